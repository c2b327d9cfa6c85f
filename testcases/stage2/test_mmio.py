"""Accesses where the guest has no memory: user space emulates them, for every register and access size.

virt/kvm/arm/mmio.c (5.4), arch/arm64/kvm/mmio.c (6.1): the syndrome gives the register, the size and the sign
extension; KVM_EXIT_MMIO carries the address, the size and the data. Stage 2 must map nothing for them.
"""

import errno

import pytest
from arm_kvm.vocabulary import ISAS, PAGE, Mmio, RunFailed

IPA = 0x8000_0000
DEVICE = 0x1000_0000


@pytest.mark.parametrize("size", [1, 2, 4])
def test_read_returns_what_the_device_answers(vm, stage2, size):
    value = 0x7766_5544 & ((1 << 8 * size) - 1)
    vm.device[DEVICE] = value
    assert vm.guest.read(DEVICE, size) == value
    assert vm.exits == [Mmio(ipa=DEVICE, size=size, write=False)]
    assert stage2(vm).leaf(DEVICE) is None


@pytest.mark.parametrize("size", [1, 2, 4])
def test_write_reaches_the_device(vm, stage2, size):
    vm.guest.write(DEVICE + 0x20, 0x8899_AABB, size)
    value = 0x8899_AABB & ((1 << 8 * size) - 1)
    assert vm.exits == [Mmio(ipa=DEVICE + 0x20, size=size, write=True, value=value)]
    assert stage2(vm).leaf(DEVICE) is None


@pytest.mark.guests("A64")
def test_eight_bytes_read_and_written(vm):
    vm.device[DEVICE] = 0x1122_3344_5566_7788
    assert vm.guest.read(DEVICE, 8) == 0x1122_3344_5566_7788
    vm.guest.write(DEVICE + 8, 0x99AA_BBCC_DDEE_FF00, 8)
    assert vm.exits[1] == Mmio(ipa=DEVICE + 8, size=8, write=True, value=0x99AA_BBCC_DDEE_FF00)


def sign_extending_loads(isa):
    return [access for access in ISAS[isa].accesses if access.signed and access.syndrome]


@pytest.mark.parametrize("top_bit", [0, 1], ids=["positive", "negative"])
def test_sign_extending_loads(vm, isa, known_fault, top_bit):
    """LDRSB, LDRSH and LDRSW extend the sign of the device's answer through the register."""
    lost_their_sign = []
    for access in sign_extending_loads(isa):
        raw = 0x5A5A_5A5A & ((1 << 8 * access.size - 1) - 1) | top_bit << (8 * access.size - 1)
        vm.device[DEVICE] = raw
        value = vm.guest.read(DEVICE, insn=access.name)
        extended = raw - (top_bit << 8 * access.size)
        assert value in (extended, raw), f"{access.name} of {raw:#x} gave {value:#x}"
        if value != extended:
            lost_their_sign.append(access.name)
    if lost_their_sign:
        known_fault("mmio-load-without-sign", seen=", ".join(lost_their_sign))


def test_every_register_can_be_loaded_and_stored(vm, isa):
    for reg in range(ISAS[isa].registers):
        vm.device[DEVICE] = 0xA000 + reg
        assert vm.guest.read(DEVICE, reg=reg) == 0xA000 + reg
        vm.guest.write(DEVICE + 4, 0xB000 + reg, reg=reg)
        assert vm.exits[-1] == Mmio(ipa=DEVICE + 4, size=4, write=True, value=0xB000 + reg)


@pytest.mark.parametrize("offset", [0x0, 0xFFC])
def test_exit_carries_the_whole_address(vm, offset):
    """HPFAR gives the page, the faulting virtual address the low twelve bits."""
    vm.guest.write(DEVICE + offset, 1)
    assert vm.exits[-1].ipa == DEVICE + offset


def instructions_without_syndrome(isa):
    return [access for access in ISAS[isa].accesses if not access.syndrome]


def test_instruction_without_syndrome_is_refused_and_harms_nothing(vm, isa, stage2):
    """For load and store multiple and for write-back forms the CPU gives no syndrome: KVM_RUN fails with ENOSYS."""
    vm.add_memory(IPA, PAGE)
    for access in instructions_without_syndrome(isa):
        with pytest.raises(RunFailed) as caught:
            if access.write:
                vm.guest.write(DEVICE, 1, insn=access.name)
            else:
                vm.guest.read(DEVICE, insn=access.name)
        assert caught.value.errno == errno.ENOSYS, access.name
    vm.guest.write(IPA, 9)
    assert vm.guest.read(IPA) == 9
    assert stage2(vm).leaf(DEVICE) is None


def test_the_same_instructions_work_on_memory(vm, isa):
    """They need a syndrome only to be emulated: on memory they simply execute."""
    memory = vm.add_memory(IPA, PAGE)
    for access in instructions_without_syndrome(isa):
        if access.write:
            vm.guest.write(IPA, 0x55, insn=access.name)
            assert memory.read(0, 4) == b"\x55\0\0\0", access.name
        else:
            vm.guest.read(IPA, insn=access.name)
    assert vm.exits == []
