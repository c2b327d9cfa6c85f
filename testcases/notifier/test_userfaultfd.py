"""userfaultfd: the VMM handles the page faults of its own memory, and so those of its guests.

mm/userfaultfd.c, fs/userfaultfd.c (handle_userfault). Post-copy migration and live snapshots depend on it.
"""

import errno
from contextlib import ExitStack

import pytest
from arm_kvm.vocabulary import PAGE, Advice, HostOsError, Operation, content_of

IPA = 0x8000_0000
resting, hammering = pytest.mark.resting, pytest.mark.hammering
pytestmark = [pytest.mark.native, pytest.mark.vcpus(2, pinned=True)]


@resting
def test_missing_pages_are_filled_in(scene):
    """The guest waits in its fault until the VMM has provided the page, and then reads its content."""
    scene.memory.advise(Advice.DONTNEED, 8 * PAGE, 16 * PAGE)
    with scene.memory.userfaults(8 * PAGE, 16 * PAGE) as faults:
        got = [scene.vm.guest.read(IPA + page * PAGE) for page in range(8, 24)]
    assert got == [content_of(scene.memory.hva + page * PAGE) for page in range(8, 24)]
    assert faults.seen == [(page * PAGE, "missing") for page in range(8, 24)]
    scene.stage2()


@hammering
def test_missing_pages_are_filled_in_while_guests_write(scene):
    with scene.memory.userfaults(8 * PAGE, 16 * PAGE) as faults, scene.guests_at_work():
        scene.memory.advise(Advice.DONTNEED, 8 * PAGE, 16 * PAGE)
        scene.wait_for_a_round()
    assert {offset // PAGE for offset, _ in faults.seen} == set(range(8, 24))


@pytest.fixture
def protectable(scene, host):
    """The scene, on a kernel whose userfaultfd can write-protect."""
    if host.kernel_version < (5, 14):
        pytest.skip("before 5.14 userfaultfd does not write-protect; arm64 5.10 accepts the request and ignores it")
    try:
        with scene.memory.userfaults(0, PAGE, protect=True):
            pass
    except HostOsError as e:
        if e.errno != errno.EINVAL:
            raise
        pytest.skip(f"userfaultfd of this kernel cannot write-protect ({e.call})")
    return scene


@resting
def test_write_protected_pages(protectable):
    """Stores wait until the VMM permits them; loads do not."""
    scene = protectable
    with ExitStack() as stack:
        with scene.host_does(Operation.UFFD_PROTECT, 8, 16):
            faults = stack.enter_context(scene.memory.userfaults(8 * PAGE, 16 * PAGE, protect=True))
        scene.vm.guest.read(IPA + 8 * PAGE)
        assert not scene.leaf(8).writable
        scene.vm.guest.fill(IPA + 8 * PAGE + 0x800, 4)
    assert {page // PAGE for page, _ in faults.seen} >= set(range(8, 12))
    scene.settle()


@hammering
def test_write_protected_pages_while_guests_write(protectable):
    scene = protectable
    with ExitStack() as stack:
        with scene.host_does(Operation.UFFD_PROTECT, 8, 16):
            faults = stack.enter_context(scene.memory.userfaults(8 * PAGE, 16 * PAGE, protect=True))
        scene.guests_write_every_page()
    assert {page // PAGE for page, _ in faults.seen} >= set(range(8, 12))
    scene.settle()


@resting
def test_dontneed_under_userfaultfd(scene):
    """Each time the page is dropped, the next access must be reported to the VMM again."""
    with scene.memory.userfaults(8 * PAGE, PAGE) as faults:
        for _ in range(3):
            with scene.host_does(Operation.DONTNEED, 8, 1):
                scene.memory.advise(Advice.DONTNEED, 8 * PAGE, PAGE)
            scene.vm.guest.read(IPA + 8 * PAGE)
    assert len(faults.seen) >= 3
    assert {offset for offset, _ in faults.seen} == {8 * PAGE}
    scene.stage2()


@hammering
def test_dontneed_under_userfaultfd_while_guests_write(scene):
    with scene.memory.userfaults(8 * PAGE, PAGE) as faults, scene.guests_at_work():
        for _ in range(3):
            with scene.host_does(Operation.DONTNEED, 8, 1):
                scene.memory.advise(Advice.DONTNEED, 8 * PAGE, PAGE)
    assert {offset for offset, _ in faults.seen} == {8 * PAGE}
    scene.stage2()
