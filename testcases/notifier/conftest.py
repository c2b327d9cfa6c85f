"""Fixtures of the notifier cases: the scene (arm_kvm/testing/scene.py) and the host's means to act on its memory.

A case with a scene runs twice, once with resting guests and once with hammering ones. A case that is marked ``resting``
or ``hammering`` runs only in that mode.
"""

import pytest
from arm_kvm.testing.scene import IPA, Scene
from arm_kvm.vocabulary import BLOCK, PAGE, Child, facilities, huge_pages

PAGES = 64


def pytest_configure(config):
    config.addinivalue_line("markers", "resting: run the case only with a scene whose guests rest")
    config.addinivalue_line("markers", "hammering: run the case only with a scene whose guests hammer")


def pytest_generate_tests(metafunc):
    marked = [name for name in ("resting", "hammering") if metafunc.definition.get_closest_marker(name)]
    if "hammering" in metafunc.fixturenames and not marked:
        metafunc.parametrize("hammering", [False, True], ids=["resting", "hammering"], indirect=True)


@pytest.fixture
def hammering(request):
    """Whether the scene's guests hammer while the host acts, or rest."""
    return getattr(request, "param", request.node.get_closest_marker("hammering") is not None)


@pytest.fixture
def make_scene(host, vm, witness, oracle, hammering):
    """``make_scene(shared=True)``: a scene over such memory; ``memory=`` is a function that makes the VM's memory."""

    def make(pages=PAGES, memory=None, **kind):
        if memory is None:
            memory = vm.add_memory(IPA, pages * PAGE, align=BLOCK, **kind)
        else:
            memory = memory(vm)
            vm.add_memory(IPA, memory.size, memory=memory)
        return Scene(host, vm, memory, witness, oracle, hammering)

    return make


@pytest.fixture
def scene(make_scene):
    """64 pages of private anonymous memory."""
    return make_scene()


@pytest.fixture
def quiet(oracle, known_fault):
    """``quiet(known, name)``: check that the kernel has logged no splat.

    If it has, and ``known(splat)`` is true of every one, the case ends with the known fault ``name``.
    """

    def look(known, name):
        splats = [str(splat) for splat in oracle.splats()]
        if splats and all(map(known, splats)):
            known_fault(name)
        assert splats == []

    return look


@pytest.fixture
def fork(host):
    """``fork()``: fork the VMM. The children end with the test."""
    children = []

    def make():
        children.append(Child(host.agent))
        return children[-1]

    yield make
    for child in children:
        child.end()


@pytest.fixture
def reclaim(host, ssh, vm):
    """``reclaim(memory, offset, size)``: have these pages reclaimed, and none of the VM's others."""
    for guest in vm.guests:
        guest.ping()  # faults in its mailbox
    with facilities.reclaim(host) as take:
        yield take


@pytest.fixture
def swap(host, ssh):
    """Swap space on zram."""
    with facilities.swap(host):
        yield


@pytest.fixture
def disk(host, ssh):
    """A folder on a file system whose page cache can be written back and evicted."""
    with facilities.filesystem(host) as folder:
        yield folder


@pytest.fixture
def cgroup(host, ssh):
    """A memory cgroup that contains the VMM."""
    with facilities.memory_cgroup(host) as group:
        yield group


@pytest.fixture
def huge_files(host, ssh):
    """Shared memory and memfds get huge pages."""
    with huge_pages.of_shared_memory(host):
        yield


@pytest.fixture
def khugepaged(host, ssh):
    """``khugepaged.scan()``: have khugepaged scan all memory that was advised MADV_HUGEPAGE."""
    return huge_pages.Khugepaged(host)
