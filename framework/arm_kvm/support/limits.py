"""Turn limits of this machine, and what it forbids, into errors of the lab that say what to do about them."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from arm_kvm.support.errors import CacheUnusable, ConfigError, DiskFull, LabError, LimitReached, SetupError
from arm_kvm.support.paths import cache_root, is_there

#: A full disk, or an exhausted quota.
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
_FILES = (errno.EMFILE, errno.ENFILE)
_LIMITS = (*_FULL, *_FILES, errno.EFBIG, errno.ENOMEM)
_NO_THREAD = "can't start new thread"  #: Python's message, threading.Thread.start()
_LITTLE = 1 << 20  #: bytes; a disk with less free space counts as full


def is_limit(e: BaseException) -> bool:
    """Whether this is a limit of this machine, and so no fault of the code that meets it."""
    no_thread = isinstance(e, RuntimeError) and _NO_THREAD in str(e)
    return isinstance(e, MemoryError) or no_thread or (isinstance(e, OSError) and e.errno in _LIMITS)


def lab_error(e: BaseException, where: Path | None = None) -> LabError:
    """Return the error for what this machine refused. ``where`` was being written; used if ``e`` names no file."""
    if not isinstance(e, OSError):
        return _no_memory() if isinstance(e, MemoryError) else _no_process()
    own = Path(os.fsdecode(e.filename)) if isinstance(e.filename, str | bytes) else None
    named = own or where
    if e.errno in _FULL:
        return _full(e, named)
    if e.errno in _FILES:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return LimitReached(
            f"no more files can be opened: this process may have {most} open at a time",
            remedy="raise the limit (`ulimit -n 1024`)",
        )
    if e.errno == errno.EFBIG:
        most = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        return LimitReached(
            f"{named or 'a file'} would be larger than the {most:,} bytes that this process may write to a file",
            remedy="raise the limit (`ulimit -f unlimited`)",
        )
    if e.errno == errno.ENOMEM:
        return _no_memory()
    if e.errno == errno.EAGAIN and own is None:
        return _no_process()
    if e.errno in _FORBIDDEN and named is not None:
        if _within(named, _cache()):
            return CacheUnusable(
                f"cannot write {named}: {e.strerror}",
                remedy="correct its owner and permissions, or put the cache elsewhere with ARM_KVM_CACHE",
            )
        return SetupError(f"{named}: {e.strerror}", remedy="correct its owner and permissions")
    if e.errno == errno.ENOENT and own is not None and len(own.parts) == 1:
        return SetupError(f"{own} is not installed, or not in PATH", remedy="run `arm-kvm setup`, or correct PATH")
    return SetupError(f"{own}: {e.strerror}" if own else str(e))


def disk_full(where: Path | None = None, why: str = os.strerror(errno.ENOSPC)) -> DiskFull:
    """Return the error for a program that reports a full disk itself, or waits for space on one."""
    return _full(OSError(errno.ENOSPC, why), where)


def _no_memory() -> LimitReached:
    return LimitReached(
        "this machine has no memory left for the lab", remedy="free some, or raise its limit (`ulimit -v unlimited`)"
    )


def _no_process() -> LimitReached:
    return LimitReached(
        "no more processes or threads can be started", remedy="end some, or raise the limit (`ulimit -u`)"
    )


@contextmanager
def lab_errors(where: Path) -> Iterator[None]:
    """Within the block, which writes to ``where``, raise limits and missing permissions as :func:`lab_error`."""
    try:
        yield
    except OSError as e:
        if e.errno in (*_LIMITS, *_FORBIDDEN):
            raise lab_error(e, where) from e
        raise


def _full(e: OSError, named: Path | None) -> DiskFull:
    """Name the disk that is actually full: the named file's if it is, else that of one of the lab's folders."""
    folders = [folder for folder, _ in _places()]
    full = next((path for path in (named, *folders) if path and is_full(path)), named)
    elsewhere = next((how for folder, how in _places() if full and _within(full, folder)), "")
    return DiskFull(
        f"the disk with {full} is full ({e.strerror})" if full else f"a disk is full ({e.strerror})",
        remedy=f"free some space on it{elsewhere and ', or ' + elsewhere}",
    )


def _places() -> list[tuple[Path, str]]:
    """The folders that the lab writes to, and how to choose others."""
    places = [(Path(os.environ.get("TMPDIR") or "/tmp"), "set TMPDIR to another folder")]
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        places.insert(0, (Path(runtime), "set XDG_RUNTIME_DIR to another folder"))
    cache = _cache()
    return [(cache, "put the cache elsewhere with ARM_KVM_CACHE"), *places] if cache else places


def _cache() -> Path | None:
    with suppress(ConfigError):
        return cache_root()
    return None


def _within(path: Path, folder: Path | None) -> bool:
    return folder is not None and (path == folder or folder in path.parents)


def is_full(path: Path) -> bool:
    """Whether the disk that the path is on, or would be on, has no space left."""
    there = next((p for p in (path, *path.parents) if is_there(p)), None)
    with suppress(OSError):
        disk = os.statvfs(there or "/")
        return disk.f_bavail * disk.f_frsize < _LITTLE or (disk.f_files > 0 and disk.f_favail == 0)
    return False
