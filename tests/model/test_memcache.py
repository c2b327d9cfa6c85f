"""The page-table memory cache: filled before the lock, never empty under it, honest when memory is short."""

import pytest
from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch import regime
from arm_kvm.model.kvm import memcache
from arm_kvm.model.kvm.memcache import AllocatedUnderLock, CacheEmpty, MemoryCache, MmuLock, OutOfMemory
from arm_kvm.model.kvm.tables import Stage2Tables
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = 0x4000_0000
REGIMES = [
    regime.stage2_armv7(ROOT, 0x80003558),
    regime.stage2_armv8(ROOT, 5 << 16 | 2 << 6 | 64 - 48),
    regime.stage2_armv8(ROOT, 5 << 16 | 0 << 6 | 64 - 34),
]


def make(pages=10**6, capacity=memcache.CAPACITY, strict=False):
    stock = iter(range(ROOT + 0x100_0000, ROOT + 0x100_0000 + pages * 0x1000, 0x1000))
    return MemoryCache(MmuLock(), lambda: next(stock, None), capacity, strict)


@settings(deadline=None)
@given(st.sampled_from(REGIMES), st.lists(st.integers(0, (1 << 34) - 1), max_size=30))
def test_never_empty_under_the_lock(r, ipas):
    """Far-apart addresses need a table at every level: what was had before the lock is enough, and just so."""
    cache = make(capacity=memcache.pages_needed(r))
    tables = Stage2Tables(r, cache.take)
    for ipa in ipas:
        cache.top_up(memcache.pages_needed(r))
        with cache.lock.hold():
            tables.map(ipa & -0x1000, 3, d.LeafFields(0))


@pytest.mark.parametrize(("r", "pages"), [(REGIMES[0], 2), (REGIMES[1], 3), (REGIMES[2], 1)])
def test_pages_needed_is_the_depth_below_the_root(r, pages):
    assert memcache.pages_needed(r) == pages
    cache = make()
    cache.top_up(pages)
    before = len(cache.pages)
    Stage2Tables(r, cache.take).map(0, 3, d.LeafFields(0))
    assert before - len(cache.pages) == pages


def test_one_page_less_is_caught():
    cache = make(capacity=1)
    cache.top_up(1)
    with pytest.raises(CacheEmpty, match="not topped up"):
        Stage2Tables(REGIMES[0], cache.take).map(0, 3, d.LeafFields(0))


def test_an_allocation_under_the_lock_is_caught():
    cache = make()
    with cache.lock.hold(), pytest.raises(AllocatedUnderLock):
        cache.top_up(2)
    assert not cache.lock.held and cache.pages == []


def test_the_lock_is_not_recursive():
    lock = MmuLock()
    with lock.hold(), pytest.raises(AssertionError, match="recursive"), lock.hold():
        pass


def test_enough_is_enough():
    cache = make()
    cache.top_up(2)
    assert len(cache.pages) == memcache.CAPACITY
    for _ in range(memcache.CAPACITY - 2):
        cache.take()
    cache.top_up(2)
    assert len(cache.pages) == 2


@pytest.mark.parametrize("stock", range(4))
def test_exhaustion(stock):
    """With fewer than the least, ENOMEM, and what was got stays; with the least, a fault can go on."""
    cache = make(pages=stock)
    if stock < 2:
        with pytest.raises(OutOfMemory, match=f"{stock} of 2"):
            cache.top_up(2)
    else:
        cache.top_up(2)
    assert len(cache.drain()) == stock and cache.pages == []


def test_the_first_kernels_gave_up_with_enough_in_hand():
    """5.4: mmu_topup_memory_cache() answers ENOMEM at the first page that cannot be had."""
    cache = make(pages=3, strict=True)
    with pytest.raises(OutOfMemory, match="page 4 of 40"):
        cache.top_up(2)
    cache.top_up(2)  # the next run finds what was got


def test_more_than_fits_is_a_mistake():
    with pytest.raises(ValueError, match="do not fit"):
        make(capacity=2).top_up(3)
