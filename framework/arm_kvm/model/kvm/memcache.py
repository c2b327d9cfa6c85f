"""A vCPU's cache of table pages, filled before kvm->mmu_lock is taken so that nothing is allocated under the lock.

Sources: Linux 5.4 virt/kvm/arm/mmu.c (mmu_topup_memory_cache, mmu_memory_cache_alloc, user_mem_abort); since 5.9
virt/kvm/kvm_main.c (kvm_mmu_topup_memory_cache, kvm_mmu_memory_cache_alloc).
"""

from __future__ import annotations

from dataclasses import dataclass

#: KVM_NR_MEM_OBJS (5.4, arm and arm64); KVM_ARCH_NR_OBJS_PER_MEMORY_CACHE since 5.9.
CAPACITY = 40
#: The first kernel, (major, minor), whose top-up succeeds with the minimum if it cannot fill the cache.
MINIMUM_SUFFICES = (5, 9)


@dataclass(frozen=True)
class TopUp:
    """The result of a top-up. ``short``: an allocation failed; ``refused``: the top-up and KVM_RUN return ENOMEM."""

    short: bool
    refused: bool


@dataclass
class MemoryCache:
    """The cache of one vCPU on a host kernel (major, minor), and the number of pages in it."""

    kernel: tuple[int, int]
    pages: int = 0

    def top_up(self, least: int, available: int) -> TopUp:
        """Fill the cache if it holds fewer than ``least`` pages. The allocator fails after ``available`` pages.

        Pages that were allocated stay in the cache even if the top-up fails. Raises ValueError if ``least`` is more
        than the capacity.
        """
        if least > CAPACITY:
            raise ValueError(f"{least} pages do not fit in a cache of {CAPACITY}")
        if self.pages >= least:
            return TopUp(short=False, refused=False)
        short = available < CAPACITY - self.pages
        self.pages = min(CAPACITY, self.pages + available)
        enough = self.pages >= least and self.kernel >= MINIMUM_SUFFICES
        return TopUp(short, refused=short and not enough)
