"""The VMM's memory, which memslots are made of. HVAs, sizes and offsets are in bytes."""

from __future__ import annotations

import contextlib
import errno
import os
import threading

from . import libc, placement, poison

PAGE = os.sysconf("SC_PAGE_SIZE")

_MADV_PAGEOUT = 21
_MADV_HWPOISON = 100
_READ_WRITE = libc.PROT_READ | libc.PROT_WRITE


def map_memory(
    size: int,
    align: int = PAGE,
    huge: bool = False,
    shared: bool = False,
    file: int = -1,
    offset: int = 0,
    prot: int = _READ_WRITE,
    at: int | None = None,
) -> int:
    """Map memory aligned to ``align``, anonymous or of an open ``file`` from ``offset`` on, and return its HVA.

    ``huge`` takes it from the hugetlbfs pool. With ``at`` it replaces what is mapped at that HVA.
    """
    flags = libc.MAP_SHARED if shared else libc.MAP_PRIVATE
    flags |= libc.MAP_ANONYMOUS if file < 0 else 0
    if file >= 0 and at is None:  # to align the beginning of the file
        at = _reserve(size, align, libc.MAP_PRIVATE | libc.MAP_ANONYMOUS)
    if at is not None:
        return libc.mmap(at, size, prot, flags | libc.MAP_FIXED, file, offset)
    if huge:
        return libc.mmap(None, size, prot, flags | libc.MAP_HUGETLB)
    return _reserve(size, align, flags, prot)


def _reserve(size: int, align: int, flags: int, prot: int = _READ_WRITE) -> int:
    """Map memory of this size and alignment: map too much and unmap what is before and after the aligned part."""
    start = libc.mmap(None, size + align, prot, flags)
    hva = (start + align - 1) & ~(align - 1)
    if hva > start:
        libc.munmap(start, hva - start)
    if start + align > hva:
        libc.munmap(hva + size, start + align - hva)
    return hva


def open_file(size: int | None = None, path: str | None = None) -> int:
    """Open a file to map and return its descriptor.

    With ``size`` it is a new one, at ``path`` or a memfd; without, it is the existing file at ``path``.
    """
    if size is None:
        return os.open(path or "", os.O_RDWR)
    fd = os.memfd_create("guest") if path is None else os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    os.ftruncate(fd, size)
    return fd


def close_file(file: int) -> None:
    os.close(file)


def truncate(file: int, size: int) -> None:
    os.ftruncate(file, size)


def punch_hole(file: int, offset: int, size: int) -> None:
    libc.punch_hole(file, offset, size)


def sync(file: int) -> None:
    """fsync(2), after which reclaim can take the file's pages: they are clean."""
    os.fsync(file)


def move(hva: int, size: int, to: int) -> None:
    """mremap(2) to ``to``, over what is mapped there."""
    libc.mremap(hva, size, to)


def maps() -> bytes:
    """Return /proc/self/maps, which the lab parses, faster than an emulated CPU."""
    with open("/proc/self/maps", "rb", buffering=0) as f:
        return b"".join(iter(lambda: f.read(1 << 16), b""))


def unmap(hva: int, size: int) -> None:
    libc.munmap(hva, size)


def protect(hva: int, size: int, prot: int) -> None:
    libc.mprotect(hva, size, prot)


def advise(hva: int, size: int, advice: int) -> None:
    with poison.unblocked() if advice == _MADV_HWPOISON else contextlib.nullcontext():
        libc.madvise(hva, size, advice)


def takes(advice: int) -> bool:
    """Return whether this kernel's madvise(2) knows this advice."""
    hva = libc.mmap(None, PAGE, _READ_WRITE, libc.MAP_PRIVATE | libc.MAP_ANONYMOUS)
    try:
        libc.madvise(hva, PAGE, advice)
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
        return False
    finally:
        libc.munmap(hva, PAGE)
    return True


def lock(hva: int, size: int) -> None:
    """mlock(2): no page of the range is reclaimed until :func:`unlock`."""
    libc.mlock(hva, size)


def unlock(hva: int, size: int) -> None:
    libc.munlock(hva, size)


def page_out(hva: int, size: int) -> None:
    """MADV_PAGEOUT for each page, twice in a row: up to 6.8 the first only ages a page that has been accessed.

    A page that running guests use is reclaimed if none of them accesses it between the two.
    """
    for page in range(hva, hva + size, PAGE):
        libc.madvise(page, PAGE, _MADV_PAGEOUT)
        libc.madvise(page, PAGE, _MADV_PAGEOUT)


def read(hva: int, size: int) -> bytes:
    return libc.read_memory(hva, size)


def write(hva: int, blob: bytes) -> None:
    libc.write_memory(hva, blob)


def pagemap(hva: int, size: int) -> bytes:
    """Return the u64 of /proc/self/pagemap for each page of the range (Documentation/admin-guide/mm/pagemap)."""
    with open("/proc/self/pagemap", "rb", buffering=0) as f:
        return os.pread(f.fileno(), size // PAGE * 8, hva // PAGE * 8)


class Storm:
    """A thread that calls madvise(2) on one range repeatedly until :meth:`end`, which returns the number of calls."""

    def __init__(self, hva: int, size: int, advice: int) -> None:
        self._over, self._count = threading.Event(), 0
        self._thread = threading.Thread(target=self._run, args=(hva, size, advice), daemon=True)
        with placement.anywhere():
            self._thread.start()

    def _run(self, hva: int, size: int, advice: int) -> None:
        while not self._over.is_set():
            advise(hva, size, advice)
            self._count += 1

    def end(self) -> int:
        self._over.set()
        self._thread.join()
        return self._count
