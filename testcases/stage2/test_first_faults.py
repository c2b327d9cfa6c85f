"""The first access to a page of guest memory: one fault, one leaf, the right frame and permissions.

virt/kvm/arm/mmu.c (5.4) user_mem_abort, arch/arm64/kvm/mmu.c (6.1): a write fault maps the page writable, a read fault
maps it as the host does, and an execute fault clears XN.
"""

import pytest
from arm_kvm.vocabulary import PAGE, GuestException

IPA = 0x8000_0000


@pytest.fixture
def memory(vm):
    """1 MiB of guest memory at IPA that neither host nor guest has touched."""
    return vm.add_memory(IPA, 0x10_0000)


def test_nothing_is_mapped_before_the_guest_runs_there(vm, memory, stage2):
    vm.guest.ping()
    assert stage2(vm).mapped(IPA, memory.size) == []


def test_write_fault_maps_the_page_writable(vm, memory, stage2, host):
    vm.guest.write(IPA + 5 * PAGE + 8, 0x1234_5678)
    leaf = stage2(vm).leaf(IPA + 5 * PAGE)
    assert leaf.writable and leaf.readable and leaf.executable == host.needs_no_icache_maintenance
    assert leaf.pa == vm.frame_of(leaf.ipa)
    assert memory.read(5 * PAGE + 8, 4) == bytes.fromhex("78563412")


def test_read_fault_of_untouched_pages(vm, memory, stage2):
    """A first read maps the host's shared zero page, which the guest must not be able to write.

    Or a frame of the VM's own: 5.4.y and 5.8 break copy on write for every reference (17839856fd58).
    """
    assert vm.guest.read(IPA) == 0 and vm.guest.read(IPA + PAGE) == 0
    one, other = (stage2(vm).leaf(IPA + offset) for offset in (0, PAGE))
    assert one.readable and one.pa == vm.frame_of(IPA)
    if one.pa == other.pa:
        assert not one.writable and not other.writable


def test_read_then_write_gives_a_private_frame(vm, memory, stage2):
    assert vm.guest.read(IPA) == 0 and vm.guest.read(IPA + PAGE) == 0
    neighbour = stage2(vm).leaf(IPA + PAGE).pa

    vm.guest.write(IPA, 7)
    private = stage2(vm).leaf(IPA)
    assert private.writable and private.pa == vm.frame_of(IPA)
    assert private.pa != neighbour and stage2(vm).leaf(IPA + PAGE).pa == neighbour
    assert vm.guest.read(IPA) == 7 and vm.guest.read(IPA + PAGE) == 0


def test_read_fault_of_a_page_the_host_wrote_maps_it_writable(vm, memory, stage2):
    memory.write(3 * PAGE, b"\x2a\0\0\0")
    assert vm.guest.read(IPA + 3 * PAGE) == 0x2A
    leaf = stage2(vm).leaf(IPA + 3 * PAGE)
    assert leaf.writable, "the host maps the page writable, stage 2 does not: the first store faults needlessly"


def test_execute_fault_maps_the_page_executable(vm, memory, stage2):
    memory.write(PAGE, vm.guest.ret)
    vm.guest.execute(IPA + PAGE)
    leaf = stage2(vm).leaf(IPA + PAGE)
    assert leaf.executable and leaf.readable
    assert leaf.pa == vm.frame_of(IPA + PAGE)


def test_write_then_execute_keeps_the_page_writable(vm, memory, stage2, host):
    vm.guest.write(IPA, int.from_bytes(vm.guest.ret, "little"))
    assert stage2(vm).leaf(IPA).executable == host.needs_no_icache_maintenance
    vm.guest.execute(IPA)
    leaf = stage2(vm).leaf(IPA)
    assert leaf.executable and leaf.writable


def test_execute_then_write_keeps_the_page_executable(vm, memory, stage2):
    memory.write(0, vm.guest.ret)
    vm.guest.execute(IPA)
    vm.guest.write(IPA + 64, 1)
    leaf = stage2(vm).leaf(IPA)
    assert leaf.executable and leaf.writable
    vm.guest.execute(IPA)


def test_guest_and_host_see_each_others_stores(vm, memory, stage2):
    vm.guest.write(IPA + 0x10, 0xC0FFEE)
    assert memory.read(0x10, 4) == 0xC0FFEE.to_bytes(4, "little")
    memory.write(0x10, b"\xef\xbe\xad\xde")
    assert vm.guest.read(IPA + 0x10) == 0xDEADBEEF


def test_instruction_fetch_where_there_is_no_memory_aborts(vm, memory, stage2):
    """KVM injects a prefetch abort, for an instruction fetch cannot be emulated."""
    with pytest.raises(GuestException) as caught:
        vm.guest.execute(0x3000_0000)
    assert caught.value.kind == "prefetch abort"
    assert caught.value.address == caught.value.pc == 0x3000_0000
    assert stage2(vm).leaf(0x3000_0000) is None


def test_two_vms_at_one_ipa_have_frames_of_their_own(make_vm, stage2):
    first, second = make_vm(), make_vm()
    for number, vm in enumerate((first, second)):
        vm.add_memory(IPA, PAGE)
        vm.guest.write(IPA, number + 1)
    assert (first.guest.read(IPA), second.guest.read(IPA)) == (1, 2)
    assert stage2(first).leaf(IPA).pa != stage2(second).leaf(IPA).pa


@pytest.mark.guests("A64")
def test_injected_abort_has_a_clean_syndrome(vm, known_fault):
    """ESR_EL1[63:32] holds ISS2 and reserved bits: an abort that KVM injects sets none of them."""
    with pytest.raises(GuestException) as caught:
        vm.guest.execute(0x3000_0000)
    upper = caught.value.syndrome >> 32
    if upper == 0xFFFF_FFFF:
        known_fault("injected-syndrome-sign-extended")
    assert upper == 0
