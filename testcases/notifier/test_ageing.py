"""Ageing: the host tests and clears the accessed flag of a page, in stage 2 as well.

mm/page_idle.c (clear_young), mm/rmap.c page_referenced (clear_flush_young), virt/kvm/arm/mmu.c kvm_age_hva. Ageing must
not unmap anything or take a permission away. A guest's next access must set the flag again, and the host must see it
(cf2d23e0bac9).
"""

import pytest
from arm_kvm.vocabulary import PAGE, Advice, Call, Operation, descriptors, facilities

IPA = 0x8000_0000
pytestmark = [pytest.mark.native, pytest.mark.vcpus(2, pinned=True)]
resting, hammering = pytest.mark.resting, pytest.mark.hammering
idle = pytest.mark.needs("idle-tracking")


def young(scene, page):
    """Whether the accessed flag of the leaf that maps this page is set."""
    return bool(descriptors.AF.of(scene.leaf(page).desc))


@idle
@resting
def test_marking_idle_clears_the_access_flag(scene):
    with scene.host_does(Operation.AGE, 8, 16):
        scene.memory.mark_idle(8 * PAGE, 16 * PAGE)
    assert not any(young(scene, page) for page in range(8, 24))
    assert young(scene, 7) and young(scene, 24)
    scene.settle()


@idle
@hammering
def test_marking_idle_while_guests_write(scene):
    with scene.host_does(Operation.AGE, 8, 16):
        scene.memory.mark_idle(8 * PAGE, 16 * PAGE)
    scene.settle()


@idle
@resting
def test_the_guests_access_is_seen(scene):
    scene.memory.mark_idle(8 * PAGE, 16 * PAGE)
    assert scene.memory.idle(8 * PAGE, 16 * PAGE) == [True] * 16
    scene.vm.guest.read(IPA + 8 * PAGE)
    scene.vm.guest.write(IPA + 9 * PAGE, 1)
    assert young(scene, 8) and young(scene, 9) and not young(scene, 10)
    assert scene.memory.idle(8 * PAGE, 16 * PAGE) == [False] * 2 + [True] * 14


@idle
@hammering
def test_the_stores_of_both_guests_are_seen(scene):
    scene.memory.mark_idle(8 * PAGE, 16 * PAGE)
    scene.guests_write_every_page()
    assert scene.memory.idle(8 * PAGE, 16 * PAGE) == [False] * 16
    scene.settle()


@idle
@resting
def test_the_entry_is_as_it_was_after_the_next_access(scene):
    """The access sets the flag again and changes nothing else."""
    leaf = scene.leaf(8)
    scene.memory.mark_idle(8 * PAGE, PAGE)
    scene.vm.guest.read(IPA + 8 * PAGE)
    assert scene.leaf(8) == leaf


@idle
@hammering
def test_marking_idle_again_and_again(scene):
    with scene.guests_at_work():
        for _ in range(8):
            scene.memory.mark_idle()
    scene.settle()


@pytest.fixture
def pageout_ages(host, swap):
    """A host whose MADV_PAGEOUT (up to 6.8) ages pages (clear_flush_young) and leaves those that were used."""
    if host.kernel_version >= (6, 9):
        pytest.skip("since 6.9 MADV_PAGEOUT does not age pages (mm/vmscan.c reclaim_folio_list, ignore_references)")


@resting
@pytest.mark.feature("MADV_PAGEOUT")
def test_reclaim_ages_first(scene, host, pageout_ages):
    facilities.drain_lru(host)
    with scene.host_does(Operation.AGE, 8, 16):
        scene.memory.advise(Advice.PAGEOUT, 8 * PAGE, 16 * PAGE)
    assert not any(young(scene, page) for page in range(8, 24))
    assert scene.vm.guest.read(IPA + 8 * PAGE + 8) == 9
    assert young(scene, 8) and not young(scene, 9)
    scene.settle()


@hammering
@pytest.mark.feature("MADV_PAGEOUT")
def test_reclaim_ages_first_while_guests_write(scene, host, pageout_ages):
    facilities.drain_lru(host)
    with scene.host_does(Operation.AGE, 8, 16):
        scene.memory.advise(Advice.PAGEOUT, 8 * PAGE, 16 * PAGE)
    scene.settle()


def test_reclaim_asks_before_it_takes(scene, host, cgroup, swap, trace):
    """Under pressure in a memory cgroup pages are aged first (up to 6.8), then unmapped; no store is lost."""
    more = scene.vm.memory(4 << 20)  # charged to the cgroup, unlike the scene's own memory
    more.write(0, bytes(4 << 20))
    scene.vm.add_memory(IPA + (1 << 24), 4 << 20, memory=more)
    scene.vm.guest.fill(IPA + (1 << 24), 1024)
    with scene.guest_activity(), trace(f"kvm:{Call.AGE.value}", f"kvm:{Call.UNMAP.value}") as events:
        cgroup.reclaim(2 << 20)
    calls = {Call(event.name) for event in events}
    assert Call.UNMAP in calls
    assert Call.AGE in calls or host.kernel_version >= (6, 9)
    assert scene.vm.guest.check(IPA + (1 << 24), 1024) == []
    scene.settle()
