"""The walk for speed: all leaves of a regime, or the leaves of many addresses, level by level with numpy.

The same rules as :mod:`~arm_kvm.model.arch.walk`, which is written to be read; ``tests/model/test_walk.py`` holds them
together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np

from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch.descriptors import Format
from arm_kvm.model.arch.faults import FaultType
from arm_kvm.model.arch.granule import LAST_LEVEL
from arm_kvm.model.arch.regime import Regime


class PhysicalMemory(Protocol):
    """Physical memory, as a vectorised walk needs it."""

    def fetch(self, pas: np.ndarray) -> np.ndarray:
        """The uint64 words at these physical addresses (uint64, bytes, 8-byte aligned); 0 where there is no RAM."""

    def tables(self, bases: np.ndarray, entries: int) -> np.ndarray:
        """``entries`` words from each of these physical addresses, a row each; 0 where there is no RAM."""

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
        return np.uint64(1) << self.format.granule.level_shift(self.level.astype(np.uint64))


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


def sweep(regime: Regime, memory: PhysicalMemory) -> Tables:
    """Every leaf a walk can end at, every table page, and the entries that make no sense.

    An entry that makes no sense is reported, and left out where a walk faults on it. A table that is reached twice is
    swept twice: sharing is the judge's business. Cost is proportional to the table pages, not to the space.
    """
    granule = regime.granule
    root = np.arange(regime.root_pages, dtype=np.uint64) * np.uint64(granule.size) + np.uint64(regime.root)
    if not memory.backed(root).all():
        nowhere = Malformed(regime.root, 0, regime.start_level, 0, "a root table that no RAM backs")
        return Tables(regime, _in_order([], regime.format), root, [nowhere])
    bases, inputs, entries = root[:1], np.zeros(1, dtype=np.uint64), regime.entries
    pages, found, malformed = [root], [], []
    for level in range(regime.start_level, LAST_LEVEL + 1):
        at, ia, desc = _live_entries(memory, bases, inputs, entries, granule.level_shift(level))
        tables = _points_to_table(desc, level)
        faults = _faults(regime, level, desc)
        homeless = tables & ~memory.backed(_address(regime, desc))
        malformed += [
            Malformed(int(at[i]), int(ia[i]), level, int(desc[i]), _why(regime, level, desc[i], bool(homeless[i])))
            for i in np.flatnonzero(_odd(regime, level, desc) | homeless)
        ]
        leaf, tables = ~tables & ~faults, tables & ~faults & ~homeless
        found.append(Leaves(ia[leaf], desc[leaf], np.full(int(leaf.sum()), level, dtype=np.uint8)))
        bases, inputs, entries = _address(regime, desc[tables]), ia[tables], granule.entries
        pages.append(bases)
    return Tables(regime, _in_order(found, regime.format), np.concatenate(pages), malformed)


def _live_entries(memory: PhysicalMemory, bases: np.ndarray, inputs: np.ndarray, entries: int, shift: int):
    """Address, input address and value of every valid entry of the tables at ``bases``."""
    desc = memory.tables(bases, entries).ravel()
    live = np.flatnonzero(d.VALID.of(desc))
    table, slot = np.divmod(live, entries)
    slot = slot.astype(np.uint64)
    return bases[table] + (slot << np.uint64(3)), inputs[table] + (slot << np.uint64(shift)), desc[live]


def _in_order(parts: list[Leaves], fmt: Format) -> Leaves:
    nothing = Leaves(np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros(0, np.uint8))
    parts = [nothing, *parts]
    ia, desc, level = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ia", "desc", "level"))
    leaves = Leaves(ia, desc, level, fmt)
    if (ia[1:] > ia[:-1]).all():  # leaves of one level only: they come in order
        return leaves
    return leaves[np.argsort(ia, kind="stable")]


def _points_to_table(desc: np.ndarray, level: int) -> np.ndarray:
    return d.TYPE.of(desc).astype(bool) & (level < LAST_LEVEL)


def _address(regime: Regime, desc: np.ndarray) -> np.ndarray:
    return desc & np.uint64(regime.format.address_field())


def _beyond(regime: Regime, address: np.ndarray) -> np.ndarray:
    """Which addresses are above the physical size."""
    return (address >> np.uint64(regime.output_bits)) != 0


def _meaningless(regime: Regime, level: int, desc: np.ndarray) -> np.ndarray:
    """Which valid entries have a type that means nothing at this level."""
    if level == LAST_LEVEL:
        return d.TYPE.of(desc) == 0
    return (d.TYPE.of(desc) == 0) & (level < regime.granule.top_block)


def _faults(regime: Regime, level: int, desc: np.ndarray) -> np.ndarray:
    """Which valid entries a walk faults on, permissions aside."""
    return _meaningless(regime, level, desc) | _beyond(regime, _address(regime, desc))


def _odd(regime: Regime, level: int, desc: np.ndarray) -> np.ndarray:
    """Which valid entries something is wrong with. Pages are mapped alike, so each attribute pattern is judged once."""
    attributes = desc & ~np.uint64(regime.format.address_field(level))
    patterns = np.unique(attributes[np.flatnonzero(np.diff(attributes, prepend=~attributes[:1]))])
    odd = np.array([p for p in patterns if _reservations(regime, level, int(p))], dtype=np.uint64)
    beyond = _beyond(regime, _address(regime, desc))
    return beyond | np.isin(attributes, odd) if len(odd) else beyond


def _reservations(regime: Regime, level: int, desc: int) -> list[str]:
    return _reserved(regime.stage, level, desc, regime.format)


@lru_cache(maxsize=1024)  # few patterns, seen again and again
def _reserved(stage: int, level: int, desc: int, fmt: Format) -> list[str]:
    if stage == 2:
        return d.reserved(desc, level, fmt)
    kind = d.reserved_type(desc, level, fmt.granule)
    return [kind] if kind else []


def _why(regime: Regime, level: int, desc: np.uint64, homeless: bool) -> str:
    """What is wrong with an entry, in words."""
    if _beyond(regime, _address(regime, desc)):
        return f"output address beyond the {regime.output_bits}-bit physical space"
    if homeless:
        return "table address that no RAM backs"
    return ", ".join(_reservations(regime, level, int(desc)))


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


def resolve(regime: Regime, memory: PhysicalMemory, ias: np.ndarray) -> Resolved:
    """Translate each address (uint64, bytes) by one stage; access flag and permissions are not looked at."""
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
    return out


def _one_level(regime: Regime, memory: PhysicalMemory, ias, level: int, at, base, out: Resolved):
    """Read the entries of the addresses ``at``; record how their walks end.

    Return those that go on, and their tables.
    """
    shift = np.uint64(regime.granule.level_shift(level))
    entries = regime.entries if level == regime.start_level else regime.granule.entries
    where = base + (((ias[at] >> shift) & np.uint64(entries - 1)) << np.uint64(3))
    word = memory.fetch(where)
    address = _address(regime, word)
    table, valid = _points_to_table(word, level), d.VALID.of(word).astype(bool)
    status = np.full(len(at), NO_FAULT, dtype=np.uint8)
    status[_beyond(regime, address)] = FaultType.ADDRESS_SIZE.value + level
    status[~valid | _meaningless(regime, level, word)] = FaultType.TRANSLATION.value + level
    status[~memory.backed(where)] = FaultType.EXTERNAL_ON_WALK.value + level
    offset = (np.uint64(1) << shift) - np.uint64(1)
    out.status[at], out.desc[at], out.level[at] = status, word, level
    out.oa[at] = (address & ~offset) | (ias[at] & offset)
    on = (status == NO_FAULT) & table
    return at[on], address[on]


def translate(regime: Regime, memory: PhysicalMemory, ias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The leaf that maps each address: ``(desc, pa)``, two uint64 arrays shaped like ``ias``.

    0 and 0 where none does.
    """
    found = resolve(regime, memory, ias)
    mapped = found.status == NO_FAULT
    return np.where(mapped, found.desc, np.uint64(0)), np.where(mapped, found.oa, np.uint64(0))
