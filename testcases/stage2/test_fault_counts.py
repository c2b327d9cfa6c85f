"""Touching N pages takes N faults and leaves N leaves in the tables, no more and no fewer.

The faults are counted in the kernel's own trace (kvm:kvm_guest_fault), the leaves, independently, in the board's RAM.
"""

import numpy as np
import pytest
from arm_kvm.vocabulary import GIB, PAGE, tables

IPA = 0x8000_0000


def faults(events, ipa, size):
    """The IPAs of the stage-2 faults that the kernel traced in ``[ipa, ipa + size)``."""
    return [e.fields["ipa"] for e in events if e.name == "kvm_guest_fault" and ipa <= e.fields["ipa"] < ipa + size]


@pytest.mark.parametrize("pages", [1, 17, 513])
def test_each_page_written_faults_once(vm, stage2, trace, pages):
    memory = vm.add_memory(IPA, 0x40_0000)
    vm.guest.ping()
    with trace("kvm:kvm_guest_fault") as events:
        vm.guest.fill(IPA, pages, stride=PAGE)
    expected = [IPA + i * PAGE for i in range(pages)]
    assert sorted(faults(events, IPA, memory.size)) == expected
    assert stage2(vm).mapped(IPA, memory.size) == expected


def test_second_access_does_not_fault(vm, stage2, trace):
    memory = vm.add_memory(IPA, 0x10_0000)
    vm.guest.fill(IPA, 32)
    with trace("kvm:kvm_guest_fault") as events:
        assert vm.guest.check(IPA, 32) == []
        vm.guest.fill(IPA, 32, seed=5)
    assert faults(events, IPA, memory.size) == []
    assert len(stage2(vm).mapped(IPA, memory.size)) == 32


def test_read_then_write_faults_no_more_than_the_host_changes(vm, stage2, trace):
    """One fault if the read maps a writable frame; otherwise a second for the write.

    A third is allowed where breaking copy on write under the fault calls KVM's own notifier: the fault then starts over
    (mmu_notifier_retry).
    """
    vm.add_memory(IPA, PAGE)
    vm.guest.ping()
    with trace("kvm:kvm_guest_fault") as events:
        vm.guest.read(IPA)
        was_writable = stage2(vm).leaf(IPA).writable
        vm.guest.write(IPA, 1)
    seen = faults(events, IPA, PAGE)
    assert set(seen) == {IPA} and len(seen) in ((1,) if was_writable else (2, 3))


def test_far_apart_pages_need_tables_of_their_own(vm, stage2):
    """Each GiB needs a level 2 and a level 3 table; pages in the same 2 MiB share both."""
    vm.guest.ping()
    before = len(stage2(vm).tables.pages)
    for gib in (2, 3):
        vm.add_memory(gib * GIB, PAGE)
        vm.guest.write(gib * GIB, gib)
    far = tables.needed(stage2(vm).regime, np.array([2 * GIB, 3 * GIB], dtype=np.uint64))
    assert len(stage2(vm).tables.pages) == before + far and stage2(vm).spare_tables == 0
