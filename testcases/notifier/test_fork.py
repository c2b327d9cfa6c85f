"""fork: parent, child and guest share pages until one of them writes.

mm/memory.c copy_page_range, wp_page_copy. Whoever writes gets the copy; the guest is the parent. Up to 6.9 change_pte
maps the copy read-only at once where a level 3 table is left.
"""

import pytest
from arm_kvm.model.kvm.notifier import Operation
from arm_kvm.vmm.memory import PAGE

IPA = 0x8000_0000
pytestmark = [pytest.mark.native, pytest.mark.vcpus(2, pinned=True)]


def test_fork_takes_write_permission(scene, fork):
    """What the guest may still write is not what the child has. (5.4.y copies for a guest that only reads, too:
    17839856fd58, "gup: document and work around 'COW can break either way' issue".)"""
    kept = scene.memory.frame()
    with scene.hammering_if_busy():
        with scene.host_does(Operation.FORK):
            child = fork()
        at_fork = child.read(scene.memory, 0, scene.memory.size)
        scene.stage2()
    if not scene.busy:
        assert scene.vm.guest.read(IPA + 8) == 1
        assert not (scene.leaf(0).writable and scene.leaf(0).pa == kept)
    with scene.guests_at_work():
        pass
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
    with scene.guests_at_work():
        pass
    scene.settle()


def test_parent_writes_first(scene, fork):
    """Its copy replaces the old frame in stage 2: the guest sees what the parent wrote."""
    fork()
    if scene.busy:
        with scene.guests_at_work():
            for page in range(16):
                scene.memory.write(page * PAGE + 0x800, b"here")
                scene.stage2()
        scene.settle()
        return
    assert scene.vm.guest.read(IPA + 8) == 1  # has a level 3 table made
    with scene.host_does(Operation.COW_COPY, 5, 1):
        scene.memory.write(5 * PAGE + 0x800, b"\xfe\xca\0\0")
    assert scene.vm.guest.read(IPA + 5 * PAGE + 0x800) == 0xCAFE
    scene.settle()


def test_child_writes_first(scene, fork):
    """The child gets the copy; parent and guest keep the frame, and KVM is told nothing."""
    child = fork()
    frame = scene.memory.frame(5 * PAGE)
    with scene.host_does(Operation.CHILD_WRITE, 5, 1):
        child.write(scene.memory, 5 * PAGE + 0x800, b"\xfe\xca\0\0")
    if not scene.busy:
        assert scene.vm.guest.read(IPA + 5 * PAGE + 0x800) == 0
        assert scene.memory.frame(5 * PAGE) == frame
    scene.settle()


def test_sole_owner_keeps_its_page(scene, fork):
    """After the child's exit the parent may write without a copy: then nobody is told."""
    child = fork()
    assert scene.vm.guest.read(IPA + 5 * PAGE) >= 1
    child.write(scene.memory, 5 * PAGE, b"gone")
    frame = scene.memory.frame(5 * PAGE)
    if not scene.busy:
        with scene.host_does(Operation.COW_REUSE, 5, 1):
            scene.memory.write(5 * PAGE + 0x800, b"here")
        assert scene.memory.frame(5 * PAGE) == frame
    with scene.guests_at_work():
        pass
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
