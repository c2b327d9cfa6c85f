"""Swap to zram and back, and pages freed with MADV_FREE; also pages that KVM marks accessed after they were freed.

mm/vmscan.c shrink_page_list, mm/rmap.c try_to_unmap_one. A page is swapped out only once no leaf can write it.
"""

import pytest
from arm_kvm.vocabulary import PAGE, Advice, Operation, facilities

IPA = 0x8000_0000
resting, hammering = pytest.mark.resting, pytest.mark.hammering
#: On a host of their own: the use of a freed page shows only when the page is allocated again.
pytestmark = [
    pytest.mark.native,
    pytest.mark.vcpus(2, pinned=True),
    pytest.mark.usefixtures("swap", "reclaim"),
    pytest.mark.isolation("module"),
]


def accessed_late(splat):
    """Whether the splat says that KVM marked a page accessed after it had been freed."""
    of_a_free_page = "kvm_is_zone_device_pfn" in splat and "kvm_set_pfn_accessed" in splat
    return of_a_free_page or ("Bad page state" in splat and "bad because of flags: 0x2(referenced)" in splat)


@pytest.fixture
def settle(scene, quiet):
    """Settle the scene, and check that the kernel did not complain of pages reclaimed from guests at work."""

    def end(**how):
        scene.settle(**how)
        quiet(accessed_late, "accessed-after-reclaim")

    return end


@resting
def test_out_and_back(scene, settle, reclaim):
    scene.page_out(reclaim, Operation.SWAP_OUT, 8, 32)
    assert not scene.memory.frames(8 * PAGE, 32 * PAGE).any()
    assert scene.vm.guest.read(IPA + 8 * PAGE + 8) == 9
    settle()


@hammering
def test_out_and_back_while_guests_write(scene, settle, reclaim):
    scene.page_out(reclaim, Operation.SWAP_OUT, 8, 32)
    settle()


def test_in_by_the_host(scene, settle, reclaim):
    """The host's own access brings the page back; KVM is not notified, and maps it at the guest's next fault."""
    with scene.guest_activity():
        scene.page_out(reclaim, Operation.SWAP_OUT, 8, 8)
        with scene.host_does(Operation.SWAP_IN, 8, 8):
            scene.memory.read(8 * PAGE, 8 * PAGE)
    settle()


def test_out_again_and_again(scene, settle, reclaim):
    with scene.guest_activity():
        for _ in range(4):
            scene.page_out(reclaim, Operation.SWAP_OUT)
            scene.memory.read(0, scene.memory.size)
    settle()


@resting
def test_freed_pages_are_reclaimed(scene, settle, reclaim):
    """Pages freed with MADV_FREE and not written since: reclaim drops them, and the guest reads zeroes."""
    with scene.host_does(Operation.FREE, 8, 16):
        scene.memory.advise(Advice.FREE, 8 * PAGE, 16 * PAGE)
    scene.page_out(reclaim, Operation.FREE_RECLAIMED, 8, 16)
    assert scene.vm.guest.read(IPA + 8 * PAGE + 8) == 0
    settle(lost=range(8, 24))


@hammering
def test_freed_pages_are_reclaimed_while_guests_write(scene, settle, reclaim):
    with scene.guests_at_work():
        with scene.host_does(Operation.FREE, 8, 16):
            scene.memory.advise(Advice.FREE, 8 * PAGE, 16 * PAGE)
        scene.page_out(reclaim, Operation.FREE_RECLAIMED, 8, 16)
    settle(lost=range(8, 24))


@resting
@pytest.mark.feature("MADV_PAGEOUT")  # one call looks at each page once
def test_freed_pages_that_were_written_since_are_kept(scene, settle, host):
    """Reclaim unmaps each page, finds it dirty, and maps it again: this time the frame is kept."""
    scene.memory.advise(Advice.FREE, 8 * PAGE, 16 * PAGE)
    scene.guests_write_every_page()
    frames = scene.memory.frames(8 * PAGE, 16 * PAGE)
    facilities.drain_lru(host)
    with scene.host_does(Operation.RECLAIM_GIVEN_UP, 8, 16):
        for _ in range(1 if host.kernel_version >= (6, 9) else 2):  # up to 6.8 the first call only ages the pages
            scene.memory.advise(Advice.PAGEOUT, 8 * PAGE, 16 * PAGE)
    assert (scene.memory.frames(8 * PAGE, 16 * PAGE) == frames).all()
    settle()
