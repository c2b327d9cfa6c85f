"""Assemble and link bare-metal programs with cross binutils."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arm_kvm.support.errors import SetupError
from arm_kvm.support.programs import run


class Binutils:
    """The assembler and linker of one instruction set, run in a folder of their own."""

    def __init__(self, prefix: str, folder: Path, what: str) -> None:
        self._prefix, self.folder, self._what = prefix, folder, what

    def run(self, tool: str, *arguments: str) -> None:
        """Run ``as``, ``ld`` or ``objcopy``. Raises SetupError if it is missing or fails."""
        program = self._prefix + tool
        if shutil.which(program) is None:
            raise SetupError(
                f"{program} is not installed: the {self._what} cannot be assembled", remedy="run `arm-kvm setup`"
            )
        done = run([program, *arguments], cwd=self.folder)
        if done.returncode:
            raise SetupError(f"{program} fails on the {self._what}", evidence=done.stderr)


@contextmanager
def binutils(prefix: str, what: str) -> Iterator[Binutils]:
    """Binutils with this name prefix; ``what`` is named in their errors. The folder is removed after the block."""
    with tempfile.TemporaryDirectory(prefix="arm-kvm-") as folder:
        yield Binutils(prefix, Path(folder), what)


def equates(names: dict[str, int]) -> str:
    """Return assembler text that defines these symbols, so that Python and assembly cannot disagree."""
    return "".join(f".equ {name}, {value:#x}\n" for name, value in names.items())
