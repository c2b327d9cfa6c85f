"""Pages that move to another frame: compaction, and soft offlining of a frame that may be bad.

mm/migrate.c unmap_and_move, mm/compaction.c, mm/memory-failure.c soft_offline_page.
"""

import numpy as np
import pytest
from arm_kvm.host import facilities
from arm_kvm.model.kvm.notifier import Call, Operation
from arm_kvm.oracle.witness import calls_in
from arm_kvm.vmm.memory import BLOCK, PAGE, Advice

IPA = 0x8000_0000
PAGES = 2048
_HOG = 400 << 20
pytestmark = [pytest.mark.native, pytest.mark.vcpus(2, pinned=True)]


@pytest.mark.needs("memory-failure")
def test_soft_offline(scene, host):
    """Each page leaves its frame, which is not used again; the content goes with it."""
    before = scene.memory.frames(8 * PAGE, 4 * PAGE)
    with scene.host_does(Operation.MIGRATE, 8, 4):
        facilities.drain_lru(host)
        scene.memory.advise(Advice.SOFT_OFFLINE, 8 * PAGE, 4 * PAGE)
    assert not np.isin(scene.memory.frames(8 * PAGE, 4 * PAGE), before).any()
    scene.settle()


def test_compaction(make_scene, host, trace, ssh):
    """Memory full of holes is compacted: some pages of the guest find themselves in other frames."""
    hog = None

    def memory(vm):
        """Two halves at either end of the host's free memory: compaction moves what lies low."""
        nonlocal hog
        memory, hog = vm.memory(PAGES * PAGE, align=BLOCK), vm.memory(_HOG, align=BLOCK)
        hog.advise(Advice.HUGEPAGE)
        memory.write(0, bytes(PAGES // 2 * PAGE))
        for offset in range(0, _HOG, BLOCK):
            hog.write(offset, b"x")
        memory.write(PAGES // 2 * PAGE, bytes(PAGES // 2 * PAGE))
        return memory

    scene = make_scene(memory=memory)
    hog.advise(Advice.DONTNEED)
    kept = np.arange(0, PAGES, 8)
    for page in range(0, PAGES, 8):
        scene.memory.advise(Advice.DONTNEED, (page + 1) * PAGE, 7 * PAGE)
    with scene.guest_activity(), trace(f"kvm:{Call.UNMAP.value}") as events:
        before = scene.memory.frames()[kept]
        facilities.compact_memory(host)
        scene.stage2()
    moved = kept[before != scene.memory.frames()[kept]]
    told = {start for _, (start, _) in calls_in(events)}
    assert told >= set((scene.memory.hva + moved * PAGE).tolist())
    # A large host may have its pages where they belong already; there soft offlining has moved some for certain.
    assert len(moved) or "memory-failure" in host.config.can
    scene.settle(lost=np.setdiff1d(np.arange(PAGES), kept))
