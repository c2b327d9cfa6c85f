"""The same jobs on the QEMU of three Debian suites: which is the fastest to judge kernels with?

Each job is measured on one emulator after the other, so that the figures to compare are from the same few minutes.
"""

import pytest
from arm_kvm.host import config, emulators, snapshots
from arm_kvm.host.host import Host
from arm_kvm.host.kernel import obtain
from arm_kvm.oracle import Oracle
from arm_kvm.support.errors import LabError

IPA, LEAVES = 0x8000_0000, 4096

pytestmark = [
    pytest.mark.parametrize("qemu", ["deb:bookworm", "deb:trixie", "deb:sid"]),
    pytest.mark.parametrize("name", ["a15", "arm64"]),
]


@pytest.fixture
def fitted(benchmark, name, qemu):
    """The host on this QEMU."""
    try:
        host_config = emulators.fitted(config.find(name), qemu)
    except LabError as e:
        pytest.skip(e.one_line)
    benchmark.extra_info["qemu"] = ".".join(map(str, host_config.board.qemu.version))
    return host_config


@pytest.fixture
def kernel(fitted):
    try:
        return obtain(fitted)
    except LabError as e:
        pytest.skip(e.one_line)


@pytest.fixture
def restore(fitted, kernel, tmp_path):
    """``restore()``: a host restored from a snapshot made with this QEMU; it ends after the test."""
    snapshot, hosts = snapshots.obtain(fitted, kernel, tmp_path / "boot"), []

    def make():
        hosts.append(snapshot.restore(tmp_path / "logs"))
        return hosts[-1]

    make.end = lambda: [hosts.pop().shutdown() for _ in list(hosts)]
    yield make
    make.end()


def test_cold_boot(benchmark, fitted, kernel, tmp_path):
    """QEMU start to the agent's first answer."""
    hosts = []

    def boot():
        hosts.append(Host.boot(fitted, kernel, tmp_path / "logs"))

    benchmark.pedantic(boot, rounds=5, teardown=lambda: hosts.pop().shutdown(), warmup_rounds=1)


def test_restore(benchmark, restore):
    """QEMU start to the first answer of a saved host's agent."""
    benchmark.pedantic(restore, rounds=20, teardown=restore.end, warmup_rounds=1)


def test_mmio_exits(benchmark, restore, fitted):
    """1,000 doorbells rung inside the agent."""
    host = restore()
    vm = host.create_vm(fitted.guests[0])
    vm.guest.ping()
    benchmark.pedantic(vm.vcpus[0].measure_mmio, args=(1000,), rounds=10, warmup_rounds=2)


def test_look(benchmark, restore, fitted):
    """4,096 leaves: stop the machine, read both sides, judge every leaf, let the machine go on."""
    host = restore()
    vm = host.create_vm(fitted.guests[0])
    vm.add_memory(IPA, LEAVES * 0x1000)
    vm.guest.fill(IPA, LEAVES)
    benchmark.pedantic(Oracle(host).stage2, args=(vm,), rounds=30, warmup_rounds=3)
