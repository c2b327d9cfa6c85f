"""The pytest front door, run as its users run it: skips, failures, artifacts, kept machines.

Each test runs pytest in a process of its own, on a small suite, on real hosts.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from arm_kvm.machine.rundir import live_machines
from arm_kvm.support.paths import CONFIGS, ROOT

from .conftest import HEARS_CTRL_C, outside_pytest

PASSING = """
def test_vm_runs(vm, stage2):
    vm.add_memory(0x80000000, 0x1000)
    vm.guest.write(0x80000000, 1)
    assert stage2(vm).leaf(0x80000000).writable
"""


class Run:
    """Runs pytest on ``suite`` with the plugin, as it is installed, and nothing of this repository's own options."""

    def __init__(self, folder):
        self.folder = folder

    def argv(self, suite, *options):
        (self.folder / "test_suite.py").write_text(suite)
        (self.folder / "pytest.ini").write_text("[pytest]\naddopts = -ra --tb=short -p no:logging\n")
        plain = ["-c", "pytest.ini", "--artifacts", "artifacts"]
        return [*HEARS_CTRL_C, sys.executable, "-m", "pytest", *plain, *options, "test_suite.py"]

    def start(self, suite, *options, **environment):
        env = outside_pytest(os.environ | environment)
        env.pop("CI", None)  # where pytest repeats every failure in full
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(self.argv(suite, *options), cwd=self.folder, env=env, **how)

    def __call__(self, suite, *options, **environment):
        process = self.start(suite, *options, **environment)
        said, _ = process.communicate(timeout=120)
        return process.returncode, said


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


@pytest.fixture
def empty_cache(tmp_path):
    return {"ARM_KVM_CACHE": str(tmp_path / "cache"), "ARM_KVM_OFFLINE": "1"}


def test_the_header_names_qemu_kernel_and_guests(run):
    code, said = run(PASSING, "--host", "arm64")
    assert code == 0 and "2 passed" in said
    assert re.search(r"arm64: QEMU [\d.]+, cortex-a57 x2; Linux 6\.1\S* \(Debian .*\); guests A64/A32", said)


def test_a_kernel_that_cannot_be_had_is_one_plain_skip(run, empty_cache):
    suite = PASSING + PASSING.replace("test_vm_runs", "test_again")
    code, said = run(suite, "--host", "a15", **empty_cache)
    assert code == 5 and "2 skipped" in said
    assert "arm-kvm: nothing was judged: all 2 cases were skipped" in said
    (line,) = [line for line in said.splitlines() if line.startswith("SKIPPED")]
    assert "[2]" in line and "a15: linux-5.4.302.tar.xz is not cached" in line and "--kernel PATH" in line


def test_require_kvm_makes_it_a_failure(run, empty_cache):
    code, said = run(PASSING, "--host", "a15", "--require-kvm", **empty_cache)
    assert code == 1 and "1 error" in said
    assert "host a15 cannot be used: linux-5.4.302.tar.xz is not cached" in said and "Traceback" not in said


def test_a_file_of_a_tree_that_cannot_be_read(run, tmp_path):
    tree = tmp_path / "linux"
    (tree / "arch/arm").mkdir(parents=True)
    (tree / "Kconfig").touch()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.path.relpath(tree / "pipe"))
        code, said = run(PASSING, "--host", "a15", "--require-kvm", "--kernel", str(tree))
    assert code == 1 and "Traceback" not in said
    assert (
        f"host a15 cannot be used: {tree}/pipe: No such device or address" in said and "owner and permissions" in said
    )


def test_a_given_kernel_without_kvm(run, tmp_path):
    """The kernel boots on the A15, starts in HYP mode and has no KVM, which the host file promises."""
    text = (CONFIGS / "hosts/a15-debian.yaml").read_text()
    (tmp_path / "a15x.yaml").write_text(text.replace("can: [a15]\nguests: []", "can: [kvm, a15]\nguests: [A32]"))
    suite = PASSING + PASSING.replace("test_vm_runs", "test_again")
    code, said = run(suite, "--host", "a15x.yaml")
    assert code == 1 and "2 errors" in said
    assert "boots but has no KVM in it" in said and "--kernel PATH" in said


def wrong_kernels(tmp_path):
    (tmp_path / "Image").write_bytes(bytes(0x38) + b"ARM\x64" + bytes(64))
    (tmp_path / "zImage").write_bytes(bytes(0x24) + b"\x18\x28\x6f\x01" + bytes(64))
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("no kernel")
    os.mkfifo(tmp_path / "pipe")


WRONG_KERNELS = {
    "nothing": ("", "there is no such file or folder"),
    "a path that is not there": ("/nowhere/Image", "there is no such file or folder"),
    "in the home of nobody": ("~nosuchuser/Image", "there is no such user"),
    "another architecture's": ("zImage", "is a 32-bit Arm kernel; this host needs an arm64 one"),
    "no kernel": ("text", "is not an Arm kernel image"),
    "a pipe": ("pipe", "it is not a file"),
    "a folder that is no tree": ("folder", "is not a kernel source tree"),
    "a host that is not there": ("arm46=Image", "no host is called 'arm46'"),
    "a host that does not run": ("a15=Image", "host a15 does not run"),
    "a package without a suite": ("deb:linux-image-arm64", "deb:PACKAGE@SUITE"),
    "a suite without a package": ("deb:@sid", "deb:PACKAGE@SUITE"),
    "an unknown suite": ("deb:linux-image-arm64@nosuch", "Debian has no suite 'nosuch'"),
    "an unknown package": ("deb:linux-image-arm46@bookworm", "did you mean linux-image-arm64?"),
}


@pytest.mark.parametrize("what", WRONG_KERNELS)
def test_a_wrong_kernel_is_told_before_anything_boots(run, tmp_path, what):
    """By pytest's usage error (4), and not by a skip; in time also where a pipe could be waited for."""
    wrong_kernels(tmp_path)
    kernel, words = WRONG_KERNELS[what]
    code, said = run(PASSING, "--host", "arm64", "--kernel", kernel)
    assert code == 4 and words in said and "Traceback" not in said, said
    assert not list(tmp_path.glob("artifacts/hosts/*"))


def test_one_image_for_two_hosts(run, tmp_path):
    wrong_kernels(tmp_path)
    code, said = run(PASSING, "--host", "arm64", "--host", "a15", "--kernel", "Image")
    assert code == 4 and "is an arm64 kernel; this host needs a 32-bit Arm one" in said
    assert "--kernel HOST=" in said


def test_two_hosts_of_one_name(run, tmp_path):
    (tmp_path / "arm64.yaml").write_text((CONFIGS / "hosts/arm64.yaml").read_text())
    code, said = run(PASSING, "--host", "arm64", "--host", "arm64.yaml")
    assert code == 4 and "two hosts are called 'arm64'" in said


@pytest.mark.parametrize("count", ["0", "-3"])
def test_no_sequences(run, count):
    code, said = run(PASSING, "--host", "arm64", "--count", count)
    assert code == 4 and f"--count {count}: play at least one sequence" in said


def test_a_file_outside_the_root_folder(run, tmp_path):
    """pytest has no path for it; its artifacts have a place all the same."""
    (tmp_path / "root").mkdir()
    (tmp_path / "elsewhere").mkdir()
    suite = tmp_path / "elsewhere/test_mine.py"
    suite.write_text(PASSING)
    options = ["--host", "arm64", "-k", "A64", "--rootdir", str(tmp_path / "root"), str(suite)]
    code, said = run("", *options)
    assert code == 0 and "1 passed" in said, said
    assert list((tmp_path / "artifacts").rglob("console.log"))


def test_a_failed_boot_is_not_tried_again(run, tmp_path):
    text = (CONFIGS / "hosts/arm64.yaml").read_text()
    (tmp_path / "sick.yaml").write_text(text.replace("nokaslr", "nokaslr mem=64M"))
    suite = PASSING + PASSING.replace("test_vm_runs", "test_again")
    code, said = run(suite, "--host", "sick.yaml")
    assert code == 1 and "4 errors" in said
    assert said.count("Last console lines:") == 1
    assert said.count("could not be used earlier in this run, and is not tried again: the host's kernel panicked") == 3
    assert len(list((tmp_path / "artifacts/hosts").iterdir())) == 1, "one boot"


PANIC = """
def test_panic(host, isa):
    host.ssh.run("echo c > /proc/sysrq-trigger", timeout=20)
"""


def test_a_panic_fails_its_test_and_the_next_gets_a_fresh_host(run, tmp_path):
    code, said = run(PANIC + PASSING, "--host", "arm64", "-k", "A64")
    assert code == 1 and "1 failed, 1 passed" in said
    assert "HostPanic: the host's kernel panicked" in said and "sysrq triggered crash" in said
    (folder,) = (tmp_path / "artifacts").glob("**/test_suite.test_panic*")
    assert "Kernel panic" in (folder / "console.log").read_text()
    assert (
        "HostPanic" not in (folder / "lost.txt").read_text()
        and "Last console lines" in (folder / "lost.txt").read_text()
    )


SPLAT = """
def test_splat(host, isa):
    host.ssh.run("echo '<4>WARNING: CPU: 0 PID: 1 at mm/made_up.c:1' > /dev/kmsg")
"""


def test_a_splat_fails_the_test_that_caused_it(run):
    code, said = run(SPLAT + PASSING, "--host", "arm64", "-k", "A64")
    assert code == 1 and "1 failed, 1 passed" in said
    assert "kernel-splat" in said and "mm/made_up.c" in said


LATE = """
from arm_kvm.vmm.client import op

def test_passes(host, vm):
    vm.guest.ping()
    destroy = host.reset

    def reset():
        destroy()
        host.ssh.run("echo '<4>WARNING: CPU: 0 PID: 1 at mm/made_up.c:1' > /dev/kmsg")
        host.reset = destroy

    host.reset = reset

def test_with_a_vm_that_does_not_go(vm, host):
    host.agent(op.vm_destroy, vm=vm.id)
"""


@pytest.mark.parametrize("isolation", ["session", "test"])
def test_a_splat_when_the_vms_go_is_the_tests(run, isolation):
    code, said = run(LATE + PASSING, "--host", "arm64", "-k", "A64", "--isolation", isolation)
    assert code == 1 and "3 passed" in said and "2 errors" in said
    assert re.search(r"ERROR at teardown of test_passes.*while its VMs were destroyed:.*mm/made_up.c", said, re.S)
    assert re.search(r"teardown of test_with_a_vm_that_does_not_go.*VMs could not be destroyed: ", said, re.S)


LIE = """
from dataclasses import replace

def test_lie(vm):
    vm.add_memory(0x80000000, 0x1000)
    vm.guest.write(0x80000000, 1)
    slot = vm.slot_at(0x80000000)
    vm.slots[slot.slot] = replace(slot, ipa=0x90000000)
"""


def test_a_violation_after_the_test_fails_it_with_the_diff(run):
    code, said = run(LIE, "--host", "arm64", "-k", "A64")
    assert code == 1 and "1 failed" in said
    assert re.search(r"outside-memslots\s+IPA \[0x80000000, 0x80001000\)", said)
    assert "expected  nothing mapped: no memslot here" in said


def test_artifacts_of_a_test_are_in_one_folder_and_in_junit(run, tmp_path):
    code, _ = run(PASSING, "--host", "arm64", "-k", "A64", "--junitxml", "junit.xml")
    assert code == 0
    (folder,) = (tmp_path / "artifacts").glob("**/test_suite.test_vm_runs*")
    names = {path.name for path in folder.iterdir()}
    assert {"agent.log", "stage2-1.txt"} <= names
    assert "IPA [0x0080000000, 0x0080001000)" in (folder / "stage2-1.txt").read_text()
    attached = {p.get("value") for p in ET.parse(tmp_path / "junit.xml").iter("property")}
    assert {str(path) for path in folder.iterdir()} <= attached


TALKS_TO_QEMU = """
import logging

def test_fails(host):
    host.machine.qmp("query-status")
    logging.getLogger("mine").warning("a record of the test itself")
    assert False
"""


def test_a_failure_shows_no_qmp_traffic(run, tmp_path):
    """Even with pytest's log capture, which the lab's own configuration turns off."""
    code, said = run(TALKS_TO_QEMU, "--host", "arm64", "-o", "addopts=-ra --tb=short")
    assert code == 1 and "a record of the test itself" in said
    assert "qemu.qmp" not in said and "DEBUG" not in said
    (log,) = (tmp_path / "artifacts").glob("**/test_suite.test_fails*/qmp.log")
    assert "query-status" in log.read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "arm46"], "did you mean 'arm64'"),
        (["--host", "none.yaml"], "No such file"),
        (["--host", "arm64", "--kernel", "a15=zImage"], "host a15 does not run"),
        (["--host", "arm64", "--kernel", "zImage", "--kernel", "Image"], "every host has one already: zImage"),
    ],
)
def test_a_wrong_option_is_a_usage_error(run, options, words):
    code, said = run(PASSING, *options)
    assert code == 4 and words in said and "Traceback" not in said


def test_a_kernel_elsewhere_on_the_disk_is_not_a_test_path(tmp_path):
    """`--kernel PATH` and `--artifacts DIR` of things that exist, as `tox -e arm-kvm --` passes them."""
    (tmp_path / "zImage").write_bytes(bytes(0x38) + b"ARM\x64" + bytes(64))
    argv = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--collect-only", "-q"]
    argv += ["--host", "arm64", "--kernel", str(tmp_path / "zImage"), "--artifacts", str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "testcases/stage2/test_mmio.py::" in done.stdout, done.stderr


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


FEATURES = """
import pytest
from arm_kvm.vmm.client import op
from arm_kvm.host.features import FEATURES, Feature
FEATURES["MADV_NONE"] = Feature("Linux 9.9", lambda host: host.agent(op.memory_takes, advice=200))

@pytest.mark.feature("MADV_COLD")
def test_that_any_kernel_of_today_can_run(vm):
    pass

@pytest.mark.feature("MADV_COLD", "MADV_NONE")
def test_that_no_kernel_can(vm):
    pass
"""


def test_what_a_kernel_lacks_is_found_out_and_named(run):
    code, said = run(FEATURES, "--host", "arm64", "-k", "A64")
    assert code == 0 and "1 passed, 1 skipped" in said
    assert re.search(r"Linux 6\.1\S+ has no MADV_NONE: it comes with Linux 9\.9", said)


def test_a_feature_that_is_none(run):
    code, said = run(FEATURES.replace('"MADV_COLD")', '"MADV_CLOD")'), "--host", "arm64")
    assert code == 2 and "feature('MADV_CLOD') is not known; did you mean 'MADV_COLD'?" in said


SLOW = """
import time

def test_slow(vm):
    print("ready", flush=True)
    vm.guest.ping()
    time.sleep(60)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_when_pytest_is_ended(run, tmp_path, end):
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


DIES_LATE = """
from arm_kvm.recorder.facts import kernel_map
from arm_kvm.vmm.client import op

def test_passes(vm, host):
    vm.guest.ping()
    kernel = kernel_map(host)
    with host.machine.gdb.pause() as gdb:
        gdb.write_memory(kernel.pa(kernel.symbols["kvm_arch_destroy_vm"]), bytes(4))

def test_after(vm):
    vm.guest.ping()
"""


@pytest.mark.parametrize("isolation", ["session", "test"])
def test_a_host_that_dies_when_the_vms_go(run, isolation):
    """The test's own part passed; the kernel meets an undefined instruction when its VM is destroyed."""
    code, said = run(DIES_LATE, "--host", "arm64", "-k", "A64", "--isolation", isolation)
    assert code == 1 and "2 passed" in said and "1 error" in said
    assert "while the test's VMs were destroyed, its host was lost: the host's kernel" in said
