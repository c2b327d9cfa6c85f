"""pytest -n: a QEMU or worker that dies fails one test only; and the order of cases."""

import re

import pytest

SUITE = """
import os, signal, pytest

@pytest.mark.parametrize("n", range(6))
def test_works(vm, n):
    vm.guest.ping()

def test_dies(host, vm):
    vm.guest.ping()
    host.ssh.run("echo last words > /dev/kmsg")
    os.kill({victim}, signal.SIGKILL)
    vm.guest.ping()
"""


OPTIONS = ["--host", "arm64", "-k", "A64", "-n", "2"]


def test_workers_share_the_cases(run):
    code, said = run(SUITE.replace("os.kill({victim}, signal.SIGKILL)", "pass"), *OPTIONS)
    assert code == 0 and "7 passed" in said


def test_a_qemu_that_is_killed(run):
    code, said = run(SUITE.replace("{victim}", "host.machine.process.pid"), *OPTIONS)
    assert code == 1 and "1 failed, 6 passed" in said
    assert "QEMU ended (signal 9)" in said and "last words" in said


QEMU_KILLED_EARLY = """
import os, signal, threading, time
from contextlib import suppress
from pathlib import Path

def first_qemu():
    while True:
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # the process has ended
                pid, name, _, parent = path.read_text().split()[:4]
                makes_a_board = b"-machine" in path.with_name("cmdline").read_bytes()
                if name.startswith("(qemu-system") and int(parent) == os.getpid() and makes_a_board:
                    return int(pid)
        time.sleep(0.001)

def kill():
    victim = first_qemu()
    time.sleep({after})
    os.kill(victim, signal.{signal})

threading.Thread(target=kill, daemon=True).start()

from arm_kvm.vmm.client import op

def test_meets_it(host):
    time.sleep(0.5)
    host.agent(op.kernel_log)

def test_has_another(host):
    host.agent(op.kernel_log)
"""


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("after", [0, 0.1])
def test_a_qemu_that_is_killed_while_it_starts(run, after, signal):
    """Not the host's fault: the next test starts the host again."""
    suite = QEMU_KILLED_EARLY.replace("{after}", str(after)).replace("{signal}", signal)
    code, said = run(suite, "--host", "arm64")
    assert code == 1 and re.search("1 failed, 1 passed|1 passed, 1 error", said)
    assert re.search(r"QEMU (was killed while it started|ended \((signal 9|signal 15|exit code 0)\))", said)
    assert "what killed QEMU" in said


def test_a_worker_that_is_killed(run):
    code, said = run(SUITE.replace("{victim}", "os.getpid()"), *OPTIONS)
    assert code == 1 and "1 failed, 6 passed" in said
    assert re.search(r"worker 'gw\d' crashed while running .*test_dies", said)
    assert "last console lines" in said and "last words" in said


def test_the_slowest_cases_come_first(run, tmp_path):
    """By their durations in the last run, which ran in the order of the file."""
    suite = "import time\n" + "".join(f"def test_{n}(host):\n    time.sleep({n} * 0.3)\n" for n in range(4))
    run(suite, "--host", "arm64", "-n", "1")
    _, said = run(suite, "--host", "arm64", "-n", "1", "-v")
    assert re.findall(r"PASSED test_suite.py::test_(\d)", said) == ["3", "2", "1", "0"]


def test_cases_of_a_module_share_its_host(run, tmp_path):
    """With workers, too, a module's cases come together: four cases of two modules on one worker need two hosts."""
    for module in ("test_a", "test_b"):
        text = "import time\nSEEN = set()\n" + "".join(
            f"def test_{n}(host):\n    SEEN.add(host.machine.process.pid)\n    time.sleep({n} * 0.2)\n"
            "    assert len(SEEN) == 1\n"
            for n in range(2)
        )
        (tmp_path / f"{module}.py").write_text(text)
    for _ in range(2):  # the second run knows the durations
        code, said = run("", "--host", "arm64", "-n", "1", "--isolation", "module", "test_a.py", "test_b.py", "-v")
        assert code == 0 and "4 passed" in said
    assert re.findall(r"PASSED (test_\w)\.py::test_(\d)", said) == [(f"test_{m}", n) for m in "ab" for n in "10"]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_unknown_isolation(run, workers):
    suite = 'import pytest\n\n@pytest.mark.isolation("tset")\ndef test_one(host):\n    pass\n'
    code, said = run(suite, "--host", "arm64", "-n", workers)
    assert code != 0 and "test_one: isolation('tset') is none of session, module, test" in said
    assert "INTERNALERROR" not in said and "Traceback" not in said


def test_keep_is_for_one_process(run):
    code, said = run(SUITE, *OPTIONS, "--keep")
    assert code == 4 and "--keep leaves a machine" in said
