"""Every path that changes a stage-2 table, disabled in the memory of a running kernel.

The random sequences notice, and shrink what they found to a few steps. That tables are not freed, the page allocator's
own trace shows (testcases/lifecycle).
"""

import errno

import pytest
from arm_kvm.model.kvm.notifier import Operation
from arm_kvm.oracle.verdicts import Verdict, Violation
from arm_kvm.sequences.player import Player, SequenceBroken
from arm_kvm.sequences.search import search
from arm_kvm.sequences.steps import Step, StepKind
from arm_kvm.sequences.world import Complaint
from arm_kvm.support.errors import HostOsError
from arm_kvm.vmm.memory import Advice

SHORT = 6  #: steps that a failure is shrunk to, at most
ENOUGH = 400  #: sequences within which it is found
#: What does it, by kernel: the names that there are, of these.
UNMAP = ("kvm_unmap_hva_range", "kvm_unmap_gfn_range")
SET_PTE = ("kvm_set_spte_hva", "kvm_set_spte_gfn")
AGE = ("kvm_age_hva", "kvm_age_gfn")
WRITE_PROTECT = ("stage2_wp_range", "kvm_pgtable_stage2_wrprotect")
FLUSH = ("kvm_arch_flush_shadow_memslot",)
FREE = ("kvm_free_stage2_pgd",)

pytestmark = pytest.mark.native


@pytest.fixture
def shortest(host, oracle, isa):
    """``shortest()``: the shortest sequence that fails, as (steps, complaints)."""

    def look():
        with pytest.raises(SequenceBroken) as found:
            search(lambda: Player(host, oracle, isa), sequences=ENOUGH)
        return found.value.steps, "\n".join(map(str, found.value.complaints))

    return look


def kinds(steps):
    return {step.kind for step in steps}


def test_nothing_is_found_in_a_healthy_kernel(host, oracle, isa):
    """No sequence failed; of the kinds of steps that this host has, chance has left out one or two at most."""
    player = Player(host, oracle, isa)
    player.end()
    tally = search(lambda: Player(host, oracle, isa), sequences=240)
    assert len({kind for kind in StepKind if player.world.can(kind)} - tally.kinds) <= 2


def test_unmapping(without, shortest):
    """A leaf outlives what the host has taken away or protected."""
    with without(*UNMAP, value=0):
        steps, complaints = shortest()
    assert len(steps) <= SHORT
    assert any(word in complaints for word in ("wrong-frame", "excess-permission", "still mapped", "still writable"))


def test_change_pte(without, shortest):
    """After a copy on write, or the first store over the zero page, the new frame is not mapped where it should be."""
    with without(*SET_PTE, value=0):
        steps, complaints = shortest()
    assert len(steps) <= SHORT
    assert "a level 3 table was left" in complaints


def test_ageing(without, shortest):
    """The host asks, and the guest's accessed flag stays."""
    with without(*AGE, value=0):
        steps, complaints = shortest()
    assert len(steps) <= SHORT
    assert steps[-1].kind is StepKind.AGE and "still young" in complaints


def test_write_protection(without, shortest):
    """A page that is clean in the dirty log can be written."""
    with without(*WRITE_PROTECT, value=0):
        steps, complaints = shortest()
    assert len(steps) <= SHORT
    assert StepKind.LOG_ON in kinds(steps) and "excess-permission" in complaints


def test_flushing_of_memslots(without, shortest):
    """The pages of a memslot that was deleted, or has moved, can still be reached."""
    with without(*FLUSH, value=0):
        steps, complaints = shortest()
    assert len(steps) <= SHORT
    assert steps[-1].kind in (StepKind.SLOT_DELETE, StepKind.SLOT_MOVE) and "outside-memslots" in complaints


def test_a_witness_names_it(without, vm, witness):
    """One operation, before and after: what is still there has its name."""
    memory = vm.add_memory(0x8000_0000, 0x1000)
    vm.guest.write(0x8000_0000, 1)
    with pytest.raises(Violation) as found, without(*UNMAP, value=0), witness(Operation.DONTNEED, memory):
        memory.advise(Advice.DONTNEED)
    assert found.value.verdicts & {Verdict.STALE, Verdict.WRONG_FRAME}
    vm.destroy()


def test_freeing_of_tables(without, make_vm, stage2, trace):
    """The page allocator never gets the tables of a destroyed VM."""
    for healthy in (True, False):
        vm = make_vm()
        vm.guest.ping()
        own = {pa >> 12 for pa in stage2(vm).tables.pages.tolist()}
        with trace("kmem:mm_page_free", "kmem:mm_page_free_batched") as events:
            if healthy:
                vm.destroy()
            else:
                with without(*FREE, value=0):
                    vm.destroy()
        freed = {event.fields["pfn"] + n for event in events for n in range(1 << event.fields.get("order", 0))}
        assert own <= freed if healthy else not own & freed


@pytest.mark.parametrize("judge", [Player.settle, lambda player: player.do(Step(StepKind.HOST_READS))])
def test_a_step_is_judged_with_the_next_one_or_at_the_end(without, host, oracle, isa, judge):
    """What is told are the steps up to the one that went wrong, whatever came after."""
    player = Player(host, oracle, isa)
    player.do(Step(StepKind.GUEST_WRITES, page=3))
    with without(*UNMAP, value=0):
        player.do(Step(StepKind.DONTNEED, page=3, last=3))
        with pytest.raises(SequenceBroken) as found:
            judge(player)
    assert [step.kind for step in found.value.steps] == [StepKind.GUEST_WRITES, StepKind.DONTNEED] and player.broken
    player.end()


def test_a_complaint_of_the_kernel_is_shrunk(host, oracle, isa):
    class Complaining(Player):
        def _carry_out(self, step):
            if step.kind is StepKind.FORK:
                self._host.ssh.run("echo '<4>WARNING: CPU: 0 PID: 1 at mm/made_up.c:1' > /dev/kmsg")
            return super()._carry_out(step)

    with pytest.raises(SequenceBroken, match="made_up") as found:
        search(lambda: Complaining(host, oracle, isa), sequences=ENOUGH)
    assert [step.kind for step in found.value.steps] == [StepKind.FORK]


def test_what_does_not_repeat_is_told_all_the_same(host, oracle, isa):
    class Once(Player):
        done = False

        def _carry_out(self, step):
            if step.kind is StepKind.FORK and not Once.done:
                Once.done = True
                raise HostOsError("fork", errno.ENOMEM)
            return super()._carry_out(step)

    with pytest.raises(SequenceBroken, match="fork: ENOMEM") as found:
        search(lambda: Once(host, oracle, isa), sequences=ENOUGH)
    assert found.value.steps[-1].kind is StepKind.FORK and Complaint("(this did not repeat)") in found.value.complaints
