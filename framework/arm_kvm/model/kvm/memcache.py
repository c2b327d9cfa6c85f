"""The cache of page-table pages: filled before the lock is taken, so that nothing is allocated under it.

Sources: Linux 5.4 virt/kvm/arm/mmu.c (mmu_topup_memory_cache, mmu_memory_cache_alloc, kvm_phys_addr_ioremap,
user_mem_abort); since 5.9 virt/kvm/kvm_main.c (kvm_mmu_topup_memory_cache, kvm_mmu_memory_cache_alloc).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from arm_kvm.model.arch.granule import LAST_LEVEL
from arm_kvm.model.arch.regime import Regime

#: KVM_NR_MEM_OBJS (5.4, arm and arm64); KVM_ARCH_NR_OBJS_PER_MEMORY_CACHE since 5.9.
CAPACITY = 40


class OutOfMemory(Exception):
    """The page allocator has nothing: the ioctl, or the fault, answers ENOMEM."""


class AllocatedUnderLock(AssertionError):
    """Memory was asked for while kvm->mmu_lock was held: it might sleep."""


class CacheEmpty(AssertionError):
    """A table page was wanted under the lock and none was left: BUG_ON in 5.4.

    Since 5.8 a WARN and an atomic allocation.
    """


class MmuLock:
    """kvm->mmu_lock, as far as the cache is concerned: held or not."""

    def __init__(self) -> None:
        self.held = False

    @contextmanager
    def hold(self) -> Iterator[None]:
        if self.held:
            raise AssertionError("mmu_lock is not recursive")
        self.held = True
        try:
            yield
        finally:
            self.held = False


def pages_needed(regime: Regime) -> int:
    """kvm_mmu_cache_min_pages: the most table pages that one mapping needs, one for each level below the root."""
    return LAST_LEVEL - regime.start_level


@dataclass
class MemoryCache:
    """One vCPU's cache.

    ``page_allocator`` returns the physical address of a zeroed page, or None when memory is short.
    """

    lock: MmuLock
    page_allocator: Callable[[], int | None]
    capacity: int = CAPACITY
    strict: bool = False  #: 5.4: one page that cannot be had fails the top-up, however many are there by then
    pages: list[int] = field(default_factory=list)

    def top_up(self, least: int) -> None:
        """Fill to capacity when fewer than ``least`` pages are there.

        Raises OutOfMemory when ``least`` (5.4: every page up to the capacity) cannot be had; what was got stays.
        Raises AllocatedUnderLock.
        """
        if self.lock.held:
            raise AllocatedUnderLock("the cache is topped up before the lock is taken")
        if not least <= self.capacity:
            raise ValueError(f"{least} pages do not fit in a cache of {self.capacity}")
        if len(self.pages) >= least:
            return
        while len(self.pages) < self.capacity:
            page = self.page_allocator()
            if page is None and self.strict:
                raise OutOfMemory(f"page {len(self.pages) + 1} of {self.capacity} page-table pages")
            if page is None:
                break
            self.pages.append(page)
        if len(self.pages) < least:
            raise OutOfMemory(f"{len(self.pages)} of {least} page-table pages")

    def take(self) -> int:
        """A page for a table, under the lock or not. Raises CacheEmpty."""
        if not self.pages:
            raise CacheEmpty("the cache holds no page: it was not topped up for what is mapped")
        return self.pages.pop()

    def drain(self) -> list[int]:
        """Give all pages back (the vCPU is destroyed)."""
        pages, self.pages = self.pages, []
        return pages
