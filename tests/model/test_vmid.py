"""VMIDs: properties of both allocators, and histories that follow from the kernel's source."""

import pytest
from arm_kvm.model.kvm.vmid import Bitmap, Consecutive, Invalidation, VcpuLoads
from hypothesis import given
from hypothesis import strategies as st

ALL = (Invalidation.ALL_VMS_ALL_CPUS,)
CPUS = 3
BITS = 3  # seven VMIDs, so that histories of a few dozen steps roll over many times

#: Histories: which VM enters on which CPU; -1: the vCPU on that CPU is scheduled out.
histories = st.lists(st.tuples(st.integers(-1, 12), st.integers(0, CPUS - 1)), max_size=80)


@pytest.fixture(
    params=[lambda: Consecutive(BITS), lambda: Bitmap(BITS, CPUS)], ids=["consecutive", "bitmap"], scope="module"
)
def make(request):
    return request.param


def steps(make, history):
    """Play a history: each entry with its VM, the generation before it, and the VMs on the CPUs after it."""
    allocator, running = make(), {}
    for vm, cpu in history:
        if vm < 0:
            allocator.leave(cpu)
            running.pop(cpu, None)
            continue
        before = allocator.generation
        entry = allocator.enter(vm, cpu)
        if isinstance(allocator, Consecutive) and entry.generation > before:
            running.clear()  # force_vm_exit(): all guests leave, and come back through enter()
        running[cpu] = (vm, entry.vmid)
        yield vm, entry, before, dict(running)


@given(history=histories)
def test_no_two_vms_share_a_vmid_in_a_generation(make, history):
    owner = {}
    for vm, entry, _, _ in steps(make, history):
        assert 0 < entry.vmid < 1 << BITS
        assert owner.setdefault((entry.generation, entry.vmid), vm) == vm


@given(history=histories)
def test_a_vm_keeps_its_vmid_within_a_generation(make, history):
    held = {}
    for vm, entry, _, _ in steps(make, history):
        assert held.setdefault((entry.generation, vm), entry.vmid) == entry.vmid


@given(history=histories)
def test_only_the_entry_that_begins_a_generation_invalidates(make, history):
    for _, entry, before, _ in steps(make, history):
        assert entry.invalidations == (ALL if entry.generation > before else ())


@given(history=histories)
def test_vms_on_cpus_at_one_time_never_share_a_vmid(make, history):
    """Nor do they over rollovers: a VM on a CPU keeps its VMID, or was forced out."""
    for _, _, _, running in steps(make, history):
        vmids = dict(running.values())
        assert len(set(vmids.values())) == len(vmids)


def test_these_histories_do_roll_over(make):
    """The properties above are about rollovers, so they must happen."""
    generations = {entry.generation for _, entry, _, _ in steps(make, [(n % 13, n % CPUS) for n in range(80)])}
    assert len(generations) > 5


def test_consecutive_numbers_in_order_of_first_run():
    allocator = Consecutive(8)
    first = allocator.enter("one", 0)
    assert (first.vmid, first.invalidations) == (1, ALL)  # the first generation begins like every other
    assert [allocator.enter(vm, 0).vmid for vm in ("two", "one", "three", "two")] == [2, 1, 3, 2]


def test_the_256th_vm_begins_a_generation():
    allocator = Consecutive(8)
    assert [allocator.enter(vm, 0).vmid for vm in range(255)] == list(range(1, 256))
    late = allocator.enter(255, 0)
    assert (late.vmid, late.invalidations, late.generation) == (1, ALL, 3)
    again = allocator.enter(0, 1)
    assert (again.vmid, again.invalidations) == (2, ())


def test_sixteen_bits_hold_65535_vms():
    allocator = Consecutive(16)
    assert {allocator.enter(vm, 0).generation for vm in range(65535)} == {2}
    assert allocator.enter("one more", 0).generation == 3


def test_a_destroyed_vms_vmid_is_not_free_in_its_generation(make):
    allocator = make()
    one = allocator.enter("one", 0)
    allocator.leave(0)
    allocator.forget("one")
    assert allocator.enter("two", 0).vmid == one.vmid + 1
    assert allocator.enter("one", 0).vmid == one.vmid + 2


def test_the_bitmap_begins_without_an_invalidation():
    assert Bitmap(8, 2).enter("one", 0).invalidations == ()


def test_the_bitmap_rolls_over_around_what_runs():
    """VM 7 runs on CPU 1 while the VMIDs run out on CPU 0: it keeps 8, which the search skips."""
    allocator = Bitmap(8, 2)
    for vm in range(255):
        allocator.enter(vm, 0)
    allocator.enter(7, 1)
    numbers = [allocator.enter(vm, 0).vmid for vm in range(300, 310)]
    assert numbers == [1, 2, 3, 4, 5, 6, 7, 9, 10, 11] and allocator.generation == 2
    kept = allocator.enter(7, 1)
    assert (kept.vmid, kept.generation, kept.invalidations) == (8, 2, ())


def test_an_idle_cpu_reserves_nothing():
    allocator = Bitmap(8, 2)
    allocator.enter(0, 1)
    allocator.leave(1)
    for vm in range(1, 255):
        allocator.enter(vm, 0)
    assert allocator.enter(300, 0).vmid == 1


def test_an_old_number_comes_back_when_it_is_free():
    allocator = Bitmap(8, 1)
    for vm in range(256):
        allocator.enter(vm, 0)
    assert (allocator.generation, allocator.enter(100, 0).vmid) == (2, 101)
    assert allocator.enter(0, 0).vmid != 1  # VM 255 has it now


def test_a_reservation_outlives_a_second_rollover():
    """A CPU that stays in its guest has no active VMID after the first rollover, only a reserved one."""
    allocator = Bitmap(8, 2)
    long_run = allocator.enter("long", 1)
    vm = 0
    while allocator.generation < 3:
        entry = allocator.enter(vm, 0)
        assert entry.vmid != long_run.vmid
        vm += 1
    assert allocator.enter("long", 1).vmid == long_run.vmid


IMPOSSIBLE = [lambda: Consecutive(17), lambda: Consecutive(0), lambda: Bitmap(8, 255), lambda: Bitmap(8, 0)]


@pytest.mark.parametrize("impossible", IMPOSSIBLE)
def test_impossible_allocators_are_refused(impossible):
    with pytest.raises(ValueError, match="bits"):
        impossible()


def test_local_invalidation_when_vcpus_of_a_vm_take_turns_on_a_cpu():
    loads = VcpuLoads()
    local = (Invalidation.THIS_VM_THIS_CPU,)
    assert loads.load("vm", 0, 0) == local  # nothing ran here yet: last_vcpu_ran is -1
    assert loads.load("vm", 0, 0) == () and loads.load("other", 0, 0) == local
    assert loads.load("vm", 1, 0) == local and loads.load("vm", 0, 0) == local
    assert loads.load("vm", 0, 1) == local and loads.load("vm", 0, 1) == ()


def test_the_last_vcpu_is_known_until_it_is_invalidated():
    loads = VcpuLoads()
    for vm, cpu in (("vm", 0), ("vm", 1), ("other", 0), ("other", 1)):
        loads.load(vm, 7, cpu)
    loads.invalidated("vm", 0)
    loads.invalidated("nobody", 0)
    assert [loads.last(vm, cpu) for vm in ("vm", "other") for cpu in (0, 1)] == [None, 7, 7, 7]
    loads.invalidated(cpu=1)
    assert [loads.last(vm, cpu) for vm in ("vm", "other") for cpu in (0, 1)] == [None, None, 7, None]
    loads.load("vm", 8, 1)
    loads.invalidated("other")
    assert loads.last("other", 0) is None and loads.last("vm", 1) == 8
    loads.invalidated()
    assert loads.last("vm", 1) is None


def test_the_consecutive_allocator_ignores_exits():
    allocator = Consecutive()
    one = allocator.enter("one", 0)
    allocator.leave(0)
    assert allocator.enter("one", 1).vmid == one.vmid


# -- predictions, for observers of a host that do not see all of it --------------------------------------


@given(history=histories, vm=st.integers(0, 12), cpu=st.integers(0, CPUS - 1))
def test_predictions_come_true(make, history, vm, cpu):
    """rolls_over() and peek() predict enter(), and change nothing."""
    allocator = make()
    for other, where in history:
        _ = allocator.leave(where) if other < 0 else allocator.enter(other, where)
    rolls, generation = allocator.rolls_over(vm), allocator.generation
    vmid = None if rolls else allocator.peek(vm)
    entry = allocator.enter(vm, cpu)
    assert (entry.generation > generation) == rolls
    assert rolls or entry.vmid == vmid


@pytest.mark.parametrize("make_late", [lambda first: Consecutive(8, first), lambda first: Bitmap(8, 2, first)])
def test_an_allocator_in_use_goes_on_where_it_was(make_late):
    """Its next VMID is ``first``, and no generation begins before the VMIDs are used up."""
    allocator = make_late(254)
    assert (allocator.peek("one"), allocator.rolls_over("one")) == (254, False)
    assert [allocator.enter(vm, 0).vmid for vm in ("one", "two", "one")] == [254, 255, 254]
    assert allocator.rolls_over("three") and not allocator.rolls_over("two")
    assert allocator.enter("three", 0).invalidations == ALL


def test_the_consecutive_allocator_begins_with_a_rollover_when_booted():
    assert Consecutive().rolls_over("one") and not Bitmap(8, 2).rolls_over("one")


def test_skipped_vmids_are_taken():
    allocator = Bitmap(8, 2)
    assert allocator.enter("one", 0).vmid == 1
    allocator.skip(9)
    assert [allocator.enter(vm, 0).vmid for vm in ("two", "three", "one")] == [9, 10, 1]
    allocator.skip(5)  # they are behind the search, and it does not go back
    assert allocator.enter("four", 0).vmid == 11


def test_skipping_all_leaves_vms_their_vmids():
    allocator = Bitmap(8, 2)
    allocator.enter("one", 0)
    allocator.skip(allocator.size)
    assert allocator.rolls_over("two") and allocator.peek("one") == 1
    assert allocator.enter("two", 1).invalidations == ALL


def test_what_was_skipped_is_free_in_the_next_generation():
    allocator = Bitmap(8, 2)
    allocator.skip(allocator.size)
    assert [allocator.enter(vm, 0).vmid for vm in range(3)] == [1, 2, 3]


def test_an_old_vmid_that_is_free_is_predicted():
    allocator = Bitmap(8, 1)
    for vm in range(256):
        allocator.enter(vm, 0)
    assert (allocator.generation, allocator.peek(100), allocator.peek("new")) == (2, 101, 2)
    assert allocator.peek(0) == 2  # VM 255 has 1 now


def test_a_reserved_vmid_is_predicted():
    allocator = Bitmap(8, 2)
    allocator.enter("long", 1)
    for vm in range(255):
        allocator.enter(vm, 0)
    assert (allocator.generation, allocator.peek("long"), allocator.rolls_over("long")) == (2, 1, False)


def test_a_vmid_gets_its_vm(make):
    """The VMID is seen to be taken before its VM is known."""
    allocator = make()
    taken = allocator.enter("somebody", 0)
    allocator.forget("somebody")
    assert not allocator.has("vm")
    allocator.give("vm", taken.vmid)
    assert allocator.has("vm")
    again = allocator.enter("vm", 1)
    assert (again.vmid, again.generation, again.invalidations) == (taken.vmid, taken.generation, ())
    assert allocator.enter("somebody", 0).vmid == taken.vmid + 1


def test_the_bitmap_knows_the_former_vms_of_a_vmid():
    """Two VMs may try to get the same old VMID; the first to enter gets it."""
    allocator = Bitmap(bits=3, cpus=1)
    for vm in range(7):
        allocator.enter(vm, 0)
    assert allocator.formerly(1) == set()
    allocator.enter("eighth", 0)
    assert allocator.formerly(1) == {0}
    allocator.enter(0, 0)
    assert allocator.formerly(1) == set()
