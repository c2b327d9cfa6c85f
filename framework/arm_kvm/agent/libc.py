"""System calls that Python does not wrap, through libc. Every failure raises OSError with the call's name."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
from collections.abc import Callable, Iterable

from . import syscalls
from .ioctls import Ioctl

_libc = ctypes.CDLL(None, use_errno=True)

PROT_READ, PROT_WRITE = 1, 2
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_HUGETLB = 1, 2, 0x10, 0x20, 0x40000
MAP_POPULATE = 0x8000
_MREMAP_MAYMOVE_FIXED = 3
_TIMER_ABSTIME = 1
_PUNCH_HOLE_KEEP_SIZE = 3
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mlock.argtypes = _libc.munlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
_libc.syscall.restype = ctypes.c_long
_libc.fallocate64.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
for _function in (_libc.pread, _libc.pwrite):
    _function.restype = ctypes.c_ssize_t
    _function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]


@functools.cache
def _scratch() -> int:
    """Open the file through which memory is loaded and stored: the kernel copies, and returns EFAULT where this process
    would get SIGSEGV. (process_vm_readv would do the same, but not every kernel has it.)
    """
    return os.open("/tmp", os.O_TMPFILE | os.O_RDWR)


def _failed(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), call)


def mmap(address: int | None, size: int, prot: int, flags: int, fd: int = -1, offset: int = 0) -> int:
    start: int = _libc.mmap(address, size, prot, flags, fd, offset)
    if start == _MAP_FAILED:
        raise _failed("mmap")
    return start


def mremap(address: int, size: int, to: int) -> None:
    """Move the mapping of ``[address, address + size)`` to ``to``, over what is mapped there."""
    if _libc.mremap(address, size, size, _MREMAP_MAYMOVE_FIXED, to) == _MAP_FAILED:
        raise _failed("mremap")


def punch_hole(fd: int, offset: int, size: int) -> None:
    if _libc.fallocate64(fd, _PUNCH_HOLE_KEEP_SIZE, offset, size):
        raise _failed("fallocate")


def syscall(name: str, *arguments: int) -> int:
    """Make a system call that libc does not wrap; pointers are passed as numbers. KeyError for an unknown name."""
    number = syscalls.number(name, 64 if os.uname().machine == "aarch64" else 32)
    result: int = _libc.syscall(number, *map(ctypes.c_ulong, arguments))
    if result == -1:
        raise _failed(name)
    return result


def raw_ioctl(which: Ioctl, fd: int, argument: int, data: bytes) -> tuple[int, bytes]:
    """ioctl(2) with a pointer to ``data``, or a number if ``data`` is empty: its result, and the data afterwards."""
    copy = ctypes.create_string_buffer(data, len(data)) if data else None
    result: int = _libc.ioctl(fd, ctypes.c_ulong(which.number), copy if copy else ctypes.c_ulong(argument))
    if result == -1:
        raise _failed(which.name)
    return result, copy.raw if copy else b""


def sigtimedwait(signals: Iterable[int]) -> bytes | None:
    """Take one of these signals that is pending for this thread and return its siginfo; None when none is pending."""
    info, at_once = ctypes.create_string_buffer(128), ctypes.create_string_buffer(16)
    wanted = sum(1 << (signal - 1) for signal in signals).to_bytes(128, "little")  # sigset_t
    return info.raw if _libc.sigtimedwait(wanted, info, at_once) > 0 else None


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


def clock_sleep_until(clock: int, nanoseconds: int) -> None:
    """clock_nanosleep(2) until this absolute time, which may be in the past."""
    when = _Timespec(*divmod(nanoseconds, 1_000_000_000))
    if number := _libc.clock_nanosleep(clock, _TIMER_ABSTIME, ctypes.byref(when), None):
        raise OSError(number, os.strerror(number), "clock_nanosleep")


def ioctl(which: Ioctl, fd: int, argument: int | bytes | bytearray = 0) -> int:
    """ioctl(2)."""
    try:
        result = fcntl.ioctl(fd, which.number, argument)
    except OSError as e:
        raise OSError(e.errno, e.strerror, which.name) from None
    return result if isinstance(result, int) else 0


def munmap(address: int, size: int) -> None:
    if _libc.munmap(address, size):
        raise _failed("munmap")


def mprotect(address: int, size: int, prot: int) -> None:
    if _libc.mprotect(address, size, prot):
        raise _failed("mprotect")


def madvise(address: int, size: int, advice: int) -> None:
    if _libc.madvise(address, size, advice):
        raise _failed("madvise")


def mlock(address: int, size: int) -> None:
    if _libc.mlock(address, size):
        raise _failed("mlock")


def munlock(address: int, size: int) -> None:
    if _libc.munlock(address, size):
        raise _failed("munlock")


def _copy(function: Callable[..., int], call: str, address: int, size: int) -> None:
    done = function(_scratch(), address, size, 0)
    if done != size:
        raise _failed(call) if done < 0 else OSError(errno.EFAULT, "Bad address", call)


def read_memory(address: int, size: int) -> bytes:
    """Load from this process's own memory; EFAULT where it is not mapped readable."""
    _copy(_libc.pwrite, "load from memory", address, size)
    return os.pread(_scratch(), size, 0)


def write_memory(address: int, data: bytes) -> None:
    """Store into this process's own memory; EFAULT where it is not mapped writable."""
    os.pwrite(_scratch(), data, 0)
    _copy(_libc.pread, "store to memory", address, len(data))
