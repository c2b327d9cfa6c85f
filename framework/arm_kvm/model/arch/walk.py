"""The walk, written for readability: one address, one access, one table entry at a time.

:mod:`arm_kvm.model.arch.sweep` does the same for many addresses at once; a property test compares the two.

Sources: ARM DDI 0406C.d, B3.6.6 (long-descriptor walks), B3.7 (permissions), B4.1.65 (HCR.PTW);
ARM DDI 0487, D8.2 (walks), D8.4 (permissions), pseudocode AArch64.S1Translate, AArch64.S2Translate, AArch64.S2Walk,
AArch64.S2CheckPermission.

Where the architecture leaves a choice, the model makes the most common one: the contiguous bit and nT are hints and
never fault; a fetch from device memory is permitted. HCR.{DC, TGE, CD, ID} are taken as 0 and HCR.VM as 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from arm_kvm.model.arch import attributes
from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch.attributes import Attributes, Combined
from arm_kvm.model.arch.faults import TABLE_READ, Access, Fault, FaultType
from arm_kvm.model.arch.regime import Regime
from arm_kvm.model.arch.stage1 import Stage1Regime


class Words(Protocol):
    """Physical memory for the scalar walk."""

    def load(self, pa: int) -> int | None:
        """The 64-bit word at a physical address; None where there is no memory."""


@dataclass(frozen=True)
class Step:
    """One table entry as read by a walk. ``at``: its physical address; its IPA for an entry of stage 1."""

    stage: int
    level: int
    at: int
    word: int


Trace = list[Step]
Read = Callable[[int, int], int | Fault]


@dataclass(frozen=True)
class Found:
    """The leaf that maps an address. ``oa``: the byte's output address; ``inherited``: the OR of the table entries."""

    desc: int
    level: int
    oa: int
    inherited: int = 0


def descend(regime: Regime, ia: int, read: Read, trace: Trace | None = None) -> Found | Fault:
    """Follow the tables to the leaf for ``ia``, or to the fault that ends the walk. Permissions are not checked.

    ``read(address, level)`` returns the entry at an address, or the fault on reading it. Entries read are appended to
    ``trace``.
    """
    if ia >> regime.input_bits:
        return Fault(FaultType.TRANSLATION, regime.first_fault_level, regime.stage)
    if regime.root >> regime.output_bits:
        return Fault(FaultType.ADDRESS_SIZE, 0, regime.stage)
    table, inherited, level = regime.root, 0, regime.start_level
    while True:
        at = table + 8 * regime.index(ia, level)
        word = read(at, level)
        if isinstance(word, Fault):
            return word
        if trace is not None:
            trace.append(Step(regime.stage, level, at, word))
        kind = d.kind(word, level, regime.granule)
        if kind in (d.EntryKind.INVALID, d.EntryKind.RESERVED):
            return Fault(FaultType.TRANSLATION, level, regime.stage)
        address = word & regime.format.address_field()
        if address >> regime.output_bits:
            return Fault(FaultType.ADDRESS_SIZE, level, regime.stage)
        if kind is not d.EntryKind.TABLE:
            break
        table, inherited, level = address, inherited | word, level + 1
    offset = (1 << regime.granule.level_shift(level)) - 1
    return Found(word, level, address & ~offset | ia & offset, inherited)


# -- stage 2 -------------------------------------------------------------------------------------------


def stage2(regime: Regime, memory: Words, ipa: int, access: Access, trace: Trace | None = None) -> Found | Fault:
    """Translate an IPA, or return the stage-2 fault that the access takes."""

    def read(pa: int, level: int) -> int | Fault:
        word = memory.load(pa)
        return Fault(FaultType.EXTERNAL_ON_WALK, level, 2) if word is None else word

    found = descend(regime, ipa, read, trace)
    if isinstance(found, Fault):
        return replace(found, ipa=ipa)
    if not d.AF.of(found.desc) and not regime.hardware_af:
        return Fault(FaultType.ACCESS_FLAG, found.level, 2, ipa=ipa)
    if not s2_allows(regime, found.desc, access):
        return Fault(FaultType.PERMISSION, found.level, 2, ipa=ipa)
    return found


def s2_allows(regime: Regime, desc: int, access: Access) -> bool:
    """Whether a stage-2 leaf grants this access (HAP, S2AP, XN; with VTCR_EL2.HD a DBM leaf also a write)."""
    if access.fetch:
        # Armv7 also requires read permission (DDI 0406C.d B3.7.2); in VMSAv8-64 XN alone decides.
        may = d.s2_executable(desc, el0=access.el0, fmt=regime.format)
        return may & d.s2_readable(desc) if regime.armv7 else may
    if access.write:
        return d.s2_writable(desc) | (d.DBM.of(desc) != 0) if regime.hardware_dirty else d.s2_writable(desc)
    return d.s2_readable(desc)


# -- both stages ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Translation:
    """The translation of a VA: IPA, physical address, the attributes of each stage and of both combined."""

    ipa: int
    pa: int
    first: Attributes
    second: Attributes
    combined: Combined


def stage1(
    control: Stage1Regime, below: Regime, memory: Words, va: int, access: Access, trace: Trace | None = None
) -> Found | Fault:
    """Translate a VA to an IPA; every table entry is read through stage 2 (``below``)."""

    def read(ipa: int, level: int) -> int | Fault:
        table = stage2(below, memory, ipa, TABLE_READ, trace)
        if isinstance(table, Fault):
            return table.on_table_walk(ipa, level)
        if below.protect_walks and below.format.is_device(d.MEMATTR.of(table.desc)):
            return Fault(FaultType.PERMISSION, table.level, 2, protected=True).on_table_walk(ipa, level)
        word = memory.load(table.oa)
        return Fault(FaultType.EXTERNAL_ON_WALK, level, 1, ipa=ipa) if word is None else word

    found = descend(control.regime, va, read, trace)
    if isinstance(found, Fault):
        return found
    if not d.AF.of(found.desc):
        return Fault(FaultType.ACCESS_FLAG, found.level, 1)
    if not control.allows(found.desc, found.inherited, access):
        return Fault(FaultType.PERMISSION, found.level, 1)
    return found


@dataclass(frozen=True)
class El10:
    """A guest's EL1&0 regime: its stage 1 (None: off), the hypervisor's stage 2, the width of physical addresses."""

    stage1: Stage1Regime | None
    stage2: Regime
    pa_bits: int

    def translate(self, memory: Words, va: int, access: Access, trace: Trace | None = None) -> Translation | Fault:
        """Translate a VA, or return the first fault. Raises ValueError for a VA of the upper range (TTBR1)."""
        if va >> 55 & 1:
            raise ValueError(f"VA {va:#x} is in the upper range, which is not modelled")
        upper = self._ipa(memory, va, access, trace)
        if isinstance(upper, Fault):
            return upper
        ipa, first = upper
        lower = stage2(self.stage2, memory, ipa, access, trace)
        if isinstance(lower, Fault):
            return lower
        second = Attributes(d.MEMATTR.of(lower.desc), d.SH.of(lower.desc))
        combined = attributes.combine(first, second, self.stage2.format.fwb)
        return Translation(ipa, lower.oa, first, second, combined)

    def _ipa(self, memory: Words, va: int, access: Access, trace: Trace | None) -> tuple[int, Attributes] | Fault:
        if self.stage1 is not None:
            found = stage1(self.stage1, self.stage2, memory, va, access, trace)
            return found if isinstance(found, Fault) else (found.oa, self.stage1.attributes(found.desc))
        if va >> self.pa_bits and not self.stage2.armv7:
            return Fault(FaultType.ADDRESS_SIZE, 0, 1)
        return va, attributes.STAGE1_OFF_FETCH if access.fetch else attributes.STAGE1_OFF
