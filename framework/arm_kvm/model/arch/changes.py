"""One stage-2 entry changes in memory: whether break-before-make is required, and what is taken from the guest.

Sources: ARM DDI 0406C.d, B3.10.1 (changing an entry); ARM DDI 0487 M.b, D8.17 (R_GPPYH, I_WZCBG) and D8.17.1 (R_WHZWS).
"""

from __future__ import annotations

from enum import Enum

from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch.descriptors import Format

#: What may change in a valid entry in place: access rights, access flag, dirty state, what is left to software.
_LOOSE = sum(field.mask for field in (d.S2AP, d.AF, d.DBM, d.XN, d.SOFTWARE))

_XNX = Format(xnx=True)  #: without FEAT_XNX bit 53 is 0, and means the same


def skips_break(old: int, new: int) -> bool:
    """Whether a valid descriptor became another valid one in one step, where it must become invalid in between.

    A new address counts even where nobody may write and both hold the same: KVM has no such change.
    """
    return bool(d.VALID.of(old) & d.VALID.of(new)) and bool((old ^ new) & ~_LOOSE)


class Loss(Enum):
    """What a change takes from the guest, so that TLBs must forget the old entry. The value says it in a report."""

    MAPPING = "unmapped"
    ACCESS = "made less accessible"
    EXECUTION = "made less executable"


def loss(old: int, new: int, level: int) -> Loss | None:
    """What the change of a descriptor of this level takes away; None: nothing, or nothing that a TLB could hold.

    A leaf whose access flag is clear faults, and is in no TLB. (Where hardware sets the flag, it would be found set.)
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
    """Who may execute: True for EL0, False for EL1."""
    return {el0 for el0 in (False, True) if d.s2_executable(desc, el0=el0, fmt=_XNX)}
