"""Which VM gets which VMID: consecutive in the order of first runs, one for all vCPUs of a VM, and stable.

The fixture ``record`` also checks every recording against the model's allocator and the rules of TLB maintenance.
"""

from itertools import pairwise

import pytest
from arm_kvm.vocabulary import Consecutive, Fleet, facilities

DATA = 0x8000_0000
#: A fresh host, on which no earlier VMs bring about a rollover.
unrolled = pytest.mark.isolation("test")


def in_order(run, numbers):
    """Whether these are the numbers that the model's allocator gives to new VMs, beginning with the first of them.

    (Earlier VMs may hold numbers in between where the allocator is an 8-bit bitmap.)
    """
    if run.allocator == "bitmap" and run.vmid_bits == 8:
        return all(b > a or run.rollovers for a, b in pairwise(numbers))
    allocator = Consecutive(run.vmid_bits, numbers[0])
    return numbers == [allocator.enter(vm, cpu=0).vmid for vm in range(len(numbers))]


@unrolled
def test_numbers_follow_the_order_of_first_run(make_vms, record, vmid):
    """The order of creation does not count: VMs 3, 0, 5 and 1 run; VMs 2 and 4 never do, and take no number."""
    order = [3, 0, 5, 1]
    with record() as run:
        vms = make_vms(6)
        for index in order:
            vms[index].guest.ping()
    assert len(run.first_runs) == 4 and in_order(run, run.first_runs)
    assert [vmid(vms[index]) for index in order] == run.first_runs


@unrolled
def test_a_vm_that_runs_later_gets_the_next_number(make_vms, record, vmid):
    """Between two VMs' first runs other VMs go on running or are only created: neither takes a number."""
    with record() as run:
        first, second = make_vms(2)
        first.guest.ping()
        make_vms(5)
        for _ in range(10):
            first.guest.ping()
        second.guest.ping()
    assert len(run.first_runs) == 2 and in_order(run, run.first_runs)
    assert vmid(second) == run.first_runs[1]


@unrolled
def test_all_vcpus_share_one(make_vm, record, vmid):
    """Four vCPUs on both CPUs, two of them in the guest at the same time."""
    with record() as run:
        vm = make_vm(vcpus=4)
        vm.add_memory(DATA, 0x4000)
        for index, vcpu in enumerate(vm.vcpus):
            vcpu.pin(index % 2)
            vm.guests[index].write(DATA + 0x1000 * index, index)
        with vm.guests[0].spinning(), vm.guests[1].spinning():
            sampled = vmid(vm)
    assert run.vmids(vm) == [sampled]
    assert {cpu for cpu, _ in run.entries(vm)} == {0, 1}
    assert [vm.guests[-1].read(DATA + 0x1000 * index) for index in range(4)] == [0, 1, 2, 3]


@unrolled
def test_stable_over_exits_migration_and_idle_time(host, ssh, make_vms, record, vmid):
    """A hundred exits, ten moves between CPUs, and a second in which the host runs no guest."""
    with record() as run:
        vm, other = make_vms(2)
        memory = vm.add_memory(DATA, 0x1000)
        for turn in range(100):
            if turn % 10 == 0:
                vm.vcpus[0].pin(turn // 10 % 2)
            vm.guest.write(DATA, turn)
        other.guest.ping()
        facilities.idle(host, seconds=1)
        vm.guest.ping()
        sampled = vmid(vm)
    assert run.vmids(vm) == [sampled]
    assert run.vmids(other) != [sampled]
    assert int.from_bytes(memory.read(0, 4), "little") == 99


def test_a_destroyed_vms_number_is_not_given_again(make_vms, record, vmid):
    """Twenty VMs are created, run and destroyed; each has its own number until a new generation begins."""
    with record() as run:
        for _ in range(20):
            (vm,) = make_vms(1)
            vm.guest.ping()
            vm.destroy()
        (last,) = make_vms(1)
        last.guest.ping()
    numbers = [number for _, number in run.entries()]
    distinct = [n for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n]
    assert len(distinct) == 21 and in_order(run, distinct)
    assert vmid(last) == distinct[-1]


def test_same_ipa_of_many_vms_is_different_memory(make_vms, record, vmid):
    """Fifty guests store at the same IPA, in turn on both CPUs, and each reads back its own value."""
    with record() as run:
        vms = make_vms(50)
        fleets = [Fleet(vms[:25], cpu=0), Fleet(vms[25:], cpu=1)]
        for fleet in fleets:
            fleet.add_memory(DATA, 0x1000)
            fleet.fill(DATA)
        assert [fleet.mismatches(DATA) for fleet in fleets] == [[], []]
    assert len(set(run.first_runs)) == 50
    assert vmid(vms[49]) == run.vmids(vms[49])[-1]
