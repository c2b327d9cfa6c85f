"""The machine: real QEMU processes that refuse, die and are killed; nothing is left, however the lab ends."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from arm_kvm.host import config
from arm_kvm.machine.board import Boot
from arm_kvm.machine.emulator import Emulator
from arm_kvm.machine.machine import Logs, Machine
from arm_kvm.machine.refusals import refusal
from arm_kvm.support.errors import MachineError, PortBusy, QemuDied, QemuRefused, SetupError

from .conftest import HEARS_CTRL_C

BOARD = config.find("arm64").board


@pytest.fixture
def start(tmp_path):
    """Start a machine whose kernel is sixteen zero bytes, which QEMU accepts."""
    machines = []
    kernel = tmp_path / "kernel"
    kernel.write_bytes(bytes(16))

    def make(board=BOARD, **how):
        machines.append(Machine.start(board, Boot(kernel, kernel, ""), Logs(tmp_path / "logs"), **how))
        return machines[-1]

    yield make
    for machine in machines:
        machine.kill()


def test_missing_qemu_names_the_remedy(start, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SetupError, match="qemu-system-aarch64 is not installed") as caught:
        start()
    assert "arm-kvm setup" in caught.value.remedy


def test_a_board_larger_than_this_machine(start):
    with pytest.raises(SetupError, match=r"no room for \d+ MiB of board RAM: this machine has \d+ MiB"):
        start(replace(BOARD, memory=1 << 46))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cpu": "cortex-a99"}, "cortex-a99"),
        ({"machine": "virt,gic-version=9"}, "gic"),
        ({"machine": "vrit"}, "machine"),
    ],
)
def test_a_board_qemu_refuses(start, change, words):
    with pytest.raises(QemuRefused, match=words) as caught:
        start(replace(BOARD, **change))
    assert "QEMU: qemu-system-aarch64 -nodefaults" in caught.value.evidence
    assert "QEMU's stderr:" in caught.value.evidence


@pytest.mark.parametrize(
    ("stderr", "kind", "words"),
    [
        ("qemu: cannot set up guest memory 'ram': Cannot allocate memory", SetupError, "the memory of the board"),
        ("qemu: Could not set up host forwarding rule 'tcp::1-:22'", PortBusy, "port for ssh"),
        (
            "qemu: warning: '-x' is deprecated\nqemu: no such CPU\nqemu: usage",
            QemuRefused,
            "this board: qemu: no such CPU",
        ),
        ("qemu: warning: only this", QemuRefused, "only this"),
    ],
)
def test_the_cause_is_found_in_stderr(stderr, kind, words):
    error = refusal(stderr, "evidence")
    assert type(error) is kind and words in error.message and error.remedy and error.evidence == "evidence"


def test_a_qemu_that_crashes_while_it_starts(start, tmp_path):
    crash = tmp_path / "qemu-system-aarch64"
    crash.write_text("#!/bin/sh\nkill -s SEGV $$\n")
    crash.chmod(0o755)
    with pytest.raises(QemuDied, match=r"QEMU crashed while it started \(SIGSEGV\)"):
        start(replace(BOARD, qemu=Emulator("qemu-system-aarch64", (str(crash),))))


ELSEWHERE = """
import sys
from pathlib import Path
from arm_kvm.host import config
from arm_kvm.support.errors import LabError
from arm_kvm.machine.board import Boot
from arm_kvm.machine.machine import Logs, Machine
try:
    Machine.start(config.find("arm64").board, Boot(Path("/dev/null"), Path("/dev/null"), ""), Logs(Path(sys.argv[1])))
    print("started")
except LabError as e:
    print(e)
"""


@pytest.mark.parametrize(
    ("name", "words"), [("a,comma", "started"), ("long" * 25, "the path of the run directory is too long for a socket")]
)
def test_run_directories_of_any_name(tmp_path, name, words):
    with tempfile.TemporaryDirectory(prefix=name, dir="/tmp") as folder:
        env = os.environ | {"XDG_RUNTIME_DIR": folder}
        argv = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "logs")]
        done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=60)
    assert done.stdout.startswith(words), done


def test_a_busy_port(start):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(PortBusy, match="port for ssh is in use"):
            start(ssh_port=taken.getsockname()[1])


def test_the_port_is_free_and_forwarded(start):
    one, other = start(), start()
    assert one.ssh_port != other.ssh_port
    for machine in (one, other):
        socket.create_connection(("127.0.0.1", machine.ssh_port), timeout=5).close()


def test_qemu_that_is_killed_is_reported_with_evidence(start):
    machine = start()
    machine.check()
    os.kill(machine.process.pid, signal.SIGKILL)
    machine.process.wait()
    with pytest.raises(QemuDied, match="signal 9") as caught:
        machine.check()
    assert "QEMU: qemu-system-aarch64" in caught.value.evidence
    with pytest.raises(QemuDied):
        machine.qmp("query-status")


def test_events_of_stops_do_not_pile_up(start):
    """QMP events are drained, lest the next command have to read those of half an hour's stops."""
    machine = start()
    for _ in range(1000):
        with machine.gdb.pause():
            pass
    assert machine.logs.qmp.read_text().count('"STOP"') >= 999


def test_commands_of_several_threads_take_turns(start):
    """A recorder serves breakpoints in a thread of its own, which drains events while the run may use QMP."""
    machine = start()
    with machine.gdb.pause(), ThreadPoolExecutor(1) as threads:
        uses = threads.submit(lambda: [machine.gdb for _ in range(50_000)])
        while not uses.done():
            assert machine.qmp("query-status")["status"] == "paused"
        uses.result()


def test_qmp_errors_are_typed(start):
    with pytest.raises(MachineError, match="no-such-command"):
        start().qmp("no-such-command")


def test_ram_and_gdbstub_see_the_same_memory(start):
    machine = start()
    pa = BOARD.ram_base + 0x100_0000
    with machine.gdb.pause() as gdb:
        gdb.write_memory(pa, b"stage two")
        assert machine.ram.read(pa, 9) == b"stage two"
        assert len(gdb.threads) == BOARD.cpus
        assert gdb.read(0, "VTTBR_EL2") == [0] and gdb.has("VTCR_EL2") and not gdb.has("VTCR_EL9")
    with pytest.raises(ValueError, match="not RAM"):
        machine.ram.read(0, 8)


def test_stop_and_go_many_times(start):
    """One packet left in the stream would shift every later answer."""
    machine = start()
    for _ in range(50):
        with machine.gdb.pause() as gdb:
            assert gdb.read(1, "ID_AA64MMFR0_EL1", "HCR_EL2") == [0x1124, 0]


LAB = """
import sys, time
from pathlib import Path
from arm_kvm.host import config
from arm_kvm.machine.board import Boot
from arm_kvm.machine.machine import Logs, Machine
kernel = Path(sys.argv[1])
machine = Machine.start(config.find("arm64").board, Boot(kernel, kernel, ""), Logs(kernel.parent / "logs"))
print(machine.process.pid, machine.folder, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_survives_the_lab(tmp_path, end):
    kernel = tmp_path / "kernel"
    kernel.write_bytes(bytes(16))
    lab = subprocess.Popen(
        [*HEARS_CTRL_C, sys.executable, "-c", LAB, str(kernel)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    pid, folder = lab.stdout.readline().split()
    assert Path(f"/proc/{pid}").exists() and Path(folder).exists()
    lab.send_signal(end)
    lab.wait(10)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and (Path(f"/proc/{pid}").exists() or Path(folder).parent.exists()):
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}").exists(), "QEMU is still there"
    assert not Path(folder).parent.exists(), "the run directory is still there"


def test_the_next_lab_sweeps_up_after_a_killed_guardian(own_run_folder):
    """A folder whose owner has ended is removed; a locked one stays, even if the process in its name has ended."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    home = Path(own_run_folder) / f"arm-kvm-{os.getuid()}"
    left, held = home / f"{gone.pid}-left/machine-x", home / f"{gone.pid}-held/machine-x"
    for folder in (left, held):
        folder.mkdir(parents=True)
    locked = os.open(held.parent, os.O_RDONLY)
    fcntl.flock(locked, fcntl.LOCK_EX)
    program = "from arm_kvm.machine.rundir import run_directory; print(run_directory())"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    os.close(locked)
    assert said.startswith(str(home)) and not left.parent.exists() and held.exists()


def test_a_run_folder_of_another_user(own_run_folder, tmp_path):
    """Also a symbolic link, which could lead to one: nothing is written or removed there."""
    (Path(own_run_folder) / f"arm-kvm-{os.getuid()}").symlink_to(tmp_path)
    program = "from arm_kvm.machine.rundir import run_directory; run_directory()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "is not a folder of this user" in done.stderr and list(tmp_path.iterdir()) == []
