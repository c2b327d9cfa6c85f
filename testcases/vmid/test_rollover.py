"""More VMs than VMIDs: a new generation begins, with everything invalidated, and nobody sees another's memory.

8-bit VMIDs (Cortex-A15, Cortex-A57): a round of 300 VMs needs more than the 255 there are, every time.
"""

import pytest
from arm_kvm.vmm.fleet import Fleet

DATA = 0x8000_0000
pytestmark = [pytest.mark.needs("vmid8"), pytest.mark.native]


@pytest.mark.parametrize("count", [300, 1000])
def test_round_robin(host, make_vms, record, vmid, count):
    """All exist at once and run in turn, three rounds; every guest finds its own memory at the same IPA."""
    with record() as run:
        fleet = Fleet(make_vms(count))
        fleet.add_memory(DATA, 0x1000)
        fleet.fill(DATA)
        assert fleet.strangers(DATA) == []
        assert fleet.strangers(DATA) == []
        sampled = [vmid(vm) for vm in fleet.vms[-4:]]
    assert 3 * count // 255 - 1 <= run.rollovers <= 3 * count // 255 + 1
    if host.config.architecture.name == "armv7":  # arm64 does where the I-cache is VPIPT, which the A57's is not
        assert run.count("icialluis") >= run.rollovers
    assert [run.vmids(vm)[-1] for vm in fleet.vms[-4:]] == sampled


def test_running_on_the_other_cpu(make_vms, record, vmid):
    """One VM stays inside its guest on CPU 1 while the others, on CPU 0, use up the numbers twice."""
    with record() as run:
        runner, *others = make_vms(301)
        runner.add_memory(DATA, 0x1000)
        runner.vcpus[0].pin(1)
        runner.guest.write(DATA, 0xA15)
        fleet = Fleet(others, cpu=0)
        fleet.add_memory(DATA, 0x1000)
        with runner.guest.spinning():
            before = vmid(runner)
            fleet.fill(DATA)
            assert fleet.strangers(DATA) == []
            after = vmid(runner)
        assert runner.guest.read(DATA) == 0xA15
    assert run.rollovers >= 2
    assert run.vmids(runner)[0] == before
    assert after in run.vmids(runner)
    if run.allocator == "bitmap":  # what is on a CPU keeps its number; the older allocator throws everybody out
        assert run.vmids(runner) == [before]
    else:
        assert len(run.vmids(runner)) > 1


def test_both_cpus_roll_over(make_vms, record, vmid):
    """150 VMs on either CPU, at the same time: both allocate, either may be the one that begins a generation."""
    with record() as run:
        vms = make_vms(300)
        fleets = [Fleet(vms[:150], cpu=0), Fleet(vms[150:], cpu=1)]
        for fleet in fleets:
            fleet.add_memory(DATA, 0x1000)
            fleet.fill(DATA)
        for _ in range(3):
            for fleet in fleets:
                fleet.start_check(DATA)
            assert [fleet.finish_check() for fleet in fleets] == [[], []]
        sampled = vmid(vms[0])
    assert run.rollovers >= 3
    assert run.vmids(vms[0])[-1] == sampled


def test_preempted_around_a_rollover(make_vms, record, vmid):
    """The VM that spins shares CPU 0 with those that use up the numbers: it is scheduled out and in at every turn."""
    with record() as run:
        spinner, *others = make_vms(301)
        spinner.add_memory(DATA, 0x1000)
        spinner.vcpus[0].pin(0)
        spinner.guest.write(DATA, 0xA57)
        fleet = Fleet(others, cpu=0)
        fleet.add_memory(DATA, 0x1000)
        with spinner.guest.spinning():
            fleet.fill(DATA)
            assert fleet.strangers(DATA) == []
            sampled = vmid(spinner)
        assert spinner.guest.read(DATA) == 0xA57
    assert run.rollovers >= 2
    assert sampled in run.vmids(spinner)


def test_destroyed_and_created_across_generations(make_vms, record, vmid):
    """Generations of VMs that come, run and go, beside some that stay through all of them."""
    with record() as run:
        stay = Fleet(make_vms(20))
        stay.add_memory(DATA, 0x1000)
        stay.fill(DATA)
        for _ in range(6):
            guests = Fleet(make_vms(100))
            guests.add_memory(DATA, 0x1000)
            guests.fill(DATA)
            assert stay.strangers(DATA) == []
            assert guests.strangers(DATA) == []
            guests.destroy()
        assert stay.strangers(DATA) == []
        sampled = vmid(stay.vms[0])
    assert run.rollovers >= 2
    assert run.vmids(stay.vms[0])[-1] == sampled


@pytest.mark.needs("hotplug")
def test_cpu_taken_off_line_and_back(host, make_vms, record, vmid):
    """A CPU leaves while VMs that ran on it exist, misses a rollover, and comes back with whatever its TLB held."""
    with record() as run:
        vms = make_vms(300)
        everybody = Fleet(vms, cpu=0)
        everybody.add_memory(DATA, 0x1000)
        some = Fleet(vms[:20], cpu=1)
        some.fill(DATA)
        with host.offline(1):
            everybody.fill(DATA)
            assert everybody.strangers(DATA) == []
        assert Fleet(vms[:20], cpu=1).strangers(DATA) == []
        sampled = vmid(vms[0])
    assert run.rollovers >= 2
    assert run.vmids(vms[0])[-1] == sampled
