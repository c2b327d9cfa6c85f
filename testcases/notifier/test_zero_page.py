"""The zero page, which a guest reads from memory that has not been written, and its replacement by the first store.

mm/memory.c do_anonymous_page, wp_page_copy. Up to 6.9 change_pte maps the new page read-only at once where a level 3
table is left.
"""

import pytest
from arm_kvm.vocabulary import PAGE, Advice, Operation, Verdict, Violation

IPA = 0x8000_0000
resting, hammering = pytest.mark.resting, pytest.mark.hammering
pytestmark = [pytest.mark.native, pytest.mark.vcpus(2, pinned=True)]


@resting
def test_host_writes_first(scene, host):
    """The guest has read zeroes; the host's store goes to another frame, and stage 2 must not keep the old one.

    (5.4.y gives a guest that only reads a page of its own, to which the host then writes: see test_fork.py.)
    """
    scene.memory.advise(Advice.DONTNEED, 8 * PAGE, 16 * PAGE)
    assert [scene.vm.guest.read(IPA + page * PAGE) for page in (8, 9)] == [0, 0]
    common = scene.leaf(8).pa == scene.leaf(9).pa
    assert common or host.kernel_version < (5, 10)
    with scene.host_does(Operation.ZERO_WRITE if common else Operation.COW_REUSE, 8, 1):
        scene.memory.write(8 * PAGE + 0x800, b"\xfe\xca\0\0")
    assert scene.vm.guest.read(IPA + 8 * PAGE + 0x800) == 0xCAFE
    assert scene.vm.guest.read(IPA + 9 * PAGE + 0x800) == 0
    scene.settle(lost=range(8, 24))


def stays_mapped(violation, pages):
    """Whether all that is wrong is that stage 2 still maps some of these pages, which the host has dropped."""
    dropped = range(IPA + pages.start * PAGE, IPA + pages.stop * PAGE)
    return violation.verdicts == {Verdict.WRONG_FRAME} and all(found.ipa in dropped for found in violation.findings)


@hammering
def test_host_and_guests_write_at_once(scene, known_fault):
    """Pages are dropped one by one, and host and guests write to each new page at once."""
    pages = range(8, 24)
    scene.memory.advise(Advice.DONTNEED, 8 * PAGE, 16 * PAGE)
    try:
        with scene.guests_at_work():
            for page in pages:
                scene.memory.advise(Advice.DONTNEED, page * PAGE, PAGE)
                scene.memory.write(page * PAGE + 0x800, b"here")
                scene.stage2()
    except Violation as violation:
        if not stays_mapped(violation, pages):
            raise
        scene.vm.destroy()
        known_fault("stale-page-after-change-pte")
    for page in pages:
        assert scene.memory.read(page * PAGE + 0x800, 4) == b"here"
        assert scene.vm.guest.read(IPA + page * PAGE + 0x800) == int.from_bytes(b"here", "little")
    scene.settle(lost=pages)
