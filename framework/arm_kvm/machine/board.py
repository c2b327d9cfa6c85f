"""A board as data, and the QEMU command line that makes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from arm_kvm.machine.emulator import Emulator

#: Name of the serial port in /sys/class/virtio-ports/*/name, for whoever wants to be answered fast.
PORT = "arm-kvm"


@dataclass(frozen=True)
class Board:
    """Hardware of a host: the QEMU that makes it, ``-machine`` and ``-cpu`` values, CPUs, bytes of RAM."""

    qemu: Emulator
    machine: str
    cpu: str
    cpus: int
    memory: int
    ram_base: int = 0x4000_0000  #: hw/arm/virt.c, VIRT_MEM


@dataclass(frozen=True)
class Boot:
    """What the board starts: paths of kernel image and initramfs, and the kernel's command line.

    A program that is no Linux has a path alone.
    """

    kernel: Path
    initramfs: Path | None = None
    cmdline: str = ""


def command_line(
    board: Board,
    boot: Boot | None,
    *,
    ram_fd: int,
    console_fd: int,
    qmp_fd: int,
    port_fd: int,
    gdb: Path,
    ssh_port: int,
    plugin: str = "",
) -> list[str]:
    """QEMU's argument vector. ``ssh_port`` 0 lets the system choose a free port on loopback.

    A machine that boots nothing is restored: it has the RAM of ``ram_fd`` to itself, copied on write, unless a plugin
    wants to see it, too; the state of its devices is still to come. ``port_fd`` is a socket that the host sees as the
    virtio serial port :data:`PORT`. ``plugin`` is a TCG plugin with its arguments. The user network is restricted: the
    host reaches nobody, only its ssh port is reached, and when restored it does not announce itself.
    """
    share = "on" if boot or plugin else "off"
    return [
        *board.qemu.command,
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", f"{board.machine},memory-backend=ram"),
        *("-object", f"memory-backend-file,id=ram,size={board.memory},mem-path=/proc/self/fd/{ram_fd},share={share}"),
        *("-m", str(board.memory >> 20), "-cpu", board.cpu, "-smp", str(board.cpus)),
        *("-accel", "tcg,thread=multi"),
        *(("-plugin", plugin) if plugin else ()),
        *("-chardev", f"socket,id=console,fd={console_fd}", "-serial", "chardev:console"),
        *("-chardev", f"socket,id=qmp,fd={qmp_fd}", "-qmp", "chardev:qmp"),
        *("-chardev", f"socket,id=gdb,path={_value(gdb)},server=on,wait=off", "-gdb", "chardev:gdb"),
        *("-chardev", f"socket,id=port,fd={port_fd}"),
        *("-device", "virtio-serial-device", "-device", f"virtserialport,chardev=port,name={PORT}"),
        *("-netdev", f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{ssh_port}-:22"),
        *("-device", "virtio-net-device,netdev=net,guest_announce=off", "-device", "virtio-rng-device"),
        *(_booting(boot) if boot else ("-incoming", "defer")),
    ]


def _value(path: Path) -> str:
    """The path within an option: QEMU ends a value at a comma, unless it is there twice."""
    return str(path).replace(",", ",,")


def _booting(boot: Boot) -> list[str]:
    linux = ["-initrd", str(boot.initramfs), "-append", boot.cmdline] if boot.initramfs else []
    return ["-kernel", str(boot.kernel), *linux]
