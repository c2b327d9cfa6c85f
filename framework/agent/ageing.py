"""Idle page tracking (Documentation/admin-guide/mm/idle_page_tracking): one bit a page frame, in words of 64."""

import os
import struct

from . import libc, memory, placement

_BITMAP = "/sys/kernel/mm/page_idle/bitmap"
_FRAME = (1 << 55) - 1
#: More than the per-CPU lists hold on which new pages wait before reclaim and idle tracking know them.
_MANY = 33


def drain():
    """Push the pages that wait on each CPU's list onto the LRU, by queueing others behind them."""
    with placement.anywhere():
        for cpu in os.sched_getaffinity(0):
            os.sched_setaffinity(0, {cpu})
            hva = memory.map_memory(_MANY * memory.PAGE)["hva"]
            libc.write_memory(hva, bytes(_MANY * memory.PAGE))
            libc.munmap(hva, _MANY * memory.PAGE)


def _frames(hva, size):
    _, raw = memory.pagemap(hva, size)
    return [word & _FRAME for (word,) in struct.iter_unpack("<Q", raw)]


def mark_idle(hva, size) -> None:
    """Call these pages idle: clears their accessed flags, the guests' too."""
    drain()
    with open(_BITMAP, "r+b", buffering=0) as bitmap:
        for frame in _frames(hva, size):
            os.pwrite(bitmap.fileno(), struct.pack("<Q", 1 << frame % 64), frame // 64 * 8)


def idle(hva, size) -> list:
    """For each page, whether nobody has accessed it since it was marked. Looking clears the accessed flags."""
    with open(_BITMAP, "rb", buffering=0) as bitmap:
        words = [(f, os.pread(bitmap.fileno(), 8, f // 64 * 8)) for f in _frames(hva, size)]
    return [bool(struct.unpack("<Q", word)[0] >> frame % 64 & 1) for frame, word in words]
