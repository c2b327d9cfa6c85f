"""Memslots: placement, overlap, move, flags, limits and the dirty log, as in the ioctls."""

import errno

import numpy as np
import pytest
from arm_kvm.model.kvm import memslots
from arm_kvm.model.kvm.memslots import Memslot, Memslots, Owed, Refused, SlotFlags
from hypothesis import given
from hypothesis import strategies as st

PAGE = 0x1000
LOG, RO, NONE = SlotFlags.LOG_DIRTY_PAGES, SlotFlags.READONLY, SlotFlags.NONE


def slot(number=0, page=0, pages=4, hva=0x7000_0000, flags=NONE):
    return Memslot(number, page * PAGE, pages * PAGE, hva, flags)


@pytest.fixture
def slots():
    return Memslots(40)


def test_memslot_covers_its_range_only():
    both = [slot(0, 0, 1), slot(1, 2, 1, 0x7100_0000, RO)]
    ipas = np.array([0, PAGE - 1, PAGE, 2 * PAGE, 3 * PAGE], dtype=np.uint64)
    assert memslots.covering(both, ipas).tolist() == [0, 0, -1, 1, -1]
    assert both[1].hva_of(2 * PAGE + 8) == 0x7100_0008 and both[1].readonly and not both[1].logging
    with pytest.raises(ValueError, match="not in memslot 0"):
        both[0].hva_of(PAGE)


def test_a_slot_maps_a_part_of_host_memory():
    one = slot(page=8, pages=4)
    assert one.ipas_of(0x7000_1000, 0x1_0000) == (9 * PAGE, 3 * PAGE)
    assert one.ipas_of(0x6FFF_F000, 0x1000) is None and one.pages == 4
    assert "hva 0x70000000" in str(one) and "READONLY" in str(one.with_flags(RO))


def test_the_life_of_a_slot(slots):
    assert slots.set(slot()) == slots.set(slot()) == Owed()
    assert slots.set(slot(page=8)) == Owed(must_go=((0, 4 * PAGE),))
    assert slots.at(0) is None and slots.at(9 * PAGE).slot == 0
    assert slots.set(slot(pages=0)) == Owed(must_go=((8 * PAGE, 4 * PAGE),)) and list(slots) == []


@pytest.mark.parametrize(
    ("wanted", "number", "why"),
    [
        (Memslot(0, 1, PAGE, 0), errno.EINVAL, "not aligned"),
        (Memslot(0, 0, PAGE + 1, 0), errno.EINVAL, "not aligned"),
        (Memslot(0, 0, PAGE, 1), errno.EINVAL, "not aligned"),
        (slot(flags=SlotFlags(4)), errno.EINVAL, "flags"),
        (slot(number=512), errno.EINVAL, "slot 512"),
        (slot(pages=1 << 31), errno.EINVAL, "pages"),
        (slot(page=(1 << 52) - 1, pages=1), errno.EINVAL, "wraps"),
        (slot(hva=(1 << 48) - PAGE), errno.EINVAL, "not an address of the process"),
        (slot(page=(1 << 28) - 1, pages=2), errno.EFAULT, "beyond 40-bit"),
        (slot(number=3, pages=0), errno.EINVAL, "no slot 3"),
        (slot(number=3, page=9, pages=2), errno.EEXIST, "overlaps"),
        (slot(number=1, page=10, flags=RO), errno.EINVAL, "do not change"),
        (slot(number=1, page=10, pages=5), errno.EINVAL, "do not change"),
        (slot(number=1, page=10, hva=0), errno.EINVAL, "do not change"),
    ],
)
def test_what_the_ioctl_refuses(slots, wanted, number, why):
    slots.set(slot(number=1, page=10))
    before = list(slots)
    with pytest.raises(Refused, match=why) as caught:
        slots.set(wanted)
    assert caught.value.errno == number and list(slots) == before


def test_a_slot_may_move_over_itself_but_not_over_others(slots):
    slots.set(slot(0, 0))
    slots.set(slot(1, 8))
    assert slots.set(slot(0, 2)).must_go == ((0, 4 * PAGE),)
    with pytest.raises(Refused, match="EEXIST"):
        slots.set(slot(0, 6))


def test_a_move_beyond_the_space_is_refused(slots):
    slots.set(slot(page=8))
    with pytest.raises(Refused, match="EFAULT"):
        slots.set(slot(page=1 << 28))
    assert slots.at(8 * PAGE).slot == 0


def test_a_32_bit_host_has_fewer_slots():
    with pytest.raises(Refused, match="slot 32"):
        Memslots(40, limit=32).set(slot(number=32))


def test_the_last_page_of_the_space(slots):
    slots.set(slot(page=(1 << 28) - 4))
    assert slots.at((1 << 40) - 1).slot == 0


# -- the dirty log -------------------------------------------------------------------------------------------


def test_logging_makes_the_slot_read_only(slots):
    slots.set(slot(page=8))
    on = slots.set(slot(page=8, flags=LOG))
    assert on == Owed(must_be_read_only=((8 * PAGE, 4 * PAGE),)) and slots.set(slot(page=8, flags=LOG)) == Owed()
    slots.written(9 * PAGE + 5)
    slots.written(10 * PAGE, 2 * PAGE)
    pages, owed = slots.take_dirty_log(0)
    assert pages == [1, 2, 3] and owed.must_be_read_only == tuple((n * PAGE, PAGE) for n in (9, 10, 11))
    assert slots.take_dirty_log(0) == ([], Owed())
    assert slots.set(slot(page=8)) == Owed()


def test_a_slot_that_moves_while_it_logs_is_clean_at_its_new_place(slots):
    assert slots.set(slot(flags=LOG)).must_be_read_only == ((0, 4 * PAGE),)
    assert slots.set(slot(page=8, flags=LOG)) == Owed(((0, 4 * PAGE),), ((8 * PAGE, 4 * PAGE),))


def test_no_log_no_answer(slots):
    slots.set(slot())
    slots.written(0)
    with pytest.raises(Refused, match="ENOENT"):
        slots.take_dirty_log(0)
    with pytest.raises(KeyError, match="in no memslot"):
        slots.written(100 * PAGE)


def test_no_such_slot_has_a_log(slots):
    with pytest.raises(Refused, match="EINVAL"):
        slots.take_dirty_log(600)


def test_a_log_goes_with_its_slot(slots):
    slots.set(slot(flags=LOG))
    slots.set(slot(pages=0))
    with pytest.raises(Refused, match="ENOENT"):
        slots.take_dirty_log(0)


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(0, 6), st.sampled_from([NONE, LOG, RO, LOG | RO]))
    )
)
def test_slots_never_overlap_and_every_write_is_logged_once(steps):
    slots = Memslots(40)
    for number, page, pages, flags in steps:
        try:
            slots.set(slot(number, page, pages, flags=flags))
        except Refused:
            continue
    kept = list(slots)
    assert not any(a.overlaps(b) for a in kept for b in kept if a is not b)
    for one in kept:
        slots.written(one.ipa, one.size)
        if one.logging:
            assert slots.take_dirty_log(one.slot)[0] == ([] if one.readonly else list(range(one.pages)))
            assert slots.take_dirty_log(one.slot)[0] == []
