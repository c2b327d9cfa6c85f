"""How many table pages a mapping needs, and that a vCPU's cache of them never runs out while the lock is held.

virt/kvm/arm/mmu.c (5.4) mmu_topup_memory_cache, KVM_NR_MEM_OBJS 40; later kvm_mmu_topup_memory_cache. With a 40-bit IPA
space, a page far from all others needs one table of level 2 and one of level 3.
"""

import numpy as np
import pytest
from arm_kvm.vocabulary import BLOCK, GIB, PAGE, memcache, tables

IPA = 0x8000_0000
pytestmark = pytest.mark.native


@pytest.fixture
def pages(stage2):
    """``pages(vm)``: how many table pages the VM has, including the root's."""
    return lambda vm: len(stage2(vm).tables.pages)


@pytest.mark.parametrize("where", [GIB, BLOCK, PAGE], ids=["another GiB", "another block", "another page"])
def test_tables_that_a_page_needs(vm, stage2, where):
    """The second page shares no table but the root, the level 2 table, or both tables with the first."""
    vm.add_memory(IPA, PAGE)
    vm.add_memory(IPA + where, PAGE)
    vm.guest.write(IPA, 1)
    before = stage2(vm)
    vm.guest.write(IPA + where, 1)
    after, regime = stage2(vm), before.regime
    both = np.array([IPA, IPA + where], dtype=np.uint64)
    more = tables.needed(regime, both) - tables.needed(regime, both[:1])
    assert after.spare_tables == before.spare_tables == 0
    assert len(after.tables.pages) - len(before.tables.pages) == more


def test_a_block_needs_no_table_of_its_own(vm, pages):
    vm.add_memory(IPA, 2 * BLOCK, align=BLOCK, huge=True)
    vm.guest.write(IPA, 1)
    before = pages(vm)
    vm.guest.write(IPA + BLOCK, 1)
    assert pages(vm) == before


def test_no_mapping_needs_more_than_the_model_says(vm, stage2, pages):
    """The worst case is the number to which KVM tops up its cache."""
    vm.add_memory(IPA, PAGE)
    vm.guest.ping()
    before = pages(vm)
    vm.guest.write(IPA, 1)
    assert pages(vm) - before == tables.most_for_one_page(stage2(vm).regime) == 2


def test_more_tables_than_the_cache_holds(vm, pages, stage2):
    """80 blocks, each with a table of its own: the cache of 40 runs dry and is refilled while the guest runs."""
    count = 2 * memcache.CAPACITY
    memory = vm.add_memory(IPA, count * BLOCK)
    vm.guest.ping()
    before = pages(vm)
    vm.guest.fill(IPA, count, stride=BLOCK)
    assert vm.guest.check(IPA, count, stride=BLOCK) == []
    assert pages(vm) == before + 1 + count
    assert len(stage2(vm).mapped(IPA, memory.size)) == count


@pytest.mark.parametrize("used", range(memcache.CAPACITY - 5, memcache.CAPACITY + 1))
def test_two_tables_from_what_is_left_of_the_cache(vm, stage2, used):
    """The last fault needs two tables when the earlier ones have left about that many in the cache.

    KVM must top the cache up before it takes the lock.
    """
    vm.add_memory(IPA, used * BLOCK)
    vm.add_memory(IPA + GIB, PAGE)
    vm.guest.fill(IPA, used, stride=BLOCK)
    vm.guest.write(IPA + GIB, 1)
    assert stage2(vm).leaf(IPA + GIB).writable


@pytest.mark.vcpus(2, pinned=True)
def test_two_vcpus_with_a_cache_each(vm, pages):
    """Both vCPUs fault in the same far-apart places at once; no table is allocated twice."""
    vm.add_memory(IPA, 80 * BLOCK)
    vm.guest.ping()
    before = pages(vm)
    for number, guest in enumerate(vm.guests):
        guest.start_fill(IPA + 4 * number, 80, stride=BLOCK)
    for guest in vm.guests:
        guest.finish()
    assert pages(vm) == before + 1 + 80
