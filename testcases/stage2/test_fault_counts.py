"""N pages touched give N faults in the kernel's trace and N leaves in the table: no more, no fewer.

Counted in the kernel's own trace (kvm:kvm_guest_fault) and in the board's RAM, independently.
"""

import pytest
from arm_kvm.model.kvm import tables

IPA = 0x8000_0000
PAGE = 0x1000


def faults(events, ipa, size):
    """IPAs of the stage-2 faults the kernel traced in a range."""
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
    """Once if the read gave a writable frame. Else again for the write; and once more if breaking copy on
    write called KVM's own notifier under the fault, which then starts over (mmu_notifier_retry)."""
    vm.add_memory(IPA, PAGE)
    vm.guest.ping()
    with trace("kvm:kvm_guest_fault") as events:
        vm.guest.read(IPA)
        was_writable = stage2(vm).leaf(IPA).writable
        vm.guest.write(IPA, 1)
    seen = faults(events, IPA, PAGE)
    assert set(seen) == {IPA} and len(seen) in ((1,) if was_writable else (2, 3))


def test_far_apart_pages_need_tables_of_their_own(vm, stage2):
    """Each GiB needs a level 2 and a level 3 table; pages of one 2 MiB share both."""
    vm.guest.ping()
    before = len(stage2(vm).tables.pages)
    for gib in (2, 3):
        vm.add_memory(gib << 30, 0x1000)
        vm.guest.write(gib << 30, gib)
    far = tables.needed(stage2(vm).regime, [2 << 30, 3 << 30])
    assert len(stage2(vm).tables.pages) == before + far and stage2(vm).spare_tables == 0
