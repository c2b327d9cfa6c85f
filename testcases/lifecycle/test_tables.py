"""A VM's table pages: the root lives as long as the VM, the others from the fault that needs them to their last entry.

virt/kvm/arm/mmu.c (5.4) kvm_alloc_stage2_pgd, kvm_free_stage2_pgd, clear_stage2_pmd_entry; arch/arm64/kvm/hyp/pgtable.c
kvm_pgtable_stage2_init, kvm_pgtable_stage2_destroy, stage2_unmap_walker. The tables' frames are compared with the page
allocator's own trace events.
"""

import itertools

import numpy as np
import pytest
from arm_kvm.vocabulary import GIB, PAGE, Advice, Child, Fleet, Frame, calls, facilities

IPA = 0x8000_0000
GICD, GICC = 0x2C00_1000, 0x2C00_2000
PARTS = [calls.Part.VM, calls.Part.VCPU, calls.Part.RUN]
pytestmark = pytest.mark.native


@pytest.fixture
def busy_vm(make_vm):
    """``busy_vm()``: a VM with pages in three GiB of IPA (the payload's too): three tables each of levels 2 and 3."""

    def make():
        vm = make_vm()
        for gib in (2, 3):
            vm.add_memory(gib * GIB, 4 * PAGE)
            vm.guest.fill(gib * GIB, 4)
        return vm

    return make


def test_root_comes_with_the_vm_zeroed(make_vm, page_trace, root, entries):
    """The root is allocated, zeroed, while the VM is created, and later holds nothing but what faults put there."""
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
    """Every zeroed frame is freed again, but for the few that the host itself allocates meanwhile.

    The roots cannot be told apart: no CPU ever had them in VTTBR.
    """
    count = 16

    def come_and_go():
        for vm in make_vms(count):
            vm.destroy()

    come_and_go()  # the first VMs fill the host's own caches
    with page_trace() as pages:
        come_and_go()
    assert len(pages.zeroed) >= count
    assert len(pages.zeroed - pages.freed) < count, "each VM seems to have leaked a frame"


def test_table_goes_with_the_last_page_it_maps(vm, page_trace, tables):
    """One page that is still mapped keeps the table."""
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
    "parts", [PARTS, [*PARTS, calls.Part.VGIC]], ids=lambda parts: "-".join(part.value for part in parts)
)
def test_tables_are_there_while_anybody_holds_the_vm(make_vm, make_vgic, page_trace, tables, parts):
    """The VM's descriptor, the vCPU's, the mapping of its run page and the VGIC's descriptor are closed in every order.

    Only closing the last one frees the tables.
    """
    for order in itertools.permutations(parts):
        vm = make_vm()
        if calls.Part.VGIC in parts:
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
    """The VMM's memory may be unmapped before or after the VM is destroyed: either way no table is left."""
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
    """The VMM closes everything; the child's copies of the descriptors keep the tables until the child exits."""
    memory = vm.add_memory(IPA, 16 * PAGE)
    vm.memories.remove(memory)  # keeps it mapped: unmapping it would free tables, too
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
    """Create, run and destroy them, 200 at a time: afterwards less than two pages per VM are missing.

    A VM needs at least four pages: two for the root, and one each for levels 2 and 3.
    """

    def generation():
        fleet = Fleet(make_vms(200))
        fleet.ping()
        fleet.destroy()

    for _ in range(2):
        generation()  # allocates what later generations reuse
    before = facilities.free_memory(host)
    for _ in range(10):
        generation()
    assert before - facilities.free_memory(host) < 2 * 2000 * PAGE
