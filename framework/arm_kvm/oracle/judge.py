"""Safety: what must hold for all stage-2 tables at any time. Pure functions from arrays to findings.

The model (arm_kvm.model.kvm.contract) decides what a leaf may be. This module brings stage 2 and the host's own mapping
together and describes what is wrong. It also checks that each table page is used once, and mapped by no guest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch.granule import KIB4
from arm_kvm.model.arch.sweep import Leaves, Malformed, PhysicalMemory, Tables
from arm_kvm.model.kvm.contract import Limit, MappedPages
from arm_kvm.model.kvm.memslots import Memslot, Window, covering
from arm_kvm.oracle.stage2 import permissions
from arm_kvm.oracle.verdicts import Finding, Reason, Verdict

_PAGE = np.uint64(KIB4.size)
Addresses = NDArray[np.uint64]


@dataclass(frozen=True)
class HostView:
    """The host's mapping of every 4 KiB page that stage 2 maps, read at the same time as stage 2.

    The arrays have one element per page: its IPA, its PA in stage 2, the index of its leaf, the index of its memslot
    (-1 if it is in none), and the descriptor and PA of its HVA in the VMM's own stage 1 (0 if there is none).
    ``others`` holds the host's PAs of further HVAs.
    """

    ipa: Addresses
    pa: Addresses
    leaf: NDArray[np.int64]
    slot: NDArray[np.int64]
    host_desc: NDArray[np.uint64]
    host_pa: Addresses
    others: Addresses


NOWHERE: Addresses = np.zeros(0, dtype=np.uint64)  #: no address
Translate = Callable[[Addresses], tuple[NDArray[np.uint64], Addresses]]  #: HVAs -> descriptors and PAs


def _pages(leaves: Leaves) -> tuple[Addresses, Addresses, NDArray[np.int64]]:
    """Split the leaves into 4 KiB pages: (IPA, PA, index of the leaf)."""
    count = (leaves.size // _PAGE).astype(np.int64)
    leaf = np.repeat(np.arange(len(leaves)), count)
    first = np.repeat(np.cumsum(count) - count, count)
    offset = (np.arange(len(leaf)) - first).astype(np.uint64) * _PAGE
    return leaves.ia[leaf] + offset, leaves.pa[leaf] + offset, leaf


def host_view(leaves: Leaves, slots: Sequence[Memslot], translate: Translate, others: Addresses = NOWHERE) -> HostView:
    """Read the host's mapping of the pages of these leaves and of ``others``, further HVAs.

    ``translate`` walks the VMM's own stage 1. It is called once.
    """
    ipa, pa, leaf = _pages(leaves)
    slot = covering(slots, ipa)
    delta = np.array([s.hva - s.ipa for s in slots] or [0], dtype=np.int64).astype(np.uint64)
    inside = slot >= 0
    host_desc, host_pa = np.zeros_like(ipa), np.zeros_like(ipa)
    hva = ipa[inside] + delta[slot[inside]]
    desc, found = translate(np.concatenate([hva, others]))
    host_desc[inside], host_pa[inside] = desc[: len(hva)], found[: len(hva)]
    return HostView(ipa, pa, leaf, slot, host_desc, host_pa, found[len(hva) :])


@dataclass(frozen=True)
class Case:
    """The state of one VM at one time, from which safety is decided."""

    tables: Tables
    slots: Sequence[Memslot]
    view: HostView
    host_writable: NDArray[np.bool_]  #: for each page, whether the host maps it writable
    written: NDArray[np.bool_]  #: for each page, whether a guest was ordered to write it since the last dirty log
    ram: PhysicalMemory
    windows: Sequence[Window] = ()  #: devices of the board that KVM maps for the VM

    @cached_property
    def _pages(self) -> MappedPages:
        view = self.view
        return MappedPages(
            ipa=view.ipa,
            pa=view.pa,
            desc=self.tables.leaves.desc[view.leaf],
            slot=view.slot,
            host_pa=view.host_pa,
            host_mapped=view.host_desc != 0,
            host_writable=self.host_writable,
            written=self.written,
            is_ram=self.ram.backed(view.pa),
            slots=self.slots,
            windows=self.windows,
            format=self.tables.regime.format,
        )

    def findings(self) -> list[Finding]:
        """Find all that is wrong with this VM's entries."""
        out = [
            Finding(Verdict.MALFORMED_ENTRY, "an invalid or a well-formed entry", _malformed(m), m.ia, _span(m))
            for m in self.tables.malformed
        ]
        for check in (self._outside, self._wrong_frame, self._excess, self._memory_type):
            out += check()
        return out

    # -- the rules --------------------------------------------------------------------------------------

    def _outside(self) -> list[Finding]:
        return self._ranges(Verdict.OUTSIDE_MEMSLOTS, self._pages.outside, lambda i: "nothing mapped: no memslot here")

    def _wrong_frame(self) -> list[Finding]:
        return self._ranges(Verdict.WRONG_FRAME, self._pages.wrong_frame, self._host_words, self._reason)

    def _excess(self) -> list[Finding]:
        out: list[Finding] = []
        for limit in Limit:
            bad = self._pages.writable_despite(limit)
            out += self._ranges(Verdict.EXCESS_PERMISSION, bad, partial(self._not_writable, limit))
        bad = self._pages.executable_device
        return out + self._ranges(Verdict.EXCESS_PERMISSION, bad, lambda i: "not executable: a device")

    def _not_writable(self, limit: Limit, page: int) -> str:
        return f"not writable: {self._host_words(page) if limit is Limit.HOST else limit.value}"

    def _memory_type(self) -> list[Finding]:
        words = f"normal write-back (MemAttr {self._pages.format.normal:#06b}), inner shareable: RAM"
        return [
            *self._ranges(Verdict.WRONG_MEMORY_TYPE, self._pages.ram_of_other_type, lambda i: words),
            *self._ranges(
                Verdict.WRONG_MEMORY_TYPE, self._pages.device_of_other_type, lambda i: "a device type: this is not RAM"
            ),
        ]

    def _reason(self, page: int) -> Reason | None:
        return None if self.view.host_desc[page] else Reason.HOST_HAS_NO_PAGE

    # -- words ----------------------------------------------------------------------------------

    def _host_words(self, page: int) -> str:
        view = self.view
        slot = self.slots[view.slot[page]]
        hva = slot.hva_of(int(view.ipa[page]))
        if not view.host_desc[page]:
            return f"nothing mapped: the host has no page at HVA {hva:#x} ({slot})"
        rights = "rw" if self.host_writable[page] else "ro"
        return f"PA {int(view.host_pa[page]):#x}, {rights} at HVA {hva:#x} ({slot})"

    def _found_words(self, page: int) -> str:
        leaves, i = self.tables.leaves, self.view.leaf[page]
        desc = int(leaves.desc[i])
        return (
            f"PA {int(self.view.pa[page]):#x} {permissions(desc)} MemAttr {d.MEMATTR.of(desc):#06b} "
            f"level {leaves.level[i]}, descriptor {desc:#018x}"
        )

    def _ranges(
        self,
        verdict: Verdict,
        bad: NDArray[np.bool_],
        expected: Callable[[int], str],
        reason: Callable[[int], Reason | None] = lambda page: None,
    ) -> list[Finding]:
        """Make a finding for each run of adjacent bad pages, with the words and the reason of its first page."""
        at = np.flatnonzero(bad)
        if not len(at):
            return []
        runs = np.split(at, np.flatnonzero(np.diff(self.view.ipa[at]) != _PAGE) + 1)
        return [
            Finding(
                verdict,
                expected(run[0]),
                self._found_words(run[0]),
                int(self.view.ipa[run[0]]),
                len(run) * KIB4.size,
                reason(run[0]),
            )
            for run in runs
        ]


def _span(m: Malformed) -> int:
    return 1 << KIB4.level_shift(m.level)


def _malformed(m: Malformed) -> str:
    return f"{m.why}: level {m.level} entry {m.desc:#018x} at PA {m.pa:#x}"


def shared_tables(tables: dict[str, Tables]) -> dict[str, list[Finding]]:
    """Find table pages that are used twice, and table pages that a guest's leaf maps, by VM name."""
    out: dict[str, list[Finding]] = {name: [] for name in tables}
    pages = np.concatenate([t.pages for t in tables.values()]) if tables else NOWHERE
    unique, count = np.unique(pages, return_counts=True)
    twice = unique[count > 1]
    for name, own in tables.items():
        for pa in np.intersect1d(own.pages, twice):
            users = [n for n, t in tables.items() for p in t.pages if p == pa]
            out[name].append(_shared(0, int(pa), f"used {len(users)} times: by {', '.join(users)}"))
        out[name] += _reachable(own.leaves, unique)
    return out


def _reachable(leaves: Leaves, pages: Addresses) -> list[Finding]:
    """Find the table pages that these leaves map."""
    if not len(leaves):
        return []
    by_pa = leaves[np.argsort(leaves.pa)]
    at = np.searchsorted(by_pa.pa, pages, side="right") - 1
    hit = (at >= 0) & (pages < by_pa.pa[at] + by_pa.size[at])
    return [
        _shared(int(by_pa.ia[i] + (pa - by_pa.pa[i])), int(pa), "the guest can reach it")
        for i, pa in zip(at[hit], pages[hit], strict=True)
    ]


def _shared(ipa: int, pa: int, why: str) -> Finding:
    return Finding(Verdict.SHARED_TABLE, "one use for each table page", f"table page PA {pa:#x}: {why}", ipa, KIB4.size)
