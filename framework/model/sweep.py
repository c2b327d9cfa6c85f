"""The walk for speed: all leaves of a regime, or the leaves of many addresses, level by level with numpy.

The same rules as ``framework/model/walk.py``, which is written to be read; ``tests/model/test_walk.py`` holds them
together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from . import descriptors as d
from .descriptors import Format
from .faults import Access, FaultType
from .granule import LAST_LEVEL
from .regime import Regime
from .walk import s2_allows


class Memory(Protocol):
    """Physical memory, as a vectorised walk needs it."""

    def fetch(self, pas: np.ndarray) -> np.ndarray:
        """The uint64 words at these physical addresses (uint64, bytes, 8-byte aligned); 0 where there is no RAM."""

    def backed(self, pas: np.ndarray) -> np.ndarray:
        """Which of these physical addresses are RAM (bool array)."""


@dataclass(frozen=True)
class Leaves:
    """Valid block and page entries, ordered by input address; three arrays of one length."""

    ia: np.ndarray  #: uint64: input address (IPA or VA) of the first byte
    desc: np.ndarray  #: uint64: the descriptor
    level: np.ndarray  #: uint8: level of the entry
    format: Format = field(default_factory=Format)

    def __len__(self) -> int:
        return len(self.ia)

    def __getitem__(self, which) -> Leaves:
        return Leaves(self.ia[which], self.desc[which], self.level[which], self.format)

    @property
    def pa(self) -> np.ndarray:
        """Output address of the first byte (uint64)."""
        return self.desc & np.uint64(self.format.address_field())

    @property
    def size(self) -> np.ndarray:
        """Bytes that each leaf maps (uint64)."""
        granule = self.format.granule
        shift = granule.shift + granule.stride * (LAST_LEVEL - self.level.astype(np.uint64))
        return np.uint64(1) << shift.astype(np.uint64)


@dataclass(frozen=True)
class Malformed:
    """An entry that the architecture or the machine gives no meaning: where it is and why."""

    pa: int  #: physical address of the entry itself
    ia: int  #: first input address it would translate
    level: int
    desc: int
    why: str


@dataclass(frozen=True)
class Tables:
    """What a sweep found."""

    regime: Regime
    leaves: Leaves
    pages: np.ndarray  #: uint64: physical address of every page that holds a table, the root's first
    malformed: list[Malformed] = field(default_factory=list)


# -- all leaves --------------------------------------------------------------------------------------------


def sweep(regime: Regime, memory: Memory) -> Tables:
    """Every valid leaf below the root, every table page, and the entries that make no sense.

    Malformed entries are reported and not followed. A table that is reached twice is swept twice:
    sharing is the judge's business. Cost is proportional to the table pages, not to the space.
    """
    granule = regime.granule
    bases, inputs = np.array([regime.root], dtype=np.uint64), np.zeros(1, dtype=np.uint64)
    entries = regime.entries
    pages = [np.arange(regime.root_pages, dtype=np.uint64) * np.uint64(granule.size) + np.uint64(regime.root)]
    found: list[Leaves] = []
    malformed: list[Malformed] = []
    for level in range(regime.start_level, LAST_LEVEL + 1):
        at, ia, desc = _live_entries(memory, bases, inputs, entries, granule.level_shift(level))
        odd = [
            (i, why) for i in np.flatnonzero(_suspects(regime, level, desc)) if (why := _why(regime, level, desc[i]))
        ]
        good = np.ones(len(desc), dtype=bool)
        good[[i for i, _ in odd]] = False
        tables = good & _points_to_table(desc, level)
        homeless = np.flatnonzero(tables)[~memory.backed(_address(regime, desc[tables]))]
        odd += [(i, "table address that no RAM backs") for i in homeless]
        tables[homeless] = False
        malformed += [Malformed(int(at[i]), int(ia[i]), level, int(desc[i]), why) for i, why in odd]
        leaf = good & ~_points_to_table(desc, level)
        found.append(Leaves(ia[leaf], desc[leaf], np.full(int(leaf.sum()), level, dtype=np.uint8)))
        bases, inputs, entries = _address(regime, desc[tables]), ia[tables], granule.entries
        pages.append(bases)
    return Tables(regime, _in_order(found, regime.format), np.concatenate(pages), malformed)


def _live_entries(memory: Memory, bases: np.ndarray, inputs: np.ndarray, entries: int, shift: int):
    """Address, input address and value of every valid entry of the tables at ``bases``."""
    index = np.arange(entries, dtype=np.uint64)
    desc = memory.fetch((bases[:, None] + (index << np.uint64(3))).ravel())
    live = np.flatnonzero(d.VALID.of(desc))
    table, slot = np.divmod(live, entries)
    slot = slot.astype(np.uint64)
    return bases[table] + (slot << np.uint64(3)), inputs[table] + (slot << np.uint64(shift)), desc[live]


def _in_order(parts: list[Leaves], fmt: Format) -> Leaves:
    ia, desc, level = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ia", "desc", "level"))
    leaves = Leaves(ia, desc, level, fmt)
    if (ia[1:] > ia[:-1]).all():  # leaves of one level only: they come in order
        return leaves
    return leaves[np.argsort(ia, kind="stable")]


def _points_to_table(desc: np.ndarray, level: int) -> np.ndarray:
    return d.TYPE.of(desc).astype(bool) & (level < LAST_LEVEL)


def _address(regime: Regime, desc: np.ndarray) -> np.ndarray:
    return desc & np.uint64(regime.format.address_field())


def _excess_address(regime: Regime) -> int:
    """Address bits that must be zero: those above the physical size. (Armv7 has no field there; they are RES0.)"""
    return (1 << 48) - (1 << regime.output_bits)


def _why(regime: Regime, level: int, desc: np.uint64) -> str | None:
    """Why a valid entry has no meaning at this level; None for a good one."""
    desc = int(desc)
    if desc & _excess_address(regime):
        return f"output address beyond the {regime.output_bits}-bit physical space"
    if regime.stage == 2:
        return next(iter(d.reserved(desc, level, regime.format)), None)
    return d.reserved_type(desc, level, regime.granule)


def _suspects(regime: Regime, level: int, desc: np.ndarray) -> np.ndarray:
    """A cheap over-approximation of :func:`_why`: the entries that differ from the commonest in more than address.

    Tables are mapped alike, so the distinct attribute patterns are few: each is judged once.
    """
    attributes = desc & ~np.uint64(regime.format.address_field(level))
    patterns = np.unique(attributes[np.flatnonzero(np.diff(attributes, prepend=~attributes[:1]))])
    odd = np.array([p for p in patterns if _why(regime, level, p)], dtype=np.uint64)
    return np.isin(attributes, odd) | ((desc & np.uint64(_excess_address(regime))) != 0)


# -- many addresses --------------------------------------------------------------------------------------------

#: :attr:`Resolved.status` where no fault was met.
NO_FAULT = 0xFF


@dataclass(frozen=True)
class Resolved:
    """One element per address: ``desc`` (uint64), ``level`` (uint8), ``oa`` (uint64, the very byte's), ``status``.

    ``status`` (uint8) is the six-bit fault status, NO_FAULT where the address is translated; then only do the others
    mean anything.
    """

    desc: np.ndarray
    level: np.ndarray
    oa: np.ndarray
    status: np.ndarray


def resolve(regime: Regime, memory: Memory, ias: np.ndarray, access: Access | None = None) -> Resolved:
    """Translate each address (uint64) by one stage.

    With ``access``, stage 2's access flag and permissions are checked too.
    """
    ias = np.asarray(ias, dtype=np.uint64)
    out = Resolved(np.zeros_like(ias), np.zeros(len(ias), np.uint8), np.zeros_like(ias), np.zeros(len(ias), np.uint8))
    out.status[:] = FaultType.TRANSLATION.value + regime.first_fault_level
    at = np.flatnonzero(ias < np.uint64(regime.input_size))
    if regime.root >> regime.output_bits:
        out.status[at] = FaultType.ADDRESS_SIZE.value
        return out
    base = np.full(len(at), regime.root, dtype=np.uint64)
    for level in range(regime.start_level, LAST_LEVEL + 1):
        at, base = _one_level(regime, memory, ias, level, at, base, out)
    if access is not None:
        _check(regime, access, out)
    return out


def _one_level(regime: Regime, memory: Memory, ias, level: int, at, base, out: Resolved):
    """Read the entries of the addresses ``at``; record how their walks end.

    Return those that go on, and their tables.
    """
    shift = np.uint64(regime.granule.level_shift(level))
    entries = regime.entries if level == regime.start_level else regime.granule.entries
    where = base + (((ias[at] >> shift) & np.uint64(entries - 1)) << np.uint64(3))
    word = memory.fetch(where)
    address = _address(regime, word)
    table, valid = _points_to_table(word, level), d.VALID.of(word).astype(bool)
    if level == LAST_LEVEL:
        valid &= d.TYPE.of(word).astype(bool)
    elif level < regime.granule.top_block:
        valid &= table
    status = np.full(len(at), NO_FAULT, dtype=np.uint8)
    status[(address >> np.uint64(regime.output_bits)) != 0] = FaultType.ADDRESS_SIZE.value + level
    status[~valid] = FaultType.TRANSLATION.value + level
    status[~memory.backed(where)] = FaultType.EXTERNAL_ON_WALK.value + level
    offset = (np.uint64(1) << shift) - np.uint64(1)
    out.status[at], out.desc[at], out.level[at] = status, word, level
    out.oa[at] = (address & ~offset) | (ias[at] & offset)
    on = (status == NO_FAULT) & table
    return at[on], address[on]


def _check(regime: Regime, access: Access, out: Resolved) -> None:
    fine = out.status == NO_FAULT
    if not regime.hardware_af:
        unset = fine & (d.AF.of(out.desc) == 0)
        out.status[unset] = FaultType.ACCESS_FLAG.value + out.level[unset]
        fine &= ~unset
    denied = fine & ~np.asarray(s2_allows(regime, out.desc, access), dtype=bool)
    out.status[denied] = FaultType.PERMISSION.value + out.level[denied]


def translate(regime: Regime, memory: Memory, ias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The leaf that maps each address: ``(desc, pa)``, two uint64 arrays shaped like ``ias``.

    0 and 0 where none does.
    """
    found = resolve(regime, memory, ias)
    mapped = found.status == NO_FAULT
    return np.where(mapped, found.desc, np.uint64(0)), np.where(mapped, found.oa, np.uint64(0))
