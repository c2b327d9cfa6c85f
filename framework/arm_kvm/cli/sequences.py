"""``replay``, ``obligations``: plays a saved sequence again, and prints the model that sequences are judged by."""

from __future__ import annotations

import argparse
from pathlib import Path

from arm_kvm.cli.arguments import KERNEL_HELP, QEMU_HELP, Commands
from arm_kvm.support.errors import SequenceFailed, SetupError


def add_commands(commands: Commands) -> None:
    replay = commands.add("replay", cmd_replay, "play a saved sequence of steps, judged after each")
    replay.add_argument("file", type=Path, metavar="FILE")
    replay.add_argument("--host", default="arm64", metavar="HOST", help="where (default: arm64)")
    replay.add_argument("--kernel", metavar="KERNEL", help=KERNEL_HELP)
    replay.add_argument("--qemu", metavar="QEMU", help=QEMU_HELP)
    owed = "print what each memory operation of the host requires of stage 2, as Markdown"
    commands.add("obligations", cmd_obligations, owed)


def cmd_replay(args: argparse.Namespace) -> int:
    """Play a saved sequence on a fresh host, step by step."""
    from arm_kvm.host import config, emulators
    from arm_kvm.host.host import Host
    from arm_kvm.host.kernel import obtain
    from arm_kvm.machine.rundir import run_directory
    from arm_kvm.oracle.oracle import Oracle
    from arm_kvm.sequences import player, steps

    sequence = steps.load(args.file)
    host_config = emulators.fitted(config.find(args.host), args.qemu)
    host = Host.boot(host_config, obtain(host_config, args.kernel), run_directory() / "logs")
    try:
        host.require_kvm()
        done = 0
        for step in player.play(host, Oracle(host), host_config.guests[0], sequence):
            done += 1
            print(f"{done:3}  {step}", flush=True)
    except player.SequenceBroken as e:
        if e.lost:
            raise e.lost from e
        raise SequenceFailed(f"{host.release} is not as the models say", evidence=str(e)) from e
    except ValueError as e:
        raise SetupError(f"{args.file}: {e}", remedy="correct the sequence") from e
    finally:
        host.shutdown()
    left_out = f" ({len(sequence) - done} left out: this kernel cannot age pages)" if done < len(sequence) else ""
    where = f"{host_config.name}, {host.release}, {host_config.board.qemu.name}"
    print(f"{done} steps on {where}: as the models say{left_out}")
    return 0


def cmd_obligations(args: argparse.Namespace) -> int:
    """Print the notifier model as a table in Markdown."""
    from arm_kvm.model.kvm import notifier

    print(notifier.document(), end="")
    return 0
