"""fork: parent, child and guest share pages until one of them writes.

mm/memory.c copy_page_range, wp_page_copy. The process that writes gets the copy; the guest's stores are the parent's.
Up to 6.9 change_pte maps the copy read-only at once where a level 3 table is left.
"""

import pytest
from arm_kvm.vocabulary import PAGE, Operation

IPA = 0x8000_0000
resting, hammering = pytest.mark.resting, pytest.mark.hammering
pytestmark = [pytest.mark.native, pytest.mark.vcpus(2, pinned=True)]


@resting
def test_fork_takes_write_permission(scene, fork):
    """The guest may write to no frame that it shares with the child.

    (5.4.y copies for a guest that only reads, too: 17839856fd58, "gup: document and work around 'COW can break either
    way' issue".)
    """
    kept = scene.memory.frame()
    with scene.host_does(Operation.FORK):
        child = fork()
    at_fork = child.read(scene.memory, 0, scene.memory.size)
    scene.stage2()
    assert scene.vm.guest.read(IPA + 8) == 1
    assert not (scene.leaf(0).writable and scene.leaf(0).pa == kept)
    scene.guests_write_every_page()
    assert child.read(scene.memory, 0, scene.memory.size) == at_fork
    scene.settle()


@hammering
def test_fork_while_guests_write(scene, fork):
    """The child keeps the content of the moment of the fork, whatever the guests write afterwards."""
    with scene.guests_at_work():
        with scene.host_does(Operation.FORK):
            child = fork()
        at_fork = child.read(scene.memory, 0, scene.memory.size)
        scene.stage2()
    scene.guests_write_every_page()
    assert child.read(scene.memory, 0, scene.memory.size) == at_fork
    scene.settle()


def test_guest_writes_first(scene, fork):
    """The guest's store must not reach the frame that the child keeps."""
    child = fork()
    kept = scene.memory.frame(5 * PAGE)
    scene.vm.guest.write(IPA + 5 * PAGE + 0x800, 0xCAFE)
    assert child.read(scene.memory, 5 * PAGE + 0x800, 2) == b"\0\0"
    assert scene.leaf(5).writable
    assert scene.leaf(5).pa == scene.memory.frame(5 * PAGE) != kept
    assert scene.memory.read(5 * PAGE + 0x800, 2) == b"\xfe\xca"
    scene.guests_write_every_page()
    scene.settle()


@resting
def test_parent_writes_first(scene, fork):
    """The parent's copy replaces the old frame in stage 2, and the guest sees what the parent wrote."""
    fork()
    assert scene.vm.guest.read(IPA + 8) == 1  # makes the level 3 table
    with scene.host_does(Operation.COW_COPY, 5, 1):
        scene.memory.write(5 * PAGE + 0x800, b"\xfe\xca\0\0")
    assert scene.vm.guest.read(IPA + 5 * PAGE + 0x800) == 0xCAFE
    scene.settle()


@hammering
def test_parent_and_guests_write_at_once(scene, fork):
    fork()
    with scene.guests_at_work():
        for page in range(16):
            scene.memory.write(page * PAGE + 0x800, b"here")
            scene.stage2()
    scene.settle()


@resting
def test_child_writes_first(scene, fork):
    """The child gets the copy; parent and guest keep the frame, and KVM is not notified."""
    child = fork()
    frame = scene.memory.frame(5 * PAGE)
    with scene.host_does(Operation.CHILD_WRITE, 5, 1):
        child.write(scene.memory, 5 * PAGE + 0x800, b"\xfe\xca\0\0")
    assert scene.vm.guest.read(IPA + 5 * PAGE + 0x800) == 0
    assert scene.memory.frame(5 * PAGE) == frame
    scene.settle()


@hammering
def test_child_and_guests_write_at_once(scene, fork):
    child = fork()
    with scene.host_does(Operation.CHILD_WRITE, 5, 1):
        child.write(scene.memory, 5 * PAGE + 0x800, b"\xfe\xca\0\0")
    scene.settle()


@resting
def test_sole_owner_keeps_its_page(scene, fork):
    """Once the child has its own copy, the parent may write without copying, and KVM is not notified."""
    child = fork()
    assert scene.vm.guest.read(IPA + 5 * PAGE) >= 1
    child.write(scene.memory, 5 * PAGE, b"gone")
    frame = scene.memory.frame(5 * PAGE)
    with scene.host_does(Operation.COW_REUSE, 5, 1):
        scene.memory.write(5 * PAGE + 0x800, b"here")
    assert scene.memory.frame(5 * PAGE) == frame
    scene.guests_write_every_page()
    scene.settle()


@hammering
def test_guests_of_the_sole_owner_write(scene, fork):
    """The guest has read a page of which the child then makes its own copy; then the guests write to every page."""
    child = fork()
    assert scene.vm.guest.read(IPA + 5 * PAGE) >= 1
    child.write(scene.memory, 5 * PAGE, b"gone")
    scene.guests_write_every_page()
    scene.settle()


def test_fork_of_shared_memory_changes_nothing(make_scene, fork):
    scene = make_scene(shared=True)
    with scene.host_does(Operation.FORK) as seen:
        child = fork()
        seen.also(Operation.FORK_SHARED, scene.memory)
    child.write(scene.memory, 0x800, b"\xfe\xca\0\0")
    assert scene.vm.guest.read(IPA + 0x800) == 0xCAFE
    scene.settle()


def test_fork_again_and_again(scene, fork):
    for _ in range(4):
        with scene.host_does(Operation.FORK):
            child = fork()
        child.write(scene.memory, 7 * PAGE, b"gone")
    scene.settle()
