"""The memslots of one VM as the lab set them, and where its guests were told to store: what KVM is held against."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from arm_kvm.model.kvm.memslots import Memslot, owed


@dataclass
class Stores:
    """Where guests were told to store since the last dirty log: ranges of IPA, in bytes."""

    ranges: list[tuple[int, int]] = field(default_factory=list)

    def add(self, ipa: int, size: int) -> None:
        self.ranges.append((ipa, ipa + size))

    def forget(self, ipa: int, size: int) -> None:
        """``[ipa, ipa + size)``, bytes, is clean."""
        outside = [((a, min(b, ipa)), (max(a, ipa + size), b)) for a, b in self.ranges]
        self.ranges = [(a, b) for pair in outside for a, b in pair if a < b]

    def pages(self, ipas: NDArray[np.uint64], sizes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which of the ranges ``[ipa, ipa + size)`` contain a byte of a store (bool array)."""
        hit = np.zeros(len(ipas), dtype=bool)
        for start, end in self.ranges:
            hit |= (ipas < np.uint64(end)) & (ipas + sizes > np.uint64(start))
        return hit


class MemslotRecord:
    """``by_number``: the memslots that KVM has. ``stores``: kept only while one of them logs dirty pages."""

    _FIRST_FREE = 2  #: those below hold the payload

    def __init__(self) -> None:
        self.by_number: dict[int, Memslot] = {}
        self.stores = Stores()

    @property
    def next_number(self) -> int:
        """The first memslot number above all in use."""
        return max([self._FIRST_FREE - 1, *self.by_number]) + 1

    def record(self, slot: Memslot) -> None:
        """Record a memslot that KVM has taken, or is about to: new, moved, with other flags, or (size 0) deleted."""
        old = self.by_number.pop(slot.slot, None)
        if slot.size:
            self.by_number[slot.slot] = slot
        due = owed(old, slot)
        for ipa, size in due.must_go + due.must_be_read_only:
            self.stores.forget(ipa, size)

    def record_store(self, ipa: int, size: int) -> None:
        """A guest is about to be told to store there; remembered while dirty pages are logged."""
        if any(slot.logging for slot in self.by_number.values()):
            self.stores.add(ipa, size)

    def at(self, ipa: int) -> Memslot:
        """The memslot that covers ``ipa``; KeyError when none does."""
        for slot in self.by_number.values():
            if slot.ipa <= ipa < slot.end:
                return slot
        raise KeyError(f"no memslot covers IPA {ipa:#x}")
