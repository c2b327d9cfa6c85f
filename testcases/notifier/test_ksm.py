"""Samepage merging: pages with the same content become one read-only frame; a store unmerges them.

mm/ksm.c write_protect_page and replace_page notify of each page. Up to 6.9 they also call change_pte with the frame
that is now shared (kvm_set_spte_hva), which stage 2 may map read-only.
"""

import numpy as np
import pytest
from arm_kvm.vocabulary import PAGE, Advice, Call, Operation, calls_in, facilities

IPA = 0x8000_0000
SAME = range(8, 24)
MANY = 2048  #: pages, so many that the guests are elsewhere most of the time
_TRIES = 20
resting, hammering = pytest.mark.resting, pytest.mark.hammering
pytestmark = [pytest.mark.native, pytest.mark.vcpus(2, pinned=True)]


@pytest.fixture
def alike(scene):
    """A scene whose pages 8 to 23 have the same content."""
    for page in SAME:
        scene.memory.write(page * PAGE, b"alike " * 100 + bytes(PAGE - 600))
    scene.memory.advise(Advice.MERGEABLE)
    yield scene
    scene.memory.advise(Advice.UNMERGEABLE)


def frames(scene):
    """The frames behind the pages that were alike."""
    return {int(frame) for frame in scene.memory.frames(SAME.start * PAGE, len(SAME) * PAGE)}


@resting
def test_merge(alike, host, witness):
    """All these pages become one frame, which the guest may read but not write."""
    vm, before = alike.vm, alike.memory.frames()
    with witness(Operation.KSM_PROTECT, alike.memory, SAME.start * PAGE, len(SAME) * PAGE) as seen:
        facilities.merge_pages(host)
        for page in np.flatnonzero(alike.memory.frames() != before).tolist():
            seen.also(Operation.KSM_MERGE, alike.memory, page * PAGE, PAGE)
    assert len(frames(alike)) == 1
    assert seen.count(Call.UNMAP) >= len(SAME)
    assert (seen.count(Call.SET) >= len(SAME)) == (host.kernel_version < (6, 10))
    assert all(vm.guest.read(IPA + page * PAGE) == int.from_bytes(b"alik", "little") for page in SAME)
    leaves = [alike.leaf(page) for page in SAME]
    assert len({leaf.pa for leaf in leaves}) == 1 and not any(leaf.writable for leaf in leaves)


@resting
def test_a_store_of_the_guest_unmerges(alike, host):
    facilities.merge_pages(host)
    alike.vm.guest.write(IPA + 9 * PAGE, 0xCAFE)
    assert alike.leaf(9).writable
    assert len(frames(alike)) == 2
    assert alike.vm.guest.read(IPA + 10 * PAGE) == int.from_bytes(b"alik", "little")
    assert alike.memory.read(9 * PAGE, 2) == b"\xfe\xca"


@resting
def test_a_store_of_the_host_unmerges(alike, host, witness):
    facilities.merge_pages(host)
    assert alike.vm.guest.read(IPA + 9 * PAGE) == alike.vm.guest.read(IPA + 10 * PAGE)
    with witness(Operation.KSM_UNSHARE, alike.memory, 9 * PAGE, PAGE):
        alike.memory.write(9 * PAGE, b"\xfe\xca\0\0")
    assert alike.vm.guest.read(IPA + 9 * PAGE) == 0xCAFE
    assert alike.vm.guest.read(IPA + 10 * PAGE) == int.from_bytes(b"alik", "little")


@hammering
def test_merging_while_guests_write(make_scene, host, trace):
    """Pages 8 to 23 differ only while a guest has added to some of them and not yet to the others.

    ksmd write-protects, compares, and merges or gives up, while guests unmerge pages again: no store may be lost.
    """
    scene = make_scene(MANY)
    for page in SAME:
        scene.memory.write(page * PAGE + 8, bytes(4))  # clears the word in which all pages differ
    at, size = SAME.start * PAGE, len(SAME) * PAGE
    scene.memory.advise(Advice.MERGEABLE, at, size)

    def some_were_unmapped():
        with trace(f"kvm:{Call.UNMAP.value}") as events:
            facilities.merge_pages(host)
            scene.stage2()
        return any(at <= hva - scene.memory.hva < at + size for _, (hva, _) in calls_in(events))

    with scene.guests_at_work():
        merged = any(some_were_unmapped() for _ in range(_TRIES))
        assert merged or host.kernel_version < (5, 0), "ksmd merged no pages"
        for _ in range(3):
            facilities.merge_pages(host)
            scene.stage2()
    scene.settle()
    scene.memory.advise(Advice.UNMERGEABLE, at, size)
    if not merged:
        pytest.skip(f"ksmd of Linux {host.release} finds no page unchanged in two passes while guests write to all")
