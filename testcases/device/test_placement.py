"""Placing the GICv2's frames: which places KVM refuses, with which error, and that a refusal changes nothing.

Also what the first run makes of a place that should have been refused (vgic_v2_map_resources, kvm_phys_addr_ioremap).
Documentation/virt/kvm/devices/arm-vgic.txt, KVM_DEV_ARM_VGIC_GRP_ADDR; virt/kvm/arm/vgic/vgic-kvm-device.c,
vgic-v2.c vgic_v2_check_base.
"""

import errno

import pytest
from arm_kvm.vocabulary import PAGE, Frame, HostOops, HostOsError, RunFailed, Verdict, calls
from arm_kvm.vocabulary import vgic as gicv2

GICD, GICC = 0x2C00_1000, 0x2C00_2000
LAST_PAGE = (1 << 40) - PAGE  #: of KVM's default IPA space; the CPU interface has a second page
UNSET = (1 << 64) - 1  #: what KVM answers for a frame that has no place
NO_SUCH_ATTRIBUTE, NO_SUCH_GROUP = 7, 9
pytestmark = pytest.mark.native


@pytest.fixture
def vgic(vm, make_vgic):
    """A GICv2 whose frames have no place yet."""
    return make_vgic(vm)


def refusal(call, *args):
    """The errno with which KVM refuses the call; 0 if it does not."""
    try:
        call(*args)
    except (HostOsError, RunFailed) as e:
        return e.errno
    return 0


@pytest.mark.parametrize("frame", Frame, ids=lambda f: f.name.lower())
@pytest.mark.parametrize("offset", [1, 4, 0x800, PAGE - 4], ids=hex)
def test_unaligned(vgic, frame, offset):
    assert refusal(vgic.place, frame, GICC + offset) == errno.EINVAL
    assert vgic.place_of(frame) == UNSET


@pytest.mark.parametrize("frame", Frame, ids=lambda f: f.name.lower())
def test_beyond_the_ipa_space(vgic, frame):
    """By default KVM gives a VM 40 bits of IPA."""
    assert refusal(vgic.place, frame, 1 << 40) == errno.E2BIG
    assert vgic.place_of(frame) == UNSET


def test_reaching_beyond_the_ipa_space(vgic, known_fault):
    """Only the first of the CPU interface's two pages would have an IPA."""
    answer = refusal(vgic.place, Frame.CPU_INTERFACE, LAST_PAGE)
    if answer == 0:
        assert vgic.place_of(Frame.CPU_INTERFACE) == LAST_PAGE
        known_fault("cpu-interface-end-unchecked")
    assert answer == errno.E2BIG
    assert vgic.place_of(Frame.CPU_INTERFACE) == UNSET


def both_pages_mapped(vm, vgic, oracle, known_fault):
    """Find out where the first run has put the page that has no IPA, and end the case with that known fault."""
    ((stage2, findings),) = oracle.examine(vm)
    assert stage2.leaf(LAST_PAGE).pa == vgic.windows[0].pa
    if findings == []:  # the second page is mapped outside this VM's tables
        known_fault("cpu-interface-behind-root-table", fatal=True)
    assert [(finding.verdict, finding.ipa) for finding in findings] == [(Verdict.OUTSIDE_MEMSLOTS, 0)]
    vm.destroy()
    known_fault("cpu-interface-wraps-to-ipa-0")


@pytest.mark.may_end_host
def test_running_what_reaches_beyond_the_ipa_space(vm, vgic, oracle, known_fault):
    """The first run maps both pages, so it must be refused: with ENXIO where KVM has refused the place already."""
    vgic.place(Frame.DISTRIBUTOR, GICD)
    placed = refusal(vgic.place, Frame.CPU_INTERFACE, LAST_PAGE) == 0
    try:
        answer = refusal(vm.guest.ping)
    except HostOops as oops:
        assert "kvm_phys_addr_ioremap" in str(oops)
        known_fault("cpu-interface-behind-root-table", fatal=True)
    if placed and answer == 0:
        both_pages_mapped(vm, vgic, oracle, known_fault)
    if placed and answer == errno.EFAULT:  # stage2_set_pte() has found a valid entry behind the root table
        known_fault("cpu-interface-behind-root-table", fatal=True)
    assert answer == (errno.ERANGE if placed else errno.ENXIO)


@pytest.mark.parametrize("frame", Frame, ids=lambda f: f.name.lower())
def test_placed_twice(vgic, frame):
    """A second place is refused, even if it is the same; the first remains."""
    vgic.place(frame, GICC)
    assert refusal(vgic.place, frame, GICC + 0x10000) == refusal(vgic.place, frame, GICC) == errno.EEXIST
    assert vgic.place_of(frame) == GICC


def test_unknown_attributes(vgic):
    assert refusal(vgic.set_attribute, 0, NO_SUCH_ATTRIBUTE) == errno.ENXIO
    assert refusal(vgic.set_attribute, NO_SUCH_GROUP, 0) == errno.ENXIO


def test_a_second_vgic(vm, vgic, make_vgic):
    assert refusal(make_vgic, vm) == errno.EEXIST


def test_after_the_vm_has_run(vm, make_vgic):
    vm.guest.ping()
    assert refusal(make_vgic, vm) == errno.EBUSY


def test_no_vcpu_after_init(vm, vgic):
    vgic.place(Frame.DISTRIBUTOR, GICD)
    vgic.place(Frame.CPU_INTERFACE, GICC)
    vgic.init()
    assert refusal(calls.create_vcpu, vm, 1) == errno.EBUSY
    assert vm.guest.read(GICC + gicv2.GICC_IIDR) == 0x0002_043B


def test_init_twice(vm, vgic):
    vgic.init()
    vgic.init()


@pytest.mark.parametrize("missing", Frame, ids=lambda f: f.name.lower())
def test_run_with_a_frame_without_a_place(vm, vgic, missing):
    """The first KVM_RUN is refused with ENXIO. (Since 6.1 the VM is dead afterwards.)"""
    (other,) = set(Frame) - {missing}
    vgic.place(other, GICC)
    assert refusal(vm.guest.ping) == errno.ENXIO


@pytest.mark.parametrize("distance", [-PAGE, 0, PAGE], ids=hex)
def test_overlapping_frames(vm, vgic, distance):
    """KVM notices only at the first run, and answers EINVAL. (api.txt has EBUSY, for the old interface.)"""
    vgic.place(Frame.CPU_INTERFACE, GICC)
    vgic.place(Frame.DISTRIBUTOR, GICC + distance)
    if distance < 0:  # the distributor's 4 KiB end where the CPU interface begins
        assert vm.guest.read(GICC + gicv2.GICC_IIDR) == 0x0002_043B
    else:
        assert refusal(vm.guest.ping) == errno.EINVAL
