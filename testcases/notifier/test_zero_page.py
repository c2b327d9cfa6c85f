"""The zero page: what a guest reads that nobody has written yet, until somebody writes it.

mm/memory.c do_anonymous_page, wp_page_copy. Up to 6.9 change_pte maps the new page read-only at once where a level 3
table is left.
"""

import pytest
from arm_kvm.model.kvm.notifier import CHANGE_PTE_GONE, Operation
from arm_kvm.oracle import Verdict, Violation
from arm_kvm.vmm.memory import PAGE, Advice

IPA = 0x8000_0000
pytestmark = [pytest.mark.native, pytest.mark.vcpus(2, pinned=True)]


@pytest.fixture
def stale(host, scene, known_fault):
    """``stale(violation)``: a page that DONTNEED took is mapped; known up to 6.9, if it is nothing else."""

    def judge(violation):
        known = "arm64" in host.config.can and host.kernel_version < CHANGE_PTE_GONE
        dropped = all(IPA + 8 * PAGE <= finding.ipa < IPA + 24 * PAGE for finding in violation.findings)
        if not known or not dropped or violation.verdicts != {Verdict.WRONG_FRAME}:
            raise violation
        scene.vm.destroy()
        known_fault(
            "a change_pte between another invalidation's start and its end maps a page that goes, and a permission "
            "fault makes it writable (change_pte: removed in 6.10)"
        )

    return judge


def test_host_writes_first(scene, host, stale):
    """The guest has read zeroes; what the host then writes is in another frame, and stage 2 must not keep the old one.

    (5.4.y gives a guest that only reads a page of its own, which the host then writes to: see test_fork.py.)
    """
    scene.memory.advise(Advice.DONTNEED, 8 * PAGE, 16 * PAGE)
    if scene.busy:
        found = None
        with scene.guests_at_work():
            for page in range(8, 24):
                scene.memory.advise(Advice.DONTNEED, page * PAGE, PAGE)
                scene.memory.write(page * PAGE + 0x800, b"here")
                try:
                    scene.stage2()
                except Violation as e:
                    found = e
                    break
        if found:
            stale(found)
        for page in range(8, 24):
            assert scene.memory.read(page * PAGE + 0x800, 4) == b"here"
            assert scene.vm.guest.read(IPA + page * PAGE + 0x800) == int.from_bytes(b"here", "little")
        scene.settle(lost=range(8, 24))
        return
    assert [scene.vm.guest.read(IPA + page * PAGE) for page in (8, 9)] == [0, 0]
    common = scene.leaf(8).pa == scene.leaf(9).pa
    assert common or host.kernel_version < (5, 10)
    with scene.host_does(Operation.ZERO_WRITE if common else Operation.COW_REUSE, 8, 1):
        scene.memory.write(8 * PAGE + 0x800, b"\xfe\xca\0\0")
    assert scene.vm.guest.read(IPA + 8 * PAGE + 0x800) == 0xCAFE
    assert scene.vm.guest.read(IPA + 9 * PAGE + 0x800) == 0
    scene.settle(lost=range(8, 24))
