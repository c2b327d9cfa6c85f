"""Blocks: transparent huge pages that are split, copied and collapsed, huge pages of files, and hugetlbfs.

mm/huge_memory.c __split_huge_pmd notifies of the aligned 2 MiB, however small the range of the request; khugepaged.c
collapse_huge_page moves 512 pages into one. A block must never map what is no longer one huge page (127393fbe597).
"""

import numpy as np
import pytest
from arm_kvm.vocabulary import BLOCK, PAGE, Advice, Call, Operation, Prot, calls_in, huge_pages

IPA = 0x8000_0000
IN_A_BLOCK = BLOCK // PAGE
resting, hammering = pytest.mark.resting, pytest.mark.hammering
pytestmark = [pytest.mark.native, pytest.mark.vcpus(2, pinned=True)]


@pytest.fixture
def huge(make_scene):
    """A scene over two transparent huge pages, each mapped by a block."""

    def memory(vm):
        memory = vm.memory(2 * BLOCK, align=BLOCK)
        memory.advise(Advice.HUGEPAGE)
        return memory

    scene = make_scene(memory=memory)
    assert scene.leaf(0).is_block and scene.leaf(IN_A_BLOCK).is_block
    return scene


@resting
def test_dontneed_of_a_page_in_a_block(huge):
    with huge.host_does(Operation.DONTNEED, 5, 1):
        huge.memory.advise(Advice.DONTNEED, 5 * PAGE, PAGE)
    assert huge.vm.guest.read(IPA + 5 * PAGE) == 0
    assert not huge.leaf(5).is_block and huge.leaf(IN_A_BLOCK).is_block
    huge.settle(lost=[5])


@hammering
def test_dontneed_of_a_page_in_a_block_while_guests_write(huge):
    with huge.host_does(Operation.DONTNEED, 5, 1):
        huge.memory.advise(Advice.DONTNEED, 5 * PAGE, PAGE)
    huge.settle(lost=[5])


def test_protecting_a_page_in_a_block(huge):
    with huge.guest_activity():
        with huge.host_does(Operation.MPROTECT_READ, 9, 1):
            huge.memory.protect(Prot.READ, 9 * PAGE, PAGE)
        with huge.host_does(Operation.MPROTECT_WIDER, 9, 1):
            huge.memory.protect(Prot.READ_WRITE, 9 * PAGE, PAGE)
    huge.settle()


def test_split_that_takes_nothing(huge):
    """Another permission for one page splits the mapping only: KVM is notified of all 2 MiB, but no frame changes."""
    frames = huge.memory.frames()
    with huge.host_does(Operation.THP_SPLIT, 9, 1):
        huge.memory.protect(Prot.ALL, 9 * PAGE, PAGE)
    assert (huge.memory.frames() == frames).all()
    huge.settle()


def test_split_by_moving_a_page(huge):
    """mremap of one page splits the block; its neighbours keep their content and place."""
    elsewhere = huge.vm.memory(PAGE)
    page = huge.memory.part(7 * PAGE, PAGE)
    with huge.guest_activity():
        with huge.host_does(Operation.MREMAP, 7, 1):
            page.move(elsewhere)
        elsewhere.move(page)
    elsewhere.replace()
    huge.settle()


@resting
def test_split_of_the_page_itself(huge, host, ssh):
    """debugfs split_huge_pages splits the huge page itself, so no block may map it."""
    with huge.host_does(Operation.THP_SPLIT_PAGE):
        huge_pages.split_all(host)
    assert huge.vm.guest.read(IPA + 8) == 1
    assert not huge.leaf(0).is_block
    huge.settle()


@hammering
def test_split_of_the_page_itself_while_guests_write(huge, host, ssh):
    with huge.host_does(Operation.THP_SPLIT_PAGE):
        huge_pages.split_all(host)
    huge.settle()


@resting
def test_copy_on_write_of_a_huge_page(huge, fork, host):
    """Up to 5.7 the whole huge page is copied; later its mapping is split and one page is copied."""
    whole = host.kernel_version < (5, 8)
    child = fork()
    if not whole:  # 5.4.y would copy for a guest that only reads: see test_fork.py
        assert huge.vm.guest.read(IPA + 8) == 1
        assert huge.leaf(0).is_block and not huge.leaf(0).writable
    with huge.host_does(Operation.COW_COPY_HUGE if whole else Operation.COW_COPY, 5, 1):
        huge.memory.write(5 * PAGE + 0x800, b"\xfe\xca\0\0")
    assert huge.vm.guest.read(IPA + 5 * PAGE + 0x800) == 0xCAFE
    assert child.read(huge.memory, 5 * PAGE + 0x800, 2) == b"\0\0"
    assert huge.leaf(5).is_block == whole
    huge.settle()


def test_split_of_a_huge_page_of_a_file(make_scene, huge_files, known_fault):
    """The huge page's mapping is dropped, not split: pages of a file are mapped again when they are next accessed."""
    scene = make_scene(2 * IN_A_BLOCK, shared=True)
    frames = scene.memory.frames()
    in_a_row = frames[0] % BLOCK == 0 and (np.diff(frames[:IN_A_BLOCK]) == PAGE).all()
    if in_a_row and not scene.leaf(0).is_block:
        known_fault("no-blocks-of-files")
    assert scene.leaf(0).is_block and scene.leaf(IN_A_BLOCK).is_block
    with scene.host_does(Operation.THP_SPLIT_FILE, 9, 1):
        scene.memory.protect(Prot.ALL, 9 * PAGE, PAGE)
    scene.settle()


def slept(splat):
    """Whether the splat says that khugepaged slept in the notifier."""
    return "include/linux/mmu_notifier.h" in splat and "Comm: khugepaged" in splat


@pytest.fixture
def collapsed(make_scene, khugepaged):
    """A scene over 1,024 pages that khugepaged has collapsed into two huge pages; their old frames are gone."""
    scene = make_scene(2 * IN_A_BLOCK)
    assert not scene.leaf(0).is_block
    with scene.host_does(Operation.THP_COLLAPSE):
        scene.memory.advise(Advice.HUGEPAGE)
        khugepaged.scan()
    return scene


@resting
def test_collapse(collapsed, quiet):
    """The guest's next fault maps a block."""
    assert collapsed.vm.guest.read(IPA + 8) == 1
    assert collapsed.leaf(0).is_block
    collapsed.settle()
    quiet(slept, "sleeps-with-page-table-mapped")


@hammering
def test_collapse_while_guests_write(collapsed, quiet):
    collapsed.settle()
    quiet(slept, "sleeps-with-page-table-mapped")


@pytest.fixture
def asked(khugepaged, trace):
    """``asked(scene)``: the blocks that khugepaged tested for use in stage 2, and those that it then unmapped."""

    def look(scene):
        with trace(*(f"kvm:{call.value}" for call in (Call.TEST, Call.UNMAP))) as events:
            scene.memory.advise(Advice.HUGEPAGE)
            khugepaged.scan()
        calls = [(call, start - scene.memory.hva & -BLOCK) for call, (start, _) in calls_in(events)]
        return [{at for call, at in calls if call is wanted} & {0, BLOCK} for wanted in (Call.TEST, Call.UNMAP)]

    return look


@resting
@pytest.mark.feature("MADV_COLD")
def test_what_only_the_guest_uses(make_scene, asked, quiet):
    """Only stage 2 knows that the pages were used: khugepaged tests it (test_young) and begins to collapse them.

    It tests again after they have been unmapped (mm/khugepaged.c __collapse_huge_page_isolate), and gives up.
    """
    scene = make_scene(2 * IN_A_BLOCK)
    scene.memory.advise(Advice.COLD)  # clears the host's own flags, and does not notify KVM
    assert asked(scene) == [{0, BLOCK}, {0, BLOCK}]
    scene.settle()
    quiet(slept, "sleeps-with-page-table-mapped")


@resting
@pytest.mark.feature("MADV_COLD")
@pytest.mark.needs("idle-tracking")
def test_what_nobody_uses(make_scene, asked):
    """With the guest's accessed flags cleared, too, khugepaged leaves the pages alone."""
    scene = make_scene(2 * IN_A_BLOCK)
    scene.memory.mark_idle()
    scene.memory.advise(Advice.COLD)
    assert asked(scene) == [{0, BLOCK}, set()]
    scene.settle()


def test_hugetlbfs(make_scene):
    """An explicit huge page is unmapped as a whole and mapped as a whole again."""
    scene = make_scene(2 * IN_A_BLOCK, huge=True)
    assert scene.leaf(0).is_block
    with scene.guest_activity():
        with scene.host_does(Operation.MPROTECT_NONE, 0, IN_A_BLOCK):
            scene.memory.protect(Prot.NONE, 0, BLOCK)
        scene.memory.protect(Prot.READ_WRITE, 0, BLOCK)
    scene.settle()
