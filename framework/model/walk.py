"""Walk a translation table: all leaves of a regime, or the leaf that maps each given address.

Vectorised by level. Memory comes as ``fetch(pas)``: a uint64 array of physical addresses (bytes,
8-byte aligned) in, the uint64 words at them out. Addresses that no RAM backs must read as 0
(invalid), and ``backed(pas)`` says which those are.

Source of the walk: ARM DDI 0406C.d B3.6.6, ARM DDI 0487 D8.2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from . import descriptors as d
from .regime import Regime


class Memory(Protocol):
    """Physical memory, as a walker needs it."""

    def fetch(self, pas: np.ndarray) -> np.ndarray:
        """The uint64 words at these physical addresses; 0 where there is no RAM."""

    def backed(self, pas: np.ndarray) -> np.ndarray:
        """Which of these physical addresses are RAM (bool array)."""


@dataclass(frozen=True)
class Leaves:
    """Valid block and page entries, ordered by input address; three arrays of one length."""

    ia: np.ndarray  #: uint64: input address (IPA or VA) of the first byte
    desc: np.ndarray  #: uint64: the descriptor
    level: np.ndarray  #: uint8: level of the entry

    def __len__(self) -> int:
        return len(self.ia)

    def __getitem__(self, which) -> Leaves:
        return Leaves(self.ia[which], self.desc[which], self.level[which])

    @property
    def pa(self) -> np.ndarray:
        return d.address(self.desc)

    @property
    def size(self) -> np.ndarray:
        """Bytes that each leaf maps (uint64)."""
        return np.uint64(1) << (d.PAGE_SHIFT + 9 * (d.LAST_LEVEL - self.level.astype(np.uint64)))


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
    """What a full walk found."""

    regime: Regime
    leaves: Leaves
    pages: np.ndarray  #: uint64: physical address of every page that holds a table, the root's first
    malformed: list[Malformed] = field(default_factory=list)


def _reserved_address_bits(regime: Regime) -> np.uint64:
    return np.uint64(d.ADDRESS & ~((1 << regime.output_bits) - 1))


def _why_malformed(regime: Regime, level: int, desc: int) -> str | None:
    """Why a valid entry has no meaning at this level; None for a good one."""
    if desc & int(_reserved_address_bits(regime)):
        return f"output address beyond the {regime.output_bits}-bit physical space"
    if desc & 2 and level < d.LAST_LEVEL:
        return None
    if not desc & 2 and level == d.LAST_LEVEL:
        return "reserved encoding (0b01) at the last level"
    if not desc & 2 and level == 0:
        return "a block at level 0"
    if d.address(desc) & ((1 << d.level_shift(level)) - 1):
        return f"block address not aligned to {1 << d.level_shift(level):#x} bytes"
    if regime.stage == 2 and d.shareability(desc) == d.Shareability.RESERVED:
        return "reserved shareability (0b01)"
    if regime.stage == 2 and not regime.fwb and d.s2_memattr(desc) in _RESERVED_MEMATTR:
        return f"reserved MemAttr {d.s2_memattr(desc):#06b}"
    return None


#: With FWB clear these MemAttr encodings are reserved.
_RESERVED_MEMATTR = frozenset({0b0100, 0b1000, 0b1100})


def _suspects(regime: Regime, level: int, desc: np.ndarray) -> np.ndarray:
    """Vectorised over-approximation of :func:`_why_malformed`: the few entries worth a closer look."""
    low = desc & np.uint64(3)
    odd = (desc & _reserved_address_bits(regime)) != 0
    leaf = (low == 1) if level < d.LAST_LEVEL else d.is_valid(desc)
    if level in (0, d.LAST_LEVEL):
        odd |= low == 1
    odd |= leaf & (d.address(desc) & np.uint64((1 << d.level_shift(level)) - 1) != 0)
    if regime.stage == 2:
        attr = d.s2_memattr(desc)
        odd |= leaf & (d.shareability(desc) == d.Shareability.RESERVED)
        odd |= leaf & ((attr & np.uint64(3)) == 0) & (attr != 0)
    return odd & d.is_valid(desc)


def walk(regime: Regime, memory: Memory) -> Tables:
    """Every valid leaf below the root, every table page, and the entries that make no sense.

    Malformed entries are reported and not followed. A table that is reached twice is walked twice:
    sharing is the judge's business. Cost is proportional to the table pages, not to the space.
    """
    bases = np.array([regime.root], dtype=np.uint64)
    inputs = np.zeros(1, dtype=np.uint64)
    entries = regime.entries
    pages = [np.arange(regime.root_pages, dtype=np.uint64) * d.PAGE_SIZE + np.uint64(regime.root)]
    found: list[Leaves] = []
    malformed: list[Malformed] = []
    for level in range(regime.start_level, d.LAST_LEVEL + 1):
        index = np.arange(entries, dtype=np.uint64)
        at = (bases[:, None] + index * np.uint64(8)).ravel()
        ia = (inputs[:, None] + (index << np.uint64(d.level_shift(level)))).ravel()
        desc = memory.fetch(at)
        live = np.flatnonzero(d.is_valid(desc))
        at, ia, desc = at[live], ia[live], desc[live]
        good = np.ones(len(desc), dtype=bool)
        for i in np.flatnonzero(_suspects(regime, level, desc)):
            if why := _why_malformed(regime, level, int(desc[i])):
                good[i] = False
                malformed.append(Malformed(int(at[i]), int(ia[i]), level, int(desc[i]), why))
        leaf = good & (~d.is_table(desc, level) if level < d.LAST_LEVEL else True)
        found.append(Leaves(ia[leaf], desc[leaf], np.full(int(leaf.sum()), level, dtype=np.uint8)))
        if level == d.LAST_LEVEL:
            break
        down = np.flatnonzero(good & ~leaf)
        there = memory.backed(d.address(desc[down]))
        for i in down[~there]:
            why = "table address that no RAM backs"
            malformed.append(Malformed(int(at[i]), int(ia[i]), level, int(desc[i]), why))
        bases, inputs, entries = d.address(desc[down[there]]), ia[down[there]], d.ENTRIES
        pages.append(bases)
    leaves = Leaves(
        np.concatenate([part.ia for part in found]),
        np.concatenate([part.desc for part in found]),
        np.concatenate([part.level for part in found]),
    )
    return Tables(regime, leaves[np.argsort(leaves.ia, kind="stable")], np.concatenate(pages), malformed)


def translate(regime: Regime, memory: Memory, ias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The leaf that maps each address: ``(desc, pa)``, two uint64 arrays shaped like ``ias``.

    ``desc`` is 0 where nothing maps the address; ``pa`` is then 0 too, else the physical address of
    the very byte.
    """
    ias = np.asarray(ias, dtype=np.uint64)
    desc = np.zeros_like(ias)
    pa = np.zeros_like(ias)
    at = np.flatnonzero(ias < np.uint64(regime.input_size))
    base = np.full(len(at), regime.root, dtype=np.uint64)
    mask = np.uint64(regime.entries - 1)
    for level in range(regime.start_level, d.LAST_LEVEL + 1):
        shift = np.uint64(d.level_shift(level))
        word = memory.fetch(base + ((ias[at] >> shift) & mask) * np.uint64(8))
        is_leaf = d.is_valid(word) & (~d.is_table(word, level) if level < d.LAST_LEVEL else True)
        hit = at[is_leaf]
        offset = np.uint64((1 << d.level_shift(level)) - 1)
        desc[hit] = word[is_leaf]
        pa[hit] = (d.address(word[is_leaf]) & ~offset) | (ias[hit] & offset)
        down = d.is_valid(word) & ~is_leaf
        at, base, mask = at[down], d.address(word[down]), np.uint64(d.ENTRIES - 1)
        if not len(at):
            break
    return desc, pa
