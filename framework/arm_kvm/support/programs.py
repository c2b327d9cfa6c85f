"""Programs of this machine that the lab runs to their end: bounded, in one language, and their refusals told."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from arm_kvm.support.errors import SetupError, Unending
from arm_kvm.support.limits import disk_full, is_limit, told

_PATIENCE = 1800.0  #: seconds; what takes longest downloads and unpacks packages on a busy machine


def run(argv: list[str], *, patience: float = _PATIENCE, **how: Any) -> subprocess.CompletedProcess:
    """Run a program, its output kept; ``how`` is what subprocess.run takes.

    Raises SetupError: it is not installed, or (Unending) does not end within ``patience`` seconds; LimitReached;
    DiskFull, by its own words.
    """
    name = Path(argv[0]).name
    how = {"text": True, "errors": "replace"} | how if "input" not in how else how
    try:
        done = subprocess.run(
            argv, capture_output=True, timeout=patience, env=os.environ | {"LC_ALL": "C.UTF-8"}, **how
        )
    except FileNotFoundError as e:
        if shutil.which(argv[0]) is None:
            raise SetupError(f"{name} is not installed", remedy="run `arm-kvm setup`") from e
        raise SetupError(f"{argv[0]} cannot be started, or not in {how.get('cwd') or '.'}: {e.strerror}") from e
    except subprocess.TimeoutExpired as e:
        remedy = "see what keeps it: a full disk, a machine with too much to do"
        raise Unending(f"{name} did not end within {patience:.0f} s, and was ended", remedy=remedy) from e
    except OSError as e:
        if is_limit(e):
            raise told(e) from e
        remedy = "see to its permissions, and whether it is for this machine"
        raise SetupError(f"{argv[0]} cannot be started: {e.strerror}", remedy=remedy) from e
    if done.returncode and os.strerror(errno.ENOSPC) in words(done):
        raise disk_full(why=f"{name}: {os.strerror(errno.ENOSPC)}")
    return done


def words(done: subprocess.CompletedProcess) -> str:
    """What a program said on standard error."""
    said = done.stderr
    return (said if isinstance(said, str) else said.decode(errors="replace")).strip()
