"""A guest that restarts: KVM_ARM_VCPU_INIT on a vCPU that has run.

The new guest starts with its caches off, so KVM unmaps all memory, to clean each page when it is faulted in again
(957db105c997; arch/arm64/kvm/arm.c kvm_arch_vcpu_ioctl_vcpu_init, 6.1). With FWB, where the guest's accesses are
always cacheable, it unmaps nothing.
"""

import pytest
from arm_kvm.vocabulary import PAGE

IPA = 0x8000_0000
PAGES = 8
pytestmark = [pytest.mark.native, pytest.mark.needs("vmid8")]  # boards without FWB


def test_everything_is_unmapped(vm, stage2):
    vm.add_memory(IPA, PAGES * PAGE)
    vm.guest.fill(IPA, PAGES)
    assert len(stage2(vm).mapped(IPA, PAGES * PAGE)) == PAGES
    vm.vcpus[0].reset()
    assert stage2(vm).mapped(IPA, PAGES * PAGE) == []


def test_memory_is_kept(vm, stage2):
    vm.add_memory(IPA, PAGES * PAGE)
    vm.guest.write(IPA, 0xA57)
    frame = stage2(vm).leaf(IPA).pa
    vm.vcpus[0].reset()
    assert vm.guest.read(IPA) == 0xA57
    assert stage2(vm).leaf(IPA).pa == frame


@pytest.mark.vcpus(2)
def test_first_init_unmaps_nothing(vm, stage2):
    """A vCPU that has not run yet may be initialised while another has memory mapped."""
    vm.add_memory(IPA, PAGE)
    vm.guest.write(IPA, 1)
    vm.vcpus[1].reset()
    assert stage2(vm).leaf(IPA).writable
