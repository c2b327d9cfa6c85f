"""Long-format translation table descriptors, 4 KiB granule.

Sources: ARM DDI 0406C.d, B3.6 (Armv7 LPAE, stage 2 attributes included); ARM DDI 0487,
D8.3 (VMSAv8-64). Both formats agree on every field used here; they differ in output address
width, which belongs to the regime.

All functions take a Python ``int`` or a numpy ``uint64`` array and return the same kind.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TypeVar

import numpy as np

Bits = TypeVar("Bits", int, np.ndarray)

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
ENTRIES = 512
LAST_LEVEL = 3

#: Output address, bits [47:12]; what lies above the regime's physical size must be zero.
ADDRESS = 0x0000_FFFF_FFFF_F000


class MemAttr(IntEnum):
    """Stage-2 MemAttr[3:0] without FWB (DDI 0406C B3.6, DDI 0487 D8.6)."""

    DEVICE_nGnRnE = 0b0000
    DEVICE_nGnRE = 0b0001
    DEVICE_nGRE = 0b0010
    DEVICE_GRE = 0b0011
    NORMAL_NC = 0b0101
    NORMAL_WB = 0b1111


class Shareability(IntEnum):
    NON = 0b00
    RESERVED = 0b01
    OUTER = 0b10
    INNER = 0b11


def level_shift(level: int) -> int:
    """log2 of the bytes one entry of this level maps: 12 at level 3, 21 at 2, 30 at 1, 39 at 0."""
    return PAGE_SHIFT + 9 * (LAST_LEVEL - level)


def is_valid(desc: Bits) -> Bits:
    return (desc & 1) != 0


def is_table(desc: Bits, level: int) -> Bits:
    """A table descriptor, or at level 3 a page descriptor: the two low bits set."""
    return (desc & 3) == 3


def address(desc: Bits) -> Bits:
    """Output address or next-level table address: a physical address in bytes."""
    return desc & ADDRESS


def s2_readable(desc: Bits) -> Bits:
    """S2AP[0] (Armv7: HAP[1]), bit 6."""
    return (desc & (1 << 6)) != 0


def s2_writable(desc: Bits) -> Bits:
    """S2AP[1] (Armv7: HAP[2]), bit 7."""
    return (desc & (1 << 7)) != 0


def s2_executable(desc: Bits) -> Bits:
    """XN, bit 54, clear. KVM uses the two-bit form only as all or nothing, so bit 54 decides."""
    return (desc & (1 << 54)) == 0


def s2_memattr(desc: Bits) -> Bits:
    """MemAttr[3:0], bits [5:2]."""
    return (desc >> 2) & 0xF


def shareability(desc: Bits) -> Bits:
    """SH[1:0], bits [9:8]."""
    return (desc >> 8) & 3


def access_flag(desc: Bits) -> Bits:
    """AF, bit 10."""
    return (desc & (1 << 10)) != 0


def block_or_page(
    pa: int,
    level: int,
    *,
    write: bool,
    execute: bool = False,
    read: bool = True,
    memattr: int = MemAttr.NORMAL_WB,
    sh: int = Shareability.INNER,
    af: bool = True,
) -> int:
    """Encode a stage-2 leaf. Raises ValueError for an address the level cannot hold."""
    if pa & ((1 << level_shift(level)) - 1):
        raise ValueError(f"{pa:#x} is not aligned to a level {level} entry")
    desc = pa | (3 if level == LAST_LEVEL else 1)
    desc |= memattr << 2 | read << 6 | write << 7 | sh << 8 | af << 10
    return desc | (0 if execute else 1 << 54)


def table(pa: int) -> int:
    """Encode a table descriptor that points at the page at physical address ``pa``."""
    return pa | 3


# -- the host's own stage 1, as Linux writes it ------------------------------------------------
#
# A clean page is read-only to the hardware but writable to Linux, so the hardware's AP[2] says
# less than KVM may grant. The bit that carries the mapping's permission is a software bit:
# arch/arm/include/asm/pgtable-3level.h (5.4) L_PTE_RDONLY and L_PMD_SECT_RDONLY, bit 58;
# arch/arm64/include/asm/pgtable-prot.h (5.4 to 6.12) PTE_WRITE, bit 51 (also DBM).

ARM_L_PTE_RDONLY = 1 << 58
ARM64_PTE_WRITE = 1 << 51


def linux_arm_writable(desc: Bits) -> Bits:
    return (desc & ARM_L_PTE_RDONLY) == 0


def linux_arm64_writable(desc: Bits) -> Bits:
    return (desc & ARM64_PTE_WRITE) != 0
