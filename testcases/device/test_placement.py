"""Placing the GICv2's frames: what is refused, with which error, that a refusal changes nothing, and what the first run
makes of a place that should have been refused (vgic_v2_map_resources, kvm_phys_addr_ioremap).

Documentation/virt/kvm/devices/arm-vgic.txt, KVM_DEV_ARM_VGIC_GRP_ADDR; virt/kvm/arm/vgic/vgic-kvm-device.c,
vgic-v2.c vgic_v2_check_base.
"""

import errno

import pytest
from arm_kvm.guest.driver import RunFailed
from arm_kvm.oracle import Verdict
from arm_kvm.support.errors import HostOops, HostOsError
from arm_kvm.vmm import calls
from arm_kvm.vmm.memory import PAGE
from arm_kvm.vmm.vgic import GICC_IIDR, Frame

GICD, GICC = 0x2C00_1000, 0x2C00_2000
UNSET = (1 << 64) - 1
NO_SUCH_ATTRIBUTE, NO_SUCH_GROUP = 7, 9
pytestmark = pytest.mark.native


@pytest.fixture
def vgic(vm, make_vgic):
    """A GICv2 whose frames have no place yet."""
    return make_vgic(vm)


def refusal(call, *args):
    """The errno that KVM refuses this with."""
    with pytest.raises((HostOsError, RunFailed)) as refused:
        call(*args)
    return refused.value.errno


@pytest.mark.parametrize("frame", Frame, ids=lambda f: f.name.lower())
@pytest.mark.parametrize("offset", [1, 4, 0x800, PAGE - 4], ids=hex)
def test_unaligned(vgic, frame, offset):
    assert refusal(vgic.place, frame, GICC + offset) == errno.EINVAL
    assert vgic.place_of(frame) == UNSET


@pytest.mark.parametrize("frame", Frame, ids=lambda f: f.name.lower())
def test_beyond_the_ipa_space(vgic, frame):
    """40 bits, KVM's default."""
    assert refusal(vgic.place, frame, 1 << 40) == errno.E2BIG
    assert vgic.place_of(frame) == UNSET


def test_reaching_beyond_the_ipa_space(vgic, known_fault):
    """The CPU interface has two pages, and only the first would have an address."""
    try:
        vgic.place(Frame.CPU_INTERFACE, (1 << 40) - PAGE)
    except HostOsError as e:
        assert e.errno == errno.E2BIG
        assert vgic.place_of(Frame.CPU_INTERFACE) == UNSET
    else:
        assert vgic.place_of(Frame.CPU_INTERFACE) == (1 << 40) - PAGE
        known_fault("cpu-interface-end-unchecked")


@pytest.mark.may_end_host
def test_running_what_reaches_beyond_the_ipa_space(vm, vgic, oracle, known_fault):
    """Where KVM has taken that place, the first run maps both pages: it must be refused."""
    last = (1 << 40) - PAGE
    vgic.place(Frame.DISTRIBUTOR, GICD)
    try:
        vgic.place(Frame.CPU_INTERFACE, last)
    except HostOsError:
        return  # see above
    try:
        vm.guest.ping()
    except RunFailed as e:
        assert e.errno == errno.ERANGE
        return
    except HostOops as oops:
        assert "kvm_phys_addr_ioremap" in str(oops)
        known_fault("cpu-interface-behind-root-table", fatal=True)
    ((stage2, findings),) = oracle.examine(vm)
    assert stage2.leaf(last).pa == vgic.windows[0].pa
    if findings == []:  # the second page is mapped, and nowhere in this VM's tables
        known_fault("cpu-interface-behind-root-table", fatal=True)
    assert [(finding.verdict, finding.ipa) for finding in findings] == [(Verdict.OUTSIDE_MEMSLOTS, 0)]
    vm.destroy()
    known_fault("cpu-interface-wraps-to-ipa-0")


@pytest.mark.parametrize("frame", Frame, ids=lambda f: f.name.lower())
def test_placed_twice(vgic, frame):
    """The second place is refused, even the same; the first holds."""
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
    assert vm.guest.read(GICC + GICC_IIDR) == 0x0002_043B


def test_init_twice(vm, vgic):
    vgic.init()
    vgic.init()


@pytest.mark.parametrize("missing", Frame, ids=lambda f: f.name.lower())
def test_run_with_a_frame_without_a_place(vm, vgic, missing):
    """The first KVM_RUN is refused with ENXIO. What follows differs: since 6.1 the VM is dead."""
    (other,) = set(Frame) - {missing}
    vgic.place(other, GICC)
    assert refusal(vm.guest.ping) == errno.ENXIO


@pytest.mark.parametrize("distance", [-PAGE, 0, PAGE], ids=hex)
def test_overlapping_frames(vm, vgic, distance):
    """Noticed at the first run only, and there with EINVAL (api.txt says EBUSY, of the old interface)."""
    vgic.place(Frame.CPU_INTERFACE, GICC)
    vgic.place(Frame.DISTRIBUTOR, GICC + distance)
    if distance < 0:  # 4 KiB before: neighbours
        assert vm.guest.read(GICC + GICC_IIDR) == 0x0002_043B
    else:
        assert refusal(vm.guest.ping) == errno.EINVAL
