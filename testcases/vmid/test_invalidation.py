"""What is unmapped in stage 2 is invalidated in the TLBs of every CPU before the caller goes on.

The guests' results prove nothing here, for an emulated TLB forgets more than a real one has to. The recorded events are
checked against the rules instead, descriptor by descriptor (not-invalidated, break-before-make).
"""

import pytest
from arm_kvm.vocabulary import BLOCK, PAGE, Advice, Child, Prot, SlotFlags

IPA = 0x8000_0000
PAGES = 16
pytestmark = pytest.mark.native


def on_both_cpus(vm):
    """Guest memory to which both vCPUs, one on each CPU, have written."""
    memory = vm.add_memory(IPA, PAGES * PAGE)
    for cpu, vcpu in enumerate(vm.vcpus):
        vcpu.pin(cpu)
        vm.guests[cpu].fill(IPA, PAGES)
    return memory


def read_on(vm):
    """Both guests read a page that remains mapped, so that they cause no invalidation themselves."""
    for guest in vm.guests:
        guest.read(IPA + (PAGES - 1) * PAGE)


def test_pages_the_host_takes_away(make_vm, record, stage2):
    with record():
        vm = make_vm(vcpus=2)
        memory = on_both_cpus(vm)
        memory.advise(Advice.DONTNEED, 0, 4 * PAGE)
        read_on(vm)
    assert stage2(vm).mapped(IPA, 4 * PAGE) == []


def test_pages_the_host_protects(make_vm, record):
    with record():
        vm = make_vm(vcpus=2)
        memory = on_both_cpus(vm)
        memory.protect(Prot.READ)
        read_on(vm)
        memory.protect(Prot.READ_WRITE)
        vm.guests[1].write(IPA, 1)


def test_pages_that_are_copied(make_vm, record, host):
    """Copy on write after a fork replaces the frame: the old descriptor is invalidated first (break before make)."""
    with record():
        vm = make_vm(vcpus=2)
        memory = on_both_cpus(vm)
        child = Child(host.agent)
        vm.guest.read(IPA)
        memory.write(0, b"host")
        vm.guests[1].write(IPA + PAGE, 1)
        child.end()


def test_pages_protected_for_the_dirty_log(make_vm, record):
    with record():
        vm = make_vm(vcpus=2)
        on_both_cpus(vm)
        vm.set_flags(IPA, SlotFlags.LOG_DIRTY_PAGES)
        read_on(vm)
        vm.guest.write(IPA, 1)
        vm.guests[1].write(IPA + PAGE, 1)
        assert vm.dirty_pages(IPA) == [IPA, IPA + PAGE]
        read_on(vm)
        vm.guest.write(IPA, 2)


def test_pages_of_a_deleted_memslot(make_vm, record):
    with record():
        vm = make_vm(vcpus=2)
        on_both_cpus(vm)
        vm.delete_slot(IPA)
        for guest in vm.guests:
            guest.ping()


def test_blocks_that_are_broken_up(make_vm, record, stage2):
    with record():
        vm = make_vm(vcpus=2)
        memory = vm.add_memory(IPA, BLOCK, align=BLOCK)
        memory.advise(Advice.HUGEPAGE)
        for cpu, vcpu in enumerate(vm.vcpus):
            vcpu.pin(cpu)
            vm.guests[cpu].write(IPA + cpu * PAGE, 1)
        assert stage2(vm).leaf(IPA).size == BLOCK
        memory.advise(Advice.DONTNEED, 0, PAGE)
        vm.guest.write(IPA, 2)
        vm.guests[1].write(IPA + 4 * PAGE, 2)
