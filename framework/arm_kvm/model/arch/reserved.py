"""The encodings of stage-2 entries that the architecture reserves, each by name.

Sources: ARM DDI 0406C.d, B3.6; ARM DDI 0487, D8.3 and D8.6.
"""

from __future__ import annotations

from arm_kvm.model.arch.descriptors import (
    DBM,
    FNXS,
    XN,
    EntryKind,
    Field,
    Format,
    LeafFields,
    Reserved,
    Shareability,
    Table,
    decode,
    kind,
)
from arm_kvm.model.arch.granule import KIB4, LAST_LEVEL, Granule

#: MemAttr[3:0] by FWB. Without FWB: normal memory with an inner field of 0b00; with FWB: 0b0100 and the RES0 bit 3.
RESERVED_MEMATTR = {
    False: frozenset({0b0100, 0b1000, 0b1100}),
    True: frozenset({0b0100, *range(0b1000, 0b10000)}),
}


def reserved(word: int, level: int, fmt: Format) -> list[str]:
    """Name everything that is reserved in a valid stage-2 entry; [] for a good one."""
    match decode(word, level, fmt):
        case Reserved():
            return reserved_type(word, level, fmt.granule)
        case LeafFields() as leaf:
            return [*_leaf_reservations(leaf, fmt), *_zeros(leaf.res0, level, fmt)]
        case Table(_, ignored):
            return _zeros(ignored & _table_zeros(fmt), LAST_LEVEL, fmt)
    return []


def reserved_type(word: int, level: int, granule: Granule) -> list[str]:
    """Name a type (bits [1:0]) that has no meaning at this level, in either stage; [] for a good one."""
    if kind(word, level, granule) is not EntryKind.RESERVED:
        return []
    return ["reserved encoding (0b01) at the last level" if level == LAST_LEVEL else f"a block at level {level}"]


def _leaf_reservations(leaf: LeafFields, fmt: Format) -> list[str]:
    found = []
    if leaf.sh == Shareability.RESERVED:
        found.append("reserved shareability (0b01)")
    if leaf.memattr in RESERVED_MEMATTR[fmt.fwb]:
        found.append(f"reserved MemAttr {leaf.memattr:#06b}")
    return found


#: Bits that are RES0 without their feature.
_WITHOUT_FEATURE = {
    Field(XN.low): "XN[0] without FEAT_XNX",
    DBM: "DBM without FEAT_HAFDBS",
    FNXS: "FnXS without FEAT_XS",
}


def _zeros(bits: int, level: int, fmt: Format) -> list[str]:
    """Name the RES0 bits that are set."""
    found = [name for field, name in _WITHOUT_FEATURE.items() if field.of(bits)]
    bits &= ~sum(field.mask for field in _WITHOUT_FEATURE)
    low = bits & ((1 << fmt.granule.level_shift(level)) - fmt.granule.size)
    if low:
        found.append(f"block address not aligned to {1 << fmt.granule.level_shift(level):#x} bytes")
    return [*found, f"RES0 bits {bits & ~low:#x}"] if bits & ~low else found


def _table_zeros(fmt: Format) -> int:
    """RES0 in a stage-2 table entry: [63:59] (in stage 1 the limits on lower levels), and bits beside the address."""
    beside = Field(40, 8).mask if fmt.armv7 else Field(48, 3).mask | (fmt.granule.size - KIB4.size)
    return Field(59, 5).mask | beside
