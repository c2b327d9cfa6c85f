"""The end of a run: machines that are kept, and none that is left."""

import signal
import time
from pathlib import Path

import pytest
from arm_kvm.machine.rundir import live_machines

FAILING = """
def test_fails(vm):
    vm.guest.ping()
    assert False
"""


def test_keep_leaves_the_machine_until_ctrl_c(run, tmp_path):
    process = run.start(FAILING, "--host", "arm64", "-k", "A64", "--keep")
    try:
        for line in process.stdout:
            if "Ctrl-C ends it" in line:
                break
            if line.strip().startswith("shell:"):
                shell = line.split("shell:")[1].split()
        (card,) = [c for c in live_machines() if c.lab_pid == process.pid]
        assert shell == card.ssh.split()
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(20)
    assert code == 1
    deadline = time.monotonic() + 5
    while Path(f"/proc/{card.qemu_pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{card.qemu_pid}").exists()


SLOW = """
import time

def test_slow(vm):
    print("ready", flush=True)
    vm.guest.ping()
    time.sleep(60)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_when_pytest_is_killed(run, tmp_path, end):
    process = run.start(SLOW, "--host", "arm64", "-k", "A64", "-s")
    while "ready" not in process.stdout.readline():
        assert process.poll() is None
    (card,) = [c for c in live_machines() if c.lab_pid == process.pid]
    process.send_signal(end)
    said, _ = process.communicate(timeout=20)
    assert "Traceback" not in said
    assert process.returncode == (pytest.ExitCode.INTERRUPTED if end == signal.SIGINT else -end)
    deadline = time.monotonic() + 5
    left = [Path(f"/proc/{card.qemu_pid}"), Path(card.gdb).parent.parent]
    while any(path.exists() for path in left) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(path.exists() for path in left)
