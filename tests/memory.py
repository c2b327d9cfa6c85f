"""Physical memory made of a numpy array, for tests of the model and the judge: no machine is pretended."""

from __future__ import annotations

import numpy as np
from arm_kvm.model.arch import descriptors as d

BASE = 0x4000_0000
PAGE = 0x1000


class Pages:
    """``count`` zeroed pages of RAM at BASE, with an allocator and word stores."""

    def __init__(self, count: int = 256) -> None:
        self.words = np.zeros(count * 512, dtype=np.uint64)
        self._next = 0

    def page(self, pages: int = 1) -> int:
        """The physical address of fresh pages, aligned to their size."""
        self._next = -(-self._next // pages) * pages
        pa = BASE + self._next * PAGE
        self._next += pages
        return pa

    def store(self, pa: int, word: int) -> None:
        self.words[(pa - BASE) // 8] = word

    def load(self, pa: int) -> int | None:
        return int(self.words[(pa - BASE) // 8]) if 0 <= pa - BASE < len(self.words) * 8 else None

    def fetch(self, pas: np.ndarray) -> np.ndarray:
        out = np.zeros(len(pas), dtype=np.uint64)
        inside = self.backed(pas)
        out[inside] = self.words[((pas[inside] - np.uint64(BASE)) >> np.uint64(3)).astype(np.int64)]
        return out

    def tables(self, bases: np.ndarray, entries: int) -> np.ndarray:
        words = np.arange(entries, dtype=np.uint64) << np.uint64(3)
        return self.fetch((bases[:, None] + words).ravel()).reshape(-1, entries)

    def backed(self, pas: np.ndarray) -> np.ndarray:
        return (pas - np.uint64(BASE)) < np.uint64(len(self.words) * 8)


class Table:
    """A stage-2 or stage-1 table built entry by entry, whatever the entries are."""

    def __init__(self, memory: Pages, regime) -> None:
        self.memory, self.regime = memory, regime

    def put(self, ia: int, level: int, desc: int) -> int:
        """Store ``desc`` as the entry of ``level`` for ``ia``, making tables on the way; the entry's address."""
        base = self.regime.root
        for at in range(self.regime.start_level, level):
            slot = base + self.regime.index(ia, at) * 8
            if not self.memory.load(slot) & 1:
                self.memory.store(slot, d.encode(d.Table(self.memory.page()), at))
            base = d.decode(self.memory.load(slot), at).address
        entry = base + self.regime.index(ia, level) * 8
        self.memory.store(entry, desc)
        return entry
