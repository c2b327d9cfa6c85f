"""Idle page tracking (Documentation/admin-guide/mm/idle_page_tracking): one bit a page frame, in words of 64."""

from __future__ import annotations

import os
import struct

from . import libc, memory, placement

_BITMAP = "/sys/kernel/mm/page_idle/bitmap"
_FRAME = (1 << 55) - 1
#: More than the per-CPU lists hold on which new pages wait before reclaim and idle tracking know them.
_SIZE = 33 * memory.PAGE
_POPULATED = (libc.PROT_READ | libc.PROT_WRITE, libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_POPULATE)


def drain() -> None:
    """Push the pages that wait on each CPU's list onto the LRU, by queueing others behind them."""
    with placement.anywhere():
        for cpu in os.sched_getaffinity(0):
            os.sched_setaffinity(0, {cpu})
            libc.munmap(libc.mmap(None, _SIZE, *_POPULATED), _SIZE)


def _frames(hva: int, size: int) -> list[int]:
    raw = memory.pagemap(hva, size)
    return [word & _FRAME for (word,) in struct.iter_unpack("<Q", raw)]


def mark_idle(hva: int, size: int) -> None:
    """Call these pages idle: clears their accessed flags, the guests' too."""
    drain()
    words: dict[int, int] = {}
    for frame in _frames(hva, size):
        words[frame // 64] = words.get(frame // 64, 0) | 1 << frame % 64
    with open(_BITMAP, "r+b", buffering=0) as bitmap:
        for word, bits in words.items():
            os.pwrite(bitmap.fileno(), struct.pack("<Q", bits), word * 8)


def idle(hva: int, size: int) -> list[bool]:
    """For each page, whether nobody has accessed it since it was marked. Looking clears the accessed flags."""
    with open(_BITMAP, "rb", buffering=0) as bitmap:
        words = [(f, os.pread(bitmap.fileno(), 8, f // 64 * 8)) for f in _frames(hva, size)]
    return [bool(struct.unpack("<Q", word)[0] >> frame % 64 & 1) for frame, word in words]
