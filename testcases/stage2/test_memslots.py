"""Memslots: holes, neighbours, read-only ones, and memslots deleted, moved and given other flags.

Documentation/virt/kvm/api: KVM_SET_USER_MEMORY_REGION. A leaf may exist only where there is a memslot, may be writable
only if the memslot is, and must go when its memslot goes (df6ce24f2ee4).
"""

from dataclasses import replace

import pytest
from arm_kvm.vocabulary import PAGE, HostOsError, Memslot, Memslots, Mmio, Refused, SlotFlags

IPA = 0x8000_0000
SIZE = 16 * PAGE


def refused(vm, wanted):
    """Check that the model refuses this memslot, and that KVM does so with the same errno."""
    model = Memslots(ipa_bits=40)
    for slot in vm.slots.values():
        model.set(slot)
    with pytest.raises(Refused) as predicted:
        model.set(wanted)
    with pytest.raises(HostOsError) as actual:
        vm.set_memslot(wanted)
    assert actual.value.errno == predicted.value.errno


def test_hole_between_memslots_is_not_memory(vm, stage2):
    vm.add_memory(IPA, PAGE)
    vm.add_memory(IPA + 2 * PAGE, PAGE)
    vm.guest.fill(IPA, 2, stride=2 * PAGE)
    vm.guest.write(IPA + PAGE, 0x99)
    assert vm.exits == [Mmio(ipa=IPA + PAGE, size=4, write=True, value=0x99)]
    assert stage2(vm).mapped(IPA, 3 * PAGE) == [IPA, IPA + 2 * PAGE]


def test_adjacent_memslots_meet_without_a_seam(vm, stage2):
    """Two memslots over different host memory meet at one IPA."""
    low, high = vm.add_memory(IPA, SIZE), vm.add_memory(IPA + SIZE, SIZE)
    vm.guest.write(IPA + SIZE - 4, 0x1111)
    vm.guest.write(IPA + SIZE, 0x2222)
    assert low.read(SIZE - 4, 4) == b"\x11\x11\0\0" and high.read(0, 4) == b"\x22\x22\0\0"
    assert stage2(vm).mapped(IPA, 2 * SIZE) == [IPA + SIZE - PAGE, IPA + SIZE]


def test_write_to_a_read_only_memslot_is_an_mmio_exit(vm, stage2):
    memory = vm.add_memory(IPA, SIZE, flags=SlotFlags.READONLY)
    memory.write(0, b"\x07\0\0\0")
    assert vm.guest.read(IPA) == 7
    vm.guest.write(IPA, 8)
    assert vm.exits == [Mmio(ipa=IPA, size=4, write=True, value=8)]
    assert vm.guest.read(IPA) == 7 and memory.read(0, 4) == b"\x07\0\0\0"
    assert not stage2(vm).leaf(IPA).writable


def test_write_first_to_a_read_only_memslot_maps_nothing(vm, stage2):
    vm.add_memory(IPA, SIZE, flags=SlotFlags.READONLY)
    vm.guest.write(IPA + PAGE, 8)
    assert vm.exits == [Mmio(ipa=IPA + PAGE, size=4, write=True, value=8)]
    assert stage2(vm).mapped(IPA, SIZE) == []


def test_deleted_memslot_takes_its_leaves_with_it(vm, stage2):
    vm.add_memory(IPA, SIZE)
    vm.guest.fill(IPA, 16)
    assert len(stage2(vm).mapped(IPA, SIZE)) == 16
    vm.delete_slot(IPA)
    assert stage2(vm).mapped(IPA, SIZE) == []
    vm.guest.read(IPA)
    assert vm.exits == [Mmio(ipa=IPA, size=4, write=False)]


def test_deleting_one_memslot_leaves_its_neighbour_alone(vm, stage2):
    vm.add_memory(IPA, SIZE)
    vm.add_memory(IPA + SIZE, SIZE)
    vm.guest.fill(IPA, 32)
    vm.delete_slot(IPA)
    assert stage2(vm).mapped(IPA, 2 * SIZE) == [IPA + SIZE + i * PAGE for i in range(16)]
    assert vm.guest.check(IPA + SIZE, 16) == []


def test_moved_memslot_is_found_at_its_new_place_only(vm, stage2):
    memory = vm.add_memory(IPA, SIZE)
    vm.guest.write(IPA, 0xAB)
    vm.move_slot(IPA, to=IPA + 0x100_0000)
    assert stage2(vm).leaf(IPA) is None
    assert vm.guest.read(IPA + 0x100_0000) == 0xAB
    assert stage2(vm).leaf(IPA + 0x100_0000).pa == memory.frame()
    vm.guest.read(IPA)
    assert vm.exits == [Mmio(ipa=IPA, size=4, write=False)]


def test_recreated_memslot_shows_the_new_memory(vm, stage2):
    """Deleted and created again over other host memory: no stale frame may be reachable."""
    vm.add_memory(IPA, SIZE)
    vm.guest.write(IPA, 0x01D)
    stale = stage2(vm).leaf(IPA).pa
    vm.delete_slot(IPA)
    vm.add_memory(IPA, SIZE).write(0, b"\xee\0\0\0")
    assert vm.guest.read(IPA) == 0xEE
    assert stage2(vm).leaf(IPA).pa != stale


def test_flag_change_to_logging_keeps_the_contents(vm, stage2):
    vm.add_memory(IPA, SIZE)
    vm.guest.fill(IPA, 16)
    vm.set_flags(IPA, SlotFlags.LOG_DIRTY_PAGES)
    assert vm.guest.check(IPA, 16) == []
    vm.set_flags(IPA, SlotFlags.NONE)
    vm.guest.fill(IPA, 16, seed=1)
    assert vm.guest.check(IPA, 16, seed=1) == []
    stage2(vm)


def test_read_only_cannot_be_changed_in_place(vm):
    """KVM_MEM_READONLY of an existing memslot is fixed: KVM refuses the change with EINVAL."""
    vm.add_memory(IPA, SIZE)
    refused(vm, vm.slot_at(IPA).with_flags(SlotFlags.READONLY))


@pytest.mark.parametrize("shift", [-PAGE, 0, PAGE], ids=["before", "same", "after"])
def test_overlapping_memslots_are_refused(vm, stage2, shift):
    vm.add_memory(IPA, SIZE)
    vm.guest.write(IPA, 3)
    refused(vm, Memslot(vm.next_slot, IPA + shift, SIZE, vm.memory(SIZE).hva))
    assert vm.guest.read(IPA) == 3
    assert stage2(vm).mapped(IPA, SIZE) == [IPA]


@pytest.mark.parametrize("unaligned", [{"ipa": IPA + 0x800}, {"size": PAGE + 0x800}], ids=["ipa", "size"])
def test_unaligned_memslots_are_refused(vm, unaligned):
    refused(vm, replace(Memslot(vm.next_slot, IPA, PAGE, vm.memory(2 * PAGE).hva), **unaligned))
