"""Descriptors: every word round trips, every field is where the manual puts it, reserved encodings have names."""

import numpy as np
import pytest
from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch.descriptors import EntryKind, Format
from arm_kvm.model.arch.granule import KIB4, KIB16, KIB64
from arm_kvm.model.arch.reserved import RESERVED_MEMATTR, reserved
from hypothesis import given
from hypothesis import strategies as st

FEATURES = [
    {},
    {"fwb": True},
    {"xnx": True},
    {"dbm": True},
    {"xs": True},
    {"fwb": True, "xnx": True, "dbm": True, "xs": True},
]
FORMATS = [d.LPAE, *(Format(granule, **features) for granule in (KIB4, KIB16, KIB64) for features in FEATURES)]
FULL = Format(xnx=True, dbm=True, xs=True)

words = st.integers(0, (1 << 64) - 1)
levels = st.integers(0, 3)
formats = st.sampled_from(FORMATS)


@given(words, levels, formats)
def test_every_word_round_trips(word, level, fmt):
    assert d.encode(d.decode(word, level, fmt), level, fmt) == word


leaves = st.builds(
    d.LeafFields,
    address=st.integers(0, 255).map(lambda n: n << 29),
    memattr=st.integers(0, 15),
    s2ap=st.sampled_from(d.Grant),
    sh=st.sampled_from(d.Shareability),
    af=st.booleans(),
    xn=st.sampled_from(d.Never),
    contiguous=st.booleans(),
    dbm=st.booleans(),
    fnxs=st.booleans(),
    software=st.integers(0, 15),
    pbha=st.integers(0, 15),
)


@given(
    leaves,
    st.sampled_from([2, 3]),
    st.sampled_from([Format(g, xnx=True, dbm=True, xs=True) for g in (KIB4, KIB16, KIB64)]),
)
def test_every_leaf_round_trips(leaf, level, fmt):
    assert d.decode(d.encode(leaf, level, fmt), level, fmt) == leaf


entries = st.one_of(
    leaves,
    st.builds(d.Invalid, st.integers(0, 1 << 64)),
    st.builds(d.Reserved, words),
    st.builds(d.Table, st.integers(0, 1 << 40), words),
)


@given(entries, levels, formats)
def test_an_entry_is_encoded_to_what_decodes_to_it_or_refused(entry, level, fmt):
    try:
        word = d.encode(entry, level, fmt)
    except ValueError:
        return
    assert d.decode(word, level, fmt) == entry


@pytest.mark.parametrize(("fmt", "memattr"), [(Format(), 0b1111), (Format(fwb=True), 0b0110)])
def test_a_leaf_is_ordinary_memory_by_default(fmt, memattr):
    assert d.decode(d.encode(d.LeafFields(0x1000), 3, fmt), 3, fmt).memattr == memattr


@pytest.mark.parametrize("fwb", [False, True])
def test_memory_types(fwb):
    """DDI 0487 D8.6: what each value of MemAttr[3:0] is."""
    fmt = Format(fwb=fwb)
    device = [fmt.is_device(memattr) for memattr in range(16)]
    assert device == [m < 4 or (fwb and 8 <= m < 12) for m in range(16)]
    named = {int(m) for m in (d.MemAttrFwb if fwb else d.MemAttr)}
    assert named == set(range(16)) - RESERVED_MEMATTR[fwb]


@pytest.mark.parametrize(
    ("change", "bits"),
    [
        ({}, 0x4000_07FF),
        ({"memattr": d.MemAttr.DEVICE_nGnRE}, 0x4000_07C7),
        ({"s2ap": d.Grant.READ}, 0x4000_077F),
        ({"s2ap": d.Grant.WRITE}, 0x4000_07BF),
        ({"sh": d.Shareability.OUTER}, 0x4000_06FF),
        ({"af": False}, 0x4000_03FF),
        ({"xn": d.Never.EL0_EL1}, 0x0040_0000_4000_07FF),
        ({"xn": d.Never.EL1}, 0x0020_0000_4000_07FF),
        ({"contiguous": True}, 0x0010_0000_4000_07FF),
        ({"dbm": True}, 0x0008_0000_4000_07FF),
        ({"software": 0b0001}, 0x0080_0000_4000_07FF),
        ({"pbha": 0b0001}, 0x0800_0000_4000_07FF),
        ({"fnxs": True}, 0x4000_0FFF),
    ],
)
def test_fields_are_where_the_manual_puts_them(change, bits):
    assert d.encode(d.LeafFields(0x4000_0000, **change), 3, FULL) == bits


def test_what_linux_writes():
    """A page of a 5.4 arm host as seen in stage 2 tables of this lab; of FWB hosts, MT_S2_FWB_NORMAL (asm/memory.h)."""
    leaf = d.decode(0x0040_0000_6F00_07FF, 3, d.LPAE)
    assert (leaf.address, leaf.s2ap, leaf.xn, leaf.memattr) == (0x6F00_0000, 3, d.Never.EL0_EL1, d.MemAttr.NORMAL_WB)


@given(words, levels, st.sampled_from([KIB4, KIB16, KIB64]))
def test_a_word_is_one_of_five_kinds(word, level, granule):
    kind = d.kind(word, level, granule)
    low = word & 3
    assert (kind is EntryKind.INVALID) == (low in (0, 2))
    assert (kind is EntryKind.PAGE) == (low == 3 and level == 3)
    assert (kind is EntryKind.TABLE) == (low == 3 and level < 3)
    assert (kind is EntryKind.BLOCK) == (low == 1 and level in ((1, 2) if granule is KIB4 else (2,)))


@pytest.mark.parametrize(
    ("entry", "level"),
    [
        (d.LeafFields(0x1000), 2),
        (d.LeafFields(1 << 40), 3),
        (d.LeafFields(0), 0),
        (d.LeafFields(0, xn=d.Never.EL1), 3),
        (d.LeafFields(0, res0=0x2000), 3),
        (d.Table(0x1000), 3),
        (d.Table(0x100), 1),
        (d.Table(0x1000, ignored=0x2000), 1),
        (d.LeafFields(0, memattr=16), 3),
        (d.Invalid(1 << 63), 3),
        (d.Reserved(3), 3),
    ],
)
def test_what_no_entry_can_encode_is_refused(entry, level):
    with pytest.raises(ValueError, match="cannot encode|does not fit"):
        d.encode(entry, level, d.LPAE)


RESERVED = {
    "reserved encoding (0b01) at the last level": (0x4000_07FD, 3, Format()),
    "a block at level 0": (0x4000_07FD, 0, Format()),
    "a block at level 1": (0x4000_07FD, 1, Format(KIB64)),
    "block address not aligned to 0x200000 bytes": (0x4000_17FD, 2, Format()),
    "RES0 bits 0x1000000000000": (0x0001_0000_4000_07FF, 3, Format()),
    "RES0 bits 0x10000000000": (0x0000_0100_4000_07FF, 3, d.LPAE),
    "RES0 bits 0x800000000000000": (0x0800_0000_4000_0003, 1, Format()),
    "RES0 bits 0x80000000000": (0x0000_0800_4000_0003, 1, d.LPAE),
    "RES0 bits 0x1000": (0x4001_1003, 1, Format(KIB64)),
    "reserved shareability (0b01)": (0x4000_05FF, 3, Format()),
    "reserved MemAttr 0b0100": (0x4000_07D3, 3, Format()),
    "reserved MemAttr 0b1100": (0x4000_07F3, 3, Format(fwb=True)),
    "XN[0] without FEAT_XNX": (0x0020_0000_4000_07FF, 3, Format()),
    "DBM without FEAT_HAFDBS": (0x0008_0000_4000_07FF, 3, Format()),
    "FnXS without FEAT_XS": (0x4000_0FFF, 3, Format()),
}


@pytest.mark.parametrize("name", RESERVED)
def test_reserved_encodings_are_named(name):
    assert reserved(*RESERVED[name]) == [name]


@pytest.mark.parametrize("word", [0, 2, 0x4000_0003, 0x4000_07FF])
def test_good_entries_have_nothing_reserved(word):
    assert reserved(word, 3 if word & 0x400 else 1, Format()) == []


@pytest.mark.parametrize(("xn", "el1", "el0"), [(0, True, True), (1, False, True), (2, False, False), (3, True, False)])
def test_execute_never_in_two_bits(xn, el1, el0):
    fmt = Format(xnx=True)
    desc = d.encode(d.LeafFields(0, xn=xn), 3, fmt)
    assert (d.s2_executable(desc, fmt=fmt), d.s2_executable(desc, el0=True, fmt=fmt)) == (el1, el0)


@pytest.mark.parametrize("xn", range(4))
def test_execute_never_in_one_bit(xn):
    """Bit 53 has no meaning without FEAT_XNX."""
    desc = d.encode(d.LeafFields(0, xn=xn), 3, FULL)
    assert d.s2_executable(desc) == d.s2_executable(desc, el0=True) == (xn < 2)


@pytest.mark.parametrize("s2ap", d.Grant)
def test_data_permissions(s2ap):
    desc = d.encode(d.LeafFields(0, s2ap=s2ap), 3)
    assert d.s2_readable(desc) == (s2ap in (1, 3)) and d.s2_writable(desc) == (s2ap in (2, 3))


@given(st.lists(words, min_size=1, max_size=20), st.booleans(), formats)
def test_arrays_and_integers_agree(many, el0, fmt):
    array = np.array(many, dtype=np.uint64)
    for function in (d.s2_readable, d.s2_writable, d.MEMATTR.of, d.SH.of, d.XN.of, d.AF.of):
        assert function(array).tolist() == [function(word) for word in many]
    assert d.s2_executable(array, el0=el0, fmt=fmt).tolist() == [d.s2_executable(w, el0=el0, fmt=fmt) for w in many]
    assert fmt.is_device(d.MEMATTR.of(array)).tolist() == [fmt.is_device(d.MEMATTR.of(w)) for w in many]


def test_ordinary_memory_under_fwb():
    assert Format().normal == 0b1111 and Format(fwb=True).normal == 0b0110


def test_linux_permission_bits():
    assert d.linux_arm_writable(0) and not d.linux_arm_writable(1 << 58)
    assert d.linux_arm64_writable(1 << 51) and not d.linux_arm64_writable(0)


def test_granules():
    assert [g.level_shift(2) for g in (KIB4, KIB16, KIB64)] == [21, 25, 29]
    assert [g.entries for g in (KIB4, KIB16, KIB64)] == [512, 2048, 8192]
    assert [str(g) for g in (KIB4, KIB16, KIB64)] == ["4 KiB", "16 KiB", "64 KiB"]


@pytest.mark.parametrize(("desc", "level", "leads"), [(3, 2, True), (1, 2, False), (3, 3, False), (0, 1, False)])
def test_what_leads_to_a_table(desc, level, leads):
    assert d.is_table(desc, level) == leads
    assert d.is_table(np.array([desc], dtype=np.uint64), level).tolist() == [leads]
