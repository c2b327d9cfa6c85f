"""vCPU threads pinned, moved and multiplexed: at any time a CPU's TLB serves one vCPU of each VM.

Two vCPUs of a VM may map one virtual address differently under the same ASID, and they have the same VMID. So KVM
invalidates the VM's translations on a CPU before it runs a vCPU there after another one (Linux 94d0e5980d67).
"""

import pytest
from arm_kvm.vocabulary import VcpuLoads

DATA = 0x8000_0000
LOCAL = {"armv7": "tlbiall", "armv8": "vmalle1"}
ICACHE = {"armv7": "iciallu", "armv8": "iallu"}  # may hold another vCPU's code for the same VA (01dc9262ff57)


def local_invalidations(loads):
    """How many local invalidations the model demands when one VM's vCPUs are loaded in this order, as (vCPU, CPU)."""
    model = VcpuLoads()
    return sum(len(model.load("the VM", vcpu, cpu)) for vcpu, cpu in loads)


def turns(vm, guests, rounds):
    """Let these guests write to their own pages in turn."""
    for turn in range(rounds):
        for index in guests:
            vm.guests[index].write(DATA + 0x1000 * index, turn)


def test_multiplexed_on_one_cpu(host, make_vm, record, vmid, known_fault):
    """Three vCPUs take turns on CPU 0, four rounds: one local invalidation at every change of vCPU, and no more."""
    with record() as run:
        vm = make_vm(vcpus=3)
        vm.add_memory(DATA, 0x3000)
        for vcpu in vm.vcpus:
            vcpu.pin(0)
        turns(vm, (0, 1, 2), rounds=4)
        sampled = vmid(vm)
    assert run.vmids(vm) == [sampled]
    loads = [(vcpu, 0) for vcpu in (0, 1, 2)] * 4
    demanded = local_invalidations(loads), local_invalidations([*loads, (0, 0)])  # sampling may load vCPU 0 once more
    assert run.count(LOCAL[host.config.architecture.name]) in demanded
    if run.count(ICACHE[host.config.architecture.name]) == 0:
        known_fault("vcpus-share-icache")
    assert run.count(ICACHE[host.config.architecture.name]) == run.count(LOCAL[host.config.architecture.name])
    assert vm.guest.read(DATA + 0x2000) == 3


def test_alone_on_its_cpu(host, make_vm, record, vmid):
    """Two vCPUs, each pinned to its own CPU: one local invalidation each, at its first run."""
    with record() as run:
        vm = make_vm(vcpus=2)
        vm.add_memory(DATA, 0x2000)
        for index, vcpu in enumerate(vm.vcpus):
            vcpu.pin(index)
        turns(vm, (0, 1), rounds=10)
    assert run.count(LOCAL[host.config.architecture.name]) == local_invalidations([(0, 0), (1, 1)] * 10)
    assert run.vmids(vm) == [vmid(vm)]
    assert vm.guest.read(DATA) == 9


def test_moved_between_cpus(host, make_vm, record, vmid):
    """Two vCPUs swap CPUs after every turn, so each time a CPU holds the other's translations."""
    loads = [(index, (index + turn) % 2) for turn in range(8) for index in range(2)]
    with record() as run:
        vm = make_vm(vcpus=2)
        vm.add_memory(DATA, 0x2000)
        for number, (index, cpu) in enumerate(loads):
            vm.vcpus[index].pin(cpu)
            vm.guests[index].write(DATA + 0x1000 * index, number // 2)
    assert run.count(LOCAL[host.config.architecture.name]) == local_invalidations(loads)
    assert run.vmids(vm) == [vmid(vm)]
    assert [vm.guest.read(DATA), vm.guest.read(DATA + 0x1000)] == [7, 7]


@pytest.mark.parametrize("vcpus", [2, 4])
def test_all_at_once_on_one_cpu(make_vm, record, vmid, vcpus):
    """vCPUs compete for one CPU while each fills its own memory."""
    pages = 32
    with record() as run:
        vm = make_vm(vcpus=vcpus)
        vm.add_memory(DATA, vcpus * pages * 0x1000)
        for index, guest in enumerate(vm.guests):
            vm.vcpus[index].pin(0)
            guest.start_fill(DATA + index * pages * 0x1000, pages)
        for guest in vm.guests:
            guest.finish()
        sampled = vmid(vm)
    assert run.vmids(vm) == [sampled]
    assert vm.guest.check(DATA, vcpus * pages) == []
