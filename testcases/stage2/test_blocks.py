"""2 MiB blocks: mapped for hugetlbfs and for transparent huge pages, and broken up again.

virt/kvm/arm/mmu.c (5.4) fault_supports_stage2_huge_mapping, transparent_hugepage_adjust: a block needs an IPA and an
HVA that are congruent modulo 2 MiB, and a memslot that contains all of it (6794ad5443a2, a80868f39837).
"""

from arm_kvm.vocabulary import BLOCK, PAGE, Advice, Prot, SlotFlags, Verdict, Violation

IPA = 0x8000_0000


def block_sized(vm, **kind):
    """4 MiB of guest memory whose IPA and HVA are congruent modulo 2 MiB."""
    return vm.add_memory(IPA, 2 * BLOCK, align=BLOCK, **kind)


def transparent(vm):
    """4 MiB of guest memory at IPA, for which the host is to use transparent huge pages."""
    memory = vm.memory(2 * BLOCK, align=BLOCK)
    memory.advise(Advice.HUGEPAGE)
    vm.add_memory(IPA, 2 * BLOCK, memory=memory)
    return memory


def test_hugetlbfs_is_mapped_as_a_block(vm, stage2):
    memory = block_sized(vm, huge=True)
    vm.guest.write(IPA + 0x12_3000, 0xB10C)
    leaf = stage2(vm).leaf(IPA + 0x12_3000)
    assert leaf.is_block and leaf.size == BLOCK and leaf.ipa == IPA and leaf.writable
    assert memory.read(0x12_3000, 2) == b"\x0c\xb1"
    assert stage2(vm).mapped(IPA, 2 * BLOCK) == [IPA]


def test_one_fault_maps_the_whole_block(vm, stage2, trace):
    block_sized(vm, huge=True)
    vm.guest.ping()
    with trace("kvm:kvm_guest_fault") as events:
        vm.guest.fill(IPA, BLOCK // PAGE)
    assert len([e for e in events if IPA <= e.fields["ipa"] < IPA + BLOCK]) == 1
    assert vm.guest.check(IPA, BLOCK // PAGE) == []


def test_transparent_huge_page_is_mapped_as_a_block(vm, stage2):
    transparent(vm)
    vm.guest.write(IPA + PAGE, 1)
    leaf = stage2(vm).leaf(IPA)
    assert leaf.is_block and leaf.writable


def test_incongruent_memory_is_mapped_by_pages(vm, stage2):
    """HVA and IPA differ modulo 2 MiB, so a block would map the wrong memory."""
    memory = vm.memory(3 * BLOCK, align=BLOCK)
    memory.advise(Advice.HUGEPAGE)
    vm.add_memory(IPA + PAGE, BLOCK, memory=memory)
    vm.guest.fill(IPA + PAGE, 4)
    assert [stage2(vm).leaf(IPA + PAGE + i * PAGE).level for i in range(4)] == [3] * 4


def test_memslot_smaller_than_a_block_is_mapped_by_pages(vm, stage2, known_fault):
    """The huge page reaches beyond the memslot, and so would a block (6794ad5443a2)."""
    memory = vm.memory(BLOCK, align=BLOCK)
    memory.advise(Advice.HUGEPAGE)
    vm.add_memory(IPA, BLOCK - PAGE, memory=memory)
    vm.guest.write(IPA, 1)
    try:
        leaf = stage2(vm).leaf
    except Violation as violation:
        beyond = [(finding.verdict, finding.ipa, finding.size) for finding in violation.findings]
        if beyond != [(Verdict.OUTSIDE_MEMSLOTS, IPA + BLOCK - PAGE, PAGE)]:
            raise
        vm.destroy()
        known_fault("block-beyond-memslot")
    assert not leaf(IPA).is_block
    assert leaf(IPA + BLOCK - PAGE) is None


def test_dontneed_of_one_page_breaks_the_block_up(vm, stage2):
    memory = transparent(vm)
    vm.guest.fill(IPA, BLOCK // PAGE)
    assert stage2(vm).leaf(IPA).is_block
    memory.advise(Advice.DONTNEED, 5 * PAGE, PAGE)
    assert stage2(vm).leaf(IPA + 5 * PAGE) is None
    assert vm.guest.read(IPA + 5 * PAGE) == 0
    assert vm.guest.check(IPA, 5) == [] and vm.guest.check(IPA + 6 * PAGE, 500) == []
    assert not stage2(vm).leaf(IPA + 5 * PAGE).is_block


def test_protecting_one_page_takes_write_permission_there(vm, stage2):
    memory = transparent(vm)
    vm.guest.fill(IPA, BLOCK // PAGE)
    memory.protect(Prot.READ, 9 * PAGE, PAGE)
    assert vm.guest.check(IPA, BLOCK // PAGE) == []
    leaf = stage2(vm).leaf(IPA + 9 * PAGE)
    assert not leaf.writable
    memory.protect(Prot.READ_WRITE, 9 * PAGE, PAGE)
    vm.guest.fill(IPA, BLOCK // PAGE, seed=3)
    assert vm.guest.check(IPA, BLOCK // PAGE, seed=3) == []
    stage2(vm)


def test_dirty_logging_breaks_blocks_into_pages(vm, stage2):
    block_sized(vm, huge=True)
    vm.guest.fill(IPA, 4)
    assert stage2(vm).leaf(IPA).is_block
    vm.set_flags(IPA, SlotFlags.LOG_DIRTY_PAGES)
    vm.guest.write(IPA + 2 * PAGE, 0xD1)
    leaf = stage2(vm).leaf(IPA + 2 * PAGE)
    assert not leaf.is_block and leaf.writable
    assert vm.dirty_pages(IPA) == [IPA + 2 * PAGE]


def test_block_comes_back_when_logging_ends(vm, stage2):
    """A block replaces the table of 512 pages, which must be neither leaked nor left in place (3c3736cd32bf)."""
    block_sized(vm, huge=True)
    vm.set_flags(IPA, SlotFlags.LOG_DIRTY_PAGES)
    vm.guest.fill(IPA, 8)
    vm.dirty_pages(IPA)
    assert not stage2(vm).leaf(IPA).is_block
    vm.set_flags(IPA, SlotFlags.NONE)
    vm.guest.fill(IPA, 8, seed=1)
    assert stage2(vm).leaf(IPA).is_block
    assert vm.guest.check(IPA, 8, seed=1) == []
