"""Idle page tracking (Documentation/admin-guide/mm/idle_page_tracking): one bit per page frame, in 64-bit words."""

from __future__ import annotations

import os
import struct

from . import libc, memory, placement

_BITMAP = "/sys/kernel/mm/page_idle/bitmap"
_FRAME = (1 << 55) - 1
#: More than fits on a CPU's list of new pages, which reclaim and idle page tracking do not see.
_SIZE = 33 * memory.PAGE
_POPULATED = (libc.PROT_READ | libc.PROT_WRITE, libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_POPULATE)


def drain() -> None:
    """Move the new pages on each CPU's list to the LRU, by filling the list with other pages."""
    with placement.anywhere():
        for cpu in os.sched_getaffinity(0):
            os.sched_setaffinity(0, {cpu})
            libc.munmap(libc.mmap(None, _SIZE, *_POPULATED), _SIZE)


def _frames(hva: int, size: int) -> list[int]:
    raw = memory.pagemap(hva, size)
    return [word & _FRAME for (word,) in struct.iter_unpack("<Q", raw)]


def mark_idle(hva: int, size: int) -> None:
    """Mark these pages as idle, which clears their accessed flags in stage 2, too."""
    drain()
    words: dict[int, int] = {}
    for frame in _frames(hva, size):
        words[frame // 64] = words.get(frame // 64, 0) | 1 << frame % 64
    with open(_BITMAP, "r+b", buffering=0) as bitmap:
        for word, bits in words.items():
            os.pwrite(bitmap.fileno(), struct.pack("<Q", bits), word * 8)


def idle(hva: int, size: int) -> list[bool]:
    """Return for each page whether it is still idle, that is, not accessed since :func:`mark_idle`.

    Reading the bitmap clears the accessed flags.
    """
    with open(_BITMAP, "rb", buffering=0) as bitmap:
        words = [(f, os.pread(bitmap.fileno(), 8, f // 64 * 8)) for f in _frames(hva, size)]
    return [bool(struct.unpack("<Q", word)[0] >> frame % 64 & 1) for frame, word in words]
