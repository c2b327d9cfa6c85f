"""Known departures of the emulated silicon from the architecture: each by name, with its reference and exact rule.

A departure replaces the prediction by what the silicon does; only if that is not predictable is the probe not made.
Each names the releases of QEMU that have it, and is checked both ways: a departure that is fixed in a release said to
have it shows as a difference, and so does one that is still present in a release said to be without it.

Releases and commits are from QEMU's history; 7.2.22, 10.0.13 and 11.1.3 were run. "architecture" quotes DDI 0487 and
Arm's v9.4 pseudocode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from arm_kvm.conform.case import Probe, Silicon
from arm_kvm.model.arch.attributes import Combined, is_device
from arm_kvm.model.arch.descriptors import MemAttrFwb, Shareability
from arm_kvm.model.arch.faults import Fault, FaultType
from arm_kvm.model.arch.regime import Regime
from arm_kvm.model.arch.walk import El10, Step, Translation

Outcome = Translation | Fault
_Either = TypeVar("_Either", Translation, Fault)
_LOW_32 = (1 << 32) - 1


@dataclass(frozen=True)
class Departure:
    """``qemu``: what QEMU does, and where; ``architecture``: the correct behaviour and its source.

    ``since``: the first release that has it, () if 7.2 has it; ``until``: the first without it, () if none is known.
    """

    name: str
    qemu: str
    architecture: str
    since: tuple[int, ...] = ()
    until: tuple[int, ...] = ()

    def shown_by(self, silicon: Silicon) -> bool:
        """Whether this QEMU has the departure."""
        return self.since <= silicon.version and (not self.until or silicon.version < self.until)

    @property
    def releases(self) -> str:
        """``since 8.2, before 10.1``, ``since 10.2``, ``before 8.0``, or ``all``."""
        since, until = (".".join(map(str, v)) for v in (self.since, self.until))
        if since and until:
            return f"since {since}, before {until}"
        return f"since {since}" if since else f"before {until}" if until else "all"

    def __str__(self) -> str:
        return f"{self.name} (QEMU: {self.releases})\n  QEMU: {self.qemu}\n  architecture: {self.architecture}"


PS_BOUNDS_IPA = Departure(
    "ps-bounds-ipa",
    "ptw.c check_s2_mmu_setup() checks start level and IPA size against the output size that VTCR_EL2.PS selects, "
    "and takes a level 0 translation fault for every address",
    "both are checked against the implemented physical size (AArch64.S2InvalidSL, AArch64.S2MinTxSZ: PAMax)",
    until=(8, 0),  # 0ffe5b7ba883 "target/arm: Rewrite check_s2_mmu_setup"
)
BLOCK_ANYWHERE = Departure(
    "block-anywhere",
    "ptw.c get_phys_addr_lpae() accepts 0b01 as a block at every level but the last",
    "no block at level 0 with 4 KiB, none above level 2 with 16 and 64 KiB: a translation fault (D8.3.1)",
    until=(8, 2),  # d53e25075bd9 "target/arm/ptw: Check for block descriptors at invalid levels"
)
S1PTW_LEVEL = Departure(
    "s1ptw-level",
    "ptw.c get_phys_addr_lpae(), do_fault: a stage-2 fault on a stage-1 walk is reported with the level of the "
    "stage-1 lookup",
    "the level of the stage-2 lookup (FaultSyndrome)",
    until=(8, 2),  # a729d63642b0 "target/arm/ptw: Report stage 2 fault level for stage 2 faults on stage 1 ptw"
)
PTW_LEVEL_0 = Departure(
    "ptw-level-0",
    "ptw.c S1_ptw_translate() reports level 0 when HCR.PTW refuses a stage-1 table in device memory",
    "the level of the stage-2 lookup (FaultSyndrome)",
    since=(8, 2),  # with a729d63642b0: before, do_fault put the level of stage 1 there
)
FWB_DEVICE = Departure(
    "fwb-device",
    "ptw.c combined_attrs_fwb(): a stage-2 device type replaces a stricter device type of stage 1",
    "the stricter of the two (S2ApplyFWBMemAttrs, S2CombineS1Device)",
)
TRANSIENT_LOST = Departure(
    "transient-lost",
    "ptw.c combine_cacheattr_nibble(): stage-2 write-through over transient write-back gives non-transient "
    "write-through",
    "transience is that of stage 1 (S2CombineS1AttrHints)",
)
DEVICE_LOW_NIBBLE = Departure(
    "device-low-nibble",
    "ptw.c combined_attrs_nofwb(): where one stage is device and the other normal, the normal one's inner "
    "attributes are compared as if they were a device type (inner non-cacheable as nGnRE)",
    "the device type alone (S2CombineS1MemAttrs)",
)
OFF_NON_SHAREABLE = Departure(
    "off-non-shareable",
    "ptw.c get_phys_addr_disabled(): with stage 1 off, data is non-shareable device memory; visible if FWB makes it "
    "write-back",
    "outer shareable (AArch64.S1DisabledOutput)",
    until=(8, 2),  # 3d9ca96221ba "target/arm/ptw: Set attributes correctly for MMU disabled data accesses"
)
AT_MARKS_DIRTY = Departure(
    "at-marks-dirty",
    "ptw.c get_phys_addr_lpae() treats an AT instruction like a store: AT S12E1W and S12E0W set S2AP[1] of a "
    "leaf with DBM",
    "an AT instruction translates as if it were set and never sets it (R_RKMHW)",
    until=(10, 2),  # efebeec13d07 "target/arm: Skip AF and DB updates for AccessType_AT"
)
AT_IGNORES_DBM = Departure(
    "at-ignores-dbm",
    "ptw.c get_phys_addr_lpae(), in_at: AT S12E1W and S12E0W take a permission fault at a leaf with DBM whose S2AP[1] "
    "is clear, where a store would set it",
    "an AT instruction translates as if it were set and never sets it (R_RKMHW)",
    since=(10, 2),  # with efebeec13d07
)
HPFAR_32_BITS = Departure(
    "hpfar-32-bits",
    "qemu-system-arm: ARMMMUFaultInfo.s2addr is a target_ulong, so HPFAR loses the bits above 31",
    "an Armv7 IPA has 40 bits (DDI 0406C.d B3.6)",
    until=(10, 1),  # 35ca9d14c173 "target/arm: Replace target_ulong -> hwaddr in ARMMMUFaultInfo"
)
IPA_32_BITS = Departure(
    "ipa-32-bits",
    "qemu-system-arm: probe_access_full() and the TLB look-up take a target_ulong, so tables at IPAs above 4 GiB are "
    "read from the wrong address (such probes are not made)",
    "an Armv7 IPA has 40 bits (DDI 0406C.d B3.6)",
    # 67d762e716a7 "target/arm: Avoid target_ulong for physical address lookups" (9.2) and bf455ec50b
    # "accel/tcg: Use uintptr_t in CPUTLBEntry"
    until=(10, 0),
)

ALL = (
    PS_BOUNDS_IPA,
    BLOCK_ANYWHERE,
    S1PTW_LEVEL,
    PTW_LEVEL_0,
    FWB_DEVICE,
    TRANSIENT_LOST,
    DEVICE_LOW_NIBBLE,
    OFF_NON_SHAREABLE,
    AT_MARKS_DIRTY,
    AT_IGNORES_DBM,
    HPFAR_32_BITS,
    IPA_32_BITS,
)


# -- PS_BOUNDS_IPA: rule for a regime -------------------------------------------------------------------------

#: (granule shift, start level) -> the largest output size that is not enough.
_TOO_NARROW = {(12, 0): 42, (14, 1): 40, (16, 1): 42}


def refuses(silicon: Silicon, stage2: Regime) -> bool:
    """Whether QEMU takes a level 0 fault for every address of this regime."""
    limit = _TOO_NARROW.get((stage2.granule.shift, stage2.start_level), 0)
    return not silicon.armv7 and (stage2.input_bits > stage2.output_bits or stage2.output_bits <= limit)


# -- BLOCK_ANYWHERE: rule for a walk --------------------------------------------------------------------------------


def met_a_block(el10: El10, outcome: Outcome) -> bool:
    """Whether a walk may have ended at a block at a level without blocks."""
    if not isinstance(outcome, Fault) or outcome.type is not FaultType.TRANSLATION:
        return False
    regime = el10.stage2 if outcome.stage == 2 or el10.stage1 is None else el10.stage1.regime
    return regime.start_level <= outcome.level < regime.granule.top_block


def with_blocks_anywhere(el10: El10) -> El10:
    """The same regime for a CPU that accepts blocks at every level."""
    upper = el10.stage1 and replace(el10.stage1, regime=_blocks_anywhere(el10.stage1.regime))
    return replace(el10, stage1=upper, stage2=_blocks_anywhere(el10.stage2))


def _blocks_anywhere(regime: Regime) -> Regime:
    return replace(regime, format=replace(regime.format, granule=replace(regime.granule, top_block=0)))


# -- AT_IGNORES_DBM: rule for a walk --------------------------------------------------------------------------------


def without_dirty_state(el10: El10) -> El10:
    """The same regime for a CPU that does not manage the dirty state."""
    return replace(el10, stage2=replace(el10.stage2, hardware_dirty=False))


# -- IPA_32_BITS: not predictable ------------------------------------------------------------------------


def reads_astray(silicon: Silicon, steps: list[Step], outcome: Outcome) -> bool:
    """Whether a walk read an entry above 4 GiB, which this QEMU may read from the wrong address."""
    if silicon.qemu != "qemu-system-arm":
        return False
    stopped = isinstance(outcome, Fault) and (outcome.s1ptw or outcome.stage == 1) and (outcome.ipa or 0) > _LOW_32
    return stopped or any(step.at > _LOW_32 for step in steps)


# -- AT_MARKS_DIRTY, AT_IGNORES_DBM: which probes ------------------------------------------------------------------


def at_for_write(probe: Probe) -> bool:
    """Whether this is an AT instruction for a write."""
    return not probe.runs and probe.access.write


# -- rules for a fault, and for combined attributes -------------------------------------------------------------


def _s1ptw_level(silicon: Silicon, fault: Fault) -> Fault:
    return fault if fault.walk_level is None else replace(fault, level=fault.walk_level)


def _ptw_level_0(silicon: Silicon, fault: Fault) -> Fault:
    return replace(fault, level=0) if fault.protected else fault


def _hpfar_32_bits(silicon: Silicon, fault: Fault) -> Fault:
    if silicon.qemu == "qemu-system-arm" and fault.ipa is not None:
        return replace(fault, ipa=fault.ipa & _LOW_32)
    return fault


def _fwb_device(el10: El10, found: Translation) -> Translation:
    if el10.stage2.format.fwb and found.second.attr < 4 and is_device(found.first.attr):
        return replace(found, combined=Combined(found.second.attr << 2, found.combined.sh))
    return found


def _transient_lost(el10: El10, found: Translation) -> Translation:
    attr = found.combined.attr
    if el10.stage2.format.fwb or attr is None or is_device(attr):
        return found
    for low, memattr in ((0, found.second.attr & 0b11), (4, found.second.attr >> 2)):
        was = found.first.attr >> low & 0xF
        if memattr == 0b10 and was & 0b1100 == 0b0100 and was & 0b0011:
            attr |= 0b1000 << low
    return replace(found, combined=Combined(attr, found.combined.sh))


#: The low nibble of MAIR that QEMU derives from MemAttr[1:0]: of normal memory, and of a device type.
_NORMAL_LOW, _DEVICE_LOW = {0b01: 0x4, 0b10: 0xB, 0b11: 0xF}, {0: 0x0, 1: 0x4, 2: 0x8, 3: 0xC}


def _device_low_nibble(el10: El10, found: Translation) -> Translation:
    attr, second = found.combined.attr, found.second.attr
    if el10.stage2.format.fwb or attr is None or not is_device(attr):
        return found
    lows = {found.first.attr & 0xF, (_NORMAL_LOW if second >> 2 else _DEVICE_LOW)[second & 0b11]}
    attr = next((device for device in (0x0, 0x4, 0x8) if device in lows), 0xC)
    return replace(found, combined=Combined(attr, found.combined.sh))


def _off_non_shareable(el10: El10, found: Translation) -> Translation:
    if el10.stage1 is not None or not el10.stage2.format.fwb:
        return found
    if found.second.attr != MemAttrFwb.NORMAL_WB or found.second.sh == Shareability.OUTER:
        return found
    sh = Shareability.INNER if found.second.sh == Shareability.INNER else Shareability.NON
    return replace(found, combined=Combined(found.combined.attr, sh))


_FAULT_RULES: dict[Departure, Callable[[Silicon, Fault], Fault]] = {
    S1PTW_LEVEL: _s1ptw_level,
    PTW_LEVEL_0: _ptw_level_0,
    HPFAR_32_BITS: _hpfar_32_bits,
}
_ATTRIBUTE_RULES: dict[Departure, Callable[[El10, Translation], Translation]] = {
    FWB_DEVICE: _fwb_device,
    TRANSIENT_LOST: _transient_lost,
    DEVICE_LOW_NIBBLE: _device_low_nibble,
    OFF_NON_SHAREABLE: _off_non_shareable,
}


def depart(silicon: Silicon, el10: El10 | None, outcome: Outcome) -> tuple[Outcome, list[Departure]]:
    """What this silicon does instead of ``outcome``, and all departures that apply, including those fixed in it."""
    if isinstance(outcome, Fault):
        return _apply(silicon, outcome, ((each, partial(rule, silicon)) for each, rule in _FAULT_RULES.items()))
    assert el10 is not None, "an impossible regime translates nothing"
    return _apply(silicon, outcome, ((each, partial(rule, el10)) for each, rule in _ATTRIBUTE_RULES.items()))


def _apply(
    silicon: Silicon, outcome: _Either, rules: Iterable[tuple[Departure, Callable[[_Either], _Either]]]
) -> tuple[_Either, list[Departure]]:
    met = []
    for departure, rule in rules:
        changed = rule(outcome)
        if changed != outcome:
            met.append(departure)
            outcome = changed if departure.shown_by(silicon) else outcome
    return outcome, met
