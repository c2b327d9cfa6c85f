"""The board's RAM: an anonymous file that QEMU maps read-write and the lab maps read-only (conformance: read-write).

A memfd rather than a named file: nothing is left on any disk however the lab ends, and its size is
not bounded by the ``/dev/shm`` mount, which is 64 MB in many containers.
"""

from __future__ import annotations

import errno
import mmap
import os

import numpy as np

from framework.errors import SetupError


class Ram:
    """Physical memory ``[base, base + size)``, bytes. Implements :class:`framework.model.sweep.Memory`.

    ``words`` is the whole RAM as a read-only uint64 array, one word per 8 bytes.
    """

    def __init__(self, fd: int, base: int, size: int) -> None:
        self.fd = fd
        self.base = base
        self.size = size
        self._map = mmap.mmap(fd, size, prot=mmap.PROT_READ)
        self.words = np.frombuffer(self._map, dtype="<u8")

    @classmethod
    def create(cls, base: int, size: int) -> Ram:
        """New zeroed RAM. Raises SetupError when this machine cannot give that much address space."""
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

    def fetch(self, pas: np.ndarray) -> np.ndarray:
        index = (pas - np.uint64(self.base)) >> np.uint64(3)
        inside = index < np.uint64(len(self.words))
        if inside.all():
            return self.words[index]
        words = np.zeros(len(index), dtype=np.uint64)
        words[inside] = self.words[index[inside]]
        return words

    def backed(self, pas: np.ndarray) -> np.ndarray:
        return (pas - np.uint64(self.base)) < np.uint64(self.size)

    def read(self, pa: int, size: int) -> bytes:
        """``size`` bytes at physical address ``pa``; ValueError outside RAM."""
        start = pa - self.base
        if start < 0 or start + size > self.size:
            raise ValueError(f"[{pa:#x}, {pa + size:#x}) is not RAM")
        return self._map[start : start + size]

    def close(self) -> None:
        self.words = np.zeros(0, dtype="<u8")
        self._map.close()
        os.close(self.fd)
