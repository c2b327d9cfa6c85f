"""madvise(2) that drops pages: MADV_DONTNEED and MADV_FREE.

mm/madvise.c: madvise_dontneed_single_vma, madvise_free_single_vma. virt/kvm/arm/mmu.c (5.4) kvm_unmap_hva_range.
"""

import pytest
from arm_kvm.vocabulary import PAGE, Advice, Operation

IPA = 0x8000_0000
resting, hammering = pytest.mark.resting, pytest.mark.hammering
pytestmark = [pytest.mark.native, pytest.mark.vcpus(2, pinned=True)]


@resting
def test_dontneed(scene):
    """The pages are unmapped at once, and the guest reads zeroes."""
    with scene.host_does(Operation.DONTNEED, 8, 16) as seen:
        scene.memory.advise(Advice.DONTNEED, 8 * PAGE, 16 * PAGE)
    assert all(seen.after[scene.vm.id].leaf(IPA + page * PAGE) is None for page in range(8, 24))
    assert scene.vm.guest.read(IPA + 8 * PAGE) == 0
    scene.settle(lost=range(8, 24))


@hammering
def test_dontneed_while_guests_write(scene):
    with scene.host_does(Operation.DONTNEED, 8, 16):
        scene.memory.advise(Advice.DONTNEED, 8 * PAGE, 16 * PAGE)
    scene.settle(lost=range(8, 24))


def test_dontneed_of_all(scene):
    with scene.host_does(Operation.DONTNEED):
        scene.memory.advise(Advice.DONTNEED)
    scene.settle(lost=range(scene.pages))


def test_dontneed_again_and_again(scene):
    """Faults and notifications race for the same pages."""
    for _ in range(8):
        with scene.host_does(Operation.DONTNEED, 30, 4):
            scene.memory.advise(Advice.DONTNEED, 30 * PAGE, 4 * PAGE)
    scene.settle(lost=range(30, 34))


def test_free_keeps_what_is_written_again(scene):
    """MADV_FREE leaves pages mapped until they are reclaimed; a page that is written again is kept.

    So no leaf may stay writable, or the host would miss the store and drop the page.
    """
    with scene.host_does(Operation.FREE, 0, 32):
        scene.memory.advise(Advice.FREE, 0, 32 * PAGE)
    scene.guests_write_every_page()
    scene.settle()
