"""The tables of a VM: the root comes and goes with the VM, the others come with faults and go with what they map.

virt/kvm/arm/mmu.c (5.4) kvm_alloc_stage2_pgd, kvm_free_stage2_pgd, clear_stage2_pmd_entry; arch/arm64/kvm/hyp/pgtable.c
kvm_pgtable_stage2_init, kvm_pgtable_stage2_destroy, stage2_unmap_walker. Frames are compared with the page allocator's
own trace events.
"""

import itertools

import numpy as np
import pytest
from arm_kvm.host.facilities import free_memory
from arm_kvm.vmm import calls
from arm_kvm.vmm.calls import Part
from arm_kvm.vmm.fleet import Fleet
from arm_kvm.vmm.memory import PAGE, Advice, Child
from arm_kvm.vmm.vgic import Frame

IPA = 0x8000_0000
GICD, GICC = 0x2C00_1000, 0x2C00_2000
GIB = 1 << 30
pytestmark = pytest.mark.native


@pytest.fixture
def busy_vm(make_vm):
    """A VM with pages in three GiB of its address space, its payload's among them: three tables each of levels 2, 3."""

    def make():
        vm = make_vm()
        for gib in (2, 3):
            vm.add_memory(gib * GIB, 4 * PAGE)
            vm.guest.fill(gib * GIB, 4)
        return vm

    return make


def test_root_comes_with_the_vm_zeroed(make_vm, page_trace, root, entries):
    """Its frames are given out while the VM is made; once it has run, they hold what faults put there and no more."""
    with page_trace() as pages:
        vm = make_vm()
    vm.guest.ping()
    assert root(vm) <= pages.allocated
    assert root(vm) <= pages.zeroed
    words = entries(root(vm))
    assert np.count_nonzero(words) == 1  # the GiB of the payload


def test_every_page_goes_with_the_vm(busy_vm, page_trace, tables, stage2):
    vm = busy_vm()
    own = tables(vm)
    assert len(own) == 2 + 3 + 4 and stage2(vm).spare_tables == 0  # payload and mailbox are 16 MiB apart
    with page_trace() as pages:
        vm.destroy()
    assert own <= pages.freed


def test_roots_of_vms_that_never_ran(make_vms, page_trace):
    """Zeroed frames go as they came, but for the few that the host takes for itself meanwhile; which the roots were,
    nobody has seen.
    """
    count = 16

    def come_and_go():
        for vm in make_vms(count):
            vm.destroy()

    come_and_go()  # the host's own caches grow with its first VMs
    with page_trace() as pages:
        come_and_go()
    assert len(pages.zeroed) >= count
    assert len(pages.zeroed - pages.freed) < count, "a frame of each VM at least"


def test_table_goes_with_the_last_page_it_maps(vm, page_trace, tables):
    """And not before: one page left keeps the table."""
    memory = vm.add_memory(IPA, 2 * PAGE)
    vm.guest.ping()
    before = tables(vm)
    vm.guest.fill(IPA, 2)
    added = tables(vm) - before
    assert len(added) == 2
    with page_trace() as pages:
        memory.advise(Advice.DONTNEED, 0, PAGE)
    assert not added & pages.freed and tables(vm) == before | added
    with page_trace() as pages:
        memory.advise(Advice.DONTNEED, PAGE, PAGE)
    assert added <= pages.freed and tables(vm) == before


def test_tables_go_with_their_memslot(vm, page_trace, tables):
    vm.add_memory(IPA, 512 * PAGE)
    vm.guest.ping()
    before = tables(vm)
    vm.guest.fill(IPA, 512)
    added = tables(vm) - before
    with page_trace() as pages:
        vm.delete_slot(IPA)
    assert added <= pages.freed and tables(vm) == before


@pytest.mark.parametrize(
    "parts",
    [(Part.VM, Part.VCPU, Part.RUN), (Part.VM, Part.VCPU, Part.RUN, Part.VGIC)],
    ids=lambda parts: "-".join(part.value for part in parts),
)
def test_tables_are_there_while_anybody_holds_the_vm(make_vm, make_vgic, page_trace, tables, parts):
    """The VM's descriptor, the vCPU's, the mapping of its run page and the VGIC's descriptor, in every order: the last
    one closed frees."""
    for order in itertools.permutations(parts):
        vm = make_vm()
        if Part.VGIC in parts:
            vgic = make_vgic(vm)
            vgic.place(Frame.DISTRIBUTOR, GICD)
            vgic.place(Frame.CPU_INTERFACE, GICC)
            vgic.init()
        vm.add_memory(IPA, PAGE)
        vm.guest.write(IPA, 1)
        own = tables(vm)
        vm.alive = False
        for number, part in enumerate(order, 1):
            with page_trace() as pages:
                calls.close_part(vm, part)
            assert own <= pages.freed if number == len(order) else not own & pages.freed, f"{order}, after {part}"


def test_memory_unmapped_before_and_after_the_vm(make_vm, tables, page_trace):
    """The process's memory may go first or last: both leave nothing."""
    for memory_first in (True, False):
        vm = make_vm()
        memory = vm.add_memory(IPA, 16 * PAGE)
        vm.guest.fill(IPA, 16)
        own = tables(vm)
        with page_trace() as pages:
            if memory_first:
                memory.unmap()
            vm.destroy()
        assert own <= pages.freed


def test_destroyed_from_another_thread(vm, tables, page_trace):
    vm.add_memory(IPA, 16 * PAGE)
    vm.guest.fill(IPA, 16)
    own = tables(vm)
    with page_trace() as pages:
        calls.close_in_another_thread(vm)
    assert own <= pages.freed


def test_a_forked_child_holds_the_vm(vm, tables, page_trace, host):
    """The VMM closes everything; the child's copies of the descriptors keep the tables until it exits."""
    memory = vm.add_memory(IPA, 16 * PAGE)
    vm.memories.remove(memory)  # stays mapped: its end would take tables, too
    child = Child(host.agent)
    try:
        vm.guest.fill(IPA, 16)
        own = tables(vm)
        with page_trace() as held:
            calls.close(vm)
    finally:
        with page_trace() as pages:
            child.end()
    assert not own & held.freed
    assert own <= pages.freed


def test_two_thousand_vms_leave_nothing_behind(host, make_vms):
    """Made, run and destroyed, 200 at a time: afterwards less than two pages a VM are missing.

    A VM needs at least four: two of the root and one each of levels 2 and 3.
    """

    def generation():
        fleet = Fleet(make_vms(200))
        fleet.ping()
        fleet.destroy()

    for _ in range(2):
        generation()  # what is allocated once
    before = free_memory(host)
    for _ in range(10):
        generation()
    assert before - free_memory(host) < 2 * 2000 * PAGE
