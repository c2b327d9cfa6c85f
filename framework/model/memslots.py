"""Memslots: which guest-physical ranges a VM has, and what each allows.

Source: Documentation/virt/kvm/api.txt (5.4) / api.rst, KVM_SET_USER_MEMORY_REGION.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntFlag

import numpy as np


class SlotFlags(IntFlag):
    """``flags`` of struct kvm_userspace_memory_region (include/uapi/linux/kvm.h)."""

    NONE = 0
    LOG_DIRTY_PAGES = 1
    READONLY = 2


@dataclass(frozen=True)
class Memslot:
    """One memslot: guest-physical ``[ipa, ipa + size)`` backed by host-virtual ``[hva, hva + size)``, bytes."""

    slot: int
    ipa: int
    size: int
    hva: int
    flags: SlotFlags = SlotFlags.NONE

    @property
    def end(self) -> int:
        return self.ipa + self.size

    @property
    def pages(self) -> int:
        return self.size >> 12

    @property
    def logging(self) -> bool:
        return bool(self.flags & SlotFlags.LOG_DIRTY_PAGES)

    @property
    def readonly(self) -> bool:
        return bool(self.flags & SlotFlags.READONLY)

    def hva_of(self, ipa: int) -> int:
        if not self.ipa <= ipa < self.end:
            raise ValueError(f"IPA {ipa:#x} is not in {self}")
        return self.hva + (ipa - self.ipa)

    def with_flags(self, flags: SlotFlags) -> Memslot:
        return replace(self, flags=flags)

    def __str__(self) -> str:
        names = f" {self.flags.name}" if self.flags else ""
        return f"memslot {self.slot} [{self.ipa:#x}, {self.end:#x}) hva {self.hva:#x}{names}"


def covering(slots: Iterable[Memslot], ipas: np.ndarray) -> np.ndarray:
    """For each IPA the index of the slot in ``slots`` that covers it, or -1 (int64 array)."""
    index = np.full(len(ipas), -1, dtype=np.int64)
    for i, slot in enumerate(slots):
        index[(ipas >= np.uint64(slot.ipa)) & (ipas < np.uint64(slot.end))] = i
    return index
