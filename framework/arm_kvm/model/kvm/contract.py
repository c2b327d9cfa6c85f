"""Safety, page by page: what a stage-2 leaf may be, given memslot, dirty log and the host's own mapping.

All arrays have one element per 4 KiB page that stage 2 maps. Descriptors are those of stage 2, addresses in bytes.

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
from numpy.typing import NDArray

from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch.descriptors import Format
from arm_kvm.model.arch.granule import KIB4
from arm_kvm.model.kvm.memslots import Memslot, Window

_OFFSET = np.uint64(KIB4.size - 1)


class Limit(Enum):
    """Why a page may not be writable. The value is for reports."""

    READONLY = "the memslot is read-only"
    CLEAN = "clean in the dirty log"
    HOST = "the host's own mapping is read-only"


@dataclass(frozen=True)
class MappedPages:
    """The pages that one VM's stage 2 maps, and everything that decides what their leaves may be, read at one moment.

    Each mask that a property returns selects the pages that break one rule.
    """

    ipa: NDArray[np.uint64]
    pa: NDArray[np.uint64]  #: the output address of stage 2
    desc: NDArray[np.uint64]  #: the stage-2 leaf
    slot: NDArray[np.int64]  #: index of the memslot in ``slots``, -1 outside all (:func:`memslots.covering`)
    host_pa: NDArray[np.uint64]  #: the page's HVA, translated by the host's own stage 1
    host_mapped: NDArray[np.bool_]  #: the host maps a page there
    host_writable: NDArray[np.bool_]  #: and the mapping is writable (Linux's permission, not the hardware's)
    written: NDArray[np.bool_]  #: a guest may have written it since its memslot began to log, or the log was last read
    is_ram: NDArray[np.bool_]  #: ``pa`` is RAM
    slots: Sequence[Memslot]
    windows: Sequence[Window]
    format: Format

    @cached_property
    def shown(self) -> NDArray[np.bool_]:
        """Pages of the board's devices that are mapped by a window. Memslots do not apply to them."""
        found = np.zeros(len(self.ipa), dtype=bool)
        for window in self.windows:
            offset = self.ipa - np.uint64(window.ipa)  # wraps around for IPAs below the window
            found |= (offset < np.uint64(window.size)) & (self.pa == np.uint64(window.pa) + offset)
        return found

    @cached_property
    def _of_slots(self) -> NDArray[np.bool_]:
        return (self.slot >= 0) & ~self.shown

    @property
    def outside(self) -> NDArray[np.bool_]:
        """Pages in no memslot, where nothing may be mapped."""
        return (self.slot < 0) & ~self.shown

    @property
    def wrong_frame(self) -> NDArray[np.bool_]:
        """Pages whose frame is not the one that the host maps at the HVA, or where the host maps none."""
        other: NDArray[np.bool_] = self.host_pa & ~_OFFSET != self.pa
        return self._of_slots & other

    def writable_despite(self, limit: Limit) -> NDArray[np.bool_]:
        """Pages that are writable although this limit forbids it. (Without a page of the host, it is a wrong frame.)"""
        return self._writable & self._limited(limit)

    @cached_property
    def _writable(self) -> NDArray[np.bool_]:
        return self._of_slots & self.host_mapped & d.s2_writable(self.desc)

    def _limited(self, limit: Limit) -> NDArray[np.bool_]:
        match limit:
            case Limit.READONLY:
                return self._in_slots_that(lambda slot: slot.readonly)
            case Limit.CLEAN:
                return self._in_slots_that(lambda slot: slot.logging) & ~self.written
        return ~self.host_writable

    def _in_slots_that(self, condition: Callable[[Memslot], bool]) -> NDArray[np.bool_]:
        by_slot: NDArray[np.bool_] = np.array([condition(slot) for slot in self.slots] or [False], dtype=np.bool_)
        return by_slot[self.slot]

    @property
    def executable_device(self) -> NDArray[np.bool_]:
        """Pages that are not RAM, and that EL1 or EL0 may execute."""
        executable = d.s2_executable(self.desc, fmt=self.format) | d.s2_executable(self.desc, el0=True, fmt=self.format)
        return (self._of_slots & self.host_mapped | self.shown) & ~self.is_ram & executable

    @property
    def ram_of_other_type(self) -> NDArray[np.bool_]:
        """Pages of RAM that are not mapped as normal write-back, inner shareable memory (PAGE_S2)."""
        normal: NDArray[np.bool_] = (d.MEMATTR.of(self.desc) == self.format.normal) & (
            d.SH.of(self.desc) == d.Shareability.INNER
        )
        return self.is_ram & ~normal

    @property
    def device_of_other_type(self) -> NDArray[np.bool_]:
        """Pages that are not RAM, and not mapped with a device type (PAGE_S2_DEVICE)."""
        return ~self.is_ram & ~self.format.is_device(d.MEMATTR.of(self.desc))
