"""What the model complains of: every complaint is provoked, and an unbroken host provokes none."""

import pytest
from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.kvm.memslots import NOTHING_OWED
from arm_kvm.oracle.verdicts import Verdict
from arm_kvm.sequences.player import SequenceBroken
from arm_kvm.sequences.steps import PAGES, Step, StepKind
from arm_kvm.sequences.world import PAGE, PLACES, Answer, Look, Rights, VmModel
from arm_kvm.support.judged import Judged

HVA, PA = 0xB600_0000 - PAGES // 2 * PAGE, 0x5000_0000
IPAS = {slot: places[0] for slot, places in PLACES.items()}
FRAMES = tuple(PA + n * PAGE for n in range(PAGES))


def world(kernel=(5, 4), **more):
    return VmModel(HVA, kernel, **more)


def leaf(page, slot=1, frame=None, **kind):
    pa = PA + page * PAGE if frame is None else frame
    return {IPAS[slot] + page * PAGE: (3, d.encode(d.LeafFields(pa, **kind), 3))}


def look(leaves=None, spare=0, frames=FRAMES):
    return Look(leaves or {}, spare, frames)


def complaints(step, before, after, of=None, owed=NOTHING_OWED):
    return (of or world()).complaints(step, before, after, owed)


def only(found, words):
    return len(found) == 1 and words in found[0].words


READ, WRITE = Step(StepKind.GUEST_READS, page=3), Step(StepKind.GUEST_WRITES, page=3)


def test_an_access_maps_its_page_and_nothing_else():
    assert complaints(READ, look(), look(leaf(3))) == complaints(WRITE, look(leaf(4)), look(leaf(3) | leaf(4))) == []
    assert only(complaints(READ, look(), look()), "not mapped")
    assert only(complaints(READ, look(), look(leaf(3, af=False))), "not young")
    assert only(complaints(WRITE, look(), look(leaf(3, s2ap=d.Grant.READ))), "not writable")
    assert only(complaints(READ, look(), look(leaf(3) | leaf(9))), "without a guest")
    assert only(complaints(READ, look(leaf(4)), look(leaf(3))), "outside what may go")


def test_a_refused_access_may_leave_its_page_young():
    """A store to an old page that the VMM's mapping forbids: one fault sets the flag, and the next is refused."""
    forbidden = world(rights=[Rights.READ] * PAGES)
    old, young = leaf(3, af=False, s2ap=d.Grant.READ), leaf(3, s2ap=d.Grant.READ)
    assert complaints(WRITE, look(old), look(young), forbidden) == complaints(WRITE, look(), look(), forbidden) == []
    assert only(complaints(WRITE, look(old), look(leaf(3)), forbidden), "without a notification")
    assert only(
        complaints(WRITE, look(old | leaf(4, af=False)), look(old | leaf(4)), forbidden), "without a notification"
    )
    assert complaints(WRITE, look(), look(young), forbidden) != []


def test_an_access_that_copies_takes_the_old_frame_from_the_alias():
    copied = (*FRAMES[:3], PA + (1 << 20), *FRAMES[4:])
    before, new = look(leaf(3, slot=2)), leaf(3, frame=copied[3])
    assert complaints(WRITE, before, look(new, frames=copied)) == []
    assert only(complaints(WRITE, before, look(new | leaf(3, slot=2), frames=copied)), "still")


def test_what_the_host_takes_away_must_be_unmapped():
    drop = Step(StepKind.DONTNEED, page=2, last=4)
    assert complaints(drop, look(leaf(3)), look()) == []
    assert only(complaints(drop, look(leaf(3)), look(leaf(3))), "old frame is still mapped")
    assert only(complaints(drop, look(leaf(3, slot=2)), look(leaf(3, slot=2))), "old frame")
    protect = Step(StepKind.PROTECT_READ, page=3, last=3)
    assert only(complaints(protect, look(leaf(3)), look(leaf(3))), "still writable")
    assert only(complaints(Step(StepKind.FORK), look(leaf(3)), look(leaf(3))), "still writable")


def test_a_complaint_has_the_verdict_of_its_breach():
    drop = Step(StepKind.DONTNEED, page=2, last=4)
    found = complaints(drop, look(leaf(3)), look(leaf(3) | leaf(9), spare=1))
    assert [complaint.verdict for complaint in found] == [Verdict.STALE, Verdict.APPEARED, None]
    broken = SequenceBroken([drop], found)
    assert isinstance(broken, Judged) and broken.verdicts == {Verdict.STALE, Verdict.APPEARED}
    assert SequenceBroken([drop], found[2:]).verdicts == frozenset()


def test_change_pte_is_expected_up_to_6_9():
    touch = Step(StepKind.HOST_WRITES, page=3)
    copied = (*FRAMES[:3], PA + (1 << 20), *FRAMES[4:])
    before, after = look(leaf(3) | leaf(4)), look(leaf(4), frames=copied)
    assert only(complaints(touch, before, after), "level 3 table was left")
    assert complaints(touch, before, after, world(kernel=(6, 10))) == []


def test_a_deleted_memslot_is_unmapped():
    w = world()
    gone = w.set(w.wanted(Step(StepKind.SLOT_DELETE, slot=1)))
    delete = Step(StepKind.SLOT_DELETE, slot=1)
    assert complaints(delete, look(leaf(3)), look(), w, gone) == []
    assert only(complaints(delete, look(leaf(3)), look(leaf(3)), w, gone), "still mapped")


def test_a_moved_memslot_is_unmapped_at_its_old_ipa():
    w, move, elsewhere = world(), Step(StepKind.SLOT_MOVE, slot=1), PLACES[1][1] + 3 * PAGE
    gone = w.set(w.wanted(move))
    assert w.ipa(READ) == elsewhere and w.answer(READ) is Answer.DONE
    assert complaints(move, look(leaf(3)), look(), w, gone) == []
    assert only(complaints(move, look(leaf(3)), look(leaf(3)), w, gone), "still mapped")
    moved = {elsewhere: leaf(3)[IPAS[1] + 3 * PAGE]}
    assert complaints(READ, look(), look(moved), w) == [] != complaints(READ, look(), look(leaf(3)), w)
    w.set(w.wanted(move))
    assert w.ipa(READ) == IPAS[1] + 3 * PAGE


def test_stores_to_a_read_only_memslot_are_mmio():
    w = world(rights=[Rights.READ] * PAGES)
    w.set(w.wanted(Step(StepKind.SLOT_DELETE)))
    assert w.allows(Step(StepKind.SLOT_READONLY)) and not w.allows(Step(StepKind.SLOT_CREATE))
    w.set(w.wanted(Step(StepKind.SLOT_READONLY)))
    assert (w.answer(READ), w.answer(WRITE)) == (Answer.DONE, Answer.MMIO)
    assert (
        w.allows(Step(StepKind.LOG_ON))
        and not w.allows(Step(StepKind.LOG_ON, slot=2))
        and not w.allows(Step(StepKind.NEW_VM))
    )
    w.set(w.wanted(Step(StepKind.LOG_ON)))
    w.set(w.wanted(Step(StepKind.SLOT_MOVE)))
    assert w.answer(WRITE) is Answer.MMIO and w.allows(Step(StepKind.DIRTY_LOG))


def test_mremap_moves_content_and_leaves_a_hole():
    w, move = world(), Step(StepKind.MREMAP, page=3, to=9)
    w.stored(WRITE, 7)
    before = look(leaf(3) | leaf(9) | leaf(3, slot=2))
    assert complaints(move, before, look(), w) == []
    assert only(complaints(move, before, look(leaf(3, slot=2)), w), "old frame is still mapped")
    assert only(complaints(move, before, look(leaf(9)), w), "old frame is still mapped")
    w.host_did(move)
    assert w.content[9] == {7} and (w.rights[3], w.rights[9]) == (Rights.HOLE, Rights.WRITE)
    assert not w.allows(move) and not w.allows(Step(StepKind.MREMAP, page=4, to=4))
    assert (
        w.allows(Step(StepKind.MREMAP, page=9, to=3))
        and w.allows(Step(StepKind.SLOT_MOVE))
        and w.allows(Step(StepKind.MUNMAP))
    )


def test_which_steps_a_hole_allows():
    w = world()
    assert only(complaints(Step(StepKind.MUNMAP, page=3, last=3), look(leaf(3)), look(leaf(3))), "old frame")
    w.host_did(Step(StepKind.MUNMAP, page=3, last=3))
    assert not w.allows(Step(StepKind.DONTNEED, page=2, last=4)) and w.allows(Step(StepKind.DONTNEED, page=4, last=5))
    assert not w.allows(Step(StepKind.HOST_READS, page=3)) and w.allows(Step(StepKind.REPLACE, page=2, last=4))


def test_pages_that_are_paged_out_must_be_unmapped_and_no_others():
    out, without = Step(StepKind.PAGE_OUT, page=3, last=4), (*FRAMES[:3], 0, *FRAMES[4:])
    both = leaf(3) | leaf(4)
    aged = leaf(4, af=False)
    assert complaints(out, look(both), look(aged, frames=without)) == complaints(out, look(both), look(both)) == []
    assert only(complaints(out, look(both), look(both, frames=without)), "old frame is still mapped")
    assert only(complaints(out, look(both), look(leaf(3))), "outside what may go")
    assert not world(swaps=False).allows(out)


def test_pages_given_to_madv_free_may_be_unmapped_or_reclaimed():
    """Whether or not it was written since, reclaim tries to take it."""
    w = world()
    w.host_did(Step(StepKind.FREE, page=3, last=3))
    for kind in (StepKind.PAGE_OUT, StepKind.AGE):
        tried, taken = Step(kind, page=3, last=4), (*FRAMES[:3], 0, *FRAMES[4:])
        assert complaints(tried, look(leaf(3)), look(), w) == complaints(tried, look(leaf(3)), look(leaf(3)), w) == []
        assert complaints(tried, look(leaf(3)), look(frames=taken), w) == []
        assert only(complaints(tried, look(leaf(3)), look(leaf(3), frames=taken), w), "old frame is still mapped")
    assert only(complaints(Step(StepKind.AGE, page=4, last=4), look(leaf(4)), look(), w), "outside what may go")
    w.host_did(Step(StepKind.MREMAP, page=3, to=9))
    assert w.freed == {9}
    w.host_did(Step(StepKind.REPLACE, page=9, last=9))
    assert w.freed == set()


def test_a_page_may_be_copied_as_soon_as_it_is_swapped_in():
    """If a child shares it. Then change_pte maps the copy where a level 3 table exists."""
    out, w = (*FRAMES[:3], 0, *FRAMES[4:]), world()
    before, now = look(leaf(4), frames=out), leaf(4) | leaf(3, s2ap=d.Grant.READ)
    touch = Step(StepKind.HOST_WRITES, page=3)
    assert complaints(touch, before, before, w) == []
    assert only(complaints(touch, before, look(now), w), "without a guest")
    w.host_did(Step(StepKind.FORK))
    assert complaints(touch, before, look(now), w) == complaints(touch, before, look(leaf(4)), w) == []
    assert complaints(touch, before, look(leaf(4) | leaf(3)), w) != []


def test_pages_in_other_tables_stay():
    """Half the memory is in one 2 MiB block, half in the next: a notifier call unmaps only in the blocks it covers."""
    drop = Step(StepKind.DONTNEED, page=2, last=4)
    assert complaints(drop, look(leaf(3) | leaf(5)), look()) == []
    assert only(complaints(drop, look(leaf(3) | leaf(9)), look()), "outside what may go")


def test_the_dirty_log_makes_pages_read_only():
    log = Step(StepKind.LOG_ON, slot=1)
    both, protected = leaf(3) | leaf(3, slot=2), leaf(3, s2ap=d.Grant.READ) | leaf(3, slot=2)
    w = world()
    on = w.set(w.wanted(log))
    assert complaints(log, look(both), look(protected), w, on) == []
    assert only(complaints(log, look(both), look(both), w, on), "changed")
    w.stored(WRITE, 7)
    _, clean = w.slots.take_dirty_log(1)
    read = Step(StepKind.DIRTY_LOG, slot=1)
    assert complaints(read, look(both), look(protected), w, clean) == []
    assert only(complaints(read, look(both), look(both), w, clean), "changed")
    assert only(
        complaints(read, look(both | leaf(4)), look(protected | leaf(4, s2ap=d.Grant.READ)), w, clean), "changed"
    )


def test_ageing_clears_the_access_flag_of_written_pages():
    w, age = world(), Step(StepKind.AGE, page=3, last=3)
    w.stored(WRITE, 7)
    assert complaints(age, look(leaf(3)), look(leaf(3, af=False)), w) == []
    assert only(complaints(age, look(leaf(3)), look(leaf(3)), w), "still young")
    assert complaints(age, look(leaf(3)), look(leaf(3))) == []  # as far as the model knows, this is the zero page
    w.host_did(Step(StepKind.FORK))
    assert complaints(age, look(leaf(3)), look(leaf(3)), w) == []


def test_a_table_that_maps_nothing_is_reported():
    assert only(complaints(READ, look(), look(leaf(3), spare=1)), "table pages map nothing")


@pytest.mark.parametrize(
    ("rights", "read", "write"),
    [
        (Rights.WRITE, Answer.DONE, Answer.DONE),
        (Rights.READ, Answer.DONE, Answer.EFAULT),
        (Rights.NONE, Answer.EFAULT, Answer.EFAULT),
        (Rights.HOLE, Answer.EFAULT, Answer.EFAULT),
    ],
)
def test_how_an_access_must_end(rights, read, write):
    w = world()
    w.rights[3] = rights
    assert (w.answer(READ), w.answer(WRITE)) == (read, write)
    w.set(w.wanted(Step(StepKind.SLOT_DELETE, slot=1)))
    assert w.answer(READ) is w.answer(WRITE) is Answer.MMIO


def test_which_steps_make_sense():
    w = world()
    assert (
        w.allows(Step(StepKind.FORK))
        and not w.allows(Step(StepKind.CHILD_EXITS))
        and not w.allows(Step(StepKind.SLOT_CREATE))
    )
    w.host_did(Step(StepKind.PROTECT_READ, page=3, last=3))
    assert w.allows(Step(StepKind.HOST_READS, page=3)) and not w.allows(Step(StepKind.HOST_WRITES, page=3))
    assert not w.allows(Step(StepKind.LOG_ON)) and not w.allows(Step(StepKind.NEW_VM))
    w.host_did(Step(StepKind.REPLACE, page=3, last=3))
    assert w.allows(Step(StepKind.LOG_ON)) and not w.allows(Step(StepKind.DIRTY_LOG))
    w.host_did(Step(StepKind.PROTECT_READ, page=3, last=3))
    w.host_did(Step(StepKind.FORK))
    w.host_did(Step(StepKind.PROTECT_WRITE, page=3, last=3))  # in the VMM, not in its child
    assert w.allows(Step(StepKind.CHILD_WRITES, page=4)) and not w.allows(Step(StepKind.CHILD_WRITES, page=3))
    assert not world(ages=False).allows(Step(StepKind.AGE)) and world().allows(Step(StepKind.AGE))


def test_content_after_each_operation():
    w = world()
    w.stored(WRITE, 7)
    w.host_did(Step(StepKind.FREE, page=3, last=3))
    assert w.content[3] == {7, 0}
    w.stored(WRITE, 8)
    assert w.content[3] == {8}
    w.host_did(Step(StepKind.DONTNEED, page=0, last=15))
    assert w.content[3] == {0}
