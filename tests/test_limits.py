"""Limits of the machine: full disks, few files, small files, closed streams. One message each, no traceback."""

import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import time

import pytest
from arm_kvm.machine.console import Console
from arm_kvm.support import programs
from arm_kvm.support.errors import CacheUnusable, ConfigError, DiskFull, LimitReached, SetupError
from arm_kvm.support.limits import lab_error
from arm_kvm.support.paths import ROOT, cache_root

from .conftest import HEARS_CTRL_C
from .pytest_run import PASSING, Run

ARM_KVM = (sys.executable, "-m", "arm_kvm")


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def shell(line, **how):
    """Run a line of shell in which ``arm_kvm`` is the command line; returns exit code and stderr."""
    line = f'arm_kvm() {{ {" ".join(ARM_KVM)} "$@"; }}; {line}'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120, **how)
    assert "Traceback" not in done.stdout + done.stderr
    return done.returncode, done.stderr


def refused(number, name=None):
    return OSError(number, os.strerror(number), name)


def test_what_is_full_is_named():
    with pytest.raises(OSError) as caught, open("/dev/full", "w") as full:
        full.write("x")
    error = lab_error(caught.value, cache_root() / "kernels")
    assert isinstance(error, DiskFull) and str(cache_root()) in error.message and "ARM_KVM_CACHE" in error.remedy
    assert "is full" in lab_error(refused(errno.EDQUOT)).message


NAMES_THE_FULL_DISK = """
import errno, os, sys
from pathlib import Path
from arm_kvm.support.limits import lab_error
os.environ["XDG_RUNTIME_DIR"] = sys.argv[1]
print(lab_error(OSError(errno.ENOSPC, "no space"), Path("/usr")))
"""


def test_the_disk_that_is_full_is_the_one_that_is_named(tmp_path):
    """A failed write names no file, so that the lab's folders are searched for the full disk."""
    mount = f"mount -t tmpfs -o size=64k tmpfs {tmp_path} && head -c 64k /dev/zero > {tmp_path}/fill"
    python = [sys.executable, "-c", NAMES_THE_FULL_DISK, str(tmp_path)]
    argv = ["unshare", "--map-root-user", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh", *python]
    if subprocess.run([*argv[:3], "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no mount namespace")
    said = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT).stdout
    assert f"the disk with {tmp_path} is full" in said and "XDG_RUNTIME_DIR" in said


LIMITS = {
    "files": (refused(errno.EMFILE), LimitReached, "ulimit -n"),
    "size of files": (refused(errno.EFBIG, "/some/file"), LimitReached, "/some/file would be larger"),
    "memory": (refused(errno.ENOMEM), LimitReached, "no memory left"),
    "processes": (refused(errno.EAGAIN), LimitReached, "ulimit -u"),
    "another user's file": (refused(errno.EACCES, "/some/file"), SetupError, "owner and permissions"),
    "any other": (refused(errno.ENOENT, "/some/file"), SetupError, "/some/file: No such file"),
}


@pytest.mark.parametrize("what", LIMITS)
def test_every_limit_has_its_words(what):
    error, kind, words = LIMITS[what]
    assert type(lab_error(error)) is kind and words in str(lab_error(error))


def test_a_cache_that_may_not_be_written(own_cache):
    error = lab_error(refused(errno.EROFS), own_cache / "kernels")
    assert type(error) is CacheUnusable and "ARM_KVM_CACHE" in error.remedy


def test_a_program_that_never_ends_is_ended():
    began = time.monotonic()
    with pytest.raises(SetupError, match="sleep did not end within"):
        programs.run(["sleep", "60"], patience=0.2)
    assert time.monotonic() - began < 30


def test_a_program_that_fills_a_disk_says_so_itself():
    with pytest.raises(DiskFull, match="cp"):
        programs.run(["cp", "/etc/passwd", "/dev/full"])


def test_a_program_that_is_not_there():
    with pytest.raises(SetupError, match="no-such-program is not installed"):
        programs.run(["no-such-program"])


def test_no_disk_for_the_consoles_log_is_known_at_once(tmp_path):
    log = tmp_path / "console.log"
    log.symlink_to("/dev/full")
    qemu, lab = socket.socketpair()
    console = Console(lab, log)
    qemu.sendall(b"[    0.000000] Booting Linux\n")
    deadline = time.monotonic() + 10
    while console.failure is None and time.monotonic() < deadline:
        console.poll()
    assert isinstance(console.failure, DiskFull)
    assert str(log) in console.failure.message
    qemu.close()
    console.close()


STREAMS = {
    "output on a full disk": ("arm_kvm hosts > /dev/full", DiskFull.exit_code, "/dev/full is full"),
    "the other commands as well": ("arm_kvm obligations > /dev/full", DiskFull.exit_code, "/dev/full is full"),
    "nowhere to say so": ("arm_kvm hosts > /dev/full 2> /dev/full", DiskFull.exit_code, ""),
    "a mistake with nowhere to tell it": ("arm_kvm kernel fetch a16 2> /dev/full", ConfigError.exit_code, ""),
    "no output": ("arm_kvm hosts >&-", 0, ""),
    "no input": ("arm_kvm hosts <&-", 0, ""),
    "no stream at all": ("arm_kvm hosts <&- >&- 2>&-", 0, ""),
    "a reader that goes": ("arm_kvm obligations | true; exit ${PIPESTATUS[0]}", 0, ""),
    "few files": ("ulimit -n 14; arm_kvm boot arm64", LimitReached.exit_code, "may have 14 open at a time"),
    "small files": ("ulimit -f 8; arm_kvm boot arm64", LimitReached.exit_code, "8,192 bytes"),
    "a cache of an unknown user": ("ARM_KVM_CACHE=~nosuchuser/c arm_kvm cache", ConfigError.exit_code, "no such user"),
    "a host file there": ("arm_kvm kernel fetch '~nosuchuser/h.yaml'", ConfigError.exit_code, "no such user"),
}


@pytest.mark.parametrize("what", STREAMS)
def test_the_command_line_under_limits(what):
    line, code, words = STREAMS[what]
    got, said = shell(line)
    assert got == code and words in said


def test_names_are_printed_in_any_locale(tmp_path):
    """Also names that are not text in any encoding."""
    for name in ("grün-漢", os.fsdecode(b"\xff\xfe")):
        folder = tmp_path / name / "kernels/key"
        folder.mkdir(parents=True)
        (folder / "meta.json").write_text('{"label": "grün 漢", "version": "6.1"}')
        (folder / "image").write_text("image")
        environment = os.environ | {"ARM_KVM_CACHE": str(tmp_path / name), "PYTHONIOENCODING": "latin-1"}
        done = subprocess.run([*ARM_KVM, "kernel", "list"], env=environment, capture_output=True, cwd=ROOT)
        assert done.returncode == 0 and b"gr\xfcn" in done.stdout, done.stderr


def test_a_host_file_nested_too_deeply(tmp_path):
    (tmp_path / "deep.yaml").write_text("[" * 5000)
    code, said = shell(f"arm_kvm kernel fetch {tmp_path}/deep.yaml")
    assert code == ConfigError.exit_code and "nested too deeply" in said


def test_a_report_that_cannot_be_written(run):
    code, said = run(PASSING, "--host", "arm64", "--junitxml", "/dev/full")
    assert code == 3 and "2 passed" in said
    assert "a report cannot be written: the disk with /dev/full is full" in said and "Traceback" not in said


def few_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (25, 25))


def test_a_suite_with_few_files(run, tmp_path):
    argv = run.argv(PASSING, "--host", "arm64")
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, preexec_fn=few_files)
    assert done.returncode == 1 and "this process may have 25 open at a time" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


REFUSED = """
def test_writes(vm):
    with open("/dev/full", "w") as full:
        full.write("x")
"""


def test_a_full_disk_in_a_case_is_the_machines(run):
    code, said = run(REFUSED, "--host", "arm64", "-k", "A64")
    assert code == 1 and "this machine does not let the test go on" in said and "is full" in said


# -- Ctrl-C ----------------------------------------------------------------------------------------------------------

SWALLOWED = """
import os, signal
def test_interrupted(vm):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        raise ValueError("what was interrupted failed over it")
def test_next(vm):
    pass
"""


def test_what_fails_over_ctrl_c_is_no_failure(run):
    code, said = run(SWALLOWED, "--host", "arm64", "-k", "A64")
    assert code == pytest.ExitCode.INTERRUPTED and "KeyboardInterrupt" in said
    assert "failed" not in said and "passed" not in said


INTERRUPTED_IN_A_FIXTURE = """
import os, signal, pytest
@pytest.fixture
def tool():
    yield
    raise RuntimeError("what the fixture used is gone with the host")
def test_interrupted(vm, tool):
    os.kill(os.getpid(), signal.SIGINT)
def test_that_hides_it(vm):
    pass
"""


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGINT)", "pytest.skip('of no importance')"])
def test_what_becomes_of_fixtures_and_skips_after_ctrl_c(run, end):
    suite = INTERRUPTED_IN_A_FIXTURE.replace("    os.kill", "    try:\n        os.kill", 1)
    suite = suite.replace("SIGINT)\n", f"SIGINT)\n    finally:\n        {end}\n", 1)
    code, said = run(suite, "--host", "arm64", "-k", "A64")
    assert code == pytest.ExitCode.INTERRUPTED and "INTERNALERROR" not in said
    assert " passed" not in said and " failed" not in said


@pytest.mark.parametrize("seconds", [0.0, 0.5, 1.2])
@pytest.mark.parametrize("times", [1, 3])
def test_ctrl_c_while_a_host_boots(own_run_folder, seconds, times):
    argv = [*HEARS_CTRL_C, *ARM_KVM, "boot", "arm64"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    try:
        deadline = time.monotonic() + 30
        while not list(os.scandir(own_run_folder)) and time.monotonic() < deadline:  # Python itself has started
            time.sleep(0.01)
        time.sleep(seconds)
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        said, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in said
    assert not list(os.scandir(own_run_folder))


def test_a_limit_is_no_verdict_on_a_mutant(run, tmp_path):
    """The case that would kill it meets a full disk: the mutant counts as not run."""
    code, said = run(REFUSED, "--host", "arm64", "--mutate", "unmap-ignored")
    assert code == 1 and "0 of 0 applicable mutants killed, 0 %; 1 not run" in said
