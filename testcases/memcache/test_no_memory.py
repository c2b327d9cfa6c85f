"""Allocation failures, one at a time: the N-th allocation of a call fails, for every N there is.

Fault injection of the kernel (fail-nth), configured by the project's own fragments. KVM_RUN answers ENOMEM; nothing is
mapped half; the next run succeeds (virt/kvm/arm/mmu.c user_mem_abort, kvm_mmu_topup_memory_cache).
"""

import errno
from functools import partial

import pytest
from arm_kvm.host.facilities import free_memory
from arm_kvm.model.kvm.memcache import MemoryCache
from arm_kvm.model.kvm.memslots import Memslot, SlotFlags
from arm_kvm.model.kvm.tables import most_for_one_page
from arm_kvm.vmm import injection
from arm_kvm.vmm.injection import every_failure
from arm_kvm.vmm.memory import BLOCK, PAGE

IPA = 0x8000_0000
MOST = 200  #: allocations of one call that are tried
pytestmark = [pytest.mark.native, pytest.mark.vcpus(2), pytest.mark.needs("fail-nth")]


@pytest.fixture
def vm(vm):
    """A VM whose second vCPU has an empty cache, and nothing to fault on but what it is told to touch."""
    vm.guest.write(vm.vcpus[1].mailbox, 0)
    return vm


@pytest.fixture
def store_failing(vm):
    """``store_failing(n)``: vCPU 1 stores to IPA, and the n-th allocation of its KVM_RUN fails, if there is one."""
    return partial(injection.store, vm, 1, IPA)


def test_table_pages_of_a_fault(vm, host, stage2, store_failing):
    """A far-apart page with an empty cache: the n-th try fails at its n-th page, and keeps those before it."""
    vm.add_memory(IPA, PAGE).write(0, b"host")  # the page itself is there: only KVM allocates
    least, tables = most_for_one_page(stage2(vm).regime), len(stage2(vm).tables.pages)
    cache = MemoryCache(host.kernel_version)
    for n in range(1, MOST):
        foretold, made = cache.top_up(least, available=n - 1), store_failing(n)
        assert (made.injected, made.errno) == (foretold.short, errno.ENOMEM if foretold.refused else 0)
        if not foretold.refused:
            break
        now = stage2(vm)
        assert now.leaf(IPA) is None and len(now.tables.pages) == tables
    assert n > least  # it was refused for want of each of them
    assert stage2(vm).leaf(IPA).writable
    assert vm.guest.read(IPA) == IPA  # what fill stores


def test_run_after_a_failure_succeeds(vm, store_failing):
    vm.add_memory(IPA, PAGE).write(0, b"host")
    made = store_failing(1)
    assert (made.injected, made.errno) == (True, errno.ENOMEM)
    vm.guests[1].write(IPA, 7)
    assert vm.guest.read(IPA) == 7


def test_a_block_or_nothing(vm, stage2, store_failing):
    """A huge page whose table cannot be had is not mapped in part."""
    vm.add_memory(IPA, BLOCK, align=BLOCK, huge=True).write(0, b"host")
    made = store_failing(1)
    assert (made.injected, made.errno) == (True, errno.ENOMEM)
    assert stage2(vm).mapped(IPA, BLOCK) == []
    vm.guests[1].write(IPA, 7)
    assert stage2(vm).leaf(IPA).is_block


def test_page_of_the_host(vm, stage2, store_failing):
    """Nothing behind the address yet, so that the host allocates, too: a run that fails has mapped nothing."""
    vm.add_memory(IPA, PAGE, align=BLOCK)
    vm.guests[1].ping()

    def attempt(n):
        made = store_failing(n)
        assert made.errno == 0 or stage2(vm).leaf(IPA) is None
        return made

    answers = every_failure(attempt)
    # EFAULT: the page itself could not be had (hva_to_pfn: KVM_PFN_ERR_FAULT)
    assert errno.ENOMEM in answers and set(answers) <= {0, errno.ENOMEM, errno.EFAULT}
    assert stage2(vm).leaf(IPA).writable


def test_creation_of_a_vm(host, vm):
    """KVM_CREATE_VM, its root table included: refused as a whole each time, and made in the end."""
    answers = every_failure(partial(injection.create_vm, host.agent))
    assert errno.ENOMEM in answers and set(answers) <= {0, errno.ENOMEM}


def test_creation_of_a_memslot(vm):
    """KVM_SET_USER_MEMORY_REGION: no memslot comes of a failure."""
    memory = vm.memory(64 * PAGE)
    slot = Memslot(7, IPA, memory.size, memory.hva, SlotFlags.LOG_DIRTY_PAGES)

    def attempt(n):
        made = injection.set_memslot(vm, slot, n)
        if made.errno:  # then nothing is there
            vm.exits.clear()
            vm.guest.read(IPA)
            assert [exit_.ipa for exit_ in vm.exits] == [IPA]
        return made

    answers = every_failure(attempt)
    assert errno.ENOMEM in answers and set(answers) <= {0, errno.ENOMEM}


def test_failures_leave_no_table_behind(host, make_vm):
    """200 VMs whose creation failed somewhere: less than a page each is missing afterwards."""
    make_vm()  # the process's first VM registers its notifier
    attempt = partial(injection.create_vm, host.agent)
    every_failure(attempt)
    before = free_memory(host)
    failures = 0
    while failures < 200:
        failures += len(every_failure(attempt))
    assert before - free_memory(host) < failures * PAGE
