"""Dirty logging: switched on, written to, read, switched off.

KVM_GET_DIRTY_LOG returns the pages written since the last call and makes them clean. A clean page must not be writable
in stage 2, or the next write to it would be missed.
"""

import pytest
from arm_kvm.vocabulary import PAGE, SlotFlags

IPA = 0x8000_0000
PAGES = 64


@pytest.fixture
def logged(vm):
    """64 pages of guest memory, all written before logging is switched on."""
    memory = vm.add_memory(IPA, PAGES * PAGE)
    vm.guest.fill(IPA, PAGES)
    vm.set_flags(IPA, SlotFlags.LOG_DIRTY_PAGES)
    return memory


def writable(stage2, vm):
    """The IPAs of the logged memory's writable leaves."""
    return [ipa for ipa in stage2(vm).mapped(IPA, PAGES * PAGE) if stage2(vm).leaf(ipa).writable]


def test_switching_on_makes_every_page_unwritable(vm, logged, stage2):
    assert writable(stage2, vm) == []


def test_log_lists_exactly_the_pages_written(vm, logged, stage2):
    vm.dirty_pages(IPA)
    chosen = [IPA + i * PAGE for i in (0, 7, 8, 31, 63)]
    for ipa in chosen:
        vm.guest.write(ipa, 1)
    assert writable(stage2, vm) == chosen
    assert vm.dirty_pages(IPA) == chosen


def test_reading_the_log_makes_the_pages_clean(vm, logged, stage2):
    vm.guest.write(IPA + 3 * PAGE, 1)
    assert IPA + 3 * PAGE in vm.dirty_pages(IPA)
    assert writable(stage2, vm) == []
    assert vm.dirty_pages(IPA) == []


def test_page_written_again_is_dirty_again(vm, logged):
    for _ in range(3):
        vm.guest.write(IPA + 9 * PAGE, 1)
        assert vm.dirty_pages(IPA) == [IPA + 9 * PAGE]


def test_reads_are_not_dirty(vm, logged, stage2):
    vm.dirty_pages(IPA)
    assert vm.guest.check(IPA, PAGES) == []
    assert vm.dirty_pages(IPA) == []
    assert writable(stage2, vm) == []


def test_a_logged_write_faults_once_per_page_and_log(vm, logged, trace):
    vm.dirty_pages(IPA)
    with trace("kvm:kvm_guest_fault") as events:
        vm.guest.fill(IPA, PAGES)
        vm.guest.fill(IPA, PAGES, seed=1)
    assert len([e for e in events if IPA <= e.fields["ipa"] < IPA + PAGES * PAGE]) == PAGES


def test_switching_off_lets_the_guest_write_freely(vm, logged, stage2):
    vm.set_flags(IPA, SlotFlags.NONE)
    vm.guest.fill(IPA, PAGES, seed=2)
    assert len(writable(stage2, vm)) == PAGES
    assert vm.guest.check(IPA, PAGES, seed=2) == []


def test_memory_first_touched_while_logging(vm, stage2):
    vm.add_memory(IPA, PAGES * PAGE, flags=SlotFlags.LOG_DIRTY_PAGES)
    vm.guest.read(IPA)
    vm.guest.write(IPA + PAGE, 1)
    assert writable(stage2, vm) == [IPA + PAGE]
    assert vm.dirty_pages(IPA) == [IPA + PAGE]


def test_executing_a_clean_page_leaves_it_clean(vm, logged, stage2):
    """A permission fault for execution adds that permission only: the page stays clean."""
    logged.write(0, vm.guest.ret)
    vm.dirty_pages(IPA)
    vm.guest.execute(IPA)
    leaf = stage2(vm).leaf(IPA)
    assert leaf.executable and not leaf.writable
    assert vm.dirty_pages(IPA) == []


def test_writing_a_clean_page_does_not_make_it_executable(vm, logged, stage2, host):
    vm.guest.write(IPA, 1)
    leaf = stage2(vm).leaf(IPA)
    assert leaf.writable and leaf.executable == host.needs_no_icache_maintenance
