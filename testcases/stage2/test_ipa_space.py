"""The edges of the IPA space: its first page, its last page, and the first address beyond it.

The size is read from the CPU (VTCR), not assumed. A memslot beyond it must be refused (c3058d5da222), and the last
entries of the concatenated root must work.
"""

import errno

import pytest
from arm_kvm.vocabulary import CODE, GIB, MAILBOX, PAGE, GuestException, GuestStage1, HostOsError, Mmio, RunFailed

TABLES = 0x2000_0000
WINDOW = 0xC000_0000


def test_first_page(vm, stage2):
    memory = vm.add_memory(0, PAGE)
    vm.guest.write(0, 0xF1)
    assert memory.read(0, 1) == b"\xf1"
    assert stage2(vm).leaf(0).pa == memory.frame()


def test_geometry_is_what_kvm_promises(vm, stage2):
    """40 bits of IPA and 4 KiB pages: start level 1, two concatenated root pages, a VMID as wide as the CPU's."""
    vm.guest.ping()
    regime = stage2(vm).regime
    assert (regime.input_bits, regime.start_level, regime.root_pages) == (40, 1, 2)
    assert regime.vmid_bits in (8, 16) and 0 < regime.vmid < 1 << regime.vmid_bits


def test_last_page(vm, stage2, known_fault):
    """The guest reaches the top of the IPA space through its own stage 1, which is the only way for A32."""
    vm.guest.ping()
    size = stage2(vm).regime.input_size
    stage1 = GuestStage1(vm.isa, root=TABLES)
    stage1.map_block(WINDOW, size - GIB)
    vm.add_memory(TABLES, PAGE).write(0, stage1.encode())
    try:
        memory = vm.add_memory(size - PAGE, PAGE)
    except HostOsError as e:
        if e.errno != errno.EFAULT:
            raise
        known_fault("last-page-of-ipa-space-refused")
    vm.guest.enable_mmu(stage1)
    vm.guest.write(WINDOW + GIB - 4, 0x1A57)
    if [exit_.ipa for exit_ in vm.exits] == [(size - 4) & 0xFFFF_FFFF]:
        known_fault("qemu-arm-32-bit-hpfar")
    assert memory.read(PAGE - 4, 4) == b"\x57\x1a\0\0"
    assert stage2(vm).leaf(size - PAGE).pa == memory.frame()


@pytest.mark.parametrize("pages_beyond", [1, 2], ids=["beyond", "across"])
def test_memslot_beyond_the_space_is_refused(vm, stage2, pages_beyond):
    vm.guest.ping()
    size = stage2(vm).regime.input_size
    before = stage2(vm).mapped(0, size)
    with pytest.raises(HostOsError) as refused:
        vm.add_memory(size - (pages_beyond - 1) * PAGE, pages_beyond * PAGE)
    assert refused.value.errno in (errno.E2BIG, errno.EFAULT, errno.EINVAL)  # depending on the version
    vm.guest.ping()
    assert stage2(vm).mapped(0, size) == before


@pytest.mark.guests("A64")
def test_access_beyond_the_space_reaches_nothing(vm, stage2):
    """The access ends in an exit or in an abort of the guest, never in a leaf. (A32 cannot form the address.)"""
    vm.guest.ping()
    size = stage2(vm).regime.input_size
    try:
        vm.guest.read(size)
    except (RunFailed, GuestException):
        assert vm.exits == []
    else:  # before 5.18 (85ea6b1ec915) it is an MMIO exit with that address
        assert vm.exits == [Mmio(ipa=size, size=4, write=False)]
    beyond_the_payload = MAILBOX + PAGE
    assert stage2(vm).mapped(0, CODE) == []
    assert stage2(vm).mapped(beyond_the_payload, size - beyond_the_payload) == []
