"""Host-virtual memory for guests: map it, change it, look at it. Addresses and sizes are bytes."""

import contextlib
import errno
import os
import threading

from . import libc, placement, poison

PAGE = os.sysconf("SC_PAGE_SIZE")

_MADV_PAGEOUT = 21
_MADV_HWPOISON = 100
_READ_WRITE = libc.PROT_READ | libc.PROT_WRITE


def map_memory(size, align=PAGE, huge=False, shared=False, file=-1, at=None) -> dict:
    """Memory, aligned to ``align``: anonymous, or of an open ``file`` from its beginning.

    ``huge`` takes it from the hugetlbfs pool; with ``at`` it replaces what is mapped there.
    """
    flags = libc.MAP_SHARED if shared else libc.MAP_PRIVATE
    flags |= libc.MAP_ANONYMOUS if file < 0 else 0
    if file >= 0 and at is None:  # reserved first: the file must begin where the aligned part does
        at = _reserve(size, align, libc.MAP_PRIVATE | libc.MAP_ANONYMOUS)
    if at is not None:
        return {"hva": libc.mmap(at, size, _READ_WRITE, flags | libc.MAP_FIXED, file)}
    if huge:
        return {"hva": libc.mmap(None, size, _READ_WRITE, flags | libc.MAP_HUGETLB)}
    return {"hva": _reserve(size, align, flags)}


def _reserve(size, align, flags):
    """Address space of this size and alignment."""
    # Reserve more than asked, then give back what lies before and after the aligned part.
    start = libc.mmap(None, size + align, _READ_WRITE, flags)
    hva = (start + align - 1) & ~(align - 1)
    if hva > start:
        libc.munmap(start, hva - start)
    if start + align > hva:
        libc.munmap(hva + size, start + align - hva)
    return hva


def open_file(size, path=None) -> int:
    """A file of this size to map: a memfd, or at ``path``. Its descriptor."""
    fd = os.memfd_create("guest") if path is None else os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    os.ftruncate(fd, size)
    return fd


def close_file(file) -> None:
    os.close(file)


def truncate(file, size) -> None:
    os.ftruncate(file, size)


def punch_hole(file, offset, size) -> None:
    libc.punch_hole(file, offset, size)


def sync(file) -> None:
    """Write a file's dirty pages to where they are kept: reclaim takes clean ones only."""
    os.fsync(file)


def move(hva, size, to) -> None:
    libc.mremap(hva, size, to)


def maps() -> "tuple[None, bytes]":
    """/proc/self/maps, for the lab to read: an emulated CPU would take longer."""
    with open("/proc/self/maps", "rb", buffering=0) as f:
        return None, b"".join(iter(lambda: f.read(1 << 16), b""))


def unmap(hva, size) -> None:
    libc.munmap(hva, size)


def protect(hva, size, prot) -> None:
    libc.mprotect(hva, size, prot)


def advise(hva, size, advice) -> None:
    with poison.let_in() if advice == _MADV_HWPOISON else contextlib.nullcontext():
        libc.madvise(hva, size, advice)


def takes(advice) -> bool:
    """Whether madvise(2) of this kernel knows this advice."""
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


def lock(hva, size) -> None:
    """Nothing of it is reclaimed until it is unlocked."""
    libc.mlock(hva, size)


def unlock(hva, size) -> None:
    libc.munlock(hva, size)


def page_out(hva, size) -> None:
    """Ask for each page to be reclaimed, twice in a row: up to 6.8 the first only ages a page that was used.

    A page that guests go on using is taken if none comes by between the two.
    """
    for page in range(hva, hva + size, PAGE):
        libc.madvise(page, PAGE, _MADV_PAGEOUT)
        libc.madvise(page, PAGE, _MADV_PAGEOUT)


def read(hva, size) -> "tuple[None, bytes]":
    return None, libc.read_memory(hva, size)


def write(hva, blob) -> None:
    libc.write_memory(hva, blob)


def pagemap(hva, size) -> "tuple[None, bytes]":
    """The u64 words of /proc/self/pagemap for each page of the range (Documentation/admin-guide/mm/pagemap)."""
    with open("/proc/self/pagemap", "rb", buffering=0) as f:
        return None, os.pread(f.fileno(), size // PAGE * 8, hva // PAGE * 8)


class Storm:
    """madvise of one range, again and again, in a thread."""

    def __init__(self, hva, size, advice):
        self._over, self._count = threading.Event(), 0
        self._thread = threading.Thread(target=self._blow, args=(hva, size, advice), daemon=True)
        with placement.anywhere():
            self._thread.start()

    def _blow(self, hva, size, advice):
        while not self._over.is_set():
            advise(hva, size, advice)
            self._count += 1

    def end(self):
        self._over.set()
        self._thread.join()
        return self._count
