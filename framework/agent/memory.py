"""Host-virtual memory for guests: map it, change it, look at it. Addresses and sizes are bytes."""

import os

from . import libc

PAGE = os.sysconf("SC_PAGE_SIZE")


def map_memory(size, align=PAGE, huge=False, shared=False, prot=libc.PROT_READ | libc.PROT_WRITE) -> dict:
    """Anonymous memory, aligned to ``align``. ``huge`` takes it from the hugetlbfs pool."""
    flags = libc.MAP_ANONYMOUS | (libc.MAP_SHARED if shared else libc.MAP_PRIVATE)
    if huge:
        return {"hva": libc.mmap(None, size, prot, flags | libc.MAP_HUGETLB)}
    # Reserve more than asked, then give back what lies before and after the aligned part.
    start = libc.mmap(None, size + align, prot, flags)
    hva = (start + align - 1) & ~(align - 1)
    if hva > start:
        libc.munmap(start, hva - start)
    if start + align > hva:
        libc.munmap(hva + size, start + align - hva)
    return {"hva": hva}


def unmap(hva, size) -> None:
    libc.munmap(hva, size)


def protect(hva, size, prot) -> None:
    libc.mprotect(hva, size, prot)


def advise(hva, size, advice) -> None:
    libc.madvise(hva, size, advice)


def read(hva, size) -> "tuple[None, bytes]":
    return None, libc.read_memory(hva, size)


def write(hva, blob) -> None:
    libc.write_memory(hva, blob)


def pagemap(hva, size) -> "tuple[None, bytes]":
    """The u64 words of /proc/self/pagemap for each page of the range (Documentation/admin-guide/mm/pagemap)."""
    with open("/proc/self/pagemap", "rb", buffering=0) as f:
        return None, os.pread(f.fileno(), size // PAGE * 8, hva // PAGE * 8)
