"""``setup``, ``doctor``: the system packages and other things that the lab needs of this machine."""

from __future__ import annotations

import argparse
import shutil

from arm_kvm.cli.arguments import Commands
from arm_kvm.cli.output import Table
from arm_kvm.support.errors import SetupError
from arm_kvm.support.limits import lab_errors
from arm_kvm.support.paths import cache_root, offline

_LEAST_DISK = 4 << 30


def add_commands(commands: Commands) -> None:
    commands.add("setup", cmd_setup, "install the system packages that the lab needs, or print the command for root")
    commands.add("doctor", cmd_doctor, "show what this machine has and lacks")


def cmd_setup(args: argparse.Namespace) -> int:
    from arm_kvm.support import setup

    installed = setup.install()
    print(f"installed: {' '.join(installed)}" if installed else "all system packages are installed")
    return 0


def cmd_doctor(args: argparse.Namespace) -> int:
    """Show what this machine has and lacks. Raises SetupError when something that the tests need is missing."""
    from arm_kvm.host import config
    from arm_kvm.machine.emulator import Emulator
    from arm_kvm.support import setup
    from arm_kvm.support.apt import main_archive

    table = Table("", "what", "for")
    for need in setup.NEEDS:
        table.add("ok" if need.met else "MISSING", need.program, f"{need.purpose} (package {need.package})")
    for program in config.PROGRAMS:
        table.add("", Emulator.installed(program).name, program)
    root = cache_root()
    with lab_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    table.add("ok" if free > _LEAST_DISK else "LOW", f"{free >> 30} GiB free", f"cache in {root}")
    try:
        main_archive()
        table.add("ok", "Debian archive", "configured in apt")
    except SetupError as e:
        table.add("MISSING", "Debian archive", e.one_line)
    table.add("", "offline" if offline() else "online", "ARM_KVM_OFFLINE")
    table.show()
    if lacking := setup.missing():
        raise SetupError(f"missing packages: {' '.join(lacking)}", remedy="run `arm-kvm setup`")
    return 0
