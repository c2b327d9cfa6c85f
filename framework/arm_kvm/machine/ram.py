"""The board's RAM, read from outside: from the file that QEMU maps, or from QEMU's own mapping.

A new machine's RAM is a memfd, not a named file: nothing is left on disk however the lab ends, and its size is not
bounded by the ``/dev/shm`` mount, which is 64 MB in many containers. A restored machine maps saved RAM privately, so
that only what it writes is copied; such a mapping is read through ``/proc/PID/mem``.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from arm_kvm.support.errors import MachineError, QemuDied, SetupError

_PAGE_SHIFT = 12
_PAGE = 1 << _PAGE_SHIFT
_WORDS = _PAGE // 8
#: Bytes: RAM is saved and compared in pieces of this size; pieces that are all zeros become holes.
CHUNK = 1 << 16
_ZEROS = bytes(CHUNK)
_GONE = "the board's RAM is gone: its QEMU has ended"


class Ram:
    """Physical memory ``[base, base + size)``, read-only. Implements :class:`arm_kvm.model.arch.sweep.Memory`.

    It begins at offset ``start`` of the file ``fd``, which is closed with this object. Where the file is QEMU's own
    memory, reading raises QemuDied once that QEMU has ended.
    """

    def __init__(self, fd: int, start: int, base: int, size: int) -> None:
        self.fd = fd
        self.start = start
        self.base = base
        self.size = size

    def fetch(self, pas: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Read the 64-bit words at these physical addresses; 0 for those that are not RAM."""
        offsets = pas - np.uint64(self.base)
        inside = offsets < np.uint64(self.size)
        if inside.all():
            return self._words(offsets)
        words = np.zeros(len(pas), dtype=np.uint64)
        words[inside] = self._words(offsets[inside])
        return words

    def _words(self, offsets: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The words at these offsets in RAM; a run of offsets in one page reads the page once."""
        pages = offsets >> np.uint64(_PAGE_SHIFT)
        begins = np.ones(len(pages), dtype=np.bool_)
        begins[1:] = pages[1:] != pages[:-1]
        runs = pages[begins].tolist()
        rows = {page: row for row, page in enumerate(dict.fromkeys(runs))}
        content = self._rows([page << _PAGE_SHIFT for page in rows], _WORDS)
        row = np.array([rows[page] for page in runs], dtype=np.int64)[np.cumsum(begins) - 1]
        words: NDArray[np.uint64] = content[row, (offsets >> np.uint64(3)) & np.uint64(_WORDS - 1)]
        return words

    def tables(self, bases: NDArray[np.uint64], entries: int) -> NDArray[np.uint64]:
        """Read ``entries`` words from each of these physical addresses, one row each; 0 for those that are not RAM."""
        offsets = bases - np.uint64(self.base)
        if (offsets <= np.uint64(self.size - entries * 8)).all():
            return self._rows(offsets.tolist(), entries)
        words = np.arange(entries, dtype=np.uint64) << np.uint64(3)
        return self.fetch((bases[:, None] + words).ravel()).reshape(-1, entries)

    def _rows(self, offsets: list[int], words: int) -> NDArray[np.uint64]:
        """``words`` words from each of these offsets in RAM, one row each."""
        rows: NDArray[np.uint64] = np.empty((len(offsets), words), dtype="<u8")
        for row, offset in zip(rows, offsets, strict=True):
            if os.preadv(self.fd, [row.data], self.start + offset) != row.nbytes:
                raise QemuDied(_GONE)
        return rows

    def backed(self, pas: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Whether each of these physical addresses is in RAM."""
        return (pas - np.uint64(self.base)) < np.uint64(self.size)

    def read(self, pa: int, size: int) -> bytes:
        """Read ``size`` bytes at physical address ``pa``. Raises ValueError outside RAM."""
        offset = pa - self.base
        if offset < 0 or offset + size > self.size:
            raise ValueError(f"[{pa:#x}, {pa + size:#x}) is not RAM")
        found = os.pread(self.fd, size, self.start + offset)
        if len(found) != size:
            raise QemuDied(_GONE)
        return found

    def close(self) -> None:
        os.close(self.fd)


class OwnRam(Ram):
    """RAM in a memfd that both QEMU and this process map shared."""

    def __init__(self, fd: int, base: int, size: int) -> None:
        super().__init__(fd, 0, base, size)
        self.file = fd  #: the descriptor that QEMU inherits
        self._map = mmap.mmap(fd, size, prot=mmap.PROT_READ)
        self._content: NDArray[np.uint64] = np.frombuffer(self._map, dtype="<u8")

    @classmethod
    def create(cls, base: int, size: int) -> OwnRam:
        """Make new RAM, all zeros. Raises SetupError if this machine does not have that much memory."""
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if size > there:
            raise SetupError(
                f"no room for {size >> 20} MiB of board RAM: this machine has {there >> 20} MiB",
                remedy="give the board less memory in its host file",
            )
        fd = os.memfd_create("arm-kvm-ram", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            return cls(fd, base, size)
        except OSError as e:
            os.close(fd)
            if e.errno not in (errno.ENOMEM, errno.ENOSPC, errno.EFBIG):
                raise
            raise SetupError(
                f"no room for {size >> 20} MiB of board RAM: {e.strerror}",
                remedy="give the board less memory in its host file, or free some on this machine",
            ) from e

    def attach(self, pid: int) -> None:
        """Called once QEMU runs, with its PID; the memfd is the RAM already."""

    def place(self, pid: int) -> tuple[str, int]:
        """Where another process finds it: a path in /proc, and its offset in that file."""
        return f"/proc/{pid}/fd/{self.file}", 0

    def _words(self, offsets: NDArray[np.uint64]) -> NDArray[np.uint64]:
        words: NDArray[np.uint64] = self._content[offsets >> np.uint64(3)]
        return words

    def close(self) -> None:
        self._content = np.zeros(0, dtype="<u8")
        self._map.close()
        super().close()


class SavedRam(Ram):
    """Saved RAM that QEMU maps copy-on-write; ``file`` is closed with this object."""

    def __init__(self, file: int, base: int, size: int) -> None:
        super().__init__(-1, 0, base, size)
        self.file = file  #: the descriptor that QEMU inherits

    def attach(self, pid: int) -> None:
        """Called once QEMU runs, with its PID: find its mapping. Raises MachineError if there is none."""
        inode = os.fstat(self.file).st_ino
        pattern = re.compile(rf"^([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ {inode}\s", re.M)
        for start, end in pattern.findall(Path(f"/proc/{pid}/maps").read_text()):
            if int(end, 16) - int(start, 16) >= self.size:
                self.fd, self.start = os.open(f"/proc/{pid}/mem", os.O_RDONLY), int(start, 16)
                return
        raise MachineError("QEMU does not map the saved RAM")

    def place(self, pid: int) -> tuple[str, int]:
        """Where another process finds it: a path in /proc, and its offset in that file."""
        return f"/proc/{pid}/mem", self.start

    def close(self) -> None:
        os.close(self.file)
        if self.fd >= 0:
            super().close()


def chunks(fd: int) -> Iterator[tuple[int, bytes]]:
    """Yield ``(offset, bytes)`` of every :data:`CHUNK` of a file that is not all zeros, in order."""
    at, end = 0, os.fstat(fd).st_size
    while at < end:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA) & -CHUNK
        except OSError as e:
            if e.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        data = os.pread(fd, CHUNK, at)
        if data != _ZEROS:
            yield at, data
        at += CHUNK
