"""The QEMU that makes a board: which program, what starts it, and which version it is.

A host file names the program; where it comes from is chosen like a kernel (:mod:`arm_kvm.host.emulators`).
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from arm_kvm.support.errors import LabError, SetupError
from arm_kvm.support.programs import run, words

_PATIENCE = 20.0  #: seconds


@dataclass(frozen=True)
class Emulator:
    """One QEMU program.

    ``program``: its name, such as ``qemu-system-aarch64``, which says what boards it has. ``command``: what starts it,
    the program last; before it stands the dynamic loader of another Debian suite, where the program comes from one.
    ``source``: where it comes from, as ``--qemu`` says it; "" for the one installed on this machine.
    """

    program: str
    command: tuple[str, ...]
    source: str = ""

    @classmethod
    def installed(cls, program: str) -> Emulator:
        """The one that PATH finds."""
        return cls(program, (program,))

    @property
    def version(self) -> tuple[int, ...]:
        """(7, 2, 22). Raises SetupError: it is not installed, or is no QEMU."""
        return _version(self.command)

    @property
    def name(self) -> str:
        """``QEMU 10.0.13 (deb:trixie)``, or a word on why it cannot be said."""
        try:
            release = "QEMU " + ".".join(map(str, self.version))
        except LabError as e:
            return e.message
        return f"{release} ({self.source})" if self.source else release

    @property
    def identity(self) -> list:
        """What distinguishes this build from every other one on this machine. Raises SetupError."""
        path = shutil.which(self.command[-1])
        status = Path(path).stat() if path else None
        return [self.program, _says(self.command), *((status.st_size, status.st_mtime_ns) if status else ())]


@cache
def _says(command: tuple[str, ...]) -> str:
    """The first line of ``--version``. Raises SetupError, LimitReached."""
    said = run([*command, "--version"], patience=_PATIENCE)
    if said.returncode or not said.stdout.startswith("QEMU emulator version"):
        raise SetupError(
            f"{command[-1]} is not a QEMU that runs here",
            remedy="choose another one with --qemu",
            evidence=words(said) or said.stdout.strip(),
        )
    return said.stdout.splitlines()[0]


@cache
def _version(command: tuple[str, ...]) -> tuple[int, ...]:
    found = re.search(r"version (\d+(?:\.\d+)*)", _says(command))
    if not found:
        raise SetupError(f"{command[-1]} does not say its version: {_says(command)}")
    return tuple(map(int, found[1].split(".")))
