"""A board as data, and the QEMU command line that makes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from arm_kvm.machine.emulator import Emulator

#: Name of the agent's serial port in /sys/class/virtio-ports/*/name; it answers faster than ssh.
PORT = "arm-kvm"


@dataclass(frozen=True)
class Board:
    """The hardware of a host: its QEMU, the ``-machine`` and ``-cpu`` values, CPUs, bytes of RAM."""

    qemu: Emulator
    machine: str
    cpu: str
    cpus: int
    memory: int
    ram_base: int = 0x4000_0000  #: hw/arm/virt.c, VIRT_MEM


@dataclass(frozen=True)
class Boot:
    """What the board boots: paths of kernel image and initramfs, and the kernel's command line.

    A bare-metal program is given as ``kernel`` alone.
    """

    kernel: Path
    initramfs: Path | None = None
    cmdline: str = ""


@dataclass(frozen=True)
class Descriptors:
    """The file descriptors that QEMU inherits: the board's RAM, and the sockets of console, QMP and serial port.

    The host sees ``port`` as the virtio serial port :data:`PORT`.
    """

    ram: int
    console: int
    qmp: int
    port: int


def command_line(
    board: Board,
    boot: Boot | None,
    fds: Descriptors,
    *,
    gdb: Path,
    ssh_port: int,
    plugin: str = "",
) -> list[str]:
    """Build QEMU's argument vector. ``ssh_port`` 0 lets the system choose a free port on loopback.

    Without ``boot`` the machine waits for an incoming migration of its devices. Its RAM is then mapped privately,
    unless a plugin shares it with the lab. ``plugin`` is a TCG plugin with its arguments. The user network is
    restricted: the host reaches no address outside, only its ssh port is forwarded, and a restored host sends no
    gratuitous ARP.
    """
    share = "on" if boot or plugin else "off"
    return [
        *board.qemu.command,
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", f"{board.machine},memory-backend=ram"),
        *("-object", f"memory-backend-file,id=ram,size={board.memory},mem-path=/proc/self/fd/{fds.ram},share={share}"),
        *("-m", str(board.memory >> 20), "-cpu", board.cpu, "-smp", str(board.cpus)),
        *("-accel", "tcg,thread=multi"),
        *(("-plugin", plugin) if plugin else ()),
        *("-chardev", f"socket,id=console,fd={fds.console}", "-serial", "chardev:console"),
        *("-chardev", f"socket,id=qmp,fd={fds.qmp}", "-qmp", "chardev:qmp"),
        *("-chardev", f"socket,id=gdb,path={_value(gdb)},server=on,wait=off", "-gdb", "chardev:gdb"),
        *("-chardev", f"socket,id=port,fd={fds.port}"),
        *("-device", "virtio-serial-device", "-device", f"virtserialport,chardev=port,name={PORT}"),
        *("-netdev", f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{ssh_port}-:22"),
        *("-device", "virtio-net-device,netdev=net,guest_announce=off", "-device", "virtio-rng-device"),
        *(_boot_options(boot) if boot else ("-incoming", "defer")),
    ]


def _value(path: Path) -> str:
    """Escape a path for use within an option: QEMU ends a value at a comma that is not doubled."""
    return str(path).replace(",", ",,")


def _boot_options(boot: Boot) -> list[str]:
    linux = ["-initrd", str(boot.initramfs), "-append", boot.cmdline] if boot.initramfs else []
    return ["-kernel", str(boot.kernel), *linux]
