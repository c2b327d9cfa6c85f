"""One VM's stage-2 tables at one time, as test cases read them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch.granule import KIB4, LAST_LEVEL
from arm_kvm.model.arch.regime import Regime
from arm_kvm.model.arch.sweep import Leaves, Tables
from arm_kvm.model.kvm import tables


@dataclass(frozen=True)
class Leaf:
    """One stage-2 leaf. Addresses and size in bytes."""

    ipa: int
    pa: int
    level: int
    desc: int

    @property
    def size(self) -> int:
        """Bytes that the leaf maps."""
        return 1 << KIB4.level_shift(self.level)

    @property
    def readable(self) -> bool:
        return bool(d.s2_readable(self.desc))

    @property
    def writable(self) -> bool:
        return bool(d.s2_writable(self.desc))

    @property
    def executable(self) -> bool:
        return bool(d.s2_executable(self.desc))

    @property
    def memattr(self) -> int:
        """MemAttr[3:0]."""
        return d.MEMATTR.of(self.desc)

    @property
    def is_block(self) -> bool:
        return self.level < LAST_LEVEL

    def __str__(self) -> str:
        return f"IPA {self.ipa:#x} -> PA {self.pa:#x} {permissions(self.desc)} level {self.level}"


def permissions(desc: int) -> str:
    """The permissions of a stage-2 descriptor as ``rwx``, with dashes."""
    flags = (d.s2_readable(desc), d.s2_writable(desc), d.s2_executable(desc))
    return "".join(c if f else "-" for c, f in zip("rwx", flags, strict=True))


class Stage2:
    """The tables of one VM: ``regime`` has root, levels and VMID, ``leaves`` all blocks and pages as arrays."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables

    @property
    def regime(self) -> Regime:
        return self.tables.regime

    @property
    def spare_tables(self) -> int:
        """The number of table pages through which no leaf is reached."""
        needed = tables.needed(self.regime, self.leaves.ia, self.leaves.level)
        return len(self.tables.pages) - self.regime.root_pages - needed

    @property
    def leaves(self) -> Leaves:
        return self.tables.leaves

    def __len__(self) -> int:
        return len(self.leaves)

    def leaf(self, ipa: int) -> Leaf | None:
        """Return the leaf that maps ``ipa``, or None. Its own ``ipa`` and ``pa`` are those of its first byte."""
        leaves = self.leaves
        at = int(np.searchsorted(leaves.ia, np.uint64(ipa), side="right")) - 1
        if at < 0:
            return None
        one = leaves[at : at + 1]
        leaf = Leaf(int(one.ia[0]), int(one.pa[0]), int(one.level[0]), int(one.desc[0]))
        return leaf if ipa < leaf.ipa + leaf.size else None

    def within(self, ipa: int, size: int) -> Leaves:
        """Return the leaves whose first byte is in ``[ipa, ipa + size)``."""
        first, last = np.searchsorted(self.leaves.ia, np.array([ipa, ipa + size], dtype=np.uint64))
        return self.leaves[int(first) : int(last)]

    def mapped(self, ipa: int, size: int) -> list[int]:
        """Return the IPAs of the leaves whose first byte is in ``[ipa, ipa + size)``."""
        return [int(ia) for ia in self.within(ipa, size).ia]

    def dump(self) -> str:
        """Format the tables as text, with a line for each run of contiguous leaves."""
        lines = [str(self.regime), f"{len(self.leaves)} leaves, {len(self.tables.pages)} table pages"]
        return "\n".join([*lines, *_runs(self.leaves)]) + "\n"


def _runs(leaves: Leaves) -> list[str]:
    """Format the leaves, with a line for each run that is contiguous in IPA and PA and equal in attributes."""
    if not len(leaves):
        return []
    attributes = leaves.desc & ~np.uint64(leaves.format.address_field())
    follows = (
        (leaves.ia[1:] == leaves.ia[:-1] + leaves.size[:-1])
        & (leaves.pa[1:] == leaves.pa[:-1] + leaves.size[:-1])
        & (attributes[1:] == attributes[:-1])
        & (leaves.level[1:] == leaves.level[:-1])
    )
    starts = np.flatnonzero(np.concatenate([[True], ~follows]))
    ends = np.concatenate([starts[1:], [len(leaves)]]) - 1
    return [
        f"IPA [{int(leaves.ia[a]):#012x}, {int(leaves.ia[b] + leaves.size[b]):#012x}) -> PA {int(leaves.pa[a]):#012x} "
        f"{permissions(int(leaves.desc[a]))} MemAttr {int(d.MEMATTR.of(leaves.desc[a])):#06b} level {leaves.level[a]}"
        for a, b in zip(starts, ends, strict=True)
    ]
