"""Memory failure: a frame is found bad, taken out of every mapping, and its user is told with SIGBUS.

mm/memory-failure.c (CONFIG_MEMORY_FAILURE: not on 32-bit Arm), arch/arm64/kvm/mmu.c kvm_send_hwpoison_signal.
"""

import numpy as np
import pytest
from arm_kvm.guest.driver import RunFailed
from arm_kvm.model.kvm.notifier import Operation
from arm_kvm.vmm.memory import PAGE, Advice

IPA = 0x8000_0000
pytestmark = [pytest.mark.native, pytest.mark.vcpus(2, pinned=True), pytest.mark.needs("memory-failure")]


def test_guest_that_reads_a_bad_page(vm, witness, stage2):
    """Stage 2 loses the page at once; the guest's next access is the VMM's SIGBUS, again and again."""
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
    """One page fails while both vCPUs work on its neighbours; those that they leave alone stay, too."""
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
    """What tells the VMM of it is no bus error of the guest, which never wants the page: its next exit is another."""
    memory = vm.add_memory(IPA, 16 * PAGE)
    vm.guest.fill(IPA, 16)
    assert stage2(vm).mapped(IPA, 16 * PAGE)
    memory.advise(Advice.HWPOISON, 15 * PAGE, PAGE)
    vm.guest.start_hammer(IPA, 8)
    vm.vcpus[0].kick()
    assert vm.vcpus[0].wait().kind == "interrupted"
    memory.replace(15 * PAGE, PAGE)
