"""The walk, written for speed: all leaves of a regime, or the leaves of many addresses, level by level with numpy.

The rules are those of :mod:`~arm_kvm.model.arch.walk`, which is written for readability; ``tests/model/test_walk.py``
compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch.descriptors import Format
from arm_kvm.model.arch.faults import FaultType
from arm_kvm.model.arch.granule import LAST_LEVEL
from arm_kvm.model.arch.regime import Regime
from arm_kvm.model.arch.reserved import reserved, reserved_type

Indices = NDArray[np.signedinteger]


class PhysicalMemory(Protocol):
    """Physical memory for the vectorised walk."""

    def fetch(self, pas: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The words at these physical addresses (8-byte aligned); 0 where there is no RAM."""

    def tables(self, bases: NDArray[np.uint64], entries: int) -> NDArray[np.uint64]:
        """The tables of ``entries`` words at these physical addresses, one row per table; 0 where there is no RAM."""

    def backed(self, pas: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Whether each of these physical addresses is RAM."""


@dataclass(frozen=True)
class Leaves:
    """Valid block and page entries, ordered by input address, in three arrays of equal length."""

    ia: NDArray[np.uint64]  #: input address (IPA or VA) of the first byte
    desc: NDArray[np.uint64]  #: the descriptor
    level: NDArray[np.uint8]  #: level of the entry
    format: Format = field(default_factory=Format)

    def __len__(self) -> int:
        return len(self.ia)

    def __getitem__(self, which: slice | NDArray[np.bool_] | Indices) -> Leaves:
        return Leaves(self.ia[which], self.desc[which], self.level[which], self.format)

    @property
    def pa(self) -> NDArray[np.uint64]:
        """Output address of the first byte of each leaf."""
        return self.desc & np.uint64(self.format.address_field())

    @property
    def size(self) -> NDArray[np.uint64]:
        """Bytes that each leaf maps."""
        shifts = [self.format.granule.level_shift(level) for level in range(LAST_LEVEL + 1)]
        return np.uint64(1) << np.array(shifts, dtype=np.uint64)[self.level]


@dataclass(frozen=True)
class Malformed:
    """An entry that the architecture reserves, or that points at no RAM: where it is, and what is wrong with it."""

    pa: int  #: physical address of the entry itself
    ia: int  #: first input address that it would translate
    level: int
    desc: int
    why: str


@dataclass(frozen=True)
class Tables:
    """The result of a sweep."""

    regime: Regime
    leaves: Leaves
    pages: NDArray[np.uint64]  #: physical addresses of all pages that hold tables, those of the root first
    malformed: list[Malformed] = field(default_factory=list)


# -- all leaves --------------------------------------------------------------------------------------------


def sweep(regime: Regime, memory: PhysicalMemory) -> Tables:
    """Find every leaf that a walk can end at, every table page, and all malformed entries.

    A malformed entry is left out of the leaves if a walk faults on it. A table that is reached twice is swept twice;
    it is for the caller to judge that. The cost is proportional to the number of table pages, not to the input space.
    """
    granule = regime.granule
    root = np.arange(regime.root_pages, dtype=np.uint64) * np.uint64(granule.size) + np.uint64(regime.root)
    if not memory.backed(root).all():
        nowhere = Malformed(regime.root, 0, regime.start_level, 0, "a root table that no RAM backs")
        return Tables(regime, _in_order([], regime.format), root, [nowhere])
    bases, inputs, entries = root[:1], np.zeros(1, dtype=np.uint64), regime.entries
    pages: list[NDArray[np.uint64]] = [root]
    found: list[Leaves] = []
    malformed: list[Malformed] = []
    for level in range(regime.start_level, LAST_LEVEL + 1):
        at, ia, desc = _valid_entries(memory, bases, inputs, entries, granule.level_shift(level))
        tables = _points_to_table(desc, level)
        faults = _faults(regime, level, desc)
        unbacked = tables & ~memory.backed(_address(regime, desc))
        malformed += [
            Malformed(int(at[i]), int(ia[i]), level, int(desc[i]), _why(regime, level, int(desc[i]), bool(unbacked[i])))
            for i in np.flatnonzero(_malformed(regime, level, desc) | unbacked)
        ]
        leaf, tables = ~tables & ~faults, tables & ~faults & ~unbacked
        found.append(Leaves(ia[leaf], desc[leaf], np.full(int(leaf.sum()), level, dtype=np.uint8)))
        bases, inputs, entries = _address(regime, desc[tables]), ia[tables], granule.entries
        pages.append(bases)
    return Tables(regime, _in_order(found, regime.format), np.concatenate(pages), malformed)


def _valid_entries(
    memory: PhysicalMemory, bases: NDArray[np.uint64], inputs: NDArray[np.uint64], entries: int, shift: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]:
    """Address, input address and value of every valid entry of the tables at ``bases``."""
    desc = memory.tables(bases, entries).ravel()
    valid = np.flatnonzero(d.VALID.of(desc))
    table, number = np.divmod(valid, entries)
    index = number.astype(np.uint64)
    return bases[table] + (index << np.uint64(3)), inputs[table] + (index << np.uint64(shift)), desc[valid]


def _in_order(parts: list[Leaves], fmt: Format) -> Leaves:
    nothing = Leaves(np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros(0, np.uint8))
    parts = [nothing, *parts]
    ia, desc, level = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ia", "desc", "level"))
    leaves = Leaves(ia, desc, level, fmt)
    if (ia[1:] > ia[:-1]).all():  # leaves of a single level are in order already
        return leaves
    return leaves[np.argsort(ia, kind="stable")]


def _points_to_table(desc: NDArray[np.uint64], level: int) -> NDArray[np.bool_]:
    """Whether each entry, if valid, is a table descriptor."""
    return d.TYPE.of(desc).astype(np.bool_) & np.bool_(level < LAST_LEVEL)


def _address(regime: Regime, desc: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return desc & np.uint64(regime.format.address_field())


def _beyond(regime: Regime, address: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether each address is above the physical size."""
    return (address >> np.uint64(regime.output_bits)).astype(np.bool_)


def _reserved_types(regime: Regime, level: int, desc: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether each entry, if valid, has a type that is reserved at this level."""
    return ~d.TYPE.of(desc).astype(np.bool_) & np.bool_(level == LAST_LEVEL or level < regime.granule.top_block)


def _faults(regime: Regime, level: int, desc: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether a walk faults on each entry, if valid. Permissions are not considered."""
    return _reserved_types(regime, level, desc) | _beyond(regime, _address(regime, desc))


def _malformed(regime: Regime, level: int, desc: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether each valid entry is malformed. Few attribute patterns occur, so each of them is judged once."""
    attributes = desc & ~np.uint64(regime.format.address_field(level))
    patterns: NDArray[np.uint64] = np.unique(attributes[np.flatnonzero(np.diff(attributes, prepend=~attributes[:1]))])
    malformed = np.array([p for p in patterns if _reservations(regime, level, int(p))], dtype=np.uint64)
    beyond = _beyond(regime, _address(regime, desc))
    return beyond | np.isin(attributes, malformed) if len(malformed) else beyond


def _reservations(regime: Regime, level: int, desc: int) -> list[str]:
    return _reserved(regime.stage, level, desc, regime.format)


@lru_cache(maxsize=1024)  # few patterns occur, again and again
def _reserved(stage: int, level: int, desc: int, fmt: Format) -> list[str]:
    if stage == 2:
        return reserved(desc, level, fmt)
    return reserved_type(desc, level, fmt.granule)


def _why(regime: Regime, level: int, desc: int, unbacked: bool) -> str:
    """Say what is wrong with an entry."""
    if (desc & regime.format.address_field()) >> regime.output_bits:
        return f"output address beyond the {regime.output_bits}-bit physical space"
    if unbacked:
        return "table address that no RAM backs"
    return ", ".join(_reservations(regime, level, desc))


# -- many addresses --------------------------------------------------------------------------------------------

#: :attr:`Resolved.status` of an address that is translated.
NO_FAULT = 0xFF


@dataclass(frozen=True)
class Resolved:
    """Arrays with one element per address.

    ``status`` is the six-bit fault status, or NO_FAULT if the address is translated; only then are the others valid.
    """

    desc: NDArray[np.uint64]
    level: NDArray[np.uint8]
    oa: NDArray[np.uint64]  #: output address of the byte
    status: NDArray[np.uint8]


def resolve(regime: Regime, memory: PhysicalMemory, ias: NDArray[np.uint64]) -> Resolved:
    """Translate each address by one stage. Access flag and permissions are not checked."""
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


def _one_level(
    regime: Regime,
    memory: PhysicalMemory,
    ias: NDArray[np.uint64],
    level: int,
    at: Indices,
    base: NDArray[np.uint64],
    out: Resolved,
) -> tuple[Indices, NDArray[np.uint64]]:
    """Read the entries of the addresses with indices ``at`` in the tables ``base``, and record walks that end.

    Return the indices of those that go on, and their next tables.
    """
    shift = np.uint64(regime.granule.level_shift(level))
    entries = regime.entries if level == regime.start_level else regime.granule.entries
    where = base + (((ias[at] >> shift) & np.uint64(entries - 1)) << np.uint64(3))
    word = memory.fetch(where)
    address = _address(regime, word)
    table, valid = _points_to_table(word, level), d.VALID.of(word).astype(np.bool_)
    status = np.full(len(at), NO_FAULT, dtype=np.uint8)
    status[_beyond(regime, address)] = FaultType.ADDRESS_SIZE.value + level
    status[~valid | _reserved_types(regime, level, word)] = FaultType.TRANSLATION.value + level
    status[~memory.backed(where)] = FaultType.EXTERNAL_ON_WALK.value + level
    offset = (np.uint64(1) << shift) - np.uint64(1)
    out.status[at], out.desc[at], out.level[at] = status, word, level
    out.oa[at] = (address & ~offset) | (ias[at] & offset)
    on = (status == NO_FAULT) & table
    return at[on], address[on]


def translate(
    regime: Regime, memory: PhysicalMemory, ias: NDArray[np.uint64]
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The leaf that maps each address: ``(desc, pa)``, two arrays of the shape of ``ias``; 0 and 0 if there is none."""
    found = resolve(regime, memory, ias)
    mapped = found.status == NO_FAULT
    return np.where(mapped, found.desc, np.uint64(0)), np.where(mapped, found.oa, np.uint64(0))
