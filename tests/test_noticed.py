"""Every path that changes a stage-2 table is disabled in the memory of a running kernel, and noticed.

The random sequences find it, and shrink the failure to a few steps. Tables that are not freed show in the trace of the
page allocator (testcases/lifecycle).
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

SHORT = 6  #: steps of a shrunk failure, at most
ENOUGH = 400  #: sequences within which it is found
#: The functions of each path, by the names that they have in different kernels.
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


def test_nothing_is_found_in_an_unbroken_kernel(host, oracle, isa):
    """No sequence fails. Of the kinds of steps that this host can do, at most two were not drawn."""
    player = Player(host, oracle, isa)
    player.end()
    tally = search(lambda: Player(host, oracle, isa), sequences=240)
    assert len({kind for kind in StepKind if player.world.can(kind)} - tally.kinds) <= 2


def test_unmapping(without, shortest):
    """A leaf stays although the host has taken the page away or protected it."""
    with without(*UNMAP, value=0):
        steps, complaints = shortest()
    assert len(steps) <= SHORT
    assert any(word in complaints for word in ("wrong-frame", "excess-permission", "still mapped", "still writable"))


def test_change_pte(without, shortest):
    """After a copy on write, or the first store to a zero page, the new frame is not mapped where it should be."""
    with without(*SET_PTE, value=0):
        steps, complaints = shortest()
    assert len(steps) <= SHORT
    assert "a level 3 table was left" in complaints


def test_ageing(without, shortest):
    """The host ages a page, and its access flag in stage 2 stays set."""
    with without(*AGE, value=0):
        steps, complaints = shortest()
    assert len(steps) <= SHORT
    assert steps[-1].kind is StepKind.AGE and "still young" in complaints


def test_write_protection(without, shortest):
    """A page that is clean in the dirty log is writable."""
    with without(*WRITE_PROTECT, value=0):
        steps, complaints = shortest()
    assert len(steps) <= SHORT
    assert StepKind.LOG_ON in kinds(steps) and "excess-permission" in complaints


def test_flushing_of_memslots(without, shortest):
    """A memslot that was deleted or moved is still mapped at its old IPA."""
    with without(*FLUSH, value=0):
        steps, complaints = shortest()
    assert len(steps) <= SHORT
    assert steps[-1].kind in (StepKind.SLOT_DELETE, StepKind.SLOT_MOVE) and "outside-memslots" in complaints


def test_a_witness_gives_a_verdict(without, vm, witness):
    """After a single operation, too, what is still mapped has a verdict."""
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
    """The failure lists the steps up to the one that went wrong, and none after it."""
    player = Player(host, oracle, isa)
    player.do(Step(StepKind.GUEST_WRITES, page=3))
    with without(*UNMAP, value=0):
        player.do(Step(StepKind.DONTNEED, page=3, last=3))
        with pytest.raises(SequenceBroken) as found:
            judge(player)
    assert [step.kind for step in found.value.steps] == [StepKind.GUEST_WRITES, StepKind.DONTNEED] and player.broken
    player.end()


def test_a_splat_is_shrunk(host, oracle, isa):
    class Complaining(Player):
        def _carry_out(self, step):
            if step.kind is StepKind.FORK:
                self._host.ssh.run("echo '<4>WARNING: CPU: 0 PID: 1 at mm/made_up.c:1' > /dev/kmsg")
            return super()._carry_out(step)

    with pytest.raises(SequenceBroken, match="made_up") as found:
        search(lambda: Complaining(host, oracle, isa), sequences=ENOUGH)
    assert [step.kind for step in found.value.steps] == [StepKind.FORK]


def test_a_failure_that_does_not_repeat_is_reported(host, oracle, isa):
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
