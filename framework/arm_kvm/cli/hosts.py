"""``hosts``, ``boot``, ``stage2``: the host files, a host to work on, the stage-2 tables of a live host."""

from __future__ import annotations

import argparse
from pathlib import Path

from arm_kvm.cli.arguments import KERNEL_HELP, PORT, QEMU_HELP, SECONDS, Commands
from arm_kvm.cli.output import Table
from arm_kvm.support.errors import NoLiveMachine


def add_commands(commands: Commands) -> None:
    commands.add("hosts", cmd_hosts, "list the hosts of configs/hosts")
    boot = commands.add("boot", cmd_boot, "boot a host, print its ssh command and attach to its console")
    boot.add_argument("host")
    boot.add_argument("--kernel", metavar="KERNEL", help=KERNEL_HELP)
    boot.add_argument("--qemu", metavar="QEMU", help=QEMU_HELP)
    port = "port on loopback for ssh (default: a free one)"
    boot.add_argument("--ssh-port", type=PORT, default=0, metavar="PORT", help=port)
    stage2 = commands.add("stage2", cmd_stage2, "show the stage-2 tables of the guests that run on a live host")
    stage2.add_argument("host")
    watch = "how long to watch the CPUs for guests (default: 2)"
    stage2.add_argument("--seconds", type=SECONDS, default=2.0, help=watch)


def cmd_hosts(args: argparse.Namespace) -> int:
    from arm_kvm.host import config

    table = Table("host", "board", "kernel", "guests", "can")
    for name in config.host_names():
        host = config.find(name)
        keys = host.kernel
        kernel = " ".join(str(keys[k]) for k in ("package", "suite", "image", "path") if k in keys)
        kernel = kernel or Path(keys["url"]).name
        qemu = host.emulator or host.board.qemu.name
        board = f"{host.board.cpu} x{host.board.cpus}, {host.board.memory >> 20} MiB, {qemu}"
        table.add(name, board, f"{keys['source']}: {kernel}", " ".join(host.guests), " ".join(sorted(host.can)))
    table.show()
    return 0


def cmd_boot(args: argparse.Namespace) -> int:
    """Boot a host and attach the user's terminal to its console."""
    from arm_kvm.cli.terminal import attach
    from arm_kvm.host import config, emulators
    from arm_kvm.host.host import Host
    from arm_kvm.host.kernel import obtain
    from arm_kvm.machine.rundir import run_directory

    host_config = emulators.fitted(config.find(args.host), args.qemu)
    kernel = obtain(host_config, args.kernel)
    host = Host.boot(host_config, kernel, run_directory() / "logs", extra="armkvm.shell", ssh_port=args.ssh_port)
    try:
        seconds = host.boot_states.reached["agent"]
        qemu, kvm = host_config.board.qemu.name, "yes" if host.has_kvm else "no"
        print(f"{host_config.name}: {host.release} on {qemu}, up in {seconds:.1f} s, KVM: {kvm}")
        print(f"shell:  {host.ssh_command}\ntables: arm-kvm stage2 {host_config.name}")
        print("This is its console; Ctrl-] ends the machine.", flush=True)
        attach(host.machine.console.take_over(), lambda: host.machine.process.poll() is None)
        if host.machine.process.poll():  # 0: powered off from within
            raise host.machine.lost()
    finally:
        host.shutdown()
    return 0


def cmd_stage2(args: argparse.Namespace) -> int:
    """Show the stage-2 tables of the guests that run on a live machine, read from outside."""
    from arm_kvm.machine.rundir import live_machines
    from arm_kvm.oracle.locator import watch

    cards = [card for card in live_machines() if card.host == args.host]
    if not cards:
        raise NoLiveMachine(
            f"no machine of host {args.host!r} is running",
            remedy=f"start one with `arm-kvm boot {args.host}`, or keep one with pytest --keep",
        )
    tables = watch(cards[-1], args.seconds)
    for stage2 in tables:
        print(stage2.dump())
    if not tables:
        print(f"no guest was seen inside any CPU of {args.host} in {args.seconds:.0f} s")
    return 0
