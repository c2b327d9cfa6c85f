"""The memslots of one VM as the lab set them, and the stores that its guests were ordered to make."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from arm_kvm.model.kvm.memslots import Memslot, owed


@dataclass
class Stores:
    """The IPA ranges, in bytes, that guests were ordered to store to since the dirty log was last read."""

    ranges: list[tuple[int, int]] = field(default_factory=list)

    def add(self, ipa: int, size: int) -> None:
        self.ranges.append((ipa, ipa + size))

    def forget(self, ipa: int, size: int) -> None:
        """Remove ``[ipa, ipa + size)``, which is clean now."""
        outside = [((a, min(b, ipa)), (max(a, ipa + size), b)) for a, b in self.ranges]
        self.ranges = [(a, b) for pair in outside for a, b in pair if a < b]

    def pages(self, ipas: NDArray[np.uint64], sizes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Return for each range ``[ipa, ipa + size)`` whether it contains a byte of a store (bool array)."""
        hit = np.zeros(len(ipas), dtype=bool)
        for start, end in self.ranges:
            hit |= (ipas < np.uint64(end)) & (ipas + sizes > np.uint64(start))
        return hit


class MemslotRecord:
    """A VM's memslots, ``by_number``, and its ``stores``, which are recorded while a memslot logs dirty pages."""

    _FIRST_FREE = 2  #: lower numbers are the payload's memslots

    def __init__(self) -> None:
        self.by_number: dict[int, Memslot] = {}
        self.stores = Stores()

    @property
    def next_number(self) -> int:
        """The lowest memslot number above those in use."""
        return max([self._FIRST_FREE - 1, *self.by_number]) + 1

    def record(self, slot: Memslot) -> None:
        """Record a memslot that is set in KVM: new, moved, with other flags, or (size 0) deleted."""
        old = self.by_number.pop(slot.slot, None)
        if slot.size:
            self.by_number[slot.slot] = slot
        due = owed(old, slot)
        for ipa, size in due.must_go + due.must_be_read_only:
            self.stores.forget(ipa, size)

    def record_store(self, ipa: int, size: int) -> None:
        """Record that a guest is ordered to store there, if a memslot logs dirty pages."""
        if any(slot.logging for slot in self.by_number.values()):
            self.stores.add(ipa, size)

    def at(self, ipa: int) -> Memslot:
        """Return the memslot that covers ``ipa``. Raises KeyError when none does."""
        for slot in self.by_number.values():
            if slot.ipa <= ipa < slot.end:
                return slot
        raise KeyError(f"no memslot covers IPA {ipa:#x}")
