"""From the control registers to the shape of a translation: start level, root, sizes.

Sources: ARM DDI 0406C.d B4.1.159 (VTCR), B4.1.160 (VTTBR), B4.1.153 (TTBCR), B3.6.6
(concatenation); ARM DDI 0487, registers VTCR_EL2, VTTBR_EL2, TCR_EL1;
KVM's choice: Linux 5.4 arch/arm/include/asm/kvm_arm.h and arch/arm64/include/asm/kvm_arm.h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .descriptors import (
    ENTRIES,
    LAST_LEVEL,
    PAGE_SHIFT,
    Bits,
    MemAttr,
    level_shift,
    linux_arm64_writable,
    linux_arm_writable,
)

#: HCR.VM: stage 2 is on, so a guest runs (Linux clears it, or on VHE replaces HCR, on the way out).
HCR_VM = 1 << 0
#: HCR_EL2.E2H: the host's own stage 1 is then described by the _EL2 registers.
HCR_E2H = 1 << 34
#: HCR_EL2.FWB, FEAT_S2FWB.
HCR_FWB = 1 << 46

MAX_CONCATENATED = 16
_PARANGE_BITS = (32, 36, 40, 42, 44, 48)


class ImpossibleRegime(ValueError):
    """The register values describe no translation the architecture allows; the message says why."""


@dataclass(frozen=True)
class Regime:
    """One stage of translation, 4 KiB granule.

    ``root`` is the physical address of the first table, in bytes; ``entries`` how many descriptors
    it has (more than 512 when tables are concatenated, fewer when the input space is small);
    ``input_bits`` and ``output_bits`` the widths of input and output addresses.
    """

    stage: int
    root: int
    start_level: int
    entries: int
    input_bits: int
    output_bits: int
    vmid: int = 0
    vmid_bits: int = 0
    fwb: bool = False  #: FEAT_S2FWB in force: MemAttr has its other encoding

    @property
    def input_size(self) -> int:
        """Bytes of input address space."""
        return 1 << self.input_bits

    @property
    def memattr_normal(self) -> int:
        """MemAttr[3:0] of ordinary write-back memory in this regime."""
        return 0b0110 if self.fwb else MemAttr.NORMAL_WB

    @property
    def root_pages(self) -> int:
        """Pages of the root table; more than one means concatenated tables."""
        return max(1, self.entries // ENTRIES)

    def __str__(self) -> str:
        return (
            f"stage {self.stage}, root {self.root:#x} ({self.root_pages} page(s)), start level "
            f"{self.start_level}, {self.input_bits}-bit input, {self.output_bits}-bit output"
            + (f", VMID {self.vmid}" if self.vmid_bits else "")
        )


def _shape(stage: int, root: int, start_level: int, input_bits: int, output_bits: int, **more: int) -> Regime:
    index_bits = input_bits - level_shift(start_level)
    if index_bits < 1:
        raise ImpossibleRegime(f"a {input_bits}-bit space does not reach level {start_level}")
    entries = 1 << index_bits
    most = MAX_CONCATENATED * ENTRIES if stage == 2 else ENTRIES
    if entries > most:
        raise ImpossibleRegime(
            f"{input_bits} bits from level {start_level} need {entries // ENTRIES} concatenated tables, "
            f"{most // ENTRIES} are allowed"
        )
    size = entries * 8
    if root % size:
        raise ImpossibleRegime(f"root {root:#x} is not aligned to the table's {size:#x} bytes")
    return Regime(stage, root, start_level, entries, input_bits, output_bits, **more)


def _root(ttbr: int) -> int:
    """BADDR of a TTBR: bits [47:1], without CnP (bit 0) and without VMID or ASID."""
    return ttbr & 0x0000_FFFF_FFFF_FFFE


def stage2_armv7(vttbr: int, vtcr: int, hcr: int = 0) -> Regime:
    """Stage 2 of Armv7 with LPAE: 40-bit output, 8-bit VMID, T0SZ a signed four-bit number.

    Raises ImpossibleRegime.
    """
    t0sz = vtcr & 0xF
    sign = vtcr >> 4 & 1
    if sign != t0sz >> 3:
        raise ImpossibleRegime(f"VTCR {vtcr:#x}: S does not repeat the top bit of T0SZ")
    input_bits = 32 - (t0sz - 16 * sign)
    levels = {0: 2, 1: 1}
    sl0 = vtcr >> 6 & 3
    if sl0 not in levels:
        raise ImpossibleRegime(f"VTCR {vtcr:#x}: SL0 {sl0} is reserved")
    return _shape(2, _root(vttbr), levels[sl0], input_bits, 40, vmid=vttbr >> 48 & 0xFF, vmid_bits=8)


def stage2_armv8(vttbr: int, vtcr: int, hcr: int = 0) -> Regime:
    """Stage 2 of VMSAv8-64 with a 4 KiB granule. Raises ImpossibleRegime (also for other granules)."""
    if vtcr >> 14 & 3:
        raise ImpossibleRegime(f"VTCR_EL2 {vtcr:#x}: TG0 is not 4 KiB")
    levels = {0: 2, 1: 1, 2: 0, 3: 3}
    parange = vtcr >> 16 & 7
    if parange >= len(_PARANGE_BITS):
        raise ImpossibleRegime(f"VTCR_EL2 {vtcr:#x}: PS {parange} is not supported")
    vmid_bits = 16 if vtcr >> 19 & 1 else 8
    return _shape(
        2,
        _root(vttbr),
        levels[vtcr >> 6 & 3],
        64 - (vtcr & 0x3F),
        _PARANGE_BITS[parange],
        vmid=vttbr >> 48 & ((1 << vmid_bits) - 1),
        vmid_bits=vmid_bits,
        fwb=bool(hcr & HCR_FWB),
    )


def _stage1_start(input_bits: int) -> int:
    """Stage 1 starts where one table is enough: no choice, no concatenation."""
    levels = -(-(input_bits - PAGE_SHIFT) // 9)
    return LAST_LEVEL + 1 - levels


def stage1_armv7(ttbr0: int, ttbcr: int) -> Regime:
    """Stage 1 PL1&0, long descriptors. Raises ImpossibleRegime when TTBCR.EAE is clear."""
    if not ttbcr >> 31 & 1:
        raise ImpossibleRegime(f"TTBCR {ttbcr:#x}: EAE is clear, these are short descriptors")
    input_bits = 32 - (ttbcr & 7)
    return _shape(1, _root(ttbr0), _stage1_start(input_bits), input_bits, 40)


def stage1_armv8(ttbr0: int, tcr: int) -> Regime:
    """Stage 1 EL1&0 (or EL2&0), lower range, 4 KiB granule. Raises ImpossibleRegime."""
    if tcr >> 14 & 3:
        raise ImpossibleRegime(f"TCR {tcr:#x}: TG0 is not 4 KiB")
    input_bits = 64 - (tcr & 0x3F)
    return _shape(1, _root(ttbr0), _stage1_start(input_bits), input_bits, 48)


@dataclass(frozen=True)
class Architecture:
    """How one architecture names and shapes the two regimes the oracle reads.

    The register names are those of QEMU's gdbstub; ``linux_writable`` reads the permission of the
    host's mapping from a leaf of the host's own stage 1.
    """

    name: str
    vttbr: str
    vtcr: str
    hcr: str
    stage2: Callable[[int, int, int], Regime]
    stage1: Callable[[int, int], Regime]
    linux_writable: Callable[[Bits], Bits]


ARMV7 = Architecture("armv7", "VTTBR", "VTCR", "HCR", stage2_armv7, stage1_armv7, linux_arm_writable)
ARMV8 = Architecture("armv8", "VTTBR_EL2", "VTCR_EL2", "HCR_EL2", stage2_armv8, stage1_armv8, linux_arm64_writable)
