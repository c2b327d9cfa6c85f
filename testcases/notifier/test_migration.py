"""Pages that move to another frame: by compaction, and by soft offlining of a frame that may be bad.

mm/migrate.c unmap_and_move, mm/compaction.c, mm/memory-failure.c soft_offline_page.
"""

import numpy as np
import pytest
from arm_kvm.vocabulary import BLOCK, PAGE, Advice, Call, Operation, calls_in, facilities

IPA = 0x8000_0000
PAGES = 2048
HOG = 400 << 20
pytestmark = [pytest.mark.native, pytest.mark.vcpus(2, pinned=True)]


@pytest.mark.needs("memory-failure")
def test_soft_offline(scene, host):
    """Each page leaves its frame, which is not used again, and keeps its content."""
    before = scene.memory.frames(8 * PAGE, 4 * PAGE)
    with scene.host_does(Operation.MIGRATE, 8, 4):
        facilities.drain_lru(host)
        scene.memory.advise(Advice.SOFT_OFFLINE, 8 * PAGE, 4 * PAGE)
    assert not np.isin(scene.memory.frames(8 * PAGE, 4 * PAGE), before).any()
    scene.settle()


def either_end(vm):
    """Memory with its halves at either end of the host's free memory, and the memory that keeps them apart.

    Compaction moves pages from low frames to high ones.
    """
    memory, hog = vm.memory(PAGES * PAGE, align=BLOCK), vm.memory(HOG, align=BLOCK)
    hog.advise(Advice.HUGEPAGE)
    memory.write(0, bytes(PAGES // 2 * PAGE))
    for offset in range(0, HOG, BLOCK):
        hog.write(offset, b"x")
    memory.write(PAGES // 2 * PAGE, bytes(PAGES // 2 * PAGE))
    return memory, hog


def test_compaction(make_scene, vm, host, trace, ssh):
    """The host's memory is full of holes and is compacted, which moves some of the guest's pages to other frames."""
    memory, hog = either_end(vm)
    scene = make_scene(memory=lambda _: memory)
    hog.advise(Advice.DONTNEED)
    kept = np.arange(0, PAGES, 8)
    for page in range(0, PAGES, 8):
        scene.memory.advise(Advice.DONTNEED, (page + 1) * PAGE, 7 * PAGE)
    with scene.guest_activity(), trace(f"kvm:{Call.UNMAP.value}") as events:
        before = scene.memory.frames()[kept]
        facilities.compact_memory(host)
        scene.stage2()
    moved = kept[before != scene.memory.frames()[kept]]
    notified = {start for _, (start, _) in calls_in(events)}
    assert notified >= set((scene.memory.hva + moved * PAGE).tolist())
    # On a large host the pages may already be where compaction wants them; there test_soft_offline moves some.
    assert len(moved) or "memory-failure" in host.config.can
    scene.settle(lost=np.setdiff1d(np.arange(PAGES), kept))
