"""Allocation failures, one at a time: the n-th allocation of a call fails, for every n.

The kernel's fault injection (fail-nth) makes them fail; the lab's own kernel fragments enable it. KVM_RUN answers
ENOMEM, no mapping is left half made, and the next run succeeds (virt/kvm/arm/mmu.c user_mem_abort,
kvm_mmu_topup_memory_cache).
"""

import errno
from functools import partial

import pytest
from arm_kvm.vocabulary import BLOCK, PAGE, Memslot, SlotFlags, facilities, injection, memcache, tables

IPA = 0x8000_0000
MOST = 200  #: the highest n that is tried
pytestmark = [pytest.mark.native, pytest.mark.vcpus(2), pytest.mark.needs("fail-nth")]


@pytest.fixture
def vm(vm):
    """A VM whose second vCPU has an empty cache, and faults on nothing but the page that it stores to."""
    vm.guest.write(vm.vcpus[1].mailbox, 0)
    return vm


@pytest.fixture
def store_failing(vm):
    """``store_failing(n)``: vCPU 1 stores to IPA, and the n-th allocation of its KVM_RUN fails, if there is one."""
    return partial(injection.store, vm, 1, IPA)


def test_table_pages_of_a_fault(vm, host, stage2, store_failing):
    """A far-apart page and an empty cache: the n-th try fails at its n-th table page.

    The cache keeps the pages before it.
    """
    vm.add_memory(IPA, PAGE).write(0, b"host")  # the host has the page: only KVM allocates
    before = stage2(vm)
    least = tables.most_for_one_page(before.regime)
    cache = memcache.MemoryCache(host.kernel_version)
    for n in range(1, MOST):
        foretold, made = cache.top_up(least, available=n - 1), store_failing(n)
        assert (made.injected, made.errno) == (foretold.short, errno.ENOMEM if foretold.refused else 0)
        if not foretold.refused:
            break
        now = stage2(vm)
        assert now.leaf(IPA) is None and len(now.tables.pages) == len(before.tables.pages)
    assert n > least, "the run did not fail once for each table page that it needs"
    assert stage2(vm).leaf(IPA).writable
    assert vm.guest.read(IPA) == IPA  # the word that the store writes


def test_run_after_a_failure_succeeds(vm, store_failing):
    vm.add_memory(IPA, PAGE).write(0, b"host")
    made = store_failing(1)
    assert (made.injected, made.errno) == (True, errno.ENOMEM)
    vm.guests[1].write(IPA, 7)
    assert vm.guest.read(IPA) == 7


def test_a_block_or_nothing(vm, stage2, store_failing):
    """A huge page for which no table page can be allocated is not mapped in part."""
    vm.add_memory(IPA, BLOCK, align=BLOCK, huge=True).write(0, b"host")
    made = store_failing(1)
    assert (made.injected, made.errno) == (True, errno.ENOMEM)
    assert stage2(vm).mapped(IPA, BLOCK) == []
    vm.guests[1].write(IPA, 7)
    assert stage2(vm).leaf(IPA).is_block


def test_page_of_the_host(vm, stage2, store_failing):
    """The HVA has no page yet, so the host allocates, too: a run that fails has mapped nothing."""
    vm.add_memory(IPA, PAGE, align=BLOCK)
    vm.guests[1].ping()

    def attempt(n):
        made = store_failing(n)
        assert made.errno == 0 or stage2(vm).leaf(IPA) is None
        return made

    answers = injection.every_failure(attempt)
    # EFAULT: the host's own page could not be allocated (hva_to_pfn: KVM_PFN_ERR_FAULT)
    assert errno.ENOMEM in answers and set(answers) <= {0, errno.ENOMEM, errno.EFAULT}
    assert stage2(vm).leaf(IPA).writable


def test_creation_of_a_vm(host, vm):
    """KVM_CREATE_VM, which allocates the root table, fails as a whole each time, and succeeds in the end."""
    answers = injection.every_failure(partial(injection.create_vm, host.agent))
    assert errno.ENOMEM in answers and set(answers) <= {0, errno.ENOMEM}


def test_creation_of_a_memslot(vm):
    """A KVM_SET_USER_MEMORY_REGION that fails creates no memslot."""
    memory = vm.memory(64 * PAGE)
    slot = Memslot(7, IPA, memory.size, memory.hva, SlotFlags.LOG_DIRTY_PAGES)

    def attempt(n):
        made = injection.set_memslot(vm, slot, n)
        if made.errno:  # no memslot: the access is MMIO
            vm.exits.clear()
            vm.guest.read(IPA)
            assert [exit_.ipa for exit_ in vm.exits] == [IPA]
        return made

    answers = injection.every_failure(attempt)
    assert errno.ENOMEM in answers and set(answers) <= {0, errno.ENOMEM}


def test_failures_leave_no_table_behind(host, make_vm):
    """200 failures to create a VM leak less than a page each."""
    make_vm()  # the first VM of a process registers its notifier
    attempt = partial(injection.create_vm, host.agent)
    injection.every_failure(attempt)
    before = facilities.free_memory(host)
    failures = 0
    while failures < 200:
        failures += len(injection.every_failure(attempt))
    assert before - facilities.free_memory(host) < failures * PAGE
