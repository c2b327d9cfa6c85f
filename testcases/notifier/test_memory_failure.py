"""Memory failure: a bad frame is taken out of every mapping, and the process that uses it gets SIGBUS.

mm/memory-failure.c (CONFIG_MEMORY_FAILURE: not on 32-bit Arm), arch/arm64/kvm/mmu.c kvm_send_hwpoison_signal.
"""

import numpy as np
import pytest
from arm_kvm.vocabulary import PAGE, Advice, Operation, RunFailed

IPA = 0x8000_0000
pytestmark = [pytest.mark.native, pytest.mark.vcpus(2, pinned=True), pytest.mark.needs("memory-failure")]


def test_guest_that_reads_a_bad_page(vm, witness, stage2):
    """Stage 2 loses the page at once, and every later access of the guest sends the VMM SIGBUS."""
    memory = vm.add_memory(IPA, 16 * PAGE)
    vm.guest.fill(IPA, 16)
    with witness(Operation.POISON, memory, 8 * PAGE, PAGE):
        memory.advise(Advice.HWPOISON, 8 * PAGE, PAGE)
    assert stage2(vm).leaf(IPA + 8 * PAGE) is None
    for _ in range(2):
        with pytest.raises(RunFailed) as failure:
            vm.guest.read(IPA + 8 * PAGE)
        assert failure.value.exit.kind == "bus-error"
    memory.replace(8 * PAGE, PAGE)
    assert vm.guest.read(IPA + 8 * PAGE) == 0
    assert vm.guest.check(IPA, 8) == vm.guest.check(IPA + 9 * PAGE, 7) == []
    stage2(vm)


def test_guests_that_go_on_beside_it(vm, witness):
    """One page fails while both vCPUs store to its neighbours; the neighbours that they leave alone are kept, too."""
    memory = vm.add_memory(IPA, 16 * PAGE)
    vm.guest.fill(IPA + 8 * PAGE, 8)
    with vm.guests[0].hammering(IPA, 8) as one, vm.guests[1].hammering(IPA + 4, 8) as other:
        with witness(Operation.POISON, memory, 15 * PAGE, PAGE, exact=False) as seen:
            memory.advise(Advice.HWPOISON, 15 * PAGE, PAGE)
        assert seen.after[vm.id].leaf(IPA + 15 * PAGE) is None
    memory.replace(15 * PAGE, PAGE)
    words = np.frombuffer(memory.read(0, 8 * PAGE), dtype="<u4").reshape(8, -1)
    assert (words[:, :2] == [one.rounds, other.rounds]).all()
    assert vm.guest.check(IPA + 8 * PAGE, 7) == []


def test_page_that_fails_unread(vm, stage2):
    """The guest never accesses the bad page, so the signal sent to the VMM must not show as the guest's bus error."""
    memory = vm.add_memory(IPA, 16 * PAGE)
    vm.guest.fill(IPA, 16)
    assert stage2(vm).mapped(IPA, 16 * PAGE)
    memory.advise(Advice.HWPOISON, 15 * PAGE, PAGE)
    vm.guest.start_hammer(IPA, 8)
    vm.vcpus[0].kick()
    assert vm.vcpus[0].wait().kind == "interrupted"
    memory.replace(15 * PAGE, PAGE)
