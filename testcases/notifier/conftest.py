"""Fixtures of the notifier cases: the scene (arm_kvm/testing/scene.py), and what its host acts with.

A case with a scene runs twice, with guests that rest and with guests that hammer. A case that is marked ``resting`` or
``hammering`` runs in that mode only.
"""

import pytest
from arm_kvm.host import facilities, huge_pages
from arm_kvm.testing.scene import IPA, Scene
from arm_kvm.vmm.memory import BLOCK, PAGE, Child

PAGES = 64


def pytest_configure(config):
    config.addinivalue_line("markers", "resting: the case's scene has guests that rest, only")
    config.addinivalue_line("markers", "hammering: the case's scene has guests that hammer, only")


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
    """``make_scene(shared=True)``: a scene over memory of that kind; ``memory=`` makes the memory, given the VM."""

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
    """``quiet(known, name)``: the kernel has not complained, or of the known fault only, as ``known(words)`` tells."""

    def look(known, name):
        said = [str(splat) for splat in oracle.splats()]
        if said and all(map(known, said)):
            known_fault(name)
        assert said == []

    return look


@pytest.fixture
def fork(host):
    """Fork the VMM; the children end with the test."""
    children = []

    def make():
        children.append(Child(host.agent))
        return children[-1]

    yield make
    for child in children:
        child.end()


@pytest.fixture
def reclaim(host, ssh, vm):
    """``reclaim(memory, offset, size)``: these pages are taken, and nothing that is the VM's own."""
    for guest in vm.guests:
        guest.ping()  # its mailbox is there
    with facilities.reclaim(host) as take:
        yield take


@pytest.fixture
def swap(host, ssh):
    """The host can swap, to memory."""
    with facilities.swap(host):
        yield


@pytest.fixture
def disk(host, ssh):
    """A folder on a file system whose pages can be evicted."""
    with facilities.filesystem(host) as folder:
        yield folder


@pytest.fixture
def cgroup(host, ssh):
    """A memory cgroup that holds the VMM."""
    with facilities.memory_cgroup(host) as group:
        yield group


@pytest.fixture
def huge_files(host, ssh):
    """Shared memory and memfds get huge pages."""
    with huge_pages.of_shared_memory(host):
        yield


@pytest.fixture
def khugepaged(host, ssh):
    """``khugepaged.scan()``: have it look at everything."""
    return huge_pages.Khugepaged(host)
