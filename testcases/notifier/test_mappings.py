"""munmap, mremap and mprotect: the VMM changes its own address space under a memslot that stays.

mm/mmap.c unmap_region, mm/mremap.c move_page_tables, mm/mprotect.c change_pmd_range. Where the VMM has no mapping, or
lacks the permission, KVM_RUN answers EFAULT; once it has, the guest can be run again.
"""

import errno

import pytest
from arm_kvm.vocabulary import PAGE, Operation, Prot, RunFailed

IPA = 0x8000_0000
resting, hammering = pytest.mark.resting, pytest.mark.hammering
pytestmark = [pytest.mark.native, pytest.mark.vcpus(2, pinned=True)]


def refused(access, *args):
    """Whether KVM_RUN answers this access of the guest with EFAULT."""
    with pytest.raises(RunFailed) as failure:
        access(*args)
    return failure.value.errno == errno.EFAULT


@resting
def test_munmap_with_the_memslot_left(scene):
    with scene.host_does(Operation.MUNMAP, 16, 8):
        scene.memory.unmap(16 * PAGE, 8 * PAGE)
    assert refused(scene.vm.guest.read, IPA + 16 * PAGE)
    assert refused(scene.vm.guest.write, IPA + 23 * PAGE, 1)
    scene.memory.replace(16 * PAGE, 8 * PAGE)
    scene.settle(lost=range(16, 24))


@hammering
def test_munmap_while_guests_write(scene):
    with scene.guests_at_work():
        with scene.host_does(Operation.MUNMAP, 16, 8):
            scene.memory.unmap(16 * PAGE, 8 * PAGE)
        scene.memory.replace(16 * PAGE, 8 * PAGE)
    scene.settle(lost=range(16, 24))


def test_other_memory_mapped_over_it(scene):
    """MAP_FIXED is munmap and mmap in one: the guest must see only the new pages."""
    with scene.host_does(Operation.MUNMAP, 16, 8):
        scene.memory.replace(16 * PAGE, 8 * PAGE)
    scene.settle(lost=range(16, 24))


@resting
def test_mremap_away_and_back(scene):
    """The pages move to another address and return: nothing is lost."""
    elsewhere = scene.vm.memory(scene.memory.size)
    with scene.host_does(Operation.MREMAP):
        scene.memory.move(elsewhere)
    assert refused(scene.vm.guest.read, IPA)
    elsewhere.move(scene.memory)
    elsewhere.replace()
    scene.settle()


@hammering
def test_mremap_away_and_back_while_guests_write(scene):
    elsewhere = scene.vm.memory(scene.memory.size)
    with scene.guests_at_work():
        with scene.host_does(Operation.MREMAP):
            scene.memory.move(elsewhere)
        elsewhere.move(scene.memory)
    elsewhere.replace()
    scene.settle()


@resting
def test_mprotect_to_read_only_and_back(scene):
    with scene.host_does(Operation.MPROTECT_READ, 8, 16):
        scene.memory.protect(Prot.READ, 8 * PAGE, 16 * PAGE)
    assert scene.vm.guest.read(IPA + 8 * PAGE + 8) == 9
    assert not scene.leaf(8).writable
    assert refused(scene.vm.guest.write, IPA + 9 * PAGE, 1)
    with scene.host_does(Operation.MPROTECT_WIDER, 8, 16):
        scene.memory.protect(Prot.READ_WRITE, 8 * PAGE, 16 * PAGE)
    scene.settle()


@resting
def test_mprotect_to_none_and_back(scene):
    with scene.host_does(Operation.MPROTECT_NONE, 8, 16):
        scene.memory.protect(Prot.NONE, 8 * PAGE, 16 * PAGE)
    assert refused(scene.vm.guest.read, IPA + 8 * PAGE)
    assert refused(scene.vm.guest.write, IPA + 23 * PAGE, 1)
    with scene.host_does(Operation.MPROTECT_WIDER, 8, 16):
        scene.memory.protect(Prot.READ_WRITE, 8 * PAGE, 16 * PAGE)
    scene.settle()


@hammering
@pytest.mark.parametrize(
    ("operation", "prot"),
    [(Operation.MPROTECT_READ, Prot.READ), (Operation.MPROTECT_NONE, Prot.NONE)],
    ids=["read-only", "none"],
)
def test_mprotect_and_back_while_guests_write(scene, operation, prot):
    with scene.guests_at_work():
        with scene.host_does(operation, 8, 16):
            scene.memory.protect(prot, 8 * PAGE, 16 * PAGE)
        with scene.host_does(Operation.MPROTECT_WIDER, 8, 16):
            scene.memory.protect(Prot.READ_WRITE, 8 * PAGE, 16 * PAGE)
    scene.settle()


def test_mprotect_of_one_page_again_and_again(scene):
    with scene.guest_activity():
        for _ in range(6):
            with scene.host_does(Operation.MPROTECT_READ, 40, 1):
                scene.memory.protect(Prot.READ, 40 * PAGE, PAGE)
            with scene.host_does(Operation.MPROTECT_WIDER, 40, 1):
                scene.memory.protect(Prot.READ_WRITE, 40 * PAGE, PAGE)
    scene.settle()
