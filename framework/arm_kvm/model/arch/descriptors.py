"""Long-format translation table descriptors. Every bit of a stage-2 entry is named here and nowhere else.

Sources: ARM DDI 0406C.d, B3.6 (Armv7 LPAE: table, block and page formats, second stage attributes);
ARM DDI 0487, D8.3 (VMSAv8-64 descriptor formats), D8.6 (stage 2 memory attributes, FEAT_S2FWB).
Linux's use of the software bits: arch/arm/include/asm/pgtable-3level.h and arch/arm64/include/asm/pgtable-prot.h (5.4).

:class:`Field` works alike on a Python ``int`` and on a numpy ``uint64`` array. :func:`decode` and :func:`encode` are
exact inverses on all 2**64 words: bits without a meaning are kept as found.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from arm_kvm.model.arch.granule import KIB4, LAST_LEVEL, Granule


class Field(NamedTuple):
    """Bits ``[low + width - 1 : low]`` of a descriptor."""

    low: int
    width: int = 1

    @property
    def mask(self) -> int:
        return ((1 << self.width) - 1) << self.low

    @overload
    def of(self, desc: int) -> int: ...
    @overload
    def of(self, desc: NDArray[np.uint64]) -> NDArray[np.uint64]: ...
    def of(self, desc: int | NDArray[np.uint64]) -> int | NDArray[np.uint64]:
        """The field's value."""
        # numpy's stubs take a Python int for a signed operand, and so give a signed result.
        return desc >> self.low & ((1 << self.width) - 1)  # type: ignore[return-value]

    def put(self, value: int) -> int:
        """A descriptor with this field set and nothing else. Raises ValueError when the value does not fit."""
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
SOFTWARE = Field(55, 4)  #: left to the operating system

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


@overload
def is_table(desc: int, level: int) -> bool: ...
@overload
def is_table(desc: NDArray[np.uint64], level: int) -> NDArray[np.bool_]: ...
def is_table(desc: int | NDArray[np.uint64], level: int) -> bool | NDArray[np.bool_]:
    """Whether an entry of this level is a valid table descriptor."""
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
    NORMAL_WB = 0b0110  #: write-back, overriding stage 1
    STAGE1 = 0b0111  #: the type that stage 1 gives


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
    """XN[1:0] with FEAT_XNX: the exception levels that may never execute. Without it, only NONE and EL0_EL1 exist."""

    NONE = 0b00
    EL1 = 0b01
    EL0_EL1 = 0b10
    EL0 = 0b11


@dataclass(frozen=True)
class Format:
    """Everything besides the level that decides the meaning of a descriptor's bits."""

    granule: Granule = KIB4
    armv7: bool = False  #: addresses end at bit 39; [47:40] are RES0
    fwb: bool = False  #: HCR_EL2.FWB: MemAttr has its other encoding
    xnx: bool = False  #: FEAT_XNX: XN has two bits
    dbm: bool = False  #: FEAT_HAFDBS: bit 51 is DBM, not RES0
    xs: bool = False  #: FEAT_XS: bit 11 is FnXS, not RES0

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

    @overload
    def is_device(self, memattr: int) -> bool: ...
    @overload
    def is_device(self, memattr: NDArray[np.uint64]) -> NDArray[np.bool_]: ...
    def is_device(self, memattr: int | NDArray[np.uint64]) -> bool | NDArray[np.bool_]:
        """Whether MemAttr[3:0] is a device type. With FWB bit 3 is RES0 and ignored."""
        return (memattr & (0b0100 if self.fwb else 0b1100)) == 0


LPAE = Format(armv7=True)  #: the only format of Armv7


class EntryKind(Enum):
    """What a word in a table can be."""

    INVALID = "invalid"
    TABLE = "table"
    BLOCK = "block"
    PAGE = "page"
    RESERVED = "reserved"


def kind(word: int, level: int, granule: Granule) -> EntryKind:
    """The kind of entry, from bits [1:0] and the level (DDI 0487 D8.3.1)."""
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
    """A valid entry whose type is reserved at its level; the walk takes a translation fault."""

    word: int


@dataclass(frozen=True)
class Table:
    """A table descriptor: ``address`` is the next table's physical address, ``ignored`` holds all other bits."""

    address: int
    ignored: int = 0


@dataclass(frozen=True)
class LeafFields:
    """A stage-2 block or page. ``address`` in bytes; ``memattr`` None: ordinary write-back memory.

    ``res0`` holds the bits that should be zero and are not, including those of absent features.
    """

    address: int
    memattr: int | None = None
    s2ap: int = Grant.READ_WRITE
    sh: int = Shareability.INNER
    af: bool = True
    xn: int = Never.NONE
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
_TYPE_BITS = VALID.mask | TYPE.mask
_XN_LOW = Field(XN.low)  #: XN[0]


def _meaningful(fmt: Format) -> int:
    """The attribute bits of a leaf that have a meaning in this format."""
    mask = sum(field.mask for field in _LEAF_FIELDS.values()) & ~(DBM.mask | FNXS.mask | _XN_LOW.mask)
    return mask | fmt.dbm * DBM.mask | fmt.xs * FNXS.mask | fmt.xnx * _XN_LOW.mask


def decode(word: int, level: int, fmt: Format = Format()) -> Entry:
    """Decode a word of a stage-2 table at ``level``."""
    match kind(word, level, fmt.granule):
        case EntryKind.INVALID:
            return Invalid(word >> 1)
        case EntryKind.RESERVED:
            return Reserved(word)
        case EntryKind.TABLE:
            field = fmt.address_field()
            return Table(word & field, word & ~field & ~_TYPE_BITS)
    address, known = fmt.address_field(level), _meaningful(fmt)
    attributes = word & known
    return LeafFields(
        word & address,
        memattr=MEMATTR.of(attributes),
        s2ap=S2AP.of(attributes),
        sh=SH.of(attributes),
        af=bool(AF.of(attributes)),
        xn=XN.of(attributes),
        contiguous=bool(CONTIGUOUS.of(attributes)),
        dbm=bool(DBM.of(attributes)),
        fnxs=bool(FNXS.of(attributes)),
        software=SOFTWARE.of(attributes),
        pbha=PBHA.of(attributes),
        res0=word & ~address & ~known & ~_TYPE_BITS,
    )


def encode(entry: Entry, level: int, fmt: Format = Format()) -> int:
    """Encode ``entry`` for ``level``. Raises ValueError when no word decodes to it."""
    if isinstance(entry, LeafFields) and entry.memattr is None:
        entry = replace(entry, memattr=fmt.normal)
    word = _word(entry, level, fmt)
    if word >> 64 or decode(word, level, fmt) != entry:
        raise ValueError(f"a level {level} entry cannot encode {entry}")
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


# -- what a stage-2 leaf grants ----------------------------------------------------------------------------


@overload
def s2_readable(desc: int) -> bool: ...
@overload
def s2_readable(desc: NDArray[np.uint64]) -> NDArray[np.bool_]: ...
def s2_readable(desc: int | NDArray[np.uint64]) -> bool | NDArray[np.bool_]:
    """Whether EL1 and EL0 may read."""
    return (desc & (Grant.READ << S2AP.low)) != 0


@overload
def s2_writable(desc: int) -> bool: ...
@overload
def s2_writable(desc: NDArray[np.uint64]) -> NDArray[np.bool_]: ...
def s2_writable(desc: int | NDArray[np.uint64]) -> bool | NDArray[np.bool_]:
    """Whether EL1 and EL0 may write."""
    return (desc & (Grant.WRITE << S2AP.low)) != 0


@overload
def s2_executable(desc: int, *, el0: bool = False, fmt: Format = Format()) -> bool: ...
@overload
def s2_executable(desc: NDArray[np.uint64], *, el0: bool = False, fmt: Format = Format()) -> NDArray[np.bool_]: ...
def s2_executable(
    desc: int | NDArray[np.uint64], *, el0: bool = False, fmt: Format = Format()
) -> bool | NDArray[np.bool_]:
    """Whether EL1 (or EL0) may execute; read permission is not considered. Without FEAT_XNX bit 54 alone decides."""
    xn = XN.of(desc)
    if not fmt.xnx:
        return xn < Never.EL0_EL1
    return (xn == Never.NONE) | (xn == (Never.EL1 if el0 else Never.EL0))


# -- the host's own stage 1, as Linux writes it ------------------------------------------------
#
# A clean page is read-only to the hardware but writable to Linux, so the hardware's AP[2] shows
# less than KVM may grant. The permission of the mapping is in a software bit:
# arch/arm/include/asm/pgtable-3level.h (5.4) L_PTE_RDONLY and L_PMD_SECT_RDONLY, bit 58;
# arch/arm64/include/asm/pgtable-prot.h (5.4 to 6.12) PTE_WRITE, bit 51 (also DBM).

ARM_L_PTE_RDONLY = Field(58)
ARM64_PTE_WRITE = Field(51)


@overload
def linux_arm_writable(desc: int) -> bool: ...
@overload
def linux_arm_writable(desc: NDArray[np.uint64]) -> NDArray[np.bool_]: ...
def linux_arm_writable(desc: int | NDArray[np.uint64]) -> bool | NDArray[np.bool_]:
    """Whether the mapping's permission (not the hardware's) allows writes, on 32-bit Arm Linux."""
    return ARM_L_PTE_RDONLY.of(desc) == 0


@overload
def linux_arm64_writable(desc: int) -> bool: ...
@overload
def linux_arm64_writable(desc: NDArray[np.uint64]) -> NDArray[np.bool_]: ...
def linux_arm64_writable(desc: int | NDArray[np.uint64]) -> bool | NDArray[np.bool_]:
    """Whether the mapping's permission (not the hardware's) allows writes, on arm64 Linux."""
    return ARM64_PTE_WRITE.of(desc) != 0
