"""Changes of a stage-2 entry in memory: whether break-before-make is required, and what the guest loses.

Sources: ARM DDI 0406C.d, B3.10.1 (changing an entry); ARM DDI 0487 M.b, D8.17 (R_GPPYH, I_WZCBG) and D8.17.1 (R_WHZWS).
"""

from __future__ import annotations

from enum import Enum

from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch.descriptors import Format

#: Fields of a valid entry that may change in place: access rights, access flag, dirty state, software bits.
_LOOSE = sum(field.mask for field in (d.S2AP, d.AF, d.DBM, d.XN, d.SOFTWARE))

_XNX = Format(xnx=True)  #: without FEAT_XNX bit 53 is 0, and XN has the same meaning


def skips_break(old: int, new: int) -> bool:
    """Whether a valid descriptor became another valid one in one step although it must become invalid in between.

    A new address counts even if the memory is read-only and the contents are equal, because KVM has no such change.
    """
    return bool(d.VALID.of(old) & d.VALID.of(new)) and bool((old ^ new) & ~_LOOSE)


class Loss(Enum):
    """What the guest loses by a change, so that the old entry must be invalidated in TLBs. The value is for reports."""

    MAPPING = "unmapped"
    ACCESS = "made less accessible"
    EXECUTION = "made less executable"


def loss(old: int, new: int, level: int) -> Loss | None:
    """What the guest loses when a descriptor of this level changes; None: nothing, or nothing that a TLB can hold.

    A leaf whose access flag is clear faults and is never in a TLB. (Where hardware manages the flag, it has set it.)
    """
    if not d.VALID.of(old) or (not d.is_table(old, level) and not d.AF.of(old)):
        return None
    if not d.VALID.of(new):
        return Loss.MAPPING
    if d.is_table(old, level):
        return None
    if d.S2AP.of(old) & ~d.S2AP.of(new):
        return Loss.ACCESS
    return Loss.EXECUTION if _executors(old) - _executors(new) else None


def _executors(desc: int) -> set[bool]:
    """The exception levels that may execute: True for EL0, False for EL1."""
    return {el0 for el0 in (False, True) if d.s2_executable(desc, el0=el0, fmt=_XNX)}
