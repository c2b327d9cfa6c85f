"""A QEMU program: its name, the command that starts it, and its version.

A host file names the program; :mod:`arm_kvm.host.emulators` chooses where it comes from.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from arm_kvm.support.errors import LabError, SetupError
from arm_kvm.support.programs import run

_PATIENCE = 20.0  #: seconds


@dataclass(frozen=True)
class Emulator:
    """One QEMU program.

    ``program``: its name, such as ``qemu-system-aarch64``, which determines the boards it has. ``command``: the words
    that start it, the program last, preceded by its own dynamic loader where it comes from another Debian suite.
    ``source``: the value of ``--qemu`` that selects it; "" for the one installed on this machine.
    """

    program: str
    command: tuple[str, ...]
    source: str = ""

    @classmethod
    def installed(cls, program: str) -> Emulator:
        """The program of this name in PATH."""
        return cls(program, (program,))

    @property
    def version(self) -> tuple[int, ...]:
        """The release, such as (7, 2, 22). Raises SetupError if it is not installed or not a QEMU."""
        return _version(self.command)

    @property
    def name(self) -> str:
        """A name such as ``QEMU 10.0.13 (deb:trixie)``, or the reason why the version is not known."""
        try:
            release = "QEMU " + ".".join(map(str, self.version))
        except LabError as e:
            return e.message
        return f"{release} ({self.source})" if self.source else release

    @property
    def identity(self) -> list[str | int]:
        """What distinguishes this build from any other on this machine. Raises SetupError."""
        path = shutil.which(self.command[-1])
        status = Path(path).stat() if path else None
        return [self.program, _version_line(self.command), *((status.st_size, status.st_mtime_ns) if status else ())]


@cache
def _version_line(command: tuple[str, ...]) -> str:
    """The first line of ``--version``. Raises SetupError, LimitReached."""
    done = run([*command, "--version"], patience=_PATIENCE)
    if done.returncode or not done.stdout.startswith("QEMU emulator version"):
        raise SetupError(
            f"{command[-1]} is not a QEMU that runs on this machine",
            remedy="choose another one with --qemu",
            evidence=done.stderr.strip() or done.stdout.strip(),
        )
    return done.stdout.splitlines()[0]


@cache
def _version(command: tuple[str, ...]) -> tuple[int, ...]:
    found = re.search(r"version (\d+(?:\.\d+)*)", _version_line(command))
    if not found:
        raise SetupError(f"{command[-1]} prints no version number: {_version_line(command)}")
    return tuple(map(int, found[1].split(".")))
