"""Cases that have a host to themselves begin with a prepared host and VM, just as they would have made them."""

import pytest
from arm_kvm.hosts.spares import Spares
from arm_kvm.machine.rundir import live_machines
from arm_kvm.support.errors import LabError

SUITE = """
import pytest

@pytest.fixture(autouse=True)
def what_is_there(host, request):
    with open("there", "a") as f:
        f.write(f"{request.node.name.partition('[')[0]} {len(host.vms)}\\n")

def test_first(vm, host):
    assert host.vms == [vm] and len(vm.vcpus) == 1

@pytest.mark.vcpus(2, pinned=True)
def test_two(vm, host, ssh):
    assert host.vms == [vm] and vm.id == 1 and len(vm.vcpus) == 2
    lists = ssh.run(f"grep -h Cpus_allowed_list /proc/{host.agent.hello['pid']}/task/*/status").split()[1::2]
    assert lists == ["0", "0", "1"]
    vm.guests[1].ping()

def test_none(host):
    assert host.vms == []

class TestAnother:
    @pytest.fixture
    def vm(self):
        return "of my own"

    def test_another(self, vm, host, isa):
        assert host.vms == []

class TestMore:
    @pytest.fixture
    def vm(self, vm):
        vm.guest.ping()
        return vm

    def test_more(self, vm, host):
        assert host.vms == [vm] and vm.guest.entered
"""

REFUSED = """
import pytest

def test_first(vm):
    vm.guest.ping()

@pytest.mark.vcpus(5000)
def test_too_many(vm):
    pass

def test_last(vm):
    vm.guest.ping()
"""

FAILS = "def test_fails(vm):\n    assert False\n" + "".join(f"def test_{n}(vm): pass\n" for n in range(9))


def alone(run, suite, *options):
    return run(suite, "--host", "arm64", "--isolation", "test", "-k", "A64 or none", *options)


def test_each_case_gets_its_own_vm_and_no_more(run, tmp_path):
    code, said = alone(run, SUITE)
    assert code == 0 and "5 passed" in said, said
    logs = {path.parent.name: path.read_text() for path in tmp_path.glob("artifacts/**/test_suite.*/agent.log")}
    prepared = [name for name, log in logs.items() if log.count("> 3 kernel_log") and "restored" in log]
    assert len(logs) == 5 and len(prepared) == 4  # all but the first
    there = dict(line.split() for line in (tmp_path / "there").read_text().splitlines())
    with_vm = {test for test, vms in there.items() if int(vms) == 1}
    asked = {"test_first", "test_two", "test_more"}
    assert with_vm == {test for test in asked if any(test in name for name in prepared)} and len(with_vm) >= 2


def test_a_vm_that_kvm_refuses_fails_the_case_that_asks_for_it(run):
    code, said = alone(run, REFUSED)
    assert code == 1 and "2 passed" in said and "1 error" in said
    assert "KVM_CREATE_VCPU" in said and "boots afresh" not in said


@pytest.mark.parametrize(("least", "made"), [(0, ["one"]), (1 << 60, [])])
def test_no_host_is_prepared_when_memory_is_short(least, made):
    """A test that asks then has its host started."""
    asked = []

    def make():
        asked.append("one")
        raise LabError("not in this test")

    spares = Spares(least)
    spares.expect({"one": make})
    assert spares.take("one") is None
    spares.close()
    assert asked == made


def test_unused_hosts_end(run):
    process = run.start(FAILS, "--host", "arm64", "--isolation", "test", "-k", "A64", "-x")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "1 failed" in said
    assert not [card for card in live_machines() if card.lab_pid == process.pid]
