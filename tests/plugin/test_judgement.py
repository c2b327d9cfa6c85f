"""What fails a test besides its own assertions, what is skipped, and the artifacts of each test."""

import re
import xml.etree.ElementTree as ET

import pytest
from arm_kvm.support.paths import CONFIGS

from ..pytest_run import PASSING


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
def test_a_splat_while_the_vms_are_destroyed_fails_the_test(run, isolation):
    code, said = run(LATE + PASSING, "--host", "arm64", "-k", "A64", "--isolation", isolation)
    assert code == 1 and "3 passed" in said and "2 errors" in said
    assert re.search(r"ERROR at teardown of test_passes.*while its VMs were destroyed:.*mm/made_up.c", said, re.S)
    assert re.search(r"teardown of test_with_a_vm_that_does_not_go.*VMs could not be destroyed: ", said, re.S)


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
def test_a_host_that_dies_while_the_vms_are_destroyed(run, isolation):
    """The test's own assertions hold; the kernel executes an undefined instruction when it destroys the VM."""
    code, said = run(DIES_LATE, "--host", "arm64", "-k", "A64", "--isolation", isolation)
    assert code == 1 and "2 passed" in said and "1 error" in said
    assert "while the test's VMs were destroyed, its host was lost: the host's kernel" in said


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


FEATURES = """
import pytest
from arm_kvm.vmm.client import op
from arm_kvm.host.features import FEATURES, Feature
FEATURES["MADV_NONE"] = Feature("Linux 9.9", lambda host: host.agent(op.memory_takes, advice=200))

@pytest.mark.feature("MADV_COLD")
def test_that_any_current_kernel_can_run(vm):
    pass

@pytest.mark.feature("MADV_COLD", "MADV_NONE")
def test_that_no_kernel_can(vm):
    pass
"""


def test_a_feature_that_the_kernel_lacks_skips_the_case(run):
    code, said = run(FEATURES, "--host", "arm64", "-k", "A64")
    assert code == 0 and "1 passed, 1 skipped" in said
    assert re.search(r"Linux 6\.1\S+ has no MADV_NONE: it comes with Linux 9\.9", said)


def test_an_unknown_feature(run):
    code, said = run(FEATURES.replace('"MADV_COLD")', '"MADV_CLOD")'), "--host", "arm64")
    assert code == 2 and "feature('MADV_CLOD') is not known; did you mean 'MADV_COLD'?" in said
