"""``conform``: compares the model with the emulated CPU; no kernel is involved."""

from __future__ import annotations

import argparse
import secrets
import shlex
import time

from arm_kvm.cli.arguments import POSITIVE, QEMU_HELP, SEED, Commands
from arm_kvm.support.errors import NonConformance

_HOSTS = ("a15", "a15-wide", "arm64", "arm64-vhe")


def add_commands(commands: Commands) -> None:
    conform = commands.add("conform", cmd_conform, "compare the model with the emulated CPU, on random tables")
    conform.add_argument("--host", action="append", metavar="BOARD", help="a host's board (default: all four)")
    cases = "run at least this many cases (default: 100000)"
    conform.add_argument("--cases", type=POSITIVE, default=100_000, metavar="N", help=cases)
    conform.add_argument("--qemu", metavar="QEMU", help=QEMU_HELP)
    conform.add_argument("--seed", type=SEED, metavar="S", help="repeat the run with this seed (default: a new one)")
    conform.add_argument("--departures", action="store_true", help="list where QEMU is known to differ from the manual")


def cmd_conform(args: argparse.Namespace) -> int:
    if args.departures:
        from arm_kvm.conform import departures

        print("\n".join(map(str, departures.ALL)))
        return 0
    for name in args.host or _HOSTS:
        _conform(name, args.qemu, args.cases, secrets.randbits(32) if args.seed is None else args.seed)
    return 0


def _conform(name: str, qemu: str | None, cases: int, seed: int) -> None:
    from arm_kvm.conform.run import Difference, conform
    from arm_kvm.conform.silicon import Lab
    from arm_kvm.host import config, emulators
    from arm_kvm.machine.rundir import run_directory
    from arm_kvm.support import progress

    host = emulators.fitted(config.find(name), qemu)
    words = ["arm-kvm", "conform", "--host", name, *(["--qemu", qemu] if qemu else [])]
    again = shlex.join([*words, "--cases", str(cases), "--seed", str(seed)])
    started = time.monotonic()
    with Lab(host, run_directory() / "logs") as lab, progress.task(again, cases, "cases") as advance:
        try:
            tally = conform(lab, cases, seed, advance)
        except Difference as e:
            raise NonConformance(
                f"{host.name}: model and silicon differ", remedy=f"repeat it with `{again}`", evidence=str(e)
            ) from e
    minutes = (time.monotonic() - started) / 60
    print(f"{again}\n{host.board.qemu.name}: {tally}")
    print(f"no unexplained difference; {tally.cases / minutes:,.0f} cases a minute", flush=True)
