"""Run programs of this machine to their end, with a time limit, in the C locale, and with failures as lab errors."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arm_kvm.support.errors import SetupError, Unending
from arm_kvm.support.limits import disk_full, is_limit, lab_error

_PATIENCE = 1800.0  #: seconds; downloading and unpacking packages takes the longest


def run(argv: list[str], *, patience: float = _PATIENCE, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program and capture its output as text.

    Raises SetupError (it is not installed), Unending (it does not end within ``patience`` seconds), LimitReached, and
    DiskFull if the program itself reports a full disk.
    """
    with _start_failures(argv, patience, cwd):
        done = subprocess.run(
            argv, capture_output=True, text=True, errors="replace", cwd=cwd, timeout=patience, env=_environment()
        )
    _check_disk(argv, done.returncode, done.stderr)
    return done


def unpack(argv: list[str], data: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    """Like :func:`run` for a program with binary output; ``data`` is its standard input."""
    with _start_failures(argv, _PATIENCE, None):
        done = subprocess.run(argv, capture_output=True, input=data, timeout=_PATIENCE, env=_environment())
    _check_disk(argv, done.returncode, done.stderr.decode(errors="replace"))
    return done


def _environment() -> dict[str, str]:
    return os.environ | {"LC_ALL": "C.UTF-8"}


@contextmanager
def _start_failures(argv: list[str], patience: float, cwd: Path | None) -> Iterator[None]:
    """Within the block, which runs the program, failures to start or to end are raised as errors of the lab."""
    name = Path(argv[0]).name
    try:
        yield
    except FileNotFoundError as e:
        if shutil.which(argv[0]) is None:
            raise SetupError(f"{name} is not installed", remedy="run `arm-kvm setup`") from e
        raise SetupError(f"{argv[0]} cannot be started in {cwd or '.'}: {e.strerror}") from e
    except subprocess.TimeoutExpired as e:
        remedy = "look for a full disk, or too much load on this machine"
        raise Unending(f"{name} did not end within {patience:.0f} s, and was killed", remedy=remedy) from e
    except OSError as e:
        if is_limit(e):
            raise lab_error(e) from e
        remedy = "check its permissions, and whether it is built for this machine"
        raise SetupError(f"{argv[0]} cannot be started: {e.strerror}", remedy=remedy) from e


def _check_disk(argv: list[str], status: int, stderr: str) -> None:
    if status and os.strerror(errno.ENOSPC) in stderr:
        raise disk_full(why=f"{Path(argv[0]).name}: {os.strerror(errno.ENOSPC)}")
