"""VMs that end abruptly: the VMM is killed or runs out of memory, or a VM or memslot goes while it is in use.

mmu_notifier release, kvm_flush_shadow_all; mm/oom_kill.c, whose reaper may not sleep in the notifier (b5331379bc62);
8b3405e345b5 and 0c428a6a9256: the tables are freed while a notifier walks them.
"""

import time

import pytest
from arm_kvm.vocabulary import PAGE, Advice, Memslot, Mmio, calls, facilities

IPA = 0x8000_0000
MIB = 1 << 20
pytestmark = pytest.mark.native


@pytest.fixture
def vmm_vm(make_vmm, isa):
    """A VM of another process, with two vCPUs, as the pair (process, VM)."""
    vmm = make_vmm()
    return vmm, vmm.create_vm(isa, vcpus=2)


def works(make_vm, stage2):
    """Whether the host can still create and run a VM."""
    vm = make_vm()
    vm.add_memory(IPA, PAGE)
    vm.guest.write(IPA, 0xA11)
    return vm.guest.read(IPA) == 0xA11 and stage2(vm).leaf(IPA) is not None


def test_killed_while_its_guests_fault(vmm_vm, make_vm, stage2, tables, page_trace):
    """SIGKILL stops the guests and frees the tables; the host carries on."""
    vmm, vm = vmm_vm
    vm.add_memory(IPA, 64 * MIB)
    vm.guest.fill(IPA, 16)
    own = tables(vm)
    vm.guests[0].start_fill(IPA, 64 * MIB // PAGE)
    vm.guests[1].start_fill(IPA + 4, 64 * MIB // PAGE)
    with page_trace() as pages:
        vmm.kill()
    assert own <= pages.freed
    assert works(make_vm, stage2)


def test_killed_while_its_guests_hammer_and_its_memory_goes(vmm_vm, make_vm, stage2):
    vmm, vm = vmm_vm
    memory = vm.add_memory(IPA, 64 * PAGE)
    vm.guests[0].start_hammer(IPA, 64)
    vm.guests[1].start_hammer(IPA + 4, 64)
    memory.start_storm(Advice.DONTNEED)
    time.sleep(0.1)
    vmm.kill()
    assert works(make_vm, stage2)


def test_out_of_memory(vmm_vm, make_vm, stage2, host):
    """A guest touches more than its VMM's memory cgroup allows: the OOM killer kills the VMM, and only the VMM."""
    vmm, vm = vmm_vm
    vm.add_memory(IPA, 128 * MIB)
    vm.guest.ping()
    with facilities.memory_cgroup(host, vmm.pid) as group:
        group.limit(32 * MIB)
        vm.guest.start_fill(IPA, 128 * MIB // PAGE)
        vmm.await_end()
        assert group.oom_kills() == 1
    assert works(make_vm, stage2)


def test_notifier_during_destruction(make_vm, stage2):
    """Another thread keeps calling madvise on the VM's memory while the VM is destroyed."""
    for _ in range(10):
        vm = make_vm()
        memory = vm.add_memory(IPA, 64 * PAGE)
        vm.guest.fill(IPA, 64)
        with memory.storm(Advice.DONTNEED) as storm:
            calls.close(vm)
        assert storm.calls > 0
        memory.unmap()
    assert works(make_vm, stage2)


def test_vm_closed_while_a_vcpu_runs(vm, tables, page_trace):
    """A running vCPU survives the closing of the VM's descriptor: it holds a reference to the VM."""
    vm.add_memory(IPA, 4 * PAGE)
    vm.guest.fill(IPA, 4)
    own = tables(vm)
    with vm.guest.hammering(IPA, 4):
        with page_trace() as pages:
            calls.close_part(vm, calls.Part.VM)
        assert not own & pages.freed
    assert vm.guest.read(IPA) > 0
    vm.alive = False
    with page_trace() as pages:
        calls.close_part(vm, calls.Part.RUN)
        calls.close_part(vm, calls.Part.VCPU)
    assert own <= pages.freed


@pytest.mark.vcpus(2)
def test_neighbouring_memslot_deleted_under_a_running_vcpu(vm, stage2):
    """A memslot is created and deleted while both vCPUs store to its neighbour: no store is lost."""
    memory = vm.add_memory(IPA, 64 * PAGE)
    other = vm.memory(64 * PAGE)
    with vm.guests[0].hammering(IPA, 64) as first, vm.guests[1].hammering(IPA + 4, 64) as second:
        for _ in range(10):
            vm.add_memory(IPA + 64 * PAGE, 64 * PAGE, memory=other)
            vm.delete_slot(IPA + 64 * PAGE)
            stage2(vm)
    counted = [int.from_bytes(memory.read(page * PAGE + 4 * n, 4), "little") for n in (0, 1) for page in range(64)]
    assert counted == [first.rounds] * 64 + [second.rounds] * 64


def test_memslot_deleted_under_the_vcpu_that_uses_it(vm, stage2):
    """While the memslot is gone, accesses are MMIO exits; once it is back, the guest finds its memory again."""
    memory = vm.add_memory(IPA, 4 * PAGE)
    slot = vm.slot_at(IPA)
    stage2(vm)
    with vm.guest.hammering(IPA, 4) as hammer:
        vm.delete_slot(IPA)
        assert stage2(vm).mapped(IPA, 4 * PAGE) == []
        time.sleep(1.0)  # the guest reaches the deleted memslot
        vm.set_memslot(Memslot(slot.slot, IPA, slot.size, memory.hva))
    assert hammer.rounds > 0
    assert vm.exits and all(isinstance(exit_, Mmio) and IPA <= exit_.ipa < IPA + 4 * PAGE for exit_ in vm.exits)
    vm.guest.fill(IPA, 4)
    assert vm.guest.check(IPA, 4) == []
