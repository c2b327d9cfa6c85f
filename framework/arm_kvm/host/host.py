"""A live host: a machine whose Linux is up and whose agent answers."""

from __future__ import annotations

import os
import re
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from arm_kvm.agent import syscalls
from arm_kvm.guest.exits import Signal
from arm_kvm.guest.isa import ISAS
from arm_kvm.host import rootfs as rootfs_
from arm_kvm.host.boot import Progress, bring_up, greet, start_agent
from arm_kvm.host.config import HostConfig
from arm_kvm.host.kernel import Kernel
from arm_kvm.host.origin import Once, Origin
from arm_kvm.host.ssh import Ssh, command_line
from arm_kvm.machine.board import Boot
from arm_kvm.machine.hold import Hold
from arm_kvm.machine.machine import Logs, Machine, Plugin
from arm_kvm.machine.rundir import Card, run_directory
from arm_kvm.machine.saved import Saved
from arm_kvm.support.errors import ConfigError, KernelError, LabError, NoKvm
from arm_kvm.support.limits import lab_errors
from arm_kvm.vmm.actor import Actor
from arm_kvm.vmm.client import Agent, op, request
from arm_kvm.vmm.descriptor import Descriptor
from arm_kvm.vmm.process import Vmm
from arm_kvm.vmm.vm import Vm, destroy

ComeUp = Callable[[Machine, dict[str, float], Progress], Agent]


_RUNNING = 44 << 20  #: bytes that a kernel and its first processes allocate beside their images


def _require_room(config: HostConfig, kernel: Kernel, initramfs: Path) -> None:
    """Raise ConfigError if the board's memory is too small for this kernel and root file system."""
    unpacked = kernel.unpacked_size
    packed = initramfs.stat().st_size
    needed = unpacked + 2 * packed + _RUNNING  # the archive is freed only when its files are unpacked
    if config.board.memory < needed:
        raise ConfigError(
            f"{config.path}: memory: {config.board.memory >> 20}M is too little for the kernel ({unpacked >> 20} MiB) "
            f"and its root file system ({packed >> 20} MiB, twice while it is unpacked)",
            remedy=f"give the board {-(-needed >> 26) * 64}M or more",
        )


class Host:
    """A live host. Made by :meth:`boot` or :meth:`restore`, ended by :meth:`shutdown`.

    ``agent`` takes requests, ``ssh`` commands.
    """

    def __init__(
        self,
        config: HostConfig,
        kernel: Kernel,
        machine: Machine,
        rootfs: rootfs_.Rootfs,
        come_up: ComeUp,
        origin: Origin | None = None,
    ) -> None:
        self.config = config
        self.kernel = kernel
        self.machine = machine
        self.rootfs = rootfs
        self.vms: list[Vm] = []
        self._actors: list[Actor] = []
        self.boot_states = Progress()
        self.origin = origin or Origin()  #: key of what is found out once for all hosts of this snapshot, see Once
        self._ssh: Ssh | None = None
        try:
            self.agent = come_up(machine, config.timeouts, self.boot_states)
            self._leave_card()
        except BaseException:
            machine.kill()
            raise

    @classmethod
    def boot(
        cls,
        config: HostConfig,
        kernel: Kernel,
        logs: Path,
        *,
        extra: str = "",
        ssh_port: int = 0,
        plugin: Plugin | None = None,
    ) -> Host:
        """Boot the board and wait until its agent answers.

        ``extra`` is appended to the kernel's command line; ``plugin`` is loaded into QEMU. Raises ConfigError,
        SetupError, QemuRefused, PortBusy, HostPanic, HostSilent and other LabErrors, and then leaves no process
        behind.
        """
        rootfs = rootfs_.obtain(config.rootfs)
        initramfs = run_directory() / f"{config.name}.{time.monotonic_ns()}.cpio"
        try:
            with lab_errors(initramfs):
                rootfs.initramfs(initramfs, kernel.modules)
            _require_room(config, kernel, initramfs)
            boot = Boot(kernel.image, initramfs, f"{config.cmdline} {extra}".strip())
            machine = Machine.start(config.board, boot, Logs(logs), ssh_port, plugin)
        finally:
            initramfs.unlink(missing_ok=True)
        host = cls(config, kernel, machine, rootfs, bring_up)
        if rootfs.bytecode is None:
            with suppress(LabError):  # only later boots would be faster
                rootfs.keep_bytecode(*host.agent.ask(request(op.bytecode), deadline=60.0))
        return host

    @classmethod
    def restore(
        cls,
        config: HostConfig,
        kernel: Kernel,
        saved: Saved,
        logs: Path,
        *,
        plugin: Plugin | None = None,
        entropy: bytes = b"",
        origin: Origin | None = None,
    ) -> Host:
        """Resume a saved host; its clock is set, and ``entropy`` is added to its entropy pool.

        Without ``entropy`` all hosts restored from one snapshot start with the same pool. Raises what :meth:`boot`
        raises.
        """
        rootfs = rootfs_.obtain(config.rootfs)
        machine = Machine.restore(config.board, saved, Logs(logs), plugin)
        host = cls(config, kernel, machine, rootfs, greet, origin)
        try:
            host.agent(op.restored, now=time.time(), blob=entropy)
        except BaseException:
            host.shutdown()
            raise
        return host

    def _leave_card(self) -> None:
        machine = self.machine
        ram, start = machine.ram.place(machine.process.pid)
        Card(
            host=self.config.name,
            qemu_pid=machine.process.pid,
            lab_pid=os.getpid(),
            ram=ram,
            ram_start=start,
            ram_base=machine.ram.base,
            ram_size=machine.ram.size,
            architecture=self.config.architecture.name,
            gdb=str(machine.folder / "gdb"),
            ssh=self.ssh_command,
        ).save(machine.folder)

    @property
    def ssh(self) -> Ssh:
        """The ssh connection to the host, opened on first use. Raises SshUnreachable."""
        if self._ssh is None:
            where = (self.machine.ssh_port, self.rootfs.client_key, self.rootfs.host_key)
            self._ssh = Ssh.connect(*where, self.config.timeouts["ssh"], self.machine.check)
        return self._ssh

    @property
    def ssh_command(self) -> str:
        """The command line that opens a shell on this host."""
        return command_line(self.machine.ssh_port, self.rootfs.client_key)

    @property
    def has_kvm(self) -> bool:
        """Whether the host has /dev/kvm."""
        return bool(self.agent.hello["kvm"])

    @property
    def release(self) -> str:
        """The running kernel's version, as ``uname -r`` prints it."""
        return str(self.agent.hello["release"])

    @property
    def kernel_version(self) -> tuple[int, int]:
        """(major, minor) of the running kernel."""
        major, minor = re.findall(r"\d+", self.release)[:2]
        return int(major), int(minor)

    @property
    def needs_no_icache_maintenance(self) -> bool:
        """CTR_EL0.DIC (ARM DDI 0487, D19.2): instruction fetches see all stores; KVM maps RAM executable at once.

        arch/arm64/kvm/mmu.c (6.12), user_mem_abort(): ARM64_HAS_CACHE_DIC. Armv7 has no such bit.
        """
        return self.config.architecture.name == "armv8" and _has_dic(self)

    @property
    def gicv(self) -> int:
        """Physical address of the GIC's virtual CPU interface: the fourth range of its device tree node."""
        return _gicv(self)

    def symbol(self, *names: str) -> int:
        """Virtual address of the first of these symbols that the kernel has; several, for releases rename them.

        ``name+0x10`` is an offset from one. Raises KernelError.
        """
        for name, _, offset in (name.partition("+") for name in names):
            if address := self.ssh.run(f"awk '$3 == \"{name}\" {{print $1; exit}}' /proc/kallsyms").strip():
                return int(address, 16) + int(offset or "0", 0)
        raise KernelError(
            f"Linux {self.release} has no symbol {' or '.join(names)}",
            remedy="it may be inlined there: choose one of its callers",
        )

    # -- concurrency -------------------------------------------------------------------------------------

    def actor(self, cpu: int | None = None) -> Actor:
        """A thread of the VMM that makes requests concurrently with the agent, bound to ``cpu`` if one is given.

        It ends with the test.
        """
        self._actors.append(Actor(self.agent, cpu))
        return self._actors[-1]

    @contextmanager
    def hold(self, *symbols: str, cpu: int, seconds: float = 10.0) -> Iterator[Hold]:
        """Within the block, hold ``cpu`` when it reaches this symbol of the kernel, while the other CPUs run.

        Of several symbols the first that the kernel has is used. ``held.wait()`` returns when the CPU is held. It is
        released at the end of the block, or after ``seconds``; the block then raises HoldFailed. CPU 0, on which the
        agent and ssh run, cannot be held.
        """
        if not 0 < cpu < self.config.board.cpus:
            raise ConfigError(
                f"{self.config.name}: CPU {cpu} cannot be held",
                remedy="hold a CPU above 0, on which the agent and ssh run",
            )
        held = Hold(self.machine.gdb, self.symbol(*symbols), cpu, symbols[0], seconds)
        try:
            yield held
        except BaseException:
            with suppress(LabError):  # the test's own failure comes first
                held.release()
            raise
        held.release()

    # -- system calls and ioctls without a method of their own -----------------------------------------------

    @property
    def kvm(self) -> Descriptor:
        """The VMM's descriptor of /dev/kvm, for system ioctls."""
        return Descriptor(self.agent, self.agent(op.kvm_fd))

    def system_call(self, name: str, *arguments: int) -> int:
        """Have the VMM make this system call and return its result. Raises HostOsError.

        Raises KeyError for a name that is not in :data:`arm_kvm.agent.syscalls.NUMBERS`.
        """
        syscalls.number(name, self.agent.bits)  # here rather than as a fault of the agent
        return self.agent(op.syscall, name=name, arguments=[*arguments])

    def userfaultfd(self, flags: int = 0) -> Descriptor:
        """Call userfaultfd(2) and return the descriptor, for UFFDIO_* ioctls (:mod:`arm_kvm.agent.ioctls`)."""
        return Descriptor(self.agent, self.system_call("userfaultfd", flags))

    def take_signals(self, *numbers: int) -> list[Signal]:
        """Dequeue the pending signals of these numbers of the VMM's main thread, with their siginfo.

        The first call blocks them there and in actors made afterwards; SIGBUS is always blocked.
        """
        self.agent(op.signals_block, signals=[*numbers])
        return [Signal(*siginfo) for siginfo in self.agent(op.signals_take, signals=[*numbers])]

    def start_vmm(self) -> Vmm:
        """Start another VMM process, which can be killed."""
        agent = start_agent(self.machine, self.ssh, self.config.timeouts["agent"], log="vmm.log")
        return Vmm(agent, self.agent, self.vms)

    def require_kvm(self) -> None:
        """Raise NoKvm if this kernel came up without KVM."""
        if not self.has_kvm:
            raise NoKvm(
                f"{self.config.name}: the kernel {self.kernel.name} ({self.release}) boots but has no KVM in it",
                remedy="give one that has with --kernel PATH",
            )

    def create_vm(self, isa: str, **kind: Any) -> Vm:
        """Create a VM with the payload for this guest ISA; ``kind`` is passed to :meth:`arm_kvm.vmm.vm.Vm.create`."""
        return self.create_vms(isa, 1, **kind)[0]

    def create_vms(self, isa: str, count: int, **kind: Any) -> list[Vm]:
        """Create several VMs in one request; see :meth:`create_vm`."""
        vms = Vm.create(self.agent, ISAS[isa], count, **kind)
        self.vms += vms
        return vms

    @contextmanager
    def offline(self, cpu: int) -> Iterator[None]:
        """Within the block this CPU is offline."""
        switch = f"/sys/devices/system/cpu/cpu{cpu}/online"
        self.ssh.run(f"echo 0 > {switch}")
        try:
            yield
        finally:
            self.ssh.run(f"echo 1 > {switch}")

    def reset(self) -> None:
        """End all actors and destroy all VMs. An agent that no longer answers is killed, which frees everything, and
        replaced.

        Raises LabError if the machine is lost, or the kernel does not destroy a VM.
        """
        try:
            if self.agent.usable:
                for actor in self._actors:
                    actor.end()
                destroy(self.vms)
            else:
                self.machine.check()
                self.ssh.run(f"kill -9 {self.agent.hello['pid']}", check=False)
                self.agent.close()
                self.agent = start_agent(self.machine, self.ssh, self.config.timeouts["agent"])
        finally:
            self._actors.clear()
            self.vms.clear()

    def shutdown(self) -> None:
        """End the machine. Idempotent."""
        with ExitStack() as stack:
            stack.callback(self.machine.kill)
            if self._ssh is not None:
                stack.callback(self._ssh.close)
            stack.callback(self.agent.close)


def _read_dic(host: Host) -> bool:
    with host.machine.gdb.pause() as gdb:
        return bool(gdb.read(0, "CTR_EL0")[0] >> 29 & 1)


def _find_gicv(host: Host) -> int:
    ranges = host.ssh.run("od -An -v -tx1 /proc/device-tree/intc@*/reg")
    found: int = struct.unpack_from(">Q", bytes.fromhex(ranges), 48)[0]
    return found


_has_dic: Once[Host, bool] = Once(_read_dic)
_gicv: Once[Host, int] = Once(_find_gicv)
