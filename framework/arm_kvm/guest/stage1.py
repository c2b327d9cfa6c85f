"""The guest's own stage 1: a long-descriptor identity map, in which a test case can change entries.

The root table has 1 GiB entries (level 1): 4 for A32, 512 for A64. The test case writes the encoded tables to guest
memory, at any IPA, and enables the MMU.

Sources: ARM DDI 0406C.d B4.1.153 (TTBCR), B4.1.130 (SCTLR); ARM DDI 0487, registers TCR_EL1, SCTLR_EL1. The entries
themselves are the model's (framework/arm_kvm/model/arch/stage1.py).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from arm_kvm.guest.isa import Isa
from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch import stage1 as model

GIB = 1 << 30
MIB2 = 2 << 20
_MAIR = 0xFF  # attribute 0: normal memory, write-back
_CACHED_WALKS = 3 << 12 | 1 << 10 | 1 << 8  # SH0, ORGN0, IRGN0
_HA = 1 << 39  # TCR_EL1.HA


@dataclass(frozen=True)
class Registers:
    """The register values of the payload's ``mmu`` order."""

    ttbr0: int
    tcr: int
    mair: int
    sctlr: int


class GuestStage1:
    """A root table at IPA ``root``: an identity map, until :meth:`map_block` or :meth:`link` changes an entry.

    ``hardware_af`` sets TCR_EL1.HA: the CPU sets the access flag of the descriptors that it uses (FEAT_HAFDBS, A64; the
    CPU ``max`` has it). Entries made with ``af=False`` have the access flag clear; an access through one takes an
    access flag fault unless HA is set.
    """

    def __init__(self, isa: Isa, root: int, *, hardware_af: bool = False) -> None:
        """Raises ValueError for ``hardware_af`` with an A32 guest: Armv7 has no hardware management of the flag."""
        if hardware_af and isa.pointer_bits == 32:
            raise ValueError("hardware_af is for A64 guests: Armv7 has no TCR.HA")
        self.root = root
        self._hardware_af = hardware_af
        self._entries = [model.leaf(i * GIB, 1) for i in range(4 if isa.pointer_bits == 32 else 512)]

    def map_block(self, va: int, ipa: int, *, af: bool = True) -> None:
        """Map the 1 GiB at ``va`` to the 1 GiB at ``ipa``."""
        self._entries[va // GIB] = self.leaf(ipa, 1, af=af)

    def link(self, va: int, table: int) -> None:
        """Let the 1 GiB at ``va`` be translated by the level 2 table at IPA ``table``."""
        self._entries[va // GIB] = model.table(table)

    def encode(self) -> bytes:
        """Encode the root table, to be written at IPA ``root``."""
        return struct.pack(f"<{len(self._entries)}Q", *self._entries)

    @staticmethod
    def leaf(ipa: int, level: int, *, af: bool = True) -> int:
        """Encode the descriptor of a block (level 1 or 2) or page (level 3) that maps ``ipa``."""
        desc = model.leaf(ipa, level)
        return desc if af else desc & ~d.AF.mask

    @staticmethod
    def level2(ipa: int, *, af: bool = True) -> bytes:
        """Encode a level 2 table of 512 blocks of 2 MiB that maps the 1 GiB at ``ipa``."""
        return struct.pack("<512Q", *(GuestStage1.leaf(ipa + i * MIB2, 2, af=af) for i in range(512)))

    def registers(self, isa: Isa) -> Registers:
        """Return the register values that enable the MMU with this root table."""
        if isa.pointer_bits == 32:
            eae = 1 << 31
            return Registers(self.root, eae | _CACHED_WALKS, _MAIR, 0x00C5_0078 | 0x1005)
        t0sz, no_upper_half, ips_40 = 64 - 39, 1 << 23, 2 << 32
        tcr = t0sz | _CACHED_WALKS | no_upper_half | ips_40 | (_HA if self._hardware_af else 0)
        return Registers(self.root, tcr, _MAIR, 0x30D0_0800 | 0x1005)
