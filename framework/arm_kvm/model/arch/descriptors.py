"""Long-format translation table descriptors: every bit of a stage-2 entry has a name here, and only here.

Sources: ARM DDI 0406C.d, B3.6 (Armv7 LPAE: table, block and page formats, second stage attributes);
ARM DDI 0487, D8.3 (VMSAv8-64 descriptor formats), D8.6 (stage 2 memory attributes, FEAT_S2FWB).
Linux's use of the software bits: arch/arm/include/asm/pgtable-3level.h and arch/arm64/include/asm/pgtable-prot.h (5.4).

:class:`Field` works alike on a Python ``int`` and on a numpy ``uint64`` array. :func:`decode` and :func:`encode` are
exact inverses on all 2**64 words: what has no meaning is kept as found.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from typing import NamedTuple, TypeVar

import numpy as np

from arm_kvm.model.arch.granule import KIB4, LAST_LEVEL, Granule

Bits = TypeVar("Bits", int, np.ndarray)


class Field(NamedTuple):
    """Bits ``[low + width - 1 : low]`` of a descriptor."""

    low: int
    width: int = 1

    @property
    def mask(self) -> int:
        return ((1 << self.width) - 1) << self.low

    def of(self, desc: Bits) -> Bits:
        """The field's value."""
        return desc >> self.low & ((1 << self.width) - 1)

    def put(self, value: int) -> int:
        """A descriptor with this field set and nothing else. ValueError when it does not fit."""
        if value >> self.width:
            raise ValueError(f"{value:#x} does not fit in {self.width} bits")
        return value << self.low


# -- both stages -------------------------------------------------------------------------------------
VALID = Field(0)
TYPE = Field(1)  #: 1: a table, or at level 3 a page
SH = Field(8, 2)
AF = Field(10)
DBM = Field(51)
CONTIGUOUS = Field(52)
SOFTWARE = Field(55, 4)  #: the architecture leaves these to the operating system

# -- stage 2, block and page ---------------------------------------------------------------------------
MEMATTR = Field(2, 4)
S2AP = Field(6, 2)  #: Armv7: HAP[2:1]
FNXS = Field(11)  #: FEAT_XS
XN = Field(53, 2)  #: Armv7 and v8 without FEAT_XNX: bit 54 alone, bit 53 is RES0
PBHA = Field(59, 4)  #: implementation defined, FEAT_HPDS2

# -- stage 1 -------------------------------------------------------------------------------------------
ATTRINDX = Field(2, 3)
AP = Field(6, 2)  #: AP[2:1]
PXN = Field(53)
UXN = Field(54)
PXN_TABLE = Field(59)
XN_TABLE = Field(60)
AP_TABLE = Field(61, 2)

_ADDRESS_TOP = 48


def is_table(desc: Bits, level: int) -> Bits:
    """Whether a valid entry of this level leads to a table (bool, or bool array)."""
    return (desc & 3 == 3) & (level < LAST_LEVEL)


class MemAttr(IntEnum):
    """Stage-2 MemAttr[3:0] without FWB (DDI 0406C B3.6, DDI 0487 D8.6): outer in [3:2], inner in [1:0].

    Names of normal memory say outer, then inner, where they differ.
    """

    DEVICE_nGnRnE = 0b0000
    DEVICE_nGnRE = 0b0001
    DEVICE_nGRE = 0b0010
    DEVICE_GRE = 0b0011
    NORMAL_NC = 0b0101
    NORMAL_NC_WT = 0b0110
    NORMAL_NC_WB = 0b0111
    NORMAL_WT_NC = 0b1001
    NORMAL_WT = 0b1010
    NORMAL_WT_WB = 0b1011
    NORMAL_WB_NC = 0b1101
    NORMAL_WB_WT = 0b1110
    NORMAL_WB = 0b1111


class MemAttrFwb(IntEnum):
    """Stage-2 MemAttr[3:0] with HCR_EL2.FWB set (DDI 0487 D8.6, FEAT_S2FWB)."""

    DEVICE_nGnRnE = 0b0000
    DEVICE_nGnRE = 0b0001
    DEVICE_nGRE = 0b0010
    DEVICE_GRE = 0b0011
    NORMAL_NC = 0b0101  #: normal non-cacheable, unless stage 1 says device
    NORMAL_WB = 0b0110  #: write-back, whatever stage 1 says
    STAGE1 = 0b0111  #: what stage 1 says


class Shareability(IntEnum):
    NON = 0b00
    RESERVED = 0b01
    OUTER = 0b10
    INNER = 0b11


class Grant(IntEnum):
    """S2AP: what stage 2 grants to data accesses."""

    NONE = 0b00
    READ = 0b01
    WRITE = 0b10
    READ_WRITE = 0b11


class Never(IntEnum):
    """XN[1:0] with FEAT_XNX: who may never execute. Without it bit 53 is RES0: ``NOBODY`` or ``EL0_EL1``."""

    NOBODY = 0b00
    EL1 = 0b01
    EL0_EL1 = 0b10
    EL0 = 0b11


@dataclass(frozen=True)
class Format:
    """What decides the meaning of a descriptor's bits, beside its level."""

    granule: Granule = KIB4
    armv7: bool = False  #: addresses end at bit 39; [47:40] are RES0
    fwb: bool = False  #: HCR_EL2.FWB: MemAttr has its other encoding
    xnx: bool = False  #: FEAT_XNX: XN has two bits
    dbm: bool = False  #: FEAT_HAFDBS: bit 51 means something
    xs: bool = False  #: FEAT_XS: bit 11 means something

    @property
    def address_bits(self) -> int:
        """Width of the address field."""
        return 40 if self.armv7 else _ADDRESS_TOP

    def address_field(self, level: int = LAST_LEVEL) -> int:
        """Mask of the output address of a leaf at ``level``; of a table's address at the last level."""
        return (1 << self.address_bits) - (1 << self.granule.level_shift(level))

    @property
    def normal(self) -> int:
        """MemAttr[3:0] of ordinary write-back memory."""
        return MemAttrFwb.NORMAL_WB if self.fwb else MemAttr.NORMAL_WB

    def is_device(self, memattr: Bits) -> Bits:
        """Whether MemAttr[3:0] is a device type. With FWB bit 3 is RES0 and not looked at."""
        return (memattr & (0b0100 if self.fwb else 0b1100)) == 0


LPAE = Format(armv7=True)  #: Armv7's one format


class EntryKind(Enum):
    """The five things a word in a table can be."""

    INVALID = "invalid"
    TABLE = "table"
    BLOCK = "block"
    PAGE = "page"
    RESERVED = "reserved"


def kind(word: int, level: int, granule: Granule) -> EntryKind:
    """What the two low bits say at this level (DDI 0487 D8.3.1)."""
    if not VALID.of(word):
        return EntryKind.INVALID
    if TYPE.of(word):
        return EntryKind.PAGE if level == LAST_LEVEL else EntryKind.TABLE
    if level == LAST_LEVEL or level < granule.top_block:
        return EntryKind.RESERVED
    return EntryKind.BLOCK


# -- decoded entries -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Invalid:
    """Nothing is mapped; bits [63:1] belong to the operating system (KVM keeps page owners there)."""

    payload: int = 0


@dataclass(frozen=True)
class Reserved:
    """A valid entry whose type has no meaning at its level; the walk takes a translation fault."""

    word: int


@dataclass(frozen=True)
class Table:
    """A pointer to the next level's table at physical address ``address``. ``ignored`` holds all other bits."""

    address: int
    ignored: int = 0


@dataclass(frozen=True)
class LeafFields:
    """A stage-2 block or page. ``address`` in bytes; ``memattr`` None: ordinary write-back memory.

    ``res0`` holds the bits that should be zero and are not: those of features that are not there among them.
    """

    address: int
    memattr: int | None = None
    s2ap: int = Grant.READ_WRITE
    sh: int = Shareability.INNER
    af: bool = True
    xn: int = Never.NOBODY
    contiguous: bool = False
    dbm: bool = False
    fnxs: bool = False
    software: int = 0
    pbha: int = 0
    res0: int = 0


Entry = Invalid | Reserved | Table | LeafFields

_LEAF_FIELDS = {
    "memattr": MEMATTR,
    "s2ap": S2AP,
    "sh": SH,
    "af": AF,
    "xn": XN,
    "contiguous": CONTIGUOUS,
    "dbm": DBM,
    "fnxs": FNXS,
    "software": SOFTWARE,
    "pbha": PBHA,
}
_FLAGS = frozenset({"af", "contiguous", "dbm", "fnxs"})
_TYPE_BITS = VALID.mask | TYPE.mask
_XN_LOW = Field(XN.low)  #: XN[0]


def _meaningful(fmt: Format) -> int:
    """The attribute bits of a leaf that mean something in this format."""
    mask = sum(field.mask for field in _LEAF_FIELDS.values()) & ~(DBM.mask | FNXS.mask | _XN_LOW.mask)
    return mask | fmt.dbm * DBM.mask | fmt.xs * FNXS.mask | fmt.xnx * _XN_LOW.mask


def decode(word: int, level: int, fmt: Format = Format()) -> Entry:
    """The stage-2 entry that ``word`` is at ``level``."""
    match kind(word, level, fmt.granule):
        case EntryKind.INVALID:
            return Invalid(word >> 1)
        case EntryKind.RESERVED:
            return Reserved(word)
        case EntryKind.TABLE:
            field = fmt.address_field()
            return Table(word & field, word & ~field & ~_TYPE_BITS)
    address, known = fmt.address_field(level), _meaningful(fmt)
    values = {name: f.of(word & known) for name, f in _LEAF_FIELDS.items()}
    values |= {name: bool(values[name]) for name in _FLAGS}
    return LeafFields(word & address, res0=word & ~address & ~known & ~_TYPE_BITS, **values)


def encode(entry: Entry, level: int, fmt: Format = Format()) -> int:
    """The word of ``entry`` at ``level``. ValueError when no word means just that."""
    if isinstance(entry, LeafFields) and entry.memattr is None:
        entry = replace(entry, memattr=fmt.normal)
    word = _word(entry, level, fmt)
    if word >> 64 or decode(word, level, fmt) != entry:
        raise ValueError(f"a level {level} entry cannot say {entry}")
    return word


def _word(entry: Entry, level: int, fmt: Format) -> int:
    match entry:
        case Invalid(payload):
            return payload << 1
        case Reserved(word):
            return word
        case Table(address, ignored):
            return address | ignored | _TYPE_BITS
    word = entry.address | entry.res0 | VALID.mask | TYPE.put(level == LAST_LEVEL)
    for name, field in _LEAF_FIELDS.items():
        word |= field.put(int(getattr(entry, name)))
    return word


# -- encodings the architecture reserves -------------------------------------------------------------------


def reserved(word: int, level: int, fmt: Format) -> list[str]:
    """The names of all that is reserved in a valid stage-2 entry: empty for a good one."""
    match decode(word, level, fmt):
        case Reserved():
            return [reserved_type(word, level, fmt.granule)]
        case LeafFields() as leaf:
            return [*_leaf_reservations(leaf, fmt), *_zeros(leaf.res0, level, fmt)]
        case Table(_, ignored):
            return _zeros(ignored & _table_zeros(fmt), LAST_LEVEL, fmt)
    return []


def reserved_type(word: int, level: int, granule: Granule) -> str | None:
    """The name of a type (bits [1:0]) that has no meaning at this level, in either stage; None for a good one."""
    if kind(word, level, granule) is not EntryKind.RESERVED:
        return None
    return "reserved encoding (0b01) at the last level" if level == LAST_LEVEL else f"a block at level {level}"


def _leaf_reservations(leaf: LeafFields, fmt: Format) -> list[str]:
    found = []
    if leaf.sh == Shareability.RESERVED:
        found.append("reserved shareability (0b01)")
    if leaf.memattr in RESERVED_MEMATTR[fmt.fwb]:
        found.append(f"reserved MemAttr {leaf.memattr:#06b}")
    return found


#: Bits that are RES0 for want of a feature.
_ABSENT = {_XN_LOW: "XN[0] without FEAT_XNX", DBM: "DBM without FEAT_HAFDBS", FNXS: "FnXS without FEAT_XS"}


def _zeros(bits: int, level: int, fmt: Format) -> list[str]:
    """Names of RES0 bits that are set."""
    found = [name for field, name in _ABSENT.items() if field.of(bits)]
    bits &= ~sum(field.mask for field in _ABSENT)
    low = bits & ((1 << fmt.granule.level_shift(level)) - fmt.granule.size)
    if low:
        found.append(f"block address not aligned to {1 << fmt.granule.level_shift(level):#x} bytes")
    return [*found, f"RES0 bits {bits & ~low:#x}"] if bits & ~low else found


def _table_zeros(fmt: Format) -> int:
    """RES0 in a stage-2 table entry: the limits that stage 1 has in [63:59], and what is beside the address."""
    beside = Field(40, 8).mask if fmt.armv7 else Field(48, 3).mask | (fmt.granule.size - KIB4.size)
    return Field(59, 5).mask | beside


#: Without FWB, normal memory with an inner field of 0b00; with FWB, 0b0100 and the RES0 bit 3.
RESERVED_MEMATTR = {
    False: frozenset({0b0100, 0b1000, 0b1100}),
    True: frozenset({0b0100, *range(0b1000, 0b10000)}),
}


# -- what a stage-2 leaf grants ----------------------------------------------------------------------------


def s2_readable(desc: Bits) -> Bits:
    return (desc & (Grant.READ << S2AP.low)) != 0


def s2_writable(desc: Bits) -> Bits:
    return (desc & (Grant.WRITE << S2AP.low)) != 0


def s2_executable(desc: Bits, *, el0: bool = False, fmt: Format = Format()) -> Bits:
    """Whether EL1 (or EL0) may execute, read permission aside. Without FEAT_XNX bit 54 alone decides."""
    xn = XN.of(desc)
    if not fmt.xnx:
        return xn < Never.EL0_EL1
    return (xn == Never.NOBODY) | (xn == (Never.EL1 if el0 else Never.EL0))


# -- the host's own stage 1, as Linux writes it ------------------------------------------------
#
# A clean page is read-only to the hardware but writable to Linux, so the hardware's AP[2] says
# less than KVM may grant. The bit that carries the mapping's permission is a software bit:
# arch/arm/include/asm/pgtable-3level.h (5.4) L_PTE_RDONLY and L_PMD_SECT_RDONLY, bit 58;
# arch/arm64/include/asm/pgtable-prot.h (5.4 to 6.12) PTE_WRITE, bit 51 (also DBM).

ARM_L_PTE_RDONLY = Field(58)
ARM64_PTE_WRITE = Field(51)


def linux_arm_writable(desc: Bits) -> Bits:
    return ARM_L_PTE_RDONLY.of(desc) == 0


def linux_arm64_writable(desc: Bits) -> Bits:
    return ARM64_PTE_WRITE.of(desc) != 0
