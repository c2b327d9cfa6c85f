"""Where the lab's own files are, and the switches that hold for a whole run."""

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
    """ARM_KVM_OFFLINE=1: caches, local files, loopback and this machine's package registries only."""
    return os.environ.get("ARM_KVM_OFFLINE", "") not in ("", "0")


def cache_root() -> Path:
    """ARM_KVM_CACHE, else the user's cache folder (XDG base directory specification). Raises ConfigError."""
    if chosen := os.environ.get("ARM_KVM_CACHE"):
        return written_path(chosen, "ARM_KVM_CACHE ").absolute()
    if (base := Path(os.environ.get("XDG_CACHE_HOME", ""))).is_absolute():  # another is to be ignored
        return base / "arm-kvm"
    try:
        return Path.home() / ".cache" / "arm-kvm"
    except RuntimeError as e:
        raise ConfigError("this user has no home folder for the cache: set ARM_KVM_CACHE to a folder") from e


def plain_file(path: Path) -> Path:
    """The path, unless it is there and no file: a FIFO would be waited for, and some devices never end.

    Raises OSError.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "not a file", str(path))
    return path


def is_there(path: Path) -> bool:
    """Whether there is a file or folder of this path, also where it could not be one (too long, for example)."""
    try:
        return path.exists()
    except OSError:
        return False


def written_path(text: str, said_by: str = "") -> Path:
    """A path as a person writes it, ``~`` included; ``said_by`` stands before it in an error. Raises ConfigError."""
    try:
        return Path(text).expanduser()
    except RuntimeError as e:
        raise ConfigError(f"{said_by}{text}: there is no such user") from e
