"""The command line as a user runs it: every mistake gets one message and its own exit code, and no traceback."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from arm_kvm.host import config
from arm_kvm.machine.rundir import live_machines
from arm_kvm.support import cache, setup
from arm_kvm.support.errors import ConfigError, KernelError, NoLiveMachine, PortBusy, QemuDied, SetupError

from .conftest import HEARS_CTRL_C, outside_pytest

COMMANDS = ["setup", "doctor", "hosts", "kernel list", "kernel fetch", "kernel build", "boot", "stage2", "conform"]
COMMANDS += ["test", "mutate", "bench", "cache", "cache clean", "replay", "trace check"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(arm_kvm, command):
    done = arm_kvm(*command.split(), "--help")
    assert done.returncode == 0 and "usage: arm-kvm" in done.stdout


def test_help_loads_no_slow_module():
    """Nor does `arm-kvm test`: the pytest that it starts loads them."""
    slow = "{'numpy', 'paramiko', 'hypothesis', 'pytest', 'rich', 'yaml'}"
    code = f"import sys; from arm_kvm.cli import parser; parser().format_help(); print({slow} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


MISTAKES = {
    "unknown host": (["boot", "a16"], ConfigError, "did you mean 'a15'"),
    "no such kernel": (["boot", "arm64", "--kernel", "/none/Image"], KernelError, "there is no such file or folder"),
    "kernel of the wrong kind": (["boot", "arm64", "--kernel", sys.executable], KernelError, "not an Arm kernel"),
    "nothing runs": (["stage2", "a15-debian"], NoLiveMachine, "arm-kvm boot a15-debian"),
    "not a tree": (["kernel", "build", "a15", "--tree", "/proc"], KernelError, "not a kernel source tree"),
    "no fragment": (
        ["kernel", "build", "a15", "--tree", "/proc", "--fragment", "debgu"],
        ConfigError,
        "did you mean 'debug'?",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_message_and_its_own_exit_code(arm_kvm, mistake):
    arguments, error, words = MISTAKES[mistake]
    done = arm_kvm(*arguments)
    assert done.returncode == error.exit_code
    assert words in done.stderr and done.stderr.startswith("arm-kvm: ") and "Traceback" not in done.stderr


def test_a_busy_port_has_its_own_exit_code(arm_kvm):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = arm_kvm("boot", "arm64", "--ssh-port", taken.getsockname()[1])
    assert done.returncode == PortBusy.exit_code and "--ssh-port" in done.stderr


def test_hosts_lists_every_host_file(arm_kvm):
    said = arm_kvm("hosts").stdout
    assert all(name in said for name in config.host_names())


def test_doctor_names_what_is_missing(arm_kvm, tmp_path):
    done = arm_kvm("doctor", env=os.environ | {"PATH": str(tmp_path)})
    assert done.returncode == SetupError.exit_code
    assert "missing packages: qemu-system-arm" in done.stderr and "arm-kvm setup" in done.stderr
    assert "qemu-system-arm is not installed" in done.stdout


def test_setup_gives_an_unprivileged_user_the_exact_command(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(setup, "NEEDS", (setup.Need("no-such-program", "some-package", "a test"),))
    with pytest.raises(SetupError) as caught:
        setup.install()
    line = "apt-get update && apt-get install -y --no-install-recommends some-package"
    assert caught.value.remedy == f"run as root: {line}"


def test_setup_without_apt_says_what_to_install(monkeypatch):
    need = setup.Need("no-such-program", "some-package", "32-bit boards")
    monkeypatch.setattr(setup, "NEEDS", (need,))
    monkeypatch.setattr(setup.shutil, "which", lambda program: None)
    with pytest.raises(SetupError, match="no apt-get") as caught:
        setup.install()
    assert "no-such-program (32-bit boards; Debian: some-package)" in caught.value.remedy


def test_setup_does_nothing_twice(arm_kvm):
    done = arm_kvm("setup")
    assert done.returncode == 0 and "all system packages are installed" in done.stdout


def test_boot_gives_console_ssh_and_tables(arm_kvm, own_run_folder):
    """The tour of the README: boot a host, get its ssh command, look at its tables, end it."""
    process = subprocess.Popen(
        [*HEARS_CTRL_C, sys.executable, "-m", "arm_kvm", "boot", "arm64"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        first = [process.stdout.readline() for _ in range(4)]
        assert re.search(r"^arm64: .* up in \d+\.\d s, KVM: yes", first[0])
        assert first[1].startswith("shell:  ssh ") and "-p " in first[1]
        watched = arm_kvm("stage2", "arm64", "--seconds", "0.2")
        assert watched.returncode == 0 and "no guest was seen" in watched.stdout
        count, mib = re.search(r"running machines: (\d+), (\d+) MiB", arm_kvm("cache").stdout).groups()
        assert count == "1" and 50 < int(mib) < 1024, "of its 1 GiB of RAM, only what it has used"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(10)
    assert process.returncode == 130
    time.sleep(0.1)
    assert arm_kvm("stage2", "arm64").returncode == NoLiveMachine.exit_code


def test_boot_whose_qemu_dies_fails(own_run_folder):
    process = subprocess.Popen(
        [sys.executable, "-m", "arm_kvm", "boot", "arm64"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert "KVM: yes" in process.stdout.readline()
        (card,) = live_machines()
        os.kill(card.qemu_pid, signal.SIGKILL)
        _, said = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == QemuDied.exit_code and "arm-kvm: QEMU ended (signal 9)" in said


@pytest.mark.parametrize("port", ["65536", "-1", "ssh", ""])
def test_a_port_out_of_range(arm_kvm, port):
    done = arm_kvm("boot", "arm64", f"--ssh-port={port}")
    assert done.returncode == 2 and f"{port!r} is not a port from 0 to 65535" in done.stderr


def test_cache_is_shown_and_cleaned(arm_kvm, own_cache):
    for kind, size in (("snapshots", 3 << 20), ("kernels", 1 << 20)):
        cache.obtain(kind, "key", lambda out, work, size=size: (out / "file").write_bytes(os.urandom(size)) and {})
    (own_cache / "kernels/other.work").mkdir()
    (own_cache / "kernels/other.work/half").write_bytes(os.urandom(2 << 20))
    shown = arm_kvm("cache").stdout
    assert (
        re.search(r"kernels +1 +1 +2 ", shown)
        and re.search(r"snapshots +1 +3 ", shown)
        and re.search(r"all +6 ", shown)
    )
    assert "snapshots: 1 entries, 3 MiB removed" in arm_kvm("cache", "clean").stdout
    assert cache.kinds() == ["kernels"], "kernels take long to build: they are removed only if named"
    refused = arm_kvm("cache", "clean", "kernel")
    assert refused.returncode == ConfigError.exit_code and "it holds: kernels" in refused.stderr


def test_a_mutant_from_the_command_line(arm_kvm):
    done = arm_kvm("mutate", "--host", "arm64", "--only", "unmap-ignored", "-n", "0")
    assert done.returncode == 0 and "arm64: 1 of 1 applicable mutants killed, 100 %" in done.stdout


def test_benchmarks_that_are_interrupted_print_what_they_have():
    argv = [*HEARS_CTRL_C, sys.executable, "-m", "arm_kvm", "bench", "--", "-k", "sweep_of or sequences"]
    env = outside_pytest(os.environ)
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True, env=env)
    said = []
    for line in process.stdout:
        said.append(line)
        if "PASSED" in line:
            break
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    said.append(process.communicate(timeout=60)[0])
    assert process.returncode == 130
    assert "median" in said[-1] and "load" in said[-1] and "sweep_of" in said[-1]


def test_benchmarks_as_a_table(arm_kvm):
    done = arm_kvm("bench", "--", "-k", "sweep_of")
    assert done.returncode == 0, done.stderr
    assert "median" in done.stdout and "IQR" in done.stdout
