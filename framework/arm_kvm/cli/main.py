"""Runs a command, and deals with its errors and with output that cannot be written."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from pathlib import Path

from arm_kvm.cli import cache, conform, hosts, kernel, sequences, setup, test, trace
from arm_kvm.cli.arguments import Commands
from arm_kvm.support import interrupt
from arm_kvm.support.errors import LabError
from arm_kvm.support.limits import is_limit, lab_error


def parser() -> argparse.ArgumentParser:
    """Make the parser of the whole command line. The documentation is generated from it, too."""
    whole = argparse.ArgumentParser(
        prog="arm-kvm", description="A test lab for KVM/ARM, judged from outside the machine."
    )
    commands = Commands(whole, "COMMAND")
    for group in (setup, hosts, kernel, test, conform, sequences, trace, cache):
        group.add_commands(commands)
    return whole


def main(argv: list[str] | None = None) -> int:
    """Run the command that the arguments name, and return its exit code. Raises KeyboardInterrupt."""
    args = parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except LabError as e:
        return _failed(e)
    except BrokenPipeError:  # `arm-kvm ... | head`
        _drop(1)
        return 0
    except (OSError, MemoryError, RuntimeError) as e:
        if not isinstance(e, OSError) and not is_limit(e):
            raise
        code = _failed(lab_error(e, _output()))
        _drop(1)
        return code


def _failed(error: LabError) -> int:
    if interrupt.heard():  # the error is a consequence of Ctrl-C
        return error.exit_code
    try:
        print(f"arm-kvm: {error}", file=sys.stderr, flush=True)
    except OSError:
        _drop(2)
    return error.exit_code


def _drop(fd: int) -> None:
    """Discard what is still buffered for this stream, which the interpreter would fail to write when it exits."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


def _output() -> Path | None:
    """The file that standard output goes to, if it has a name."""
    with suppress(OSError):
        path = Path(os.readlink("/proc/self/fd/1"))
        return path if path.exists() else None
    return None
