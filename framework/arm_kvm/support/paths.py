"""Where the lab's own files are, and the environment variables that apply to a whole run."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from arm_kvm.support.errors import ConfigError

#: In a checkout these are links to its top-level folders, in an installed package the folders themselves.
_DATA = Path(__file__).resolve().parents[1] / "_data"
CONFIGS, IMAGES, TESTCASES = ((_DATA / name).resolve() for name in ("configs", "images", "testcases"))
ROOT = TESTCASES.parent  #: the checkout, or where an installed package has its data


def offline() -> bool:
    """Whether ARM_KVM_OFFLINE is set: only caches, local files, loopback and Debian's archive are used."""
    return os.environ.get("ARM_KVM_OFFLINE", "") not in ("", "0")


def cache_root() -> Path:
    """ARM_KVM_CACHE, else the user's cache folder (XDG base directory specification). Raises ConfigError."""
    if chosen := os.environ.get("ARM_KVM_CACHE"):
        return written_path(chosen, "ARM_KVM_CACHE ").absolute()
    if (base := Path(os.environ.get("XDG_CACHE_HOME", ""))).is_absolute():  # the specification ignores relative ones
        return base / "arm-kvm"
    try:
        return Path.home() / ".cache" / "arm-kvm"
    except RuntimeError as e:
        raise ConfigError("this user has no home folder for the cache", remedy="set ARM_KVM_CACHE to a folder") from e


def plain_file(path: Path) -> Path:
    """Return the path. Raises OSError for FIFOs and devices, reading from which may block or never end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "not a file", str(path))
    return path


def is_there(path: Path) -> bool:
    """Whether this file or folder exists; False also for a path that is not possible, such as one that is too long."""
    try:
        return path.exists()
    except OSError:
        return False


def written_path(text: str, said_by: str = "") -> Path:
    """Expand ``~`` in a path that a user wrote; ``said_by`` precedes it in the error. Raises ConfigError."""
    try:
        return Path(text).expanduser()
    except RuntimeError as e:
        raise ConfigError(f"{said_by}{text}: there is no such user") from e
