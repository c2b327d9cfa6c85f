"""The system calls Python does not wrap, through libc. Every failure raises OSError with the call's name."""

import ctypes
import errno
import fcntl
import os

_libc = ctypes.CDLL(None, use_errno=True)

PROT_READ, PROT_WRITE = 1, 2
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_HUGETLB = 1, 2, 0x10, 0x20, 0x40000
MAP_POPULATE = 0x8000
_MREMAP_MAYMOVE_FIXED = 3
_TIMER_ABSTIME = 1
_PUNCH_HOLE_KEEP_SIZE = 3
#: Numbers of system calls: 32-bit Arm (arch/arm/tools/syscall.tbl), arm64 (include/uapi/asm-generic/unistd.h).
_NUMBERS = {"userfaultfd": (388, 282)}
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
_libc.fallocate64.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
for _function in (_libc.pread, _libc.pwrite):
    _function.restype = ctypes.c_ssize_t
    _function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]

# Loads and stores go through a file: the kernel copies, and answers EFAULT where this process would
# get a SIGSEGV. (process_vm_readv does the same, but not every kernel has it.)
_scratch = os.open("/tmp", os.O_TMPFILE | os.O_RDWR)


def _failed(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), call)


def mmap(address, size, prot, flags, fd=-1, offset=0) -> int:
    got = _libc.mmap(address, size, prot, flags, fd, offset)
    if got == _MAP_FAILED:
        raise _failed("mmap")
    return got


def mremap(address, size, to) -> None:
    """Move the mapping of ``[address, address + size)`` to ``to``; what was mapped there goes."""
    if _libc.mremap(address, size, size, _MREMAP_MAYMOVE_FIXED, to) == _MAP_FAILED:
        raise _failed("mremap")


def punch_hole(fd, offset, size) -> None:
    if _libc.fallocate64(fd, _PUNCH_HOLE_KEEP_SIZE, offset, size):
        raise _failed("fallocate")


def syscall(name, *arguments) -> int:
    """A system call that libc does not wrap, by its number on this architecture."""
    number = _NUMBERS[name][os.uname().machine == "aarch64"]
    got = _libc.syscall(number, *arguments)
    if got < 0:
        raise _failed(name)
    return got


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


def clock_sleep_until(clock, nanoseconds) -> None:
    """Sleep until this clock shows so many nanoseconds; also where it has shown them long ago."""
    when = _Timespec(*divmod(nanoseconds, 1_000_000_000))
    if number := _libc.clock_nanosleep(clock, _TIMER_ABSTIME, ctypes.byref(when), None):
        raise OSError(number, os.strerror(number), "clock_nanosleep")


def ioctl(call, fd, request, argument=0):
    """ioctl(2); its failure names the ``call`` that it is."""
    try:
        return fcntl.ioctl(fd, request, argument)
    except OSError as e:
        raise OSError(e.errno, e.strerror, call) from None


def munmap(address, size) -> None:
    if _libc.munmap(address, size):
        raise _failed("munmap")


def mprotect(address, size, prot) -> None:
    if _libc.mprotect(address, size, prot):
        raise _failed("mprotect")


def madvise(address, size, advice) -> None:
    if _libc.madvise(address, size, advice):
        raise _failed("madvise")


def mlock(address, size) -> None:
    if _libc.mlock(address, size):
        raise _failed("mlock")


def munlock(address, size) -> None:
    if _libc.munlock(address, size):
        raise _failed("munlock")


def _copy(function, call, address, size) -> None:
    done = function(_scratch, address, size, 0)
    if done != size:
        raise _failed(call) if done < 0 else OSError(errno.EFAULT, "Bad address", call)


def read_memory(address, size) -> bytes:
    """Bytes of this process's own memory; EFAULT where it is not mapped readable."""
    _copy(_libc.pwrite, "load from memory", address, size)
    return os.pread(_scratch, size, 0)


def write_memory(address, data) -> None:
    """Store into this process's own memory; EFAULT where it is not mapped writable."""
    os.pwrite(_scratch, data, 0)
    _copy(_libc.pread, "store to memory", address, len(data))
