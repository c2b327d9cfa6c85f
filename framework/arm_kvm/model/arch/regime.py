"""The regime that the control registers describe: start level, root, sizes.

Sources: ARM DDI 0406C.d B4.1.159 (VTCR), B4.1.160 (VTTBR), B4.1.153 (TTBCR), B3.6.6 (concatenation);
ARM DDI 0487, registers VTCR_EL2, VTTBR_EL2, TCR_EL1, D8.2 (start levels), pseudocode AArch64.S2InvalidSL,
AArch64.S2InconsistentSL, AArch64.S2MinTxSZ; KVM's values: Linux 5.4 arch/arm/include/asm/kvm_arm.h and
arch/arm64/include/asm/kvm_arm.h. Not modelled and refused: 52-bit addresses (64 KiB with FEAT_LPA, FEAT_LPA2),
128-bit descriptors, permission indirection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypedDict, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from arm_kvm.model.arch.descriptors import LPAE, Format, linux_arm64_writable, linux_arm_writable
from arm_kvm.model.arch.granule import KIB4, KIB16, KIB64, LAST_LEVEL, Granule

#: HCR.VM: stage 2 is on, so a guest runs (on exit Linux clears the bit, or with VHE replaces HCR).
HCR_VM = 1 << 0
#: HCR.PTW: a stage-1 walk that reads a table in stage-2 device memory takes a permission fault.
HCR_PTW = 1 << 2
#: HCR_EL2.E2H: the host's own stage 1 is then described by the _EL2 registers.
HCR_E2H = 1 << 34
#: HCR_EL2.FWB, FEAT_S2FWB.
HCR_FWB = 1 << 46
#: HCR_EL2.RW: EL1 is AArch64.
HCR_RW = 1 << 31

SCTLR_M = 1 << 0
SCTLR_WXN = 1 << 19
SCTLR_UWXN = 1 << 20  #: Armv7 only

MAX_CONCATENATED = 16
#: Physical sizes in bits, by the encoding of ID_AA64MMFR0_EL1.PARange, VTCR_EL2.PS and TCR_EL1.IPS.
PHYSICAL_SIZES = (32, 36, 40, 42, 44, 48, 52)
_WIDEST = 48  #: of an output address, without FEAT_LPA


class ImpossibleRegime(ValueError):
    """The register values describe no regime that the architecture allows; the message says why.

    ``level0``: VMSAv8-64 defines the result: every address takes a level 0 translation fault.
    """

    def __init__(self, why: str, level0: bool = False) -> None:
        super().__init__(why)
        self.level0 = level0


@dataclass(frozen=True)
class Features:
    """The features of an implementation on which translation depends. The default has all but FEAT_XS."""

    pa_bits: int = 48
    granules: tuple[Granule, ...] = (KIB4, KIB16, KIB64)  #: of stage 2
    stage1_granules: tuple[Granule, ...] = (KIB4, KIB16, KIB64)
    small_tables: bool = True  #: FEAT_TTST: T0SZ up to 48, stage 2 from level 3 with 4 KiB
    vmid16: bool = True
    fwb: bool = True
    xnx: bool = True
    xs: bool = False
    haf: bool = True  #: FEAT_HAFDBS: hardware sets the access flag
    hafdbs: bool = True  #: FEAT_HAFDBS: hardware also manages the dirty state

    @classmethod
    def from_id_registers(cls, mmfr0: int, mmfr1: int, mmfr2: int) -> Features:
        """Decode ID_AA64MMFR0_EL1, ID_AA64MMFR1_EL1 and ID_AA64MMFR2_EL1."""

        def nibble(register: int, low: int) -> int:
            return register >> low & 0xF

        absent = {KIB4: (28, 0xF), KIB16: (20, 0), KIB64: (24, 0xF)}  # TGran4, TGran16, TGran64
        own = {KIB4: 40, KIB16: 32, KIB64: 36}  # TGranX_2: 0 as stage 1, 1 absent, 2 present
        stage1 = tuple(g for g, (low, none) in absent.items() if nibble(mmfr0, low) != none)
        said = {g: nibble(mmfr0, low) for g, low in own.items()}
        stage2 = tuple(g for g in said if said[g] >= 2 or (said[g] == 0 and g in stage1))
        return cls(
            pa_bits=PHYSICAL_SIZES[min(nibble(mmfr0, 0), len(PHYSICAL_SIZES) - 1)],
            granules=stage2,
            stage1_granules=stage1,
            small_tables=nibble(mmfr2, 28) >= 1,
            vmid16=nibble(mmfr1, 4) == 2,
            fwb=nibble(mmfr2, 40) >= 1,
            xnx=nibble(mmfr1, 28) >= 1,
            haf=nibble(mmfr1, 0) >= 1,
            hafdbs=nibble(mmfr1, 0) >= 2,
        )


@dataclass(frozen=True)
class Regime:
    """One stage of translation.

    ``root`` is the physical address of the first table (the IPA, for stage 1 under a stage 2), ``entries`` the number
    of its descriptors (more than one table's if tables are concatenated, fewer if the input space is small);
    ``input_bits`` and ``output_bits`` are the widths of input and output addresses.
    """

    stage: int
    root: int
    start_level: int
    entries: int
    input_bits: int
    output_bits: int
    format: Format = field(default_factory=Format)
    vmid: int = 0
    vmid_bits: int = 0
    hardware_af: bool = False  #: VTCR_EL2.HA: the walk sets the access flag
    hardware_dirty: bool = False  #: VTCR_EL2.HD: a write to a DBM leaf sets its write permission
    protect_walks: bool = False  #: HCR.PTW

    @property
    def granule(self) -> Granule:
        return self.format.granule

    @property
    def armv7(self) -> bool:
        return self.format.armv7

    @property
    def input_size(self) -> int:
        """Bytes of input address space."""
        return 1 << self.input_bits

    @property
    def first_fault_level(self) -> int:
        """The level that is reported if no table was read: 0, in Armv7 1."""
        return 1 if self.armv7 else 0

    @property
    def root_size(self) -> int:
        """Bytes of the root, and its alignment; at least 64 in VMSAv8-64."""
        return self.entries * 8 if self.armv7 else max(64, self.entries * 8)

    @property
    def root_pages(self) -> int:
        """Pages of the root; more than one if tables are concatenated."""
        return max(1, self.entries // self.granule.entries)

    def index(self, ia: int, level: int) -> int:
        """Index of the entry that an input address selects in its table at ``level``."""
        entries = self.entries if level == self.start_level else self.granule.entries
        return ia >> self.granule.level_shift(level) & (entries - 1)

    def __str__(self) -> str:
        return (
            f"stage {self.stage}, root {self.root:#x} ({self.root_pages} page(s) of {self.granule}), start level "
            f"{self.start_level}, {self.input_bits}-bit input, {self.output_bits}-bit output"
            + (f", VMID {self.vmid}" if self.vmid_bits else "")
        )


class _Stage2Fields(TypedDict, total=False):
    """Fields of a Regime that only stage 2 has."""

    vmid: int
    vmid_bits: int
    hardware_af: bool
    hardware_dirty: bool
    protect_walks: bool


def _shape(
    stage: int,
    root: int,
    start_level: int,
    input_bits: int,
    output_bits: int,
    fmt: Format,
    **more: Unpack[_Stage2Fields],
) -> Regime:
    """Compute the root's entries. Raises ImpossibleRegime."""
    granule = fmt.granule
    index_bits = input_bits - granule.level_shift(start_level)
    if index_bits < 1:
        raise ImpossibleRegime(f"a {input_bits}-bit space does not reach level {start_level}", level0=not fmt.armv7)
    entries = 1 << index_bits
    most = MAX_CONCATENATED * granule.entries if stage == 2 else granule.entries
    if entries > most:
        raise ImpossibleRegime(
            f"{input_bits} bits from level {start_level} need {entries // granule.entries} concatenated tables, "
            f"{most // granule.entries} are allowed",
            level0=not fmt.armv7,
        )
    regime = Regime(stage, root, start_level, entries, input_bits, output_bits, fmt, **more)
    if root % regime.root_size:
        raise ImpossibleRegime(f"root {root:#x} is not aligned to the table's {regime.root_size:#x} bytes")
    return regime


def _root(ttbr: int) -> int:
    """BADDR of a TTBR: bits [47:1], without CnP (bit 0), VMID and ASID."""
    return ttbr & 0x0000_FFFF_FFFF_FFFE


def _root_armv7(ttbr: int) -> int:
    root = _root(ttbr)
    if root >> LPAE.address_bits:
        raise ImpossibleRegime(f"root {root:#x} is beyond the 40-bit physical space")
    return root


# -- stage 2 -------------------------------------------------------------------------------------------


def stage2_armv7(vttbr: int, vtcr: int, hcr: int = 0, features: Features = Features(pa_bits=40)) -> Regime:
    """Stage 2 of Armv7 with LPAE: 40-bit output addresses, 8-bit VMID; T0SZ is a signed four-bit number.

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
    return _shape(
        2,
        _root_armv7(vttbr),
        levels[sl0],
        input_bits,
        40,
        LPAE,
        vmid=vttbr >> 48 & 0xFF,
        vmid_bits=8,
        protect_walks=bool(hcr & HCR_PTW),
    )


TG0 = {0: KIB4, 1: KIB64, 2: KIB16}
#: Start level by SL0 (DDI 0487, VTCR_EL2.SL0); with 4 KiB, 0b11 needs FEAT_TTST.
_SL0 = {KIB4: (2, 1, 0, 3), KIB16: (3, 2, 1), KIB64: (3, 2, 1)}
#: The smallest physical size, in bits, for which stage 2 may start at a level (AArch64.S2InvalidSL).
_LEAST_PA = {(KIB4, 0): 44, (KIB16, 1): 42, (KIB64, 1): 44}


#: Bits that change the meaning of other fields.
_VTCR_UNKNOWN = {32: "DS", 33: "SL2", 36: "S2PIE", 38: "D128"}
_TCR_UNKNOWN = {7: "EPD0", 59: "DS"}


def _refuse_unknown(register: str, value: int, unknown: dict[int, str]) -> None:
    for bit, name in unknown.items():
        if value >> bit & 1:
            raise ImpossibleRegime(f"{register}.{name} is set: not modelled")


def _granule(tcr: int, granules: tuple[Granule, ...], pa_bits: int) -> Granule:
    granule = TG0.get(tcr >> 14 & 3)
    if granule not in granules:
        raise ImpossibleRegime(f"TG0 {tcr >> 14 & 3} is {granule or 'reserved'}: not implemented")
    if granule is KIB64 and pa_bits > _WIDEST:
        raise ImpossibleRegime("64 KiB pages with 52-bit physical addresses (FEAT_LPA) are not modelled")
    return granule


def _input_bits(tcr: int, granule: Granule, features: Features) -> int:
    t0sz = tcr & 0x3F
    most = (47 if granule is KIB64 else 48) if features.small_tables else 39
    if not 16 <= t0sz <= most:
        raise ImpossibleRegime(f"T0SZ {t0sz} is not between 16 and {most}")
    return 64 - t0sz


def _output_bits(ps: int, features: Features) -> int:
    if ps >= len(PHYSICAL_SIZES):
        raise ImpossibleRegime(f"PS {ps} is reserved")
    return min(PHYSICAL_SIZES[ps], features.pa_bits, _WIDEST)


def stage2_armv8(vttbr: int, vtcr: int, hcr: int = 0, features: Features = Features()) -> Regime:
    """Stage 2 of VMSAv8-64, any granule. Raises ImpossibleRegime."""
    _refuse_unknown("VTCR_EL2", vtcr, _VTCR_UNKNOWN)
    granule = _granule(vtcr, features.granules, features.pa_bits)
    input_bits = _input_bits(vtcr, granule, features)
    sl0 = vtcr >> 6 & 3
    if sl0 >= len(_SL0[granule]) or (granule is KIB4 and sl0 == 3 and not features.small_tables):
        raise ImpossibleRegime(f"VTCR_EL2 {vtcr:#x}: SL0 {sl0} is reserved", level0=True)
    level = _SL0[granule][sl0]
    if features.pa_bits < _LEAST_PA.get((granule, level), 0):
        raise ImpossibleRegime(
            f"stage 2 does not start at level {level} with {features.pa_bits}-bit physical addresses", level0=True
        )
    if input_bits > max(features.pa_bits, 0 if hcr & HCR_RW else 40):
        raise ImpossibleRegime(f"{input_bits}-bit IPAs are wider than the {features.pa_bits}-bit physical space")
    vmid_bits = 16 if features.vmid16 and vtcr >> 19 & 1 else 8
    hardware_af = features.haf and bool(vtcr >> 21 & 1)
    return _shape(
        2,
        _root(vttbr),
        level,
        input_bits,
        _output_bits(vtcr >> 16 & 7, features),
        Format(
            granule, fwb=features.fwb and bool(hcr & HCR_FWB), xnx=features.xnx, dbm=features.hafdbs, xs=features.xs
        ),
        vmid=vttbr >> 48 & ((1 << vmid_bits) - 1),
        vmid_bits=vmid_bits,
        hardware_af=hardware_af,
        hardware_dirty=features.hafdbs and hardware_af and bool(vtcr >> 22 & 1),
        protect_walks=bool(hcr & HCR_PTW),
    )


# -- stage 1, the range of TTBR0 ----------------------------------------------------------------------------


def _stage1_start(input_bits: int, granule: Granule) -> int:
    """The start level of stage 1: the one at which a single table is enough."""
    levels = -(-(input_bits - granule.shift) // granule.stride)
    return LAST_LEVEL + 1 - levels


def stage1_armv7(ttbr0: int, ttbcr: int) -> Regime:
    """Stage 1 of PL1&0 with long descriptors. Raises ImpossibleRegime, also if TTBCR.EAE is clear."""
    if not ttbcr >> 31 & 1:
        raise ImpossibleRegime(f"TTBCR {ttbcr:#x}: EAE is clear, these are short descriptors")
    input_bits = 32 - (ttbcr & 7)
    return _shape(1, _root_armv7(ttbr0), _stage1_start(input_bits, KIB4), input_bits, 40, LPAE)


def stage1_armv8(ttbr0: int, tcr: int, features: Features = Features()) -> Regime:
    """Stage 1 of EL1&0 (or EL2&0), lower range. Raises ImpossibleRegime."""
    _refuse_unknown("TCR_EL1", tcr, _TCR_UNKNOWN)
    granule = _granule(tcr, features.stage1_granules, features.pa_bits)
    input_bits = _input_bits(tcr, granule, features)
    output_bits = _output_bits(tcr >> 32 & 7, features)  # IPS
    level = _stage1_start(input_bits, granule)
    return _shape(1, _root(ttbr0), level, input_bits, output_bits, Format(granule))


class LinuxWritable(Protocol):
    """Whether a leaf of the host's own stage 1 is writable to Linux (not the hardware's permission)."""

    @overload
    def __call__(self, desc: int) -> bool: ...
    @overload
    def __call__(self, desc: NDArray[np.uint64]) -> NDArray[np.bool_]: ...


@dataclass(frozen=True)
class Architecture:
    """An architecture's registers and regimes.

    The register names are those of QEMU's gdbstub; ``identity`` names the registers that Features are decoded from.
    """

    name: str
    vttbr: str
    vtcr: str
    hcr: str
    stage2: Callable[[int, int, int, Features], Regime]
    stage1: Callable[[int, int], Regime]
    linux_writable: LinuxWritable
    identity: tuple[str, ...] = ()

    def features(self, *identity: int) -> Features:
        """The CPU's features, from the values of its ``identity`` registers."""
        return Features.from_id_registers(*identity) if identity else Features(pa_bits=40)


ARMV7 = Architecture("armv7", "VTTBR", "VTCR", "HCR", stage2_armv7, stage1_armv7, linux_arm_writable)
ARMV8 = Architecture(
    "armv8",
    "VTTBR_EL2",
    "VTCR_EL2",
    "HCR_EL2",
    stage2_armv8,
    stage1_armv8,
    linux_arm64_writable,
    ("ID_AA64MMFR0_EL1", "ID_AA64MMFR1_EL1", "ID_AA64MMFR2_EL1"),
)
