"""The memory of the VMM process (the agent), which memslots are made of, and the operations of the host on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import IntEnum
from functools import partial

import numpy as np
from numpy.typing import NDArray

from arm_kvm.vmm.client import Agent, Request, op, request
from arm_kvm.vmm.descriptor import Descriptor

PAGE = 0x1000
BLOCK = 0x20_0000


class Advice(IntEnum):
    """madvise(2) advice, include/uapi/asm-generic/mman-common.h."""

    DONTNEED = 4
    FREE = 8
    MERGEABLE = 12
    UNMERGEABLE = 13
    HUGEPAGE = 14
    NOHUGEPAGE = 15
    COLD = 20
    PAGEOUT = 21
    COLLAPSE = 25
    HWPOISON = 100
    SOFT_OFFLINE = 101


class Prot(IntEnum):
    """mprotect(2) protection."""

    NONE = 0
    READ = 1
    READ_WRITE = 3
    ALL = 7  #: read, write and execute


def mappings(agent: Agent, private: bool = False) -> list[tuple[int, int]]:
    """Return the process's mappings, ``[start, end)`` in order. ``private`` selects the private writable ones."""
    words = [line.split()[:2] for line in agent(op.memory_maps).decode().splitlines()]
    spans = [span.split("-") for span, rights in words if not private or rights[1] + rights[3] == "wp"]
    return [(int(start, 16), int(end, 16)) for start, end in spans]


class Memory:
    """A mapping of the VMM. Offsets and sizes are in bytes; the default is the whole mapping."""

    def __init__(self, agent: Agent, hva: int, size: int) -> None:
        self._agent = agent
        self.hva = hva
        self.size = size

    def _at(self, offset: int, size: int | None) -> dict[str, int]:
        return {"hva": self.hva + offset, "size": self.size - offset if size is None else size}

    def read(self, offset: int, size: int) -> bytes:
        """Load from it as the host. Raises HostOsError (EFAULT) where nothing is mapped readable."""
        return self._agent(op.memory_read, **self._at(offset, size))

    def write(self, offset: int, data: bytes) -> None:
        """Store to it as the host, which faults the page in for writing. Raises HostOsError (EFAULT)."""
        self._agent(op.memory_write, hva=self.hva + offset, blob=data)

    def advise(self, advice: Advice, offset: int = 0, size: int | None = None) -> None:
        """madvise(2) on part of it."""
        self._agent(op.memory_advise, advice=int(advice), **self._at(offset, size))

    def page_out(self, offset: int = 0, size: int | None = None) -> None:
        """Reclaim its pages: MADV_PAGEOUT, twice for each page. A page that running guests access may stay."""
        self._agent(op.memory_page_out, **self._at(offset, size))

    @contextmanager
    def locked_but(self, offset: int, size: int) -> Iterator[None]:
        """Within the block, only this part of it can be reclaimed: the rest is locked (mlock(2)), thus present."""
        end = offset + size
        rest = [self._at(start, length) for start, length in ((0, offset), (end, self.size - end)) if length]
        with ExitStack() as stack:
            for part in rest:
                self._agent(op.memory_lock, **part)
                stack.callback(partial(self._agent, op.memory_unlock, **part))
            yield

    @contextmanager
    def storm(self, advice: Advice) -> Iterator[Storm]:
        """Within the block, a thread of the VMM repeats madvise(2) with this advice on all of it."""
        self.start_storm(advice)
        storm = Storm()
        try:
            yield storm
        finally:
            storm.calls = self._agent(op.storm_end)

    def start_storm(self, advice: Advice) -> None:
        """Start what :meth:`storm` does, without an end, for a VMM that will be killed meanwhile."""
        self._agent(op.storm_begin, advice=int(advice), **self._at(0, None))

    def protect(self, prot: Prot, offset: int = 0, size: int | None = None) -> None:
        """mprotect(2) on part of it."""
        self._agent(op.memory_protect, prot=int(prot), **self._at(offset, size))

    def part(self, offset: int, size: int) -> Memory:
        """Return a part of it as memory of its own."""
        return Memory(self._agent, self.hva + offset, size)

    def move(self, to: Memory) -> None:
        """mremap(2) it over the mapping of ``to``. Nothing is mapped at its own address afterwards."""
        self._agent(op.memory_move, to=to.hva, **self._at(0, None))

    def replace(self, offset: int = 0, size: int | None = None) -> None:
        """mmap(2) new anonymous memory over part of it."""
        where = self._at(offset, size)
        self._agent(op.memory_map, at=where["hva"], size=where["size"])

    def mark_idle(self, offset: int = 0, size: int | None = None) -> None:
        """Mark its pages as idle (idle page tracking), which clears their accessed flags in stage 2, too."""
        self._agent(op.memory_mark_idle, **self._at(offset, size))

    def idle(self, offset: int = 0, size: int | None = None) -> list[bool]:
        """Return for each page whether it is still idle, that is, not accessed since :meth:`mark_idle`."""
        return self._agent(op.memory_idle, **self._at(offset, size))

    @contextmanager
    def userfaults(self, offset: int = 0, size: int | None = None, *, protect: bool = False) -> Iterator[UserFaults]:
        """Within the block, the VMM resolves the page faults of this memory (userfaultfd).

        These are accesses to missing pages, or with ``protect`` writes to protected ones. Raises HostOsError when the
        kernel does not support that.
        """
        number = self._agent(op.userfault_begin, protect=protect, **self._at(offset, size))
        faults = UserFaults()
        try:
            yield faults
        finally:
            faults.seen = [(hva - self.hva, kind) for hva, kind in self._agent(op.userfault_end, number=number)]

    def unmap(self, offset: int = 0, size: int | None = None) -> None:
        """munmap(2) part of it."""
        self._agent(op.memory_unmap, **self._at(offset, size))

    def release(self) -> Request[None] | None:
        """Return the request that unmaps it, None while other VMs use it. Called once for each VM that used it."""
        return request(op.memory_unmap, hva=self.hva, size=self.size)

    def frames(self, offset: int = 0, size: int | None = None) -> NDArray[np.uint64]:
        """Return the physical address of each page (uint64) according to pagemap, 0 where no page is present."""
        raw = np.frombuffer(self._agent(op.memory_pagemap, **self._at(offset, size)), dtype="<u8")
        present = raw >> np.uint64(63) != 0
        return np.where(present, (raw & np.uint64((1 << 55) - 1)) << np.uint64(12), np.uint64(0))

    def frame(self, offset: int = 0) -> int:
        """Return the physical address of the page at ``offset`` according to pagemap, 0 when none is present."""
        return int(self.frames(offset, PAGE)[0])


class SharedMemory(Memory):
    """Memory that several VMs share, and that is unmapped with the last of them."""

    def __init__(self, agent: Agent, hva: int, size: int, users: int) -> None:
        super().__init__(agent, hva, size)
        self._users = users

    def release(self) -> Request[None] | None:
        self._users -= 1
        return None if self._users else super().release()


class UserFaults:
    """``seen``: the faults as (offset in the memory, "missing" or "write-protect"), set at the end of the block."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str]] = []


class Storm:
    """``calls``: the number of madvise(2) calls of :meth:`Memory.storm`, set at the end of its block."""

    def __init__(self) -> None:
        self.calls = 0


class File(Descriptor):
    """A new file to map: a memfd, or at ``path`` in the host. Sizes and offsets are in bytes."""

    def __init__(self, agent: Agent, size: int, path: str | None = None) -> None:
        super().__init__(agent, agent(op.file_open, size=size, path=path))
        self.size = size

    @classmethod
    def open(cls, agent: Agent, path: str) -> File:
        """Open an existing file, such as ``/dev/mem`` or the VMM's ``/proc/self/pagemap``. Its ``size`` is set to 0."""
        file = cls.__new__(cls)
        Descriptor.__init__(file, agent, agent(op.file_open, path=path))
        file.size = 0
        return file

    def truncate(self, size: int) -> None:
        """ftruncate(2)."""
        self._agent(op.file_truncate, file=self.number, size=size)

    def punch_hole(self, offset: int, size: int) -> None:
        """fallocate(2) with FALLOC_FL_PUNCH_HOLE."""
        self._agent(op.file_punch_hole, file=self.number, offset=offset, size=size)

    def sync(self) -> None:
        """fsync(2): reclaim takes clean pages only."""
        self._agent(op.file_sync, file=self.number)

    def close(self) -> None:
        self._agent(op.file_close, file=self.number)


class Child:
    """A forked child of the VMM, which shares its memory copy on write and its file descriptors."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self.pid = agent(op.child_fork)

    def write(self, memory: Memory, offset: int, data: bytes) -> None:
        """Store to this memory as the child."""
        self._agent(op.child_write, pid=self.pid, hva=memory.hva + offset, blob=data)

    def read(self, memory: Memory, offset: int, size: int) -> bytes:
        """Load from this memory as the child."""
        return self._agent(op.child_read, pid=self.pid, hva=memory.hva + offset, size=size)

    def end(self) -> None:
        """Make the child exit and wait for it."""
        self._agent(op.child_end, pid=self.pid)
