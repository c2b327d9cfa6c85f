"""Notifiers: each operation's duty, its range, and every breach of it recognised by name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.model import descriptors as d
from framework.model.memslots import Memslot
from framework.model.notifier import RULES, Breach, Duty, Frame, Notice, Operation, Told, violations

PAGE, HUGE = 0x1000, 2 << 20
HVA, IPA, PA = 0x7000_0000, 0x8000_0000, 0x6000_0000
VMA = (HVA, HVA + 4 * HUGE)
SLOT = Memslot(0, IPA, 4 * HUGE, HVA)
PAGE_5 = (HVA + 5 * PAGE, HVA + 6 * PAGE)


def notice(operation, start=PAGE_5[0], end=PAGE_5[1], **more):
    return Notice(operation, start, end, VMA, **more)


def leaf(n, level=3, **kind):
    return {IPA + n * PAGE: (level, d.encode(d.Leaf(PA + n * PAGE, **kind), level))}


def breaches(operation, before, after, **more):
    return [v.breach for v in violations(notice(operation, **more), [SLOT], before, after)]


def test_every_operation_has_a_rule():
    assert set(RULES) == set(Operation)


@pytest.mark.parametrize("operation", Operation)
def test_rules_are_consistent(operation):
    """A frame that is replaced must go, unless nothing could be mapped; whoever owes something was told."""
    rule = RULES[operation]
    if rule.told is Told.NOTHING:
        assert rule.duty is Duty.STAY
    elif rule.frame is not Frame.SAME:
        assert rule.duty is Duty.GO
    if rule.duty is not Duty.STAY:
        assert notice(operation).may_go is not None


@pytest.mark.parametrize("operation", [o for o in Operation if RULES[o].duty is Duty.GO])
def test_a_stale_leaf_is_caught(operation):
    assert breaches(operation, leaf(5), leaf(5)) == [Breach.STALE]
    assert breaches(operation, leaf(5), leaf(5, s2ap=d.Access.READ)) == [Breach.STALE]
    assert breaches(operation, leaf(5), {}) == []


@pytest.mark.parametrize("operation", [o for o in Operation if RULES[o].duty is Duty.READ_ONLY])
def test_a_leaf_that_stays_writable_is_caught(operation):
    assert breaches(operation, leaf(5), leaf(5)) == [Breach.WRITABLE]
    assert breaches(operation, leaf(5), leaf(5, s2ap=d.Access.READ)) == []
    assert breaches(operation, leaf(5, s2ap=d.Access.READ), leaf(5, s2ap=d.Access.READ)) == []


@pytest.mark.parametrize("operation", [o for o in Operation if RULES[o].told is Told.NOTHING])
def test_a_leaf_lost_without_a_word_is_caught(operation):
    assert breaches(operation, leaf(5), {}) == [Breach.LOST]
    assert breaches(operation, leaf(5), leaf(5)) == []


def test_neighbours_within_the_huge_page_may_go_others_not():
    before = leaf(5) | leaf(6) | leaf(600)
    assert breaches(Operation.DONTNEED, before, {}) == [Breach.LOST]
    assert breaches(Operation.DONTNEED, before, leaf(600)) == []


def test_a_block_goes_whole():
    before = leaf(0, level=2)
    assert breaches(Operation.DONTNEED, before, {}) == [] and breaches(Operation.DONTNEED, before, before) == [
        Breach.STALE
    ]


def test_a_leaf_nobody_spoke_of_must_not_change():
    assert breaches(Operation.DONTNEED, leaf(600), {IPA + 600 * PAGE: leaf(7)[IPA + 7 * PAGE]}) == [Breach.ALTERED]
    assert breaches(Operation.FORK_SHARED, leaf(5, s2ap=d.Access.READ), leaf(5)) == [Breach.ALTERED]


def test_ageing_takes_the_access_flag_alone():
    assert breaches(Operation.AGE, leaf(5), leaf(5, af=False)) == []
    assert breaches(Operation.AGE, leaf(5), {}) == [Breach.LOST]
    assert breaches(Operation.AGE, leaf(5), leaf(5, xn=d.Never.EL0_EL1)) == [Breach.ALTERED]


def test_change_pte_maps_the_new_frame_read_only_up_to_6_9():
    new = {IPA + 5 * PAGE: (3, d.encode(d.Leaf(PA, s2ap=d.Access.READ), 3))}
    assert breaches(Operation.KSM_MERGE, leaf(5), new, kernel=(6, 9)) == []
    assert breaches(Operation.KSM_MERGE, leaf(5), new, kernel=(6, 10)) == [Breach.ALTERED]
    writable = {IPA + 5 * PAGE: (3, d.encode(d.Leaf(PA), 3))}
    assert breaches(Operation.KSM_MERGE, leaf(5), writable, kernel=(5, 4)) == [Breach.WRITABLE]


@pytest.mark.parametrize(
    ("operation", "start", "end", "owed"),
    [
        (Operation.DONTNEED, HVA + 1, HVA + PAGE + 1, (HVA, HVA + 2 * PAGE)),
        (Operation.FORK, *PAGE_5, VMA),
        (Operation.THP_COLLAPSE, *PAGE_5, (HVA, HVA + HUGE)),
        (Operation.PUNCH_HOLE, HVA + 1, HVA + 3 * PAGE + 1, (HVA + PAGE, HVA + 3 * PAGE)),
        (Operation.TRUNCATE, HVA + HUGE + 1, HVA + HUGE + 2, (HVA + HUGE + PAGE, VMA[1])),
    ],
)
def test_ranges(operation, start, end, owed):
    assert notice(operation, start, end).owed == owed


def test_a_copied_huge_page_is_copied_whole_up_to_5_7():
    assert notice(Operation.COW_COPY, HVA, HVA + HUGE, kernel=(5, 4)).owed == (HVA, HVA + HUGE)
    assert notice(Operation.COW_COPY, HVA + PAGE, HVA + 2 * PAGE).owed == (HVA + PAGE, HVA + 2 * PAGE)
    assert notice(Operation.COW_COPY, HVA + PAGE, HVA + 3 * PAGE, kernel=(6, 1)).owed == (HVA + PAGE, HVA + 3 * PAGE)
    assert notice(Operation.COW_COPY, HVA + PAGE, HVA + 3 * PAGE, kernel=(5, 4)).owed == (HVA, HVA + HUGE)


def test_every_alias_of_a_page_counts():
    alias = Memslot(1, 0, HUGE, HVA)
    found = violations(notice(Operation.DONTNEED), [SLOT, alias], leaf(5), leaf(5))
    low = {5 * PAGE: leaf(5)[IPA + 5 * PAGE]}
    assert [v.ipa for v in found] == [IPA + 5 * PAGE]
    assert [v.ipa for v in violations(notice(Operation.DONTNEED), [SLOT, alias], low, low)] == [5 * PAGE]
    assert violations(notice(Operation.DONTNEED), [], leaf(5), leaf(5)) == []


def test_a_range_must_lie_in_its_vma():
    with pytest.raises(ValueError, match="within the VMA"):
        notice(Operation.DONTNEED, HVA - PAGE, HVA)


@given(
    st.sampled_from(Operation),
    st.integers(0, 4 * 512 - 1),
    st.integers(1, 40),
    st.sampled_from([(5, 4), (6, 1), (6, 12)]),
)
def test_the_duty_lies_within_what_may_go(operation, page, pages, kernel):
    start = HVA + page * PAGE
    said = notice(operation, start, min(start + pages * PAGE, VMA[1]), kernel=kernel)
    if said.may_go is not None:
        assert said.may_go[0] <= said.owed[0] and said.owed[1] <= said.may_go[1]


@given(st.sampled_from(Operation), st.sets(st.integers(0, 4 * 512 - 1), max_size=30))
def test_a_kernel_that_drops_all_it_may_is_always_right(operation, pages):
    """What KVM on Arm does: unmap whatever it is told of."""
    before = {ipa: word for n in pages for ipa, word in leaf(n).items()}
    may_go = notice(operation).may_go or (0, 0)
    after = {ipa: word for ipa, word in before.items() if not may_go[0] <= ipa - IPA + HVA < may_go[1]}
    assert violations(notice(operation), [SLOT], before, after) == []
