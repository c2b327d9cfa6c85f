"""Types of arguments, and how commands are added to the parser."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

KERNEL_HELP = "an image, a source tree, or deb:PACKAGE@SUITE"
QEMU_HELP = "a program, the folder it was built in, or deb:SUITE (default: the host file's)"
_LAST_PORT = 65535

Number = TypeVar("Number", int, float)
Run = Callable[[argparse.Namespace], int]  #: runs a command and returns its exit code


class Commands:
    """The commands of ``arm-kvm``, or the actions of one of them."""

    def __init__(self, parser: argparse.ArgumentParser, metavar: str, *, required: bool = True) -> None:
        self._parsers = parser.add_subparsers(metavar=metavar, required=required)

    def add(self, name: str, run: Run, text: str) -> argparse.ArgumentParser:
        """Add a command, and return its parser for the arguments."""
        parser = self._parsers.add_parser(name, help=text, description=text)
        parser.set_defaults(run=run)
        return parser

    def add_raw(self, name: str, run: Run, text: str, epilog: str) -> argparse.ArgumentParser:
        """Add a command that takes every argument as it is, ``--help`` included, to pass it to another program."""
        how = argparse.RawDescriptionHelpFormatter
        parser = self._parsers.add_parser(
            name, help=text, description=text, epilog=epilog, prefix_chars="\0", add_help=False, formatter_class=how
        )
        parser.set_defaults(run=run, parser=parser)
        return parser

    def add_group(self, name: str, text: str, description: str, run: Run | None = None) -> Commands:
        """Add a command with subcommands; ``run`` is what it does without one."""
        parser = self._parsers.add_parser(name, help=text, description=description)
        if run is not None:
            parser.set_defaults(run=run)
        return Commands(parser, "ACTION", required=run is None)


def number(kind: Callable[[str], Number], what: str, least: float, most: float = math.inf) -> Callable[[str], Number]:
    """Make a type of argument: numbers from ``least`` to ``most``. The error message calls them ``what``."""

    def convert(text: str) -> Number:
        with suppress(ValueError):
            if text.isascii() and least <= (value := kind(text)) <= most:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")

    return convert


POSITIVE = number(int, "a number above 0", 1)
WORKERS = number(int, "a number of workers, 0 or more", 0)
PORT = number(int, f"a port from 0 to {_LAST_PORT}", 0, _LAST_PORT)
SEED = number(int, "a seed from 0 to 4294967295", 0, 2**32 - 1)
SECONDS = number(float, "a number of seconds above 0, up to 3600", 1e-3, 3600)
