"""Memory attributes: the tables of the manual (DDI 0487 D8.6), line by line, and properties of all of them."""

import pytest
from arm_kvm.model.arch.attributes import STAGE1_OFF, Attributes, combine, is_device
from arm_kvm.model.arch.descriptors import Shareability
from arm_kvm.model.arch.reserved import RESERVED_MEMATTR
from hypothesis import given
from hypothesis import strategies as st

NON, OUTER, INNER = Shareability.NON, Shareability.OUTER, Shareability.INNER
DEVICES = (0x00, 0x04, 0x08, 0x0C)
MAIRS = (*DEVICES, 0x44, 0xFF, 0xBB, 0x33, 0x77, 0x4F, 0xF4, 0xAA)


@pytest.mark.parametrize(
    ("first", "second", "combined"),
    [
        (0xFF, 0b1111, 0xFF),
        (0xFF, 0b0101, 0x44),
        (0xFF, 0b1010, 0xBB),
        (0xBB, 0b1111, 0xBB),
        (0x33, 0b1111, 0x33),
        (0x77, 0b1010, 0x33),
        (0xFF, 0b1101, 0xF4),
        (0xFF, 0b0111, 0x4F),
        (0x44, 0b1111, 0x44),
        (0x04, 0b0000, 0x00),
        (0x0C, 0b0001, 0x04),
        (0xFF, 0b0001, 0x04),
        (0x00, 0b0011, 0x00),
        (0x0C, 0b1101, 0x0C),
    ],
)
def test_the_stricter_wins(first, second, combined):
    assert combine(Attributes(first, INNER), Attributes(second, INNER), fwb=False).attr == combined


@pytest.mark.parametrize(
    ("first", "second", "combined"),
    [
        (0x44, 0b0110, 0xFF),
        (0x00, 0b0110, 0xFF),
        (0xBB, 0b0110, 0xFF),
        (0xAA, 0b0110, 0xEE),
        (0x33, 0b0110, 0x77),
        (0x04, 0b0101, 0x04),
        (0xFF, 0b0101, 0x44),
        (0xFF, 0b0111, 0xFF),
        (0x0C, 0b0000, 0x00),
        (0x04, 0b0011, 0x04),
    ],
)
def test_stage_2_decides_under_fwb(first, second, combined):
    assert combine(Attributes(first, INNER), Attributes(second, INNER), fwb=True).attr == combined


@given(
    st.sampled_from(MAIRS),
    st.sampled_from(Shareability),
    st.integers(0, 15),
    st.sampled_from(Shareability),
    st.booleans(),
)
def test_device_and_uncached_memory_is_outer_shareable(mair, sh1, memattr, sh2, fwb):
    attr, sh = combine(Attributes(mair, sh1), Attributes(memattr, sh2), fwb)
    if memattr in RESERVED_MEMATTR[fwb]:
        assert (attr, sh) == (None, None)
    elif is_device(attr) or attr == 0x44:
        assert sh == OUTER


@pytest.mark.parametrize(
    ("first", "second", "combined"),
    [(NON, NON, NON), (NON, INNER, INNER), (INNER, OUTER, OUTER), (OUTER, 1, OUTER), (1, NON, None), (INNER, 1, None)],
)
def test_shareability(first, second, combined):
    assert combine(Attributes(0xFF, first), Attributes(0xF, second), fwb=False).sh == combined


def test_forced_write_back_of_device_memory_has_undefined_shareability():
    assert combine(Attributes(0x00, NON), Attributes(0b0110, NON), fwb=True) == (0xFF, None)
    assert combine(Attributes(0x00, NON), Attributes(0b0110, OUTER), fwb=True) == (0xFF, OUTER)


@pytest.mark.parametrize("mair", [0x03, 0x40, 0xA0, 0xF0])
def test_bytes_of_mair_beyond_the_base_encodings_are_undefined(mair):
    assert combine(Attributes(mair, NON), Attributes(0b1111, NON), fwb=False) == (None, None)


def test_stage_1_off_is_outer_shareable_whatever_stage_2_makes_of_it():
    assert combine(STAGE1_OFF, Attributes(0b0110, NON), fwb=True) == (0xFF, OUTER)


@given(st.sampled_from(MAIRS), st.integers(0, 15))
def test_without_fwb_stage_2_never_makes_memory_less_strict(mair, memattr):
    """Once device, always device; once uncached, never cached."""
    attr, _ = combine(Attributes(mair, NON), Attributes(memattr, NON), fwb=False)
    if attr is not None and is_device(mair):
        assert is_device(attr) and attr <= mair
    if attr is not None and mair == 0x44:
        assert attr == 0x44 or is_device(attr)
