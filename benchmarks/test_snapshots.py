"""A pristine host: from the start of its restore to its agent's first answer."""

import pytest
from arm_kvm.host import config, snapshots
from arm_kvm.host.kernel import obtain
from arm_kvm.oracle import Oracle
from arm_kvm.support.errors import LabError


@pytest.mark.parametrize("name", ["a15", "arm64"])
def test_restore_to_first_agent_answer(benchmark, tmp_path, name):
    """Start QEMU, load the device state, map RAM copy-on-write, set the clock; the snapshot exists already."""
    host_config = config.find(name)
    try:
        snapshot = snapshots.obtain(host_config, obtain(host_config), tmp_path / "boot")
    except LabError as e:
        pytest.skip(e.one_line)
    hosts = []

    def end():
        while hosts:
            hosts.pop().shutdown()

    benchmark.pedantic(lambda: hosts.append(snapshot.restore(tmp_path / "logs")), rounds=30, teardown=end)


@pytest.mark.parametrize("name", ["a15", "arm64"])
def test_judge_on_a_restored_host(benchmark, tmp_path, name):
    """Stop the machine, walk and judge 4,096 leaves; RAM is read from QEMU's private pages."""
    host_config = config.find(name)
    try:
        host = snapshots.obtain(host_config, obtain(host_config), tmp_path / "boot").restore(tmp_path / "logs")
    except LabError as e:
        pytest.skip(e.one_line)
    try:
        vm = host.create_vm(host_config.guests[0])
        vm.add_memory(0x8000_0000, 4096 * 0x1000)
        vm.guest.fill(0x8000_0000, 4096)
        oracle = Oracle(host)
        benchmark.pedantic(oracle.stage2, args=(vm,), rounds=20, warmup_rounds=2)
    finally:
        host.shutdown()
