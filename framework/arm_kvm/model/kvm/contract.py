"""Safety, page by page: what a stage-2 leaf may be, given memslot, dirty log and the host's own mapping.

All arrays have one element a page of 4 KiB that stage 2 maps; masks are bool arrays of that length. Descriptors are
uint64 and of stage 2, addresses uint64 in bytes.

Sources: Documentation/virt/kvm/api.txt (5.4) / api.rst, KVM_SET_USER_MEMORY_REGION and KVM_GET_DIRTY_LOG;
Documentation/vm/mmu_notifier.rst (5.4); Linux 5.4 virt/kvm/arm/mmu.c (user_mem_abort, kvm_phys_addr_ioremap),
arch/arm/include/asm/pgtable.h and arch/arm64/include/asm/pgtable-prot.h (PAGE_S2, PAGE_S2_DEVICE);
6.1 arch/arm64/kvm/mmu.c (user_mem_abort), hyp/pgtable.c (stage2_set_prot_attr).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import numpy as np

from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch.descriptors import Format
from arm_kvm.model.arch.granule import KIB4
from arm_kvm.model.kvm.memslots import Memslot, Window

_OFFSET = np.uint64(KIB4.size - 1)


class Limit(Enum):
    """Why a page may not be writable. The value says it in a report."""

    READONLY = "the memslot is read-only"
    CLEAN = "clean in the dirty log"
    HOST = "the host's own mapping is read-only"


@dataclass(frozen=True)
class MappedPages:
    """The pages that one VM's stage 2 maps, and all that decides what their leaves may be, read at one moment.

    Each mask below is of the pages that break one rule.
    """

    ipa: np.ndarray
    pa: np.ndarray  #: as stage 2 gives it
    desc: np.ndarray  #: of the leaf
    slot: np.ndarray  #: int64: index of the memslot in ``slots``, -1 outside all (:func:`memslots.covering`)
    host_pa: np.ndarray  #: by the host's own stage 1 for the page's HVA
    host_mapped: np.ndarray  #: bool: the host has a page there
    host_writable: np.ndarray  #: bool: and its mapping lets it be written (Linux's permission, not the hardware's)
    written: np.ndarray  #: bool: a guest was told to write it since its memslot began to log, or the log was read
    is_ram: np.ndarray  #: bool: ``pa`` is RAM
    slots: Sequence[Memslot]
    windows: Sequence[Window]
    format: Format

    @cached_property
    def shown(self) -> np.ndarray:
        """Pages of the board's devices where a window shows them: there a memslot does not count."""
        found = np.zeros(len(self.ipa), dtype=bool)
        for window in self.windows:
            offset = self.ipa - np.uint64(window.ipa)  # wraps for what lies before
            found |= (offset < np.uint64(window.size)) & (self.pa == np.uint64(window.pa) + offset)
        return found

    @cached_property
    def _of_slots(self) -> np.ndarray:
        return (self.slot >= 0) & ~self.shown

    @property
    def outside(self) -> np.ndarray:
        """In no memslot: nothing may be mapped."""
        return (self.slot < 0) & ~self.shown

    @property
    def wrong_frame(self) -> np.ndarray:
        """Not the frame that the host has for that address, or the host has none."""
        return self._of_slots & (self.host_pa & ~_OFFSET != self.pa)

    def writable_despite(self, limit: Limit) -> np.ndarray:
        """Writable, and may not be for this reason. (Where the host has no page at all, the frame is wrong.)"""
        return self._writable & self._limited(limit)

    @cached_property
    def _writable(self) -> np.ndarray:
        return self._of_slots & self.host_mapped & d.s2_writable(self.desc)

    def _limited(self, limit: Limit) -> np.ndarray:
        match limit:
            case Limit.READONLY:
                return self._in_slots_that(lambda slot: slot.readonly)
            case Limit.CLEAN:
                return self._in_slots_that(lambda slot: slot.logging) & ~self.written
        return ~self.host_writable

    def _in_slots_that(self, condition: Callable[[Memslot], bool]) -> np.ndarray:
        return np.array([condition(slot) for slot in self.slots] or [False])[self.slot]

    @property
    def executable_device(self) -> np.ndarray:
        """Not RAM, and EL1 or EL0 may execute it."""
        executable = d.s2_executable(self.desc, fmt=self.format) | d.s2_executable(self.desc, el0=True, fmt=self.format)
        return (self._of_slots & self.host_mapped | self.shown) & ~self.is_ram & executable

    @property
    def ram_of_other_type(self) -> np.ndarray:
        """RAM that is not normal write-back, inner shareable memory (PAGE_S2)."""
        normal = (d.MEMATTR.of(self.desc) == self.format.normal) & (d.SH.of(self.desc) == d.Shareability.INNER)
        return self.is_ram & ~normal

    @property
    def device_of_other_type(self) -> np.ndarray:
        """Not RAM, and not of a device type (PAGE_S2_DEVICE)."""
        return ~self.is_ram & ~self.format.is_device(d.MEMATTR.of(self.desc))
