"""The guest's own table walks go through stage 2, too: they fault and are served, and they are not writes.

The architecture reports such a fault with S1PTW set. A walk only reads the tables, so it may use those in a read-only
memslot (on arm64 since 406504c7b040). A walk into a hole is the guest's mistake, and must end in an abort of the guest.
"""

import errno

import pytest
from arm_kvm.vocabulary import PAGE, Child, GuestException, GuestStage1, RunFailed, SlotFlags

TABLES = 0x2000_0000
DATA = 0x8000_0000
ESR_S1PTW = 1 << 7


@pytest.fixture
def stage1(vm):
    """Identity tables for the guest, their root at TABLES, where there is no memory yet."""
    return GuestStage1(vm.isa, root=TABLES)


def test_walk_of_a_root_that_is_not_mapped_yet(vm, stage1, stage2, trace):
    vm.add_memory(TABLES, PAGE).write(0, stage1.encode())
    vm.add_memory(DATA, PAGE)
    with trace("kvm:kvm_guest_fault") as events:
        vm.guest.enable_mmu(stage1)
    walks = [e for e in events if e.fields.get("ipa") == TABLES]
    assert walks and all(e.fields["hsr"] & ESR_S1PTW for e in walks)
    vm.guest.write(DATA, 5)
    assert vm.guest.read(DATA) == 5
    assert stage2(vm).leaf(TABLES).readable


def test_walk_of_a_second_level_that_is_not_mapped_yet(vm, stage1, stage2):
    level2 = TABLES + 0x10_0000
    stage1.link(DATA, level2)
    vm.add_memory(TABLES, PAGE).write(0, stage1.encode())
    vm.add_memory(level2, PAGE).write(0, GuestStage1.level2(DATA))
    vm.add_memory(DATA, PAGE)
    vm.guest.enable_mmu(stage1)
    assert stage2(vm).leaf(level2) is None
    vm.guest.write(DATA, 6)
    assert stage2(vm).leaf(level2).readable
    assert stage2(vm).leaf(DATA).writable


def test_tables_in_a_read_only_memslot(vm, stage1, stage2, known_fault):
    """A walk is a read, so tables in a read-only memslot serve, and remain unwritable."""
    level2 = TABLES + 0x10_0000
    stage1.link(DATA, level2)
    vm.add_memory(TABLES, PAGE).write(0, stage1.encode())
    vm.add_memory(level2, PAGE, flags=SlotFlags.READONLY).write(0, GuestStage1.level2(DATA))
    vm.add_memory(DATA, PAGE)
    vm.guest.enable_mmu(stage1)
    try:
        vm.guest.write(DATA, 7)
    except (RunFailed, GuestException) as e:
        assert e.errno == errno.ENOSYS if isinstance(e, RunFailed) else e.kind == "data abort" and e.external
        assert stage2(vm).leaf(level2) is None
        known_fault("walk-of-read-only-tables-is-a-write")
    assert vm.guest.read(DATA) == 7
    assert vm.exits == []
    assert not stage2(vm).leaf(level2).writable


def test_walk_into_a_hole_is_the_guests_own_abort(vm, stage1, stage2, known_fault):
    """The table lies where the guest has no memory: the guest takes an abort, with no exit and no mapping."""
    hole = TABLES + 0x10_0000
    stage1.link(DATA, hole)
    vm.add_memory(TABLES, PAGE).write(0, stage1.encode())
    vm.guest.enable_mmu(stage1)
    with pytest.raises(GuestException) as caught:
        try:
            vm.guest.read(DATA)
        except RunFailed as e:
            assert e.errno == errno.ENOSYS and stage2(vm).leaf(hole) is None
            known_fault("walk-into-a-hole-ends-the-run")
    assert caught.value.kind == "data abort" and caught.value.address == DATA
    assert vm.exits == []
    assert stage2(vm).leaf(hole) is None


def test_virtual_and_physical_addresses_are_kept_apart(vm, stage1, stage2):
    """The VA differs from the IPA: stage 2 maps the IPA, and the MMIO exit reports the IPA."""
    stage1.map_block(0xC000_0000, DATA)
    vm.add_memory(TABLES, PAGE).write(0, stage1.encode())
    memory = vm.add_memory(DATA, PAGE)
    vm.guest.enable_mmu(stage1)
    vm.guest.write(0xC000_0000, 0x77)
    assert memory.read(0, 1) == b"\x77"
    assert stage2(vm).leaf(DATA) is not None and stage2(vm).leaf(0xC000_0000) is None
    vm.guest.write(0xC000_0000 + 0x10_0004, 1)
    assert vm.exits[-1].ipa == DATA + 0x10_0004


@pytest.mark.guests("A64")
@pytest.mark.feature("FEAT_HAFDBS")
def test_fetch_that_sets_the_access_flag(host, vm, stage2):
    """The CPU sets the flag in the guest's table, which a fork has made read-only: the walk writes, the fetch does not.

    Up to 5.8 KVM made the table executable instead of writable, over and over (c4ad98e4b72c, "KVM: arm64: Assume write
    fault on S1PTW permission fault on instruction fetch").
    """
    stage1 = GuestStage1(vm.isa, root=TABLES, hardware_af=True)
    stage1.map_block(0xC000_0000, DATA, af=False)
    tables = vm.add_memory(TABLES, PAGE)
    tables.write(0, stage1.encode())
    vm.add_memory(DATA, PAGE).write(0, vm.guest.ret)
    vm.guest.enable_mmu(stage1)
    child = Child(host.agent)
    vm.guest.execute(0xC000_0000)
    child.end()
    entry = int.from_bytes(tables.read(3 * 8, 8), "little")
    assert entry == GuestStage1.leaf(DATA, 1), "the CPU has set more than the access flag"
    assert stage2(vm).leaf(TABLES).writable
    assert host.needs_no_icache_maintenance or not stage2(vm).leaf(TABLES).executable
