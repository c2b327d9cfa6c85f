"""Two vCPUs that fault on the same pages at the same time.

Both faults are served, one leaf results, and no store is lost. The fault that comes second must not change the valid
entry without need (976d34e2dab1, 86658b819cd0), and no reference may leak.
"""

import pytest
from arm_kvm.vocabulary import PAGE

IPA = 0x8000_0000
PAGES = 256
pytestmark = pytest.mark.vcpus(2, pinned=True)


def test_two_vcpus_race_on_one_page(vm, stage2):
    memory = vm.add_memory(IPA, PAGES * PAGE)
    for page in range(8):
        for number, guest in enumerate(vm.guests):
            guest.start_fill(IPA + page * PAGE + 4 * number, 1)
        for guest in vm.guests:
            guest.finish()
        leaf = stage2(vm).leaf(IPA + page * PAGE)
        assert leaf.writable and leaf.pa == memory.frame(page * PAGE)
        assert vm.guest.check(IPA + page * PAGE, 2, stride=4) == []


def test_two_vcpus_race_through_the_same_memory(vm, stage2):
    vm.add_memory(IPA, PAGES * PAGE)
    for number, guest in enumerate(vm.guests):
        guest.start_fill(IPA + 8 * number, PAGES)
    for guest in vm.guests:
        guest.finish()
    assert stage2(vm).mapped(IPA, PAGES * PAGE) == [IPA + i * PAGE for i in range(PAGES)]
    for number in range(2):
        assert vm.guest.check(IPA + 8 * number, PAGES) == []


def test_vcpus_of_one_vm_share_its_tables(vm, stage2):
    vm.add_memory(IPA, PAGE)
    vm.guests[0].write(IPA, 0x11)
    assert vm.guests[1].read(IPA) == 0x11
    vm.guests[1].write(IPA, 0x22)
    assert vm.guests[0].read(IPA) == 0x22
    assert stage2(vm).mapped(IPA, PAGE) == [IPA]
