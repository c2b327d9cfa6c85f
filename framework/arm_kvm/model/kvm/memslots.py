"""Memslots: which guest-physical ranges a VM has, what each allows, and what a change of them owes to stage 2.

Sources: Documentation/virt/kvm/api.txt (5.4) / api.rst, KVM_SET_USER_MEMORY_REGION, KVM_GET_DIRTY_LOG; Linux 5.4
virt/kvm/kvm_main.c (__kvm_set_memory_region, kvm_get_dirty_log_protect), virt/kvm/arm/mmu.c
(kvm_arch_prepare_memory_region, kvm_arch_commit_memory_region, kvm_mmu_wp_memory_region); arch/arm64/kvm/mmu.c (6.1).
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import IntFlag

import numpy as np

from arm_kvm.model.arch.granule import KIB4

_PAGE = KIB4.size
_MAX_PAGES = (1 << 31) - 1  #: KVM_MEM_MAX_NR_PAGES


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
        return self.size // _PAGE

    @property
    def logging(self) -> bool:
        return bool(self.flags & SlotFlags.LOG_DIRTY_PAGES)

    @property
    def readonly(self) -> bool:
        return bool(self.flags & SlotFlags.READONLY)

    def overlaps(self, other: Memslot) -> bool:
        return self.ipa < other.end and other.ipa < self.end

    def hva_of(self, ipa: int) -> int:
        """The host-virtual address behind an IPA, bytes. Raises ValueError for one outside the slot."""
        if not self.ipa <= ipa < self.end:
            raise ValueError(f"IPA {ipa:#x} is not in {self}")
        return self.hva + (ipa - self.ipa)

    def ipas_of(self, hva: int, size: int) -> tuple[int, int] | None:
        """The part of ``[hva, hva + size)`` that this slot shows the guest, as ``(ipa, size)``."""
        low, high = max(hva, self.hva), min(hva + size, self.hva + self.size)
        return (self.ipa + low - self.hva, high - low) if low < high else None

    def with_flags(self, flags: SlotFlags) -> Memslot:
        return replace(self, flags=flags)

    def __str__(self) -> str:
        names = f" {self.flags.name}" if self.flags else ""
        return f"memslot {self.slot} [{self.ipa:#x}, {self.end:#x}) hva {self.hva:#x}{names}"


@dataclass(frozen=True)
class Window:
    """Guest-physical ``[ipa, ipa + size)`` through which the guest reaches a device of the board at ``pa``, bytes."""

    ipa: int
    size: int
    pa: int


def covering(slots: Iterable[Memslot], ipas: np.ndarray) -> np.ndarray:
    """For each IPA (uint64 array) the index of the slot in ``slots`` that covers it, or -1 (int64 array, as long)."""
    index = np.full(len(ipas), -1, dtype=np.int64)
    for i, slot in enumerate(slots):
        index[(ipas >= np.uint64(slot.ipa)) & (ipas < np.uint64(slot.end))] = i
    return index


@dataclass(frozen=True)
class Owed:
    """What a change obliges stage 2 to before the ioctl returns: IPA ranges ``(ipa, size)`` in bytes."""

    must_go: tuple[tuple[int, int], ...] = ()
    must_be_read_only: tuple[tuple[int, int], ...] = ()


NOTHING_OWED = Owed()


def owed(old: Memslot | None, new: Memslot) -> Owed:
    """What KVM owes once it has taken ``new`` (size 0: deletes) for a slot that was ``old`` (None: there was none).

    A slot that goes or moves takes its leaves with it; one that begins to log, or logs at a new place, is clean.
    Sources: Linux 5.4 virt/kvm/kvm_main.c __kvm_set_memory_region (KVM_MR_DELETE, KVM_MR_MOVE), virt/kvm/arm/mmu.c
    kvm_arch_commit_memory_region (KVM_MEM_LOG_DIRTY_PAGES: kvm_mmu_wp_memory_region).
    """
    gone = ((old.ipa, old.size),) if old is not None and (not new.size or new.ipa != old.ipa) else ()
    begins = bool(new.size) and new.logging and (bool(gone) or old is None or not old.logging)
    return Owed(must_go=gone, must_be_read_only=((new.ipa, new.size),) if begins else ())


class Refused(Exception):
    """The ioctl fails with ``errno``, and no slot changes."""

    def __init__(self, number: int, why: str) -> None:
        super().__init__(f"{errno.errorcode[number]}: {why}")
        self.errno = number


@dataclass
class Memslots:
    """All memslots of a VM, and their dirty logs. Not modelled: the VMAs behind them (EPERM, PFNMAP).

    ``ipa_bits``, ``hva_bits``: widths of guest-physical and of the process's addresses; slot numbers are below
    ``limit`` (KVM_USER_MEM_SLOTS: 512 on arm64 up to 5.10, 32 on 32-bit hosts, later 32,767 and fewer).
    """

    ipa_bits: int
    limit: int = 512
    hva_bits: int = 48
    _slots: dict[int, Memslot] = field(default_factory=dict)
    _dirty: dict[int, set[int]] = field(default_factory=dict)  # by slot: page numbers within it

    def __iter__(self) -> Iterator[Memslot]:
        return iter(sorted(self._slots.values(), key=lambda slot: slot.slot))

    def at(self, ipa: int) -> Memslot | None:
        """The slot that covers an IPA."""
        return next((slot for slot in self if slot.ipa <= ipa < slot.end), None)

    # -- KVM_SET_USER_MEMORY_REGION -----------------------------------------------------------------------

    def set(self, wanted: Memslot) -> Owed:
        """Create, delete (size 0), move or re-flag a slot; what is then owed.

        Raises Refused: EINVAL, EEXIST (it overlaps another), EFAULT (it ends beyond the IPA space).
        """
        self._check_values(wanted)
        old = self._slots.get(wanted.slot)
        if wanted.size:
            self._check_place(old, wanted)
            self._slots[wanted.slot] = wanted
        elif old is None:
            raise Refused(errno.EINVAL, f"there is no slot {wanted.slot} to delete")
        else:
            del self._slots[wanted.slot]
        if wanted.size and wanted.logging:
            self._dirty.setdefault(wanted.slot, set())
        else:
            self._dirty.pop(wanted.slot, None)
        return owed(old, wanted)

    def _check_values(self, wanted: Memslot) -> None:
        if int(wanted.flags) & ~int(SlotFlags.LOG_DIRTY_PAGES | SlotFlags.READONLY):
            raise Refused(errno.EINVAL, f"flags {wanted.flags:#x}")
        if any(value % _PAGE for value in (wanted.ipa, wanted.size, wanted.hva)):
            raise Refused(errno.EINVAL, "address or size not aligned to a page")
        if not 0 <= wanted.slot < self.limit or wanted.pages > _MAX_PAGES:
            raise Refused(errno.EINVAL, f"slot {wanted.slot} or {wanted.pages} pages")
        if wanted.end >= 1 << 64:
            raise Refused(errno.EINVAL, "the range wraps around")
        if wanted.hva + wanted.size > 1 << self.hva_bits:
            raise Refused(errno.EINVAL, f"HVA {wanted.hva:#x} is not the process's")

    def _check_place(self, old: Memslot | None, wanted: Memslot) -> None:
        """A slot that is there keeps its size, HVA and READONLY; a new place must be free, and in the IPA space."""
        if old is not None and (old.hva, old.size, old.readonly) != (wanted.hva, wanted.size, wanted.readonly):
            raise Refused(errno.EINVAL, "size, HVA and READONLY of a slot do not change")
        if old is not None and old.ipa == wanted.ipa:
            return
        for slot in self:
            if slot.slot != wanted.slot and slot.overlaps(wanted):
                raise Refused(errno.EEXIST, f"{wanted} overlaps {slot}")
        if wanted.end > 1 << self.ipa_bits:
            raise Refused(errno.EFAULT, f"[{wanted.ipa:#x}, {wanted.end:#x}) is beyond {self.ipa_bits}-bit IPAs")

    # -- the dirty log ----------------------------------------------------------------------------------------

    def written(self, ipa: int, size: int = 1) -> None:
        """The guest wrote ``[ipa, ipa + size)``. Raises KeyError.

        A write to a READONLY slot is an MMIO exit and leaves no trace here; writes by the host are its own business.
        """
        for page in range(ipa // _PAGE, -(-(ipa + size) // _PAGE)):
            slot = self.at(page * _PAGE)
            if slot is None:
                raise KeyError(f"IPA {page * _PAGE:#x} is in no memslot")
            if slot.logging and not slot.readonly:
                self._dirty[slot.slot].add(page - slot.ipa // _PAGE)

    def take_dirty_log(self, slot: int) -> tuple[list[int], Owed]:
        """KVM_GET_DIRTY_LOG: the pages written, numbered within the slot, in order; they are clean again.

        Raises Refused: EINVAL no such number, ENOENT no log. Source: Linux 5.4 virt/kvm/kvm_main.c
        kvm_get_dirty_log_protect (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 off, as it is unless a VMM asks).
        """
        log, first = self._log(slot), self._slots[slot].ipa
        pages = sorted(log)
        log.clear()
        return pages, Owed(must_be_read_only=tuple((first + page * _PAGE, _PAGE) for page in pages))

    def _log(self, slot: int) -> set[int]:
        if not 0 <= slot < self.limit:
            raise Refused(errno.EINVAL, f"there is no slot {slot}")
        if slot not in self._dirty:
            raise Refused(errno.ENOENT, f"slot {slot} has no dirty log")
        return self._dirty[slot]
