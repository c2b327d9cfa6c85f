"""Memslots: the guest-physical ranges of a VM, what each allows, and what a change requires of stage 2.

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
from numpy.typing import NDArray

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
    """One memslot: guest-physical ``[ipa, ipa + size)``, backed by host-virtual ``[hva, hva + size)``; in bytes."""

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
        """The HVA of an IPA. Raises ValueError for an IPA outside the slot."""
        if not self.ipa <= ipa < self.end:
            raise ValueError(f"IPA {ipa:#x} is not in {self}")
        return self.hva + (ipa - self.ipa)

    def ipas_of(self, hva: int, size: int) -> tuple[int, int] | None:
        """The part of ``[hva, hva + size)`` that this slot maps, as ``(ipa, size)``; None if there is none."""
        low, high = max(hva, self.hva), min(hva + size, self.hva + self.size)
        return (self.ipa + low - self.hva, high - low) if low < high else None

    def with_flags(self, flags: SlotFlags) -> Memslot:
        return replace(self, flags=flags)

    def __str__(self) -> str:
        names = f" {self.flags.name}" if self.flags else ""
        return f"memslot {self.slot} [{self.ipa:#x}, {self.end:#x}) hva {self.hva:#x}{names}"


@dataclass(frozen=True)
class Window:
    """Guest-physical ``[ipa, ipa + size)`` that KVM maps to a device of the board at ``pa``; in bytes."""

    ipa: int
    size: int
    pa: int


def covering(slots: Iterable[Memslot], ipas: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each IPA the index in ``slots`` of the slot that covers it, or -1."""
    index = np.full(len(ipas), -1, dtype=np.int64)
    for i, slot in enumerate(slots):
        index[(ipas >= np.uint64(slot.ipa)) & (ipas < np.uint64(slot.end))] = i
    return index


@dataclass(frozen=True)
class Owed:
    """What must be true of stage 2 when the ioctl returns, as IPA ranges ``(ipa, size)`` in bytes."""

    must_go: tuple[tuple[int, int], ...] = ()
    must_be_read_only: tuple[tuple[int, int], ...] = ()


NOTHING_OWED = Owed()


def owed(old: Memslot | None, new: Memslot) -> Owed:
    """What KVM owes once it has accepted ``new`` (size 0: delete) in place of ``old`` (None: a new slot).

    The leaves of a slot that is deleted or moved must go; a slot that begins to log, or is moved and logs, is clean.
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


_Pages = set[int]  #: page numbers within a slot (in the class below, ``set`` is the method)


@dataclass
class Memslots:
    """All memslots of a VM, and their dirty logs. Not modelled: the VMAs behind them (EPERM, PFNMAP).

    ``ipa_bits``, ``hva_bits``: widths of guest-physical and of the process's addresses; slot numbers are below
    ``limit`` (KVM_USER_MEM_SLOTS: 512 on arm64 up to 5.10, 32 on 32-bit hosts, at most 32,767 later).
    """

    ipa_bits: int
    limit: int = 512
    hva_bits: int = 48
    _slots: dict[int, Memslot] = field(default_factory=dict)
    _dirty: dict[int, _Pages] = field(default_factory=dict)  # by slot

    def __iter__(self) -> Iterator[Memslot]:
        return iter(sorted(self._slots.values(), key=lambda slot: slot.slot))

    def at(self, ipa: int) -> Memslot | None:
        """The slot that covers an IPA."""
        return next((slot for slot in self if slot.ipa <= ipa < slot.end), None)

    # -- KVM_SET_USER_MEMORY_REGION -----------------------------------------------------------------------

    def set(self, wanted: Memslot) -> Owed:
        """Create, delete (size 0), move or re-flag a slot, and return what KVM then owes.

        Raises Refused: EINVAL, EEXIST (it overlaps another slot), EFAULT (it ends beyond the IPA space).
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
            raise Refused(errno.EINVAL, f"HVA {wanted.hva:#x} is not an address of the process")

    def _check_place(self, old: Memslot | None, wanted: Memslot) -> None:
        """An existing slot keeps size, HVA and READONLY; a new IPA range must be free and within the IPA space."""
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
        """Log a write of ``[ipa, ipa + size)`` by the guest. Raises KeyError if the range is not in memslots.

        A write to a READONLY slot is an MMIO exit and is not logged. Nor are writes by the host.
        """
        for page in range(ipa // _PAGE, -(-(ipa + size) // _PAGE)):
            slot = self.at(page * _PAGE)
            if slot is None:
                raise KeyError(f"IPA {page * _PAGE:#x} is in no memslot")
            if slot.logging and not slot.readonly:
                self._dirty[slot.slot].add(page - slot.ipa // _PAGE)

    def take_dirty_log(self, slot: int) -> tuple[list[int], Owed]:
        """KVM_GET_DIRTY_LOG: return the written pages by number within the slot, sorted, and mark them as clean.

        Raises Refused: EINVAL (no such slot number), ENOENT (no log). Source: Linux 5.4 virt/kvm/kvm_main.c
        kvm_get_dirty_log_protect (without KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, which a VMM has to enable).
        """
        log, first = self._log(slot), self._slots[slot].ipa
        pages = sorted(log)
        log.clear()
        return pages, Owed(must_be_read_only=tuple((first + page * _PAGE, _PAGE) for page in pages))

    def _log(self, slot: int) -> _Pages:
        if not 0 <= slot < self.limit:
            raise Refused(errno.EINVAL, f"there is no slot {slot}")
        if slot not in self._dirty:
            raise Refused(errno.ENOENT, f"slot {slot} has no dirty log")
        return self._dirty[slot]
