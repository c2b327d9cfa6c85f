"""How fast the lab is: cold boot, an MMIO exit, a verdict. Run by `tox -e bench`; no figure decides a test.

Each benchmark measures what a user waits for, on a real host. The README quotes the medians.
"""

import pytest
from arm_kvm.host import config
from arm_kvm.host.host import Host
from arm_kvm.host.kernel import obtain
from arm_kvm.recorder.probe import Probe
from arm_kvm.support.errors import LabError

IPA = 0x8000_0000


@pytest.mark.parametrize("probed", [False, True], ids=["plain", "probe"])
@pytest.mark.parametrize("name", ["a15", "arm64"])
def test_cold_boot_to_first_agent_answer(benchmark, tmp_path, name, probed):
    """QEMU start to the agent's first answer, without and with the recorder's probe; kernel and root fs are cached."""
    host_config = config.find(name)
    try:
        kernel = obtain(host_config)
    except LabError as e:
        pytest.skip(e.one_line)
    hosts = []

    def boot():
        plugin = Probe(host_config) if probed else None
        hosts.append(Host.boot(host_config, kernel, tmp_path / "logs", plugin=plugin))

    def end():
        while hosts:
            hosts.pop().shutdown()

    boot()  # the first boot of a root file system also compiles the agent
    end()
    benchmark.pedantic(boot, rounds=7, teardown=end)


@pytest.mark.native
def test_mmio_exit_round_trip(benchmark, host, vm):
    """Guest, KVM, user space and back: 1,000 doorbells rung inside the agent, no ssh in between."""
    vm.guest.ping()
    exits = 1000

    def ring():
        return vm.vcpus[0].measure_mmio(exits)

    result = benchmark.pedantic(ring, rounds=5)
    benchmark.extra_info["microseconds_per_exit"] = round(result * 1e6, 1)


@pytest.mark.native
@pytest.mark.parametrize("leaves", [4096, 65536])
def test_stop_read_walk_judge_continue(benchmark, vm, stage2, leaves):
    """Stop the machine, read both sides, judge every leaf, let the machine go on."""
    vm.add_memory(IPA, leaves * 0x1000)
    vm.guest.fill(IPA, leaves)
    assert len(stage2(vm)) == leaves + 2
    benchmark.pedantic(stage2, args=(vm,), rounds=20, warmup_rounds=2)


@pytest.mark.native
def test_one_guest_order(benchmark, vm):
    """A read by the guest as a test case commands it: over ssh, through the agent, into the guest and back."""
    vm.add_memory(IPA, 0x1000)
    vm.guest.read(IPA)
    benchmark.pedantic(vm.guest.read, args=(IPA,), rounds=50)
