"""Memory attributes of stage 1 and stage 2, combined.

Sources: ARM DDI 0406C.d, B3.8 (overlaying the memory type attribute); ARM DDI 0487, D8.6, and Arm's v9.4 pseudocode
S2DecodeMemAttrs, S2CombineS1MemAttrs, S2CombineS1AttrHints, S2ApplyFWBMemAttrs, EffectiveShareability; MAIR_EL1.
"""

from __future__ import annotations

from typing import NamedTuple

from arm_kvm.model.arch.descriptors import MemAttrFwb, Shareability
from arm_kvm.model.arch.reserved import RESERVED_MEMATTR


class Attributes(NamedTuple):
    """The attributes of one stage. ``attr``: a MAIR byte (stage 1) or MemAttr[3:0] (stage 2); ``sh``: shareability."""

    attr: int
    sh: int


class Combined(NamedTuple):
    """The attributes of both stages combined, as a MAIR byte and shareability; None where it is not defined."""

    attr: int | None
    sh: int | None


#: With stage 1 off: data is Device-nGnRnE, instructions are non-cacheable (with SCTLR.I clear).
STAGE1_OFF, STAGE1_OFF_FETCH = Attributes(0x00, Shareability.OUTER), Attributes(0x44, Shareability.OUTER)

_NC = 0b0100  #: normal non-cacheable, half a MAIR byte
_NORMAL_NC = 0x44
_BACK = 0b0100  #: half a MAIR byte of cacheable memory: write-back (clear: write-through)


def is_device(mair: int) -> bool:
    """Whether a MAIR byte is a device type."""
    return not mair >> 4


def _known(mair: int) -> bool:
    """Whether a MAIR byte is a base encoding: neither of FEAT_MTE2 or FEAT_XS nor reserved."""
    return not mair & 0b11 if is_device(mair) else bool(mair & 0xF)


def combine(first: Attributes, second: Attributes, fwb: bool) -> Combined:
    """Combine the attributes of both stages: the stricter of the two, unless FWB lets stage 2 decide."""
    if second.attr in RESERVED_MEMATTR[fwb] or not _known(first.attr):
        return Combined(None, None)
    attr = _forced(first.attr, second.attr) if fwb else _stricter(first.attr, second.attr)
    if is_device(attr) or attr == _NORMAL_NC:
        return Combined(attr, Shareability.OUTER)
    # Device and non-cacheable memory is outer shareable in stage 1, whatever the field. Where stage 2 forces it
    # to write-back, an implementation may combine the field or its effect.
    effective = Shareability.OUTER if is_device(first.attr) or first.attr == _NORMAL_NC else first.sh
    one, other = _wider(first.sh, second.sh), _wider(effective, second.sh)
    return Combined(attr, one if one == other else None)


def _wider(one: int, other: int) -> int | None:
    """Outer, else inner, else non-shareable; None where the result depends on a reserved encoding (0b01)."""
    if Shareability.OUTER in (one, other):
        return Shareability.OUTER
    if Shareability.RESERVED in (one, other):
        return None
    return Shareability.INNER if Shareability.INNER in (one, other) else Shareability.NON


def _stricter(mair: int, memattr: int) -> int:
    """Device wins over normal, the stricter device type over the other; cacheability is combined by halves."""
    outer, inner = memattr >> 2, memattr & 0b11
    if outer == 0:
        return _stricter_device(mair, inner)
    if is_device(mair):
        return mair
    return _stricter_half(mair >> 4, outer) << 4 | _stricter_half(mair & 0xF, inner)


def _stricter_device(mair: int, kind: int) -> int:
    """The device types from nGnRnE to GRE are 0x00, 0x04, 0x08, 0x0c in MAIR and 0 to 3 in MemAttr."""
    return min(mair, kind << 2) if is_device(mair) else kind << 2


def _stricter_half(mair: int, memattr: int) -> int:
    """Non-cacheable wins over write-through, and that over write-back; hints and transience are those of stage 1."""
    if mair == _NC or memattr == 0b01:
        return _NC
    return mair & ~_BACK if memattr == 0b10 else mair


def _forced(mair: int, memattr: int) -> int:
    """FEAT_S2FWB: stage 2 forces device, non-cacheable or write-back, or lets stage 1 decide."""
    if memattr == MemAttrFwb.STAGE1:
        return mair
    if memattr == MemAttrFwb.NORMAL_WB:
        return 0xFF if is_device(mair) else _write_back(mair >> 4) << 4 | _write_back(mair & 0xF)
    if memattr == MemAttrFwb.NORMAL_NC:
        return mair if is_device(mair) else _NORMAL_NC
    return _stricter_device(mair, memattr)


def _write_back(mair: int) -> int:
    """Write-back with the hints of stage 1, or with all allocation hints where stage 1 is non-cacheable."""
    return 0b1111 if mair == _NC else mair | _BACK
