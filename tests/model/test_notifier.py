"""Notifiers: each operation's duty and range, and the name of every breach."""

import re

import pytest
from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.kvm.memslots import Memslot
from arm_kvm.model.kvm.notifier import (
    RULES,
    Breach,
    BreachKind,
    Call,
    Duty,
    Notice,
    Notified,
    Operation,
    document,
    table,
    unasked,
    unheard,
    violations,
)
from arm_kvm.support.paths import ROOT
from hypothesis import given
from hypothesis import strategies as st

PAGE, HUGE = 0x1000, 2 << 20
HVA, IPA, PA = 0x7000_0000, 0x8000_0000, 0x6000_0000
VMA = (HVA, HVA + 4 * HUGE)
SLOT = Memslot(0, IPA, 4 * HUGE, HVA)
PAGE_5 = (HVA + 5 * PAGE, HVA + 6 * PAGE)


def notice(operation, start=PAGE_5[0], end=PAGE_5[1], **more):
    return Notice(operation, start, end, VMA, **more)


def leaf(n, level=3, **kind):
    return {IPA + n * PAGE: (level, d.encode(d.LeafFields(PA + n * PAGE, **kind), level))}


def breaches(operation, before, after, **more):
    return [v.kind for v in violations([notice(operation, **more)], [SLOT], before, after)]


GO, RO, STAY = Duty.GO, Duty.READ_ONLY, Duty.STAY
RANGE, HUGE_PAGE, WHOLE_VMA, NOBODY = Notified.RANGE, Notified.HUGE, Notified.VMA, Notified.NONE
#: Written down once more, from the calls in mm/ (5.4, 6.1, 6.12), so that a slip in RULES is seen.
EXPECTED = {
    Operation.DONTNEED: (GO, RANGE),
    Operation.FREE: (RO, RANGE),
    Operation.FREE_RECLAIMED: (GO, RANGE),
    Operation.RECLAIM_GIVEN_UP: (STAY, Notified.RANGE),
    Operation.MUNMAP: (GO, RANGE),
    Operation.MREMAP: (GO, RANGE),
    Operation.MPROTECT_READ: (RO, RANGE),
    Operation.MPROTECT_NONE: (GO, RANGE),
    Operation.MPROTECT_WIDER: (STAY, RANGE),
    Operation.FORK: (RO, WHOLE_VMA),
    Operation.FORK_SHARED: (STAY, NOBODY),
    Operation.COW_COPY: (GO, RANGE),
    Operation.COW_COPY_HUGE: (GO, HUGE_PAGE),
    Operation.COW_REUSE: (STAY, NOBODY),
    Operation.ZERO_WRITE: (GO, RANGE),
    Operation.CHILD_WRITE: (STAY, NOBODY),
    Operation.KSM_PROTECT: (RO, RANGE),
    Operation.KSM_MERGE: (GO, RANGE),
    Operation.KSM_UNSHARE: (GO, RANGE),
    Operation.THP_SPLIT: (STAY, HUGE_PAGE),
    Operation.THP_SPLIT_FILE: (GO, HUGE_PAGE),
    Operation.THP_SPLIT_PAGE: (GO, HUGE_PAGE),
    Operation.THP_COLLAPSE: (GO, HUGE_PAGE),
    Operation.MIGRATE: (GO, RANGE),
    Operation.SWAP_OUT: (GO, RANGE),
    Operation.SWAP_IN: (STAY, NOBODY),
    Operation.PUNCH_HOLE: (GO, RANGE),
    Operation.TRUNCATE: (GO, RANGE),
    Operation.FILE_OUT: (GO, RANGE),
    Operation.POISON: (GO, RANGE),
    Operation.UFFD_PROTECT: (RO, RANGE),
    Operation.WRITE_BACK: (RO, RANGE),
    Operation.AGE: (STAY, Notified.AGED),
}


@pytest.mark.parametrize("operation", Operation)
def test_every_operation_has_its_rule(operation):
    assert (RULES[operation].duty, RULES[operation].notified) == EXPECTED[operation]


def test_change_pte_follows_where_a_page_is_replaced_in_place():
    assert {o for o in Operation if RULES[o].change_pte} == {
        Operation.COW_COPY,
        Operation.ZERO_WRITE,
        Operation.KSM_PROTECT,
        Operation.KSM_MERGE,
        Operation.KSM_UNSHARE,
    }


@pytest.mark.parametrize("operation", [o for o in Operation if RULES[o].duty is Duty.GO])
def test_a_stale_leaf_is_caught(operation):
    assert breaches(operation, leaf(5), leaf(5)) == [BreachKind.STALE]
    assert breaches(operation, leaf(5), leaf(5, s2ap=d.Grant.READ)) == [BreachKind.STALE]
    assert breaches(operation, leaf(5), {}) == []


@pytest.mark.parametrize("operation", [o for o in Operation if RULES[o].duty is Duty.READ_ONLY])
def test_a_leaf_that_stays_writable_is_caught(operation):
    assert breaches(operation, leaf(5), leaf(5)) == [BreachKind.WRITABLE]
    assert breaches(operation, leaf(5), leaf(5, s2ap=d.Grant.READ)) == []
    assert breaches(operation, leaf(5, s2ap=d.Grant.READ), leaf(5, s2ap=d.Grant.READ)) == []


@pytest.mark.parametrize("operation", [o for o in Operation if RULES[o].notified is Notified.NONE])
def test_a_leaf_lost_without_a_notification_is_caught(operation):
    assert breaches(operation, leaf(5), {}) == [BreachKind.LOST]
    assert breaches(operation, leaf(5), leaf(5)) == []


def test_only_neighbours_within_the_huge_page_may_go():
    before = leaf(5) | leaf(6) | leaf(600)
    assert breaches(Operation.DONTNEED, before, {}) == [BreachKind.LOST]
    assert breaches(Operation.DONTNEED, before, leaf(600)) == []


def test_a_block_goes_as_a_whole_or_is_split_around_the_range():
    block = leaf(0, level=2)
    pages = {ipa: word for n in range(512) for ipa, word in leaf(n).items()}
    assert breaches(Operation.DONTNEED, block, {}) == []
    assert breaches(Operation.DONTNEED, block, block) == [BreachKind.STALE]
    assert breaches(Operation.DONTNEED, block, leaf(5)) == [BreachKind.STALE]
    pages.pop(IPA + 5 * PAGE)
    assert breaches(Operation.DONTNEED, block, pages) == []
    assert BreachKind.STALE in breaches(Operation.DONTNEED, leaf(5), block)


def test_a_giant_block_reaches_beyond_the_notified_range():
    vma = (0x4000_0000, 0x8000_0000)
    slot = Memslot(0, 0x4000_0000, 1 << 30, 0x4000_0000)
    said = Notice(Operation.DONTNEED, 0x4000_5000, 0x4000_6000, vma)
    assert violations([said], [slot], {0x4000_0000: (1, d.encode(d.LeafFields(0x4000_0000), 1))}, {}) == []


def test_a_leaf_outside_the_notified_range_must_not_change():
    assert breaches(Operation.DONTNEED, leaf(600), {IPA + 600 * PAGE: leaf(7)[IPA + 7 * PAGE]}) == [BreachKind.ALTERED]
    assert breaches(Operation.DONTNEED, leaf(600), leaf(600, s2ap=d.Grant.READ)) == [BreachKind.ALTERED]
    assert breaches(Operation.FORK_SHARED, leaf(5), leaf(5, s2ap=d.Grant.READ)) == [BreachKind.ALTERED]
    assert breaches(Operation.FORK_SHARED, leaf(5, s2ap=d.Grant.READ), leaf(5)) == [BreachKind.ALTERED]
    assert breaches(Operation.MPROTECT_WIDER, leaf(5), leaf(5, s2ap=d.Grant.READ)) == []


def test_nothing_appears_without_a_guest():
    assert breaches(Operation.DONTNEED, {}, leaf(5)) == [BreachKind.WRITABLE]
    assert breaches(Operation.DONTNEED, {}, leaf(5, s2ap=d.Grant.READ)) == [BreachKind.APPEARED]
    assert breaches(Operation.AGE, {}, leaf(5)) == [BreachKind.APPEARED]
    assert breaches(Operation.KSM_MERGE, {}, leaf(5, s2ap=d.Grant.READ)) == []


def test_ageing_clears_nothing_but_the_access_flag():
    assert breaches(Operation.AGE, leaf(5), leaf(5, af=False)) == []
    assert breaches(Operation.AGE, leaf(5), {}) == [BreachKind.LOST]
    assert breaches(Operation.AGE, leaf(5), leaf(5, s2ap=d.Grant.READ)) == [BreachKind.ALTERED]
    assert breaches(Operation.AGE, leaf(5), leaf(5, xn=d.Never.EL0_EL1)) == [BreachKind.ALTERED]


def test_change_pte_maps_the_new_frame_read_only_up_to_6_9():
    new = {IPA + 5 * PAGE: (3, d.encode(d.LeafFields(PA, s2ap=d.Grant.READ), 3))}
    assert breaches(Operation.KSM_MERGE, leaf(5), new, kernel=(6, 9)) == []
    assert breaches(Operation.KSM_MERGE, leaf(5), new, kernel=(6, 10)) == [BreachKind.ALTERED]
    writable = {IPA + 5 * PAGE: (3, d.encode(d.LeafFields(PA), 3))}
    assert breaches(Operation.KSM_MERGE, leaf(5), writable, kernel=(5, 4)) == [BreachKind.WRITABLE]


def test_change_pte_must_map_where_a_table_is_left():
    new = {IPA + 5 * PAGE: (3, d.encode(d.LeafFields(PA, s2ap=d.Grant.READ), 3))}
    before = leaf(5) | leaf(6)
    assert breaches(Operation.COW_COPY, before, leaf(6)) == [BreachKind.NOT_MAPPED]
    assert breaches(Operation.COW_COPY, before, leaf(6) | new) == []
    assert breaches(Operation.COW_COPY, before, leaf(6), kernel=(6, 10)) == []
    assert breaches(Operation.COW_COPY, leaf(6), leaf(6)) == [BreachKind.NOT_MAPPED]  # also where nothing was mapped
    assert breaches(Operation.COW_COPY, before, {}) == []
    assert breaches(Operation.COW_COPY, leaf(5) | leaf(600), leaf(600)) == []  # another table
    assert breaches(Operation.COW_COPY, leaf(5), leaf(6)) == [BreachKind.APPEARED]  # the table is new
    assert breaches(Operation.COW_COPY, leaf(5) | leaf(512, level=2), leaf(512, level=2)) == []


def test_several_operations_between_two_readings():
    """A page may be gone if one of them allows it, and must be gone if one of them demands it."""
    said = [notice(Operation.MPROTECT_READ), notice(Operation.DONTNEED, HVA + 600 * PAGE, HVA + 601 * PAGE)]
    both = leaf(5) | leaf(600)
    found = violations(said, [SLOT], both, both)
    assert [v.kind for v in found] == [BreachKind.WRITABLE, BreachKind.STALE]
    assert violations(said, [SLOT], both, leaf(5, s2ap=d.Grant.READ)) == violations(said, [SLOT], both, {}) == []


# -- the calls ---------------------------------------------------------------------------------------------------


def heard(operation, before, *calls):
    return [(v.kind, v.ipa) for v in unheard([notice(operation)], [SLOT], before, calls)]


def test_a_mapped_page_must_be_named():
    assert heard(Operation.DONTNEED, leaf(5)) == [(BreachKind.NOT_TOLD, IPA + 5 * PAGE)]
    assert heard(Operation.DONTNEED, leaf(5), (Call.AGE, PAGE_5)) == [(BreachKind.NOT_TOLD, IPA + 5 * PAGE)]
    assert heard(Operation.DONTNEED, leaf(5), (Call.UNMAP, PAGE_5)) == heard(Operation.DONTNEED, leaf(6)) == []
    assert heard(Operation.AGE, leaf(5), (Call.AGE, PAGE_5)) == []
    assert heard(Operation.AGE, leaf(5), (Call.UNMAP, PAGE_5)) == [(BreachKind.NOT_TOLD, IPA + 5 * PAGE)]


def test_calls_may_come_in_pieces_and_overlap():
    whole = {ipa: word for n in range(8) for ipa, word in leaf(n).items()}
    said = notice(Operation.DONTNEED, HVA, HVA + 8 * PAGE)
    pieces = [(Call.UNMAP, (HVA + a * PAGE, HVA + b * PAGE)) for a, b in ((4, 8), (0, 3), (2, 4), (5, 6))]
    assert unheard([said], [SLOT], whole, pieces) == []
    assert [v.ipa for v in unheard([said], [SLOT], whole, pieces[:2])] == [IPA + 3 * PAGE]


def test_no_call_is_allowed_where_none_is_required():
    for call in (Call.UNMAP, Call.SET):
        assert heard(Operation.COW_REUSE, leaf(5), (call, PAGE_5)) == [(BreachKind.TOLD, IPA + 5 * PAGE)]
    elsewhere = (VMA[1], VMA[1] + PAGE)
    assert heard(Operation.COW_REUSE, leaf(5), (Call.TEST, PAGE_5), (Call.UNMAP, elsewhere)) == []


def test_a_call_for_one_operation_is_no_breach_of_another():
    """A fork notifies private memory, but not shared memory next to it."""
    page_6 = (HVA + 6 * PAGE, HVA + 7 * PAGE)
    said = [notice(Operation.MPROTECT_READ, *PAGE_5), notice(Operation.FORK_SHARED, *page_6)]
    both = [(Call.UNMAP, PAGE_5), (Call.UNMAP, page_6)]
    assert unheard(said, [SLOT], leaf(5) | leaf(6), both[:1]) == []
    told = [Breach(BreachKind.TOLD, IPA + 6 * PAGE)]
    assert unheard(said, [SLOT], leaf(5) | leaf(6), both) == told
    assert unheard(said, [SLOT], leaf(5) | leaf(6), [(Call.UNMAP, (PAGE_5[0], page_6[1]))]) == told


def test_every_operation_is_witnessed_by_a_case():
    cases = "".join(path.read_text() for path in (ROOT / "testcases").rglob("*.py"))
    calls = re.findall(r"(?:host_does|page_out|witness|also)\(([^()]*)", cases)
    witnessed = {name for call in calls for name in re.findall(r"Operation\.(\w+)", call)}
    assert witnessed == {operation.name for operation in Operation}


def test_the_document_is_the_table_under_a_heading():
    heading, text, rows = document().split("\n\n")
    assert heading.startswith("# ") and "`arm-kvm obligations`" in text
    assert rows == "\n".join(table()) + "\n"


@pytest.mark.parametrize("operation", Operation)
def test_the_table_has_a_line_for_every_operation(operation):
    (line,) = [line for line in table() if line.startswith(f"| {operation.value} |")]
    assert RULES[operation].duty.value in line and RULES[operation].notified.value in line
    assert ("read-only" in line.split("|")[4]) == RULES[operation].change_pte


# -- ranges ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "start", "end", "owed"),
    [
        (Operation.DONTNEED, HVA + 1, HVA + PAGE + 1, (HVA, HVA + 2 * PAGE)),
        (Operation.FORK, *PAGE_5, VMA),
        (Operation.THP_COLLAPSE, *PAGE_5, (HVA, HVA + HUGE)),
        (Operation.PUNCH_HOLE, HVA + 1, HVA + 3 * PAGE + 1, (HVA + PAGE, HVA + 3 * PAGE)),
        (Operation.TRUNCATE, HVA + HUGE + 1, HVA + HUGE + 2, (HVA + HUGE + PAGE, VMA[1])),
        (Operation.PUNCH_HOLE, HVA + 1, HVA + 2, (HVA + PAGE, HVA + PAGE)),
    ],
)
def test_ranges(operation, start, end, owed):
    assert notice(operation, start, end).owed == owed


def test_a_hole_within_a_page_owes_nothing_and_may_split_the_huge_page_around_it():
    said = notice(Operation.PUNCH_HOLE, HVA + 1, HVA + 2)
    assert said.may_go == (HVA, HVA + HUGE)
    assert violations([said], [SLOT], leaf(0), leaf(0)) == violations([said], [SLOT], leaf(0), {}) == []


def test_every_alias_of_a_page_counts():
    alias = Memslot(1, 0, HUGE, HVA)
    found = violations([notice(Operation.DONTNEED)], [SLOT, alias], leaf(5), leaf(5))
    low = {5 * PAGE: leaf(5)[IPA + 5 * PAGE]}
    assert [v.ipa for v in found] == [IPA + 5 * PAGE]
    assert [v.ipa for v in violations([notice(Operation.DONTNEED)], [SLOT, alias], low, low)] == [5 * PAGE]
    assert violations([notice(Operation.DONTNEED)], [], leaf(5), leaf(5)) == []


def test_a_range_must_lie_in_its_vma():
    with pytest.raises(ValueError, match="within the VMA"):
        notice(Operation.DONTNEED, HVA - PAGE, HVA)


@given(st.sampled_from(Operation), st.integers(0, 4 * HUGE - 1), st.integers(1, 3 * HUGE))
def test_the_duty_lies_within_what_may_go(operation, offset, size):
    said = notice(operation, HVA + offset, min(HVA + offset + size, VMA[1]))
    assert said.owed[0] <= said.owed[1]
    if said.may_go is not None:
        assert said.may_go[0] <= said.owed[0] and said.owed[1] <= said.may_go[1]


@given(st.sampled_from(Operation), st.sets(st.integers(0, 4 * 512 - 1), max_size=30))
def test_a_kernel_that_unmaps_all_it_may_breaks_nothing(operation, pages):
    """KVM on Arm does so: it unmaps every notified range."""
    before = {ipa: word for n in pages for ipa, word in leaf(n).items()}
    may_go = notice(operation).may_go or (0, 0)
    after = {ipa: word for ipa, word in before.items() if not may_go[0] <= ipa - IPA + HVA < may_go[1]}
    assert violations([notice(operation)], [SLOT], before, after) == []


def test_a_leaf_that_goes_must_be_in_a_call():
    """E.g. the table with the page's neighbours was freed too early."""
    before = leaf(4) | leaf(5) | leaf(6)
    calls = [(Call.UNMAP, PAGE_5), (Call.AGE, (HVA, HVA + 8 * PAGE))]
    assert unasked([SLOT], before, leaf(4) | leaf(6), calls) == unasked([SLOT], before, before, []) == []
    found = unasked([SLOT], before, {}, calls)
    assert [(v.kind, v.ipa) for v in found] == [(BreachKind.LOST, IPA + 4 * PAGE), (BreachKind.LOST, IPA + 6 * PAGE)]


def test_a_block_goes_as_a_whole_if_any_of_it_is_in_a_call():
    block = leaf(512, level=2)
    inside = (HVA + 700 * PAGE, HVA + 701 * PAGE)
    assert unasked([SLOT], block, {}, [(Call.SET, inside)]) == []
    assert [v.kind for v in unasked([SLOT], block, {}, [(Call.UNMAP, PAGE_5)])] == [BreachKind.LOST]
    pages = {ipa: word for n in range(512, 1024) for ipa, word in leaf(n).items()}
    assert unasked([SLOT], block, pages, []) == [], "broken up, and all there"
