"""Boots that fail, on real kernels: each with an error of its own, and the console's last lines."""

import os
import socket
import time
from dataclasses import replace

import pytest
from arm_kvm.host import config, rootfs
from arm_kvm.host.host import Host
from arm_kvm.host.kernel import obtain
from arm_kvm.host.ssh import Ssh
from arm_kvm.machine.rundir import live_machines
from arm_kvm.oracle import Oracle
from arm_kvm.oracle.ftrace import traced
from arm_kvm.oracle.locator import watch
from arm_kvm.sequences.player import Player, SequenceBroken
from arm_kvm.sequences.search import search
from arm_kvm.support.errors import (
    AgentFault,
    AgentTimeout,
    ConfigError,
    HostLockup,
    HostOops,
    HostOsError,
    HostPanic,
    HostSilent,
    KernelError,
    QemuDied,
    SshUnreachable,
)
from arm_kvm.vmm.client import op, request

ARM64 = config.find("arm64")


@pytest.fixture
def boot(tmp_path):
    """Boot an arm64 host with ``extra`` appended to its command line."""
    hosts = []

    def start(extra="", cmdline=ARM64.cmdline, **timeouts):
        host_config = replace(ARM64, cmdline=cmdline, timeouts=ARM64.timeouts | timeouts)
        hosts.append(Host.boot(host_config, obtain(ARM64), tmp_path / "logs", extra=extra))
        return hosts[-1]

    yield start
    for host in hosts:
        host.shutdown()


def no_machine_of_ours():
    return [card for card in live_machines() if card.lab_pid == os.getpid()] == []


def test_a_kernel_that_panics_at_boot(boot):
    with pytest.raises(HostPanic, match="Kernel panic - not syncing") as caught:
        boot("rdinit=/nonexistent root=/dev/none")
    for part in ("Last console lines:", "Kernel panic", "QEMU: qemu-system-aarch64", "QEMU's stderr:"):
        assert part in caught.value.evidence
    assert no_machine_of_ours()


def test_a_host_that_says_nothing(boot):
    with pytest.raises(HostSilent, match="boot state 'kernel' within 3 s: nothing at all"):
        boot(cmdline="console=ttyS7", kernel=3.0)


def test_a_host_whose_init_never_comes(boot):
    with pytest.raises(HostSilent, match="boot state 'init' within 5 s") as caught:
        boot("rdinit=/opt/none init=/bin/sh loglevel=8 initcall_blacklist=populate_rootfs rootdelay=60", init=5.0)
    assert "timeouts.init" in caught.value.remedy


def test_a_kernel_that_the_lab_cannot_reach(tmp_path):
    """Debian's drivers are modules, and none is packed: init reports it, long before the agent's timeout."""
    kernel = replace(obtain(ARM64), modules=[])
    with pytest.raises(KernelError, match="has no driver virtio-mmio") as caught:
        Host.boot(ARM64, kernel, tmp_path / "logs")
    assert "`modules`" in caught.value.remedy and "arm-kvm: no driver" in caught.value.evidence
    assert no_machine_of_ours()


def test_a_board_with_too_little_memory(tmp_path):
    small = replace(ARM64, board=replace(ARM64.board, memory=128 << 20))
    with pytest.raises(ConfigError, match=r"memory: 128M is too little for the kernel") as caught:
        Host.boot(small, obtain(ARM64), tmp_path / "logs")
    assert "give the board 192M or more" in caught.value.remedy
    enough = replace(ARM64, board=replace(ARM64.board, memory=192 << 20))
    Host.boot(enough, obtain(ARM64), tmp_path / "logs").shutdown()


def test_an_ssh_that_never_answers():
    """A port that accepts connections and never sends anything."""
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        key = rootfs.obtain("arm64").client_key
        with pytest.raises(SshUnreachable, match="does not answer on ssh .* within 1 s") as caught:
            Ssh.connect(mute.getsockname()[1], key, "", 1.0, lambda: None)
    assert "timeouts.ssh" in caught.value.remedy


def test_a_live_host_and_all_the_ways_it_can_fail(boot):
    """One boot for all that leaves the host usable, and at the end its panic."""
    host = boot()
    assert host.has_kvm and list(host.boot_states.reached) == ["kernel", "init", "network", "agent"]

    with pytest.raises(SshUnreachable, match="another ssh key"):
        Ssh.connect(host.machine.ssh_port, host.rootfs.client_key, "AAAA", 10.0, host.machine.check)
    with pytest.raises(SshUnreachable, match="`false` failed with status 1"):
        host.ssh.run("false")
    with pytest.raises(SshUnreachable, match="did not end within 1 s"):
        host.ssh.run("sleep 30", timeout=1.0)
    host.ssh.put(b"to and fro\n", "/tmp/file")
    assert host.ssh.get("/tmp/file") == b"to and fro\n"

    with pytest.raises(AgentFault) as fault:
        host.agent(op.vm_memslot, vm=99, slot=0, ipa=0, size=0, hva=0, flags=0)
    assert "KeyError: 99" in fault.value.evidence, "the agent's own traceback"
    with pytest.raises(HostOsError, match="store to memory: EFAULT"):
        host.agent(op.memory_write, hva=0x1000, blob=b"x")

    vm = host.create_vm("A64")
    with vm.guest.spinning():
        host.machine.release_gdb()
        (card,) = [card for card in live_machines() if card.lab_pid == os.getpid()]
        (seen,) = watch(card, 0.5)
        assert seen.leaf(0x0800_0000).executable and seen.regime.input_bits == 40
    host.reset()

    with pytest.raises(HostPanic, match="Kernel panic"):
        host.ssh.run("echo c > /proc/sysrq-trigger", timeout=10.0)
        host.agent(op.hello)
    assert not host.machine.alive


def test_an_agent_that_hangs_is_given_up_and_replaced(boot):
    host = boot()
    host.agent(op.trace_start, events=["kvm:kvm_guest_fault"])
    host.create_vm("A64").guest.ping()
    with pytest.raises(AgentTimeout, match="no answer within 1 s"):
        host.agent.ask(request(op.stay_in_user_mode, seconds=60.0), deadline=1.0)
    with pytest.raises(AgentTimeout):
        host.agent(op.hello)  # the connection was closed: the next answer could be the late one
    host.reset()
    assert host.agent(op.hello)["kvm"] and host.vms == []

    with traced(host.agent, ["kvm:kvm_entry"]) as seen:
        host.create_vm("A64").guest.ping()
    assert {event.name for event in seen.events} == {"kvm_entry"}, "and what the first agent's trace held is gone"


def patch_function(host, name, code):
    """Overwrite the first instructions of a kernel function in the machine's memory."""
    line = host.ssh.run(f"grep -w {name} /proc/kallsyms").split()
    start = next(x for x in host.ssh.run("cat /proc/iomem").splitlines() if "Kernel code" in x)
    stext = int(host.ssh.run("grep -w _stext /proc/kallsyms").split()[0], 16)
    pa = int(start.split("-")[0], 16) + int(line[0], 16) - stext
    with host.machine.gdb.pause() as gdb:
        gdb.write_memory(pa, code)


UDF = bytes(4)
BRANCH_TO_SELF = bytes.fromhex("00000014")


def test_an_oops_is_recognised(boot):
    host = boot()
    patch_function(host, "ksys_sync", UDF)
    with pytest.raises(HostOops, match="oopsed"):
        host.ssh.run("sync", timeout=10.0)
        for _ in range(50):
            host.agent(op.hello)
            time.sleep(0.05)


def test_a_lock_up_is_recognised(boot):
    host = boot()
    patch_function(host, "ksys_sync", BRANCH_TO_SELF)
    with pytest.raises(HostLockup, match="locked up"):
        host.ssh.run("sync", timeout=30.0)


def test_qemu_that_dies_under_a_request(boot):
    host = boot()
    sent = host.agent.send(request(op.stay_in_user_mode, seconds=5.0))
    host.machine.process.kill()
    with pytest.raises(QemuDied, match="signal 9") as caught:
        host.agent.receive(sent)
    assert "Last console lines:" in caught.value.evidence


def test_a_host_that_is_lost_leaves_the_sequence_that_did_it(boot):
    """Without a host the sequence cannot be shortened, and the search ends at once."""
    host = boot()

    class Killing(Player):
        def _carry_out(self, step):
            if len(self.steps) == 4:
                host.machine.process.kill()
                host.machine.process.wait()
            return super()._carry_out(step)

    with pytest.raises(SequenceBroken) as found:
        search(lambda: Killing(host, Oracle(host), "A64"), sequences=400)
    assert isinstance(found.value.lost, QemuDied) and len(found.value.steps) == 4
