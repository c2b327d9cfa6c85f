"""File-backed guest memory: a memfd, and a file on a file system whose pages are written back and evicted.

mm/shmem.c shmem_fallocate, mm/memory.c unmap_mapping_range, mm/truncate.c; reclaim of file pages: mm/rmap.c
try_to_unmap_one. Beyond the end of the file KVM_RUN answers EFAULT, where a load of the VMM would get SIGBUS.
"""

import pytest
from arm_kvm.vocabulary import BLOCK, PAGE, File, Operation, RunFailed

IPA = 0x8000_0000
SIZE = 64 * PAGE
resting, hammering = pytest.mark.resting, pytest.mark.hammering
pytestmark = [pytest.mark.native, pytest.mark.vcpus(2, pinned=True)]


@pytest.fixture
def file(host):
    """A memfd of the scene's size."""
    file = File(host.agent, SIZE)
    yield file
    file.close()


@pytest.fixture
def file_on_disk(host, disk):
    """A file of the scene's size on a file system. The VMs must be gone before the file system is unmounted."""
    file = File(host.agent, SIZE, f"{disk}/guest")
    yield file
    host.reset()
    file.close()


@pytest.fixture
def scene(make_scene, file):
    """64 pages of a memfd, shared."""
    return make_scene(memory=lambda vm: vm.memory(SIZE, align=BLOCK, shared=True, file=file))


@resting
def test_punched_hole(scene, file):
    with scene.host_does(Operation.PUNCH_HOLE, 8, 16):
        file.punch_hole(8 * PAGE, 16 * PAGE)
    assert scene.vm.guest.read(IPA + 8 * PAGE + 8) == 0
    scene.settle(lost=range(8, 24))


@hammering
def test_punched_hole_while_guests_write(scene, file):
    with scene.host_does(Operation.PUNCH_HOLE, 8, 16):
        file.punch_hole(8 * PAGE, 16 * PAGE)
    scene.settle(lost=range(8, 24))


def test_hole_of_parts_of_pages(scene, file):
    """Only the page that lies wholly in the hole is dropped; parts of pages are zeroed in place."""
    with scene.host_does(Operation.PUNCH_HOLE, 9, 1):
        file.punch_hole(8 * PAGE + 0x800, 2 * PAGE)
    scene.settle(lost=[9, 10])


@resting
def test_truncated_and_grown_again(scene, file):
    with scene.host_does(Operation.TRUNCATE, 32, 32):
        file.truncate(32 * PAGE)
    with pytest.raises(RunFailed):
        scene.vm.guest.read(IPA + 32 * PAGE)
    file.truncate(SIZE)
    scene.settle(lost=range(32, 64))


@hammering
def test_truncated_and_grown_again_while_guests_write(scene, file):
    with scene.guests_at_work():
        with scene.host_does(Operation.TRUNCATE, 32, 32):
            file.truncate(32 * PAGE)
        file.truncate(SIZE)
    scene.settle(lost=range(32, 64))


def test_two_mappings_of_one_file(scene, file):
    """The guest and another mapping of the file in the VMM see each other's stores, also after a hole is punched."""
    other = scene.vm.memory(SIZE, shared=True, file=file)
    other.write(3 * PAGE + 0x800, b"\xfe\xca\0\0")
    assert scene.vm.guest.read(IPA + 3 * PAGE + 0x800) == 0xCAFE
    with scene.host_does(Operation.PUNCH_HOLE, 3, 1):
        file.punch_hole(3 * PAGE, PAGE)
    scene.vm.guest.write(IPA + 3 * PAGE + 0x800, 0xBEEF)
    assert other.read(3 * PAGE + 0x800, 2) == b"\xef\xbe"
    scene.settle(lost=[3])


def test_private_mapping_of_a_file(make_scene, file):
    """A private page belongs to the VMM once it has been written: a hole in the file must not drop it."""
    scene = make_scene(memory=lambda vm: vm.memory(SIZE, align=BLOCK, file=file))
    with scene.host_does(Operation.PUNCH_HOLE, 8, 16):
        file.punch_hole(8 * PAGE, 16 * PAGE)
    scene.settle()


@pytest.fixture
def written_back(make_scene, file_on_disk, reclaim):
    """A scene over 64 pages of a file on a disk, all written back.

    ``reclaim`` comes first, so that the pages are charged to the memory cgroup that it may use.
    """
    scene = make_scene(memory=lambda vm: vm.memory(SIZE, align=BLOCK, shared=True, file=file_on_disk))
    with scene.host_does(Operation.WRITE_BACK):
        file_on_disk.sync()
    return scene


@resting
def test_page_cache_eviction(written_back, reclaim):
    """Clean pages are evicted, and read from the disk again."""
    written_back.page_out(reclaim, Operation.FILE_OUT, 8, 16)
    assert not written_back.memory.frames(8 * PAGE, 16 * PAGE).any()
    assert written_back.vm.guest.read(IPA + 8 * PAGE + 8) == 9
    written_back.settle()


@hammering
def test_page_cache_eviction_while_guests_write(written_back, reclaim):
    written_back.page_out(reclaim, Operation.FILE_OUT, 8, 16)
    written_back.settle()
