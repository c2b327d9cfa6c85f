"""The page-table memory cache, filled before the lock is taken: contents and result after a shortage of memory."""

import pytest
from arm_kvm.model.kvm.memcache import CAPACITY, MemoryCache, TopUp

FINE, SHORT, REFUSED = TopUp(False, False), TopUp(True, False), TopUp(True, True)


def test_enough_is_enough():
    cache = MemoryCache((5, 4))
    assert cache.top_up(2, available=1000) == FINE and cache.pages == CAPACITY
    cache.pages = 2
    assert cache.top_up(2, available=0) == FINE and cache.pages == 2
    assert cache.top_up(3, available=CAPACITY - 2) == FINE and cache.pages == CAPACITY


@pytest.mark.parametrize("stock", range(4))
def test_exhaustion(stock):
    """With fewer pages than the minimum, ENOMEM, and they stay; with the minimum, the fault proceeds."""
    cache = MemoryCache((5, 9))
    assert cache.top_up(2, available=stock) == (REFUSED if stock < 2 else SHORT)
    assert cache.pages == stock


def test_old_kernels_fail_with_the_minimum_in_the_cache():
    """mmu_topup_memory_cache() returns ENOMEM at the first page that cannot be allocated."""
    cache = MemoryCache((5, 8))
    assert cache.top_up(2, available=3) == REFUSED
    assert cache.top_up(2, available=0) == FINE  # the next run finds what was allocated


def test_more_than_fits_is_a_mistake():
    with pytest.raises(ValueError, match="do not fit"):
        MemoryCache((5, 4)).top_up(CAPACITY + 1, available=0)
