"""Safety: what must hold of every stage-2 table at every moment. Pure: arrays in, findings out.

The contract, leaf by leaf: it points at the frame that the host's own page table holds for that
address; it grants no more than memslot, host mapping and dirty log allow; its memory type fits what
is there; it lies in a memslot, or is the board's device that a window of the VM shows. And of the tables:
each page has one use and no guest can reach it.

Sources: Documentation/virt/kvm/api.txt (KVM_SET_USER_MEMORY_REGION, KVM_GET_DIRTY_LOG),
Documentation/vm/mmu_notifier.rst, virt/kvm/arm/mmu.c (5.4), arch/arm64/kvm/mmu.c (6.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch.granule import KIB4
from arm_kvm.model.arch.sweep import Leaves, PhysicalMemory, Tables
from arm_kvm.model.kvm.memslots import Memslot, Window, covering
from arm_kvm.oracle.stage2 import permissions
from arm_kvm.oracle.verdicts import Finding, Reason, Verdict

_PAGE = np.uint64(KIB4.size)
_OFFSET = np.uint64(KIB4.size - 1)


@dataclass(frozen=True)
class HostView:
    """The host's side of every 4 KiB page that stage 2 maps, read at the same moment as the tables.

    All arrays have one element a page: its IPA, the PA stage 2 gives it, the index of its leaf, the
    index of its memslot (-1 outside all), and the host's own descriptor and PA for its HVA (0: none).
    ``others`` are the host's PAs for the other HVAs that were asked for.
    """

    ipa: np.ndarray
    pa: np.ndarray
    leaf: np.ndarray
    slot: np.ndarray
    host_desc: np.ndarray
    host_pa: np.ndarray
    others: np.ndarray


NOWHERE = np.zeros(0, dtype=np.uint64)  #: no address
Translate = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def _pages(leaves: Leaves) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every leaf cut into 4 KiB pages: (ipa, pa, index of the leaf)."""
    count = (leaves.size // _PAGE).astype(np.int64)
    leaf = np.repeat(np.arange(len(leaves)), count)
    first = np.repeat(np.cumsum(count) - count, count)
    offset = (np.arange(len(leaf)) - first).astype(np.uint64) * _PAGE
    return leaves.ia[leaf] + offset, leaves.pa[leaf] + offset, leaf


def look(leaves: Leaves, slots: Sequence[Memslot], translate: Translate, others: np.ndarray = NOWHERE) -> HostView:
    """Read the host's side of these leaves, and of other HVAs, in one walk of the VMM's own stage 1.

    ``translate`` is that walk (HVA -> desc, PA).
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
    """Everything about one VM at one moment that safety is decided from."""

    tables: Tables
    slots: Sequence[Memslot]
    view: HostView
    host_writable: np.ndarray  #: bool a page: the host maps it writable
    written: np.ndarray  #: bool a page: a guest was told to write it since the last dirty log
    ram: PhysicalMemory
    windows: Sequence[Window] = ()  #: the board's devices that KVM maps for the VM

    @cached_property
    def _device(self) -> np.ndarray:
        """Which pages are what a window shows (bool array): there a memslot does not count."""
        found = np.zeros(len(self.view.ipa), dtype=bool)
        for window in self.windows:
            offset = self.view.ipa - np.uint64(window.ipa)  # wraps for what lies before
            found |= (offset < np.uint64(window.size)) & (self.view.pa == np.uint64(window.pa) + offset)
        return found

    def findings(self) -> list[Finding]:
        """All that is wrong with this VM's own leaves."""
        out = [
            Finding(
                Verdict.MALFORMED_ENTRY, "invalid, or a meaning", _malformed(m), m.ia, 1 << KIB4.level_shift(m.level)
            )
            for m in self.tables.malformed
        ]
        for check in (self._outside, self._wrong_frame, self._excess, self._memory_type):
            out += check()
        return out

    # -- one rule each: a mask of bad pages, and words for the first page of each run --------------------

    def _outside(self) -> list[Finding]:
        bad = (self.view.slot < 0) & ~self._device
        return self._ranges(Verdict.OUTSIDE_MEMSLOTS, bad, lambda i: "nothing mapped: no memslot here")

    def _wrong_frame(self) -> list[Finding]:
        bad = (self.view.slot >= 0) & ~self._device & (self.view.host_pa & ~_OFFSET != self.view.pa)
        return self._ranges(Verdict.WRONG_FRAME, bad, self._host_words, self._reason)

    def _excess(self) -> list[Finding]:
        view, desc = self.view, self.tables.leaves.desc[self.view.leaf]
        inside = (view.slot >= 0) & (view.host_desc != 0) & ~self._device
        writable = inside & d.s2_writable(desc)
        out = []
        for flag, why in (("readonly", "the memslot is read-only"), ("logging", "clean in the dirty log")):
            of_slot = np.array([getattr(s, flag) for s in self.slots] or [False])[view.slot]
            bad = writable & of_slot & (~self.written if flag == "logging" else True)
            out += self._ranges(Verdict.EXCESS_PERMISSION, bad, lambda i, why=why: f"not writable: {why}")
        bad = writable & ~self.host_writable
        out += self._ranges(Verdict.EXCESS_PERMISSION, bad, lambda i: f"not writable: {self._host_words(i)}")
        fmt = self.tables.regime.format
        executable = d.s2_executable(desc, fmt=fmt) | d.s2_executable(desc, el0=True, fmt=fmt)
        bad = (inside | self._device) & ~self.ram.backed(view.pa) & executable
        return out + self._ranges(Verdict.EXCESS_PERMISSION, bad, lambda i: "not executable: a device")

    def _memory_type(self) -> list[Finding]:
        desc = self.tables.leaves.desc[self.view.leaf]
        attr, fmt = d.MEMATTR.of(desc), self.tables.regime.format
        is_ram = self.ram.backed(self.view.pa)
        bad_ram = is_ram & ((attr != fmt.normal) | (d.SH.of(desc) != d.Shareability.INNER))
        bad_device = ~is_ram & ~fmt.is_device(attr)
        words = f"normal write-back (MemAttr {fmt.normal:#06b}), inner shareable: RAM"
        return self._ranges(Verdict.WRONG_MEMORY_TYPE, bad_ram, lambda i: words) + self._ranges(
            Verdict.WRONG_MEMORY_TYPE, bad_device, lambda i: "a device type: this is not RAM"
        )

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
        bad: np.ndarray,
        expected: Callable[[int], str],
        reason: Callable[[int], Reason | None] = lambda page: None,
    ) -> list[Finding]:
        """One finding for each run of neighbouring bad pages; its words and its reason are those of the first."""
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


def _malformed(m) -> str:
    return f"{m.why}: level {m.level} entry {m.desc:#018x} at PA {m.pa:#x}"


def shared_tables(tables: dict[str, Tables]) -> dict[str, list[Finding]]:
    """Table pages with two uses, and table pages that a guest's leaf reaches, by VM name."""
    out: dict[str, list[Finding]] = {name: [] for name in tables}
    pages = np.concatenate([t.pages for t in tables.values()]) if tables else np.zeros(0, np.uint64)
    unique, count = np.unique(pages, return_counts=True)
    twice = unique[count > 1]
    for name, own in tables.items():
        for pa in np.intersect1d(own.pages, twice):
            users = [n for n, t in tables.items() for p in t.pages if p == pa]
            out[name].append(_shared(0, int(pa), f"used {len(users)} times: by {', '.join(users)}"))
        out[name] += _reachable(own.leaves, unique)
    return out


def _reachable(leaves: Leaves, pages: np.ndarray) -> list[Finding]:
    """The table pages among the frames of these leaves."""
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
