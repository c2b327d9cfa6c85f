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
from arm_kvm.support.limits import refusals_told
from arm_kvm.vmm import syscalls
from arm_kvm.vmm.actor import Actor
from arm_kvm.vmm.client import Agent, op, request
from arm_kvm.vmm.ioctls import Descriptor
from arm_kvm.vmm.process import Vmm
from arm_kvm.vmm.vm import Vm, destroy

ComeUp = Callable[[Machine, dict[str, float], Progress], Agent]


_RUNNING = 44 << 20  #: bytes that a kernel and its first processes take beside what they are made of


def _require_room(config: HostConfig, kernel: Kernel, initramfs: Path) -> None:
    """Raises ConfigError for a board in whose memory this kernel and root file system have no room."""
    unpacked = kernel.unpacked_size
    packed = initramfs.stat().st_size
    needed = unpacked + 2 * packed + _RUNNING  # the archive is there until its files are
    if config.board.memory < needed:
        raise ConfigError(
            f"{config.path}: memory: {config.board.memory >> 20}M is too little for the kernel ({unpacked >> 20} MiB) "
            f"and its root file system ({packed >> 20} MiB, twice while it is unpacked)",
            remedy=f"give the board {-(-needed >> 26) * 64}M or more",
        )


class Host:
    """Made by :meth:`boot` or :meth:`restore`, ended by :meth:`shutdown`.

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
        self.boot_states = Progress()
        self.origin = origin or Origin()  #: what upper floors find out once is kept by this
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
        """Start the board and wait until its agent answers; ``extra`` is appended to the command line,
        ``plugin`` loaded into QEMU.

        Raises SetupError, QemuRefused, PortBusy, HostPanic, HostSilent, SshUnreachable, ... and leaves
        no process behind.
        """
        rootfs = rootfs_.obtain(config.rootfs)
        initramfs = run_directory() / f"{config.name}.{time.monotonic_ns()}.cpio"
        try:
            with refusals_told(initramfs):
                rootfs.initramfs(initramfs, kernel.modules)
            _require_room(config, kernel, initramfs)
            boot = Boot(kernel.image, initramfs, f"{config.cmdline} {extra}".strip())
            machine = Machine.start(config.board, boot, Logs(logs), ssh_port, plugin)
        finally:
            initramfs.unlink(missing_ok=True)
        host = cls(config, kernel, machine, rootfs, bring_up)
        if rootfs.bytecode is None:
            with suppress(LabError):  # it only makes later boots faster
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
        """Go on where a host of this kind was saved; its clock is set, and ``entropy`` stirred in.

        Without entropy all hosts restored from one begin with the same entropy pool. Raises what boot raises.
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
        """ssh to the host, connected when it is first wanted. Raises SshUnreachable."""
        if self._ssh is None:
            where = (self.machine.ssh_port, self.rootfs.client_key, self.rootfs.host_key)
            self._ssh = Ssh.connect(*where, self.config.timeouts["ssh"], self.machine.check)
        return self._ssh

    @property
    def ssh_command(self) -> str:
        """What a person types to get a shell on this host."""
        return command_line(self.machine.ssh_port, self.rootfs.client_key)

    @property
    def has_kvm(self) -> bool:
        """Whether /dev/kvm is there, as the agent sees it."""
        return self.agent.hello["kvm"]

    @property
    def release(self) -> str:
        """The running kernel's own version, as uname -r says it."""
        return self.agent.hello["release"]

    @property
    def kernel_version(self) -> tuple[int, int]:
        """(major, minor) of the running kernel."""
        major, minor = re.match(r"(\d+)\.(\d+)", self.release).groups()
        return int(major), int(minor)

    @property
    def needs_no_icache_maintenance(self) -> bool:
        """CTR_EL0.DIC (ARM DDI 0487, D19.2): the CPU's I-cache sees all stores, and KVM maps RAM executable at once.

        arch/arm64/kvm/mmu.c (6.12), user_mem_abort(): ARM64_HAS_CACHE_DIC. Armv7 has no such bit.
        """
        return self.config.architecture.name == "armv8" and _has_dic(self)

    @property
    def gicv(self) -> int:
        """Physical address of the board's virtual CPU interface, as its device tree says (fourth range of the GIC)."""
        return _gicv(self)

    def symbol(self, *names: str) -> int:
        """Virtual address of the first of these symbols that the kernel has: releases rename them.

        ``name+0x10`` is an instruction after one. Raises KernelError.
        """
        for name, _, offset in (name.partition("+") for name in names):
            if said := self.ssh.run(f"awk '$3 == \"{name}\" {{print $1; exit}}' /proc/kallsyms").strip():
                return int(said, 16) + int(offset or "0", 0)
        raise KernelError(
            f"Linux {self.release} has no symbol {' or '.join(names)}",
            remedy="it may be inlined there: choose a caller",
        )

    # -- more than one thing at a time -------------------------------------------------------------------

    def actor(self, cpu: int | None = None) -> Actor:
        """A thread of the VMM that does one thing while the agent does others, bound to ``cpu`` if one is given."""
        return Actor(self.agent, cpu)

    @contextmanager
    def hold(self, *symbols: str, cpu: int, seconds: float = 10.0) -> Iterator[Hold]:
        """Within the block ``cpu`` is held when it comes to this symbol of the kernel, the others going on.

        Of several symbols it is the first that the kernel has.

        ``held.wait()`` returns when it stands there; at the end of the block it goes on, or after so many seconds,
        and then the block fails. CPU 0, on which the agent and ssh live, cannot be held. Raises HoldFailed.
        """
        if not 0 < cpu < self.config.board.cpus:
            raise ConfigError(
                f"{self.config.name}: CPU {cpu} cannot be held", remedy="hold one above 0, where the agent and ssh live"
            )
        held = Hold(self.machine.gdb, self.symbol(*symbols), cpu, symbols[0], seconds)
        try:
            yield held
        except BaseException:
            with suppress(LabError):  # the test's own failure is the one to show
                held.release()
            raise
        held.release()

    # -- what the VMM can be made to do without a method of its own ------------------------------------------

    @property
    def kvm(self) -> Descriptor:
        """/dev/kvm as the VMM has it open, for ioctls on the system."""
        return Descriptor(self.agent, self.agent(op.kvm_fd))

    def system_call(self, name: str, *arguments: int) -> int:
        """Have the VMM make this system call (:data:`arm_kvm.vmm.syscalls.NUMBERS`): its result. Raises HostOsError."""
        return self.agent(op.syscall, name=name, number=syscalls.number(name, self.agent.bits), arguments=[*arguments])

    def userfaultfd(self, flags: int = 0) -> Descriptor:
        """userfaultfd(2): its descriptor, for UFFDIO_* ioctls (:mod:`arm_kvm.vmm.ioctls`)."""
        return Descriptor(self.agent, self.system_call("userfaultfd", flags))

    def take_signals(self, *numbers: int) -> list[Signal]:
        """The signals of these numbers that are pending for the VMM's main thread, with their siginfo; they are gone.

        They are blocked there from the first call on. (SIGBUS always is.)
        """
        self.agent(op.signals_block, signals=[*numbers])
        return [Signal(*told) for told in self.agent(op.signals_take, signals=[*numbers])]

    def start_vmm(self) -> Vmm:
        """Another VMM process, which can be killed."""
        agent = start_agent(self.machine, self.ssh, self.config.timeouts["agent"], log="vmm.log")
        return Vmm(agent, self.agent, self.vms)

    def require_kvm(self) -> None:
        """Raises NoKvm when this kernel came up without KVM."""
        if not self.has_kvm:
            raise NoKvm(
                f"{self.config.name}: the kernel {self.kernel.name} ({self.release}) boots but has no KVM in it",
                remedy="give one that has with --kernel PATH",
            )

    def create_vm(self, isa: str, **kind: Any) -> Vm:
        """A VM with the payload of this guest ISA; see :meth:`arm_kvm.vmm.vm.Vm.create` for ``kind``."""
        return self.create_vms(isa, 1, **kind)[0]

    def create_vms(self, isa: str, count: int, **kind: Any) -> list[Vm]:
        """Several at once."""
        vms = Vm.create(self.agent, ISAS[isa], count, **kind)
        self.vms += vms
        return vms

    @contextmanager
    def offline(self, cpu: int) -> Iterator[None]:
        """Within the block this CPU is taken out of the host."""
        switch = f"/sys/devices/system/cpu/cpu{cpu}/online"
        self.ssh.run(f"echo 0 > {switch}")
        try:
            yield
        finally:
            self.ssh.run(f"echo 1 > {switch}")

    def reset(self) -> None:
        """Destroy all VMs. An agent that was given up is replaced, and killed: its death frees everything.

        Raises LabError: the machine is lost, or the kernel does not let a VM go.
        """
        try:
            if self.agent.usable:
                destroy(self.vms)
            else:
                self.machine.check()
                self.ssh.run(f"kill -9 {self.agent.hello['pid']}", check=False)
                self.agent.close()
                self.agent = start_agent(self.machine, self.ssh, self.config.timeouts["agent"])
        finally:
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
