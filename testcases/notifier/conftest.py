"""The scene of nearly every case here: a VM with two vCPUs, 64 pages of guest memory that both have written, and a host
that does something to some of them. "resting": no guest runs meanwhile, and stage 2 must be exactly what the reference
model demands and allows. "hammering": both vCPUs go on adding to a word of their own in every page. They map at once
what they lose, so eight more pages behind those, which no guest uses meanwhile, tell whether anything else went."""

import time
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
from arm_kvm.host import facilities
from arm_kvm.model.kvm.notifier import Call
from arm_kvm.oracle.ftrace import traced
from arm_kvm.oracle.witness import calls_in
from arm_kvm.vmm.client import op
from arm_kvm.vmm.memory import BLOCK, PAGE, Child

IPA = 0x8000_0000
PAGES = 64
BYSTANDERS = 8  #: pages of a memslot of their own, in the IPAs that follow the memory
#: Of reclaim from guests at work; how often more, if they came by between its two looks at every page.
ROUNDS, TRIES = 4, 60
HOST_WORD = 2  #: index of the word that the host writes; vCPU n adds to word n


class Scene:
    """The VM, its memory, and how often each vCPU has added to every page that was not lost."""

    def __init__(self, vm, memory, witness, oracle, busy):
        self.vm, self.memory, self.busy = vm, memory, busy
        self.pages = memory.size // PAGE
        self._witness, self._oracle = witness, oracle
        self._rounds = [0, 0]
        self._at_work = False
        # No two pages are alike, and none was read first: the zero page would be split up.
        memory.write(0, np.pad(np.arange(1, self.pages + 1, dtype="<u4")[:, None], ((0, 0), (2, 1021))).tobytes())
        with self.guests_at_work():
            pass
        if busy:
            vm.guest.fill(IPA + memory.size, BYSTANDERS)
        self.stage2()  # found while nothing else goes on

    @contextmanager
    def guests_at_work(self):
        """Both vCPUs add 1 to their word in every page; at least once."""
        with ExitStack() as stack:
            hammers = [
                stack.enter_context(guest.hammering(IPA + 4 * n, self.pages)) for n, guest in enumerate(self.vm.guests)
            ]
            self._at_work = True
            try:
                yield
            finally:
                self._at_work = False
        self._rounds = [a + hammer.rounds for a, hammer in zip(self._rounds, hammers, strict=True)]

    def wait_for_a_round(self):
        """Every guest at work has been at every page since this was called."""
        begun, deadline = self._counts(), time.monotonic() + 10.0
        while (self._counts() - begun < 2).any():
            assert time.monotonic() < deadline, "the guests do not get round"

    def _counts(self):
        """How often each guest has been at the first page."""
        return np.frombuffer(self.memory.read(0, 4 * len(self.vm.guests)), dtype="<u4")

    @contextmanager
    def hammering_if_busy(self):
        """The guests hammer from here to the end of the outermost such block; or rest."""
        if not self.busy or self._at_work:
            yield
            return
        with self.guests_at_work():
            yield

    @contextmanager
    def host_does(self, operation, first=0, pages=None):
        """The block does this to pages ``first`` and following, witnessed, while the guests rest or hammer."""
        size = (self.pages - first if pages is None else pages) * PAGE
        witnessed = self._witness(operation, self.memory, first * PAGE, size, exact=not self.busy)
        with self.hammering_if_busy(), witnessed as seen:
            yield seen

    def page_out(self, reclaim, operation, first=0, pages=None):
        """``reclaim`` takes these pages. Those that guests go on using it unmaps, some of them, again and again."""
        size = (self.pages - first if pages is None else pages) * PAGE
        start = self.memory.hva + first * PAGE
        self.vm.agent(op.memory_drain)  # pages that wait for the LRU are not reclaimed
        if not self.busy:
            with self.host_does(operation, first, pages):
                reclaim(self.memory, first * PAGE, size)
            return

        def takes_some():
            with traced(self.vm.agent, [f"kvm:{Call.UNMAP.value}"]) as seen:
                reclaim(self.memory, first * PAGE, size)
                self.stage2()
            return any(start <= hva < start + size for _, (hva, _) in calls_in(seen.events))

        with self.hammering_if_busy():
            taken = [takes_some() for _ in range(ROUNDS)]
            assert any(taken) or any(takes_some() for _ in range(TRIES)), "reclaim unmapped no page"

    def stage2(self):
        return self._oracle.stage2(self.vm)

    def leaf(self, page):
        return self.stage2().leaf(IPA + page * PAGE)

    def words(self):
        """Every page's first words as the host sees them, a row each."""
        return np.frombuffer(self.memory.read(0, self.memory.size), dtype="<u4").reshape(self.pages, -1)[:, :4]

    def _host_writes(self, values):
        """The host stores one word to every page; no guest runs."""
        content = np.frombuffer(self.memory.read(0, self.memory.size), dtype="<u4").reshape(self.pages, -1).copy()
        content[:, HOST_WORD] = values
        self.memory.write(0, content.tobytes())

    def settle(self, lost=()):
        """No store was lost but those to pages the host threw away; and both sides see what the other writes."""
        kept = np.setdiff1d(np.arange(self.pages), np.array(lost, dtype=int))
        for n, rounds in enumerate(self._rounds):
            column = self.words()[:, n]
            assert set(column[kept].tolist()) <= {rounds}, f"vCPU {n}: {rounds} rounds"
            assert all(value <= rounds for value in column.tolist())
        if self.busy:
            assert self.vm.guest.check(IPA + self.memory.size, BYSTANDERS) == []
        self.exchange()

    def exchange(self):
        """The host writes a word to every page, the guest finds it; and the other way round."""
        self._host_writes(np.arange(self.pages) ^ 0xA5A5)
        self.vm.guest.fill(IPA + 4 * HOST_WORD + 4, self.pages, seed=7)
        stride = min(self.pages, 16)
        for page in range(0, self.pages, self.pages // stride):
            assert self.vm.guest.read(IPA + page * PAGE + 4 * HOST_WORD) == page ^ 0xA5A5
        address = IPA + 4 * HOST_WORD + 4 + PAGE * np.arange(self.pages, dtype=np.uint64)
        assert (self.words()[:, HOST_WORD + 1] == (address ^ 7)).all()
        self.stage2()


@pytest.fixture(params=[False, True], ids=["resting", "hammering"])
def busy(request):
    return request.param


@pytest.fixture
def make_scene(vm, witness, oracle, busy):
    """``make_scene(shared=True)``: a scene over memory of that kind; ``memory=`` makes it over this."""

    def make(pages=PAGES, memory=None, **kind):
        if memory is None:
            memory = vm.add_memory(IPA, pages * PAGE, align=BLOCK, **kind)
        else:
            memory = memory(vm)
            vm.add_memory(IPA, memory.size, memory=memory)
        if busy:
            vm.add_memory(IPA + memory.size, BYSTANDERS * PAGE)
        return Scene(vm, memory, witness, oracle, busy)

    return make


@pytest.fixture
def scene(make_scene):
    """64 pages of private anonymous memory."""
    return make_scene()


@pytest.fixture
def quiet(oracle, known_fault):
    """``quiet(known, text)``: the kernel has not complained, or of the known fault only, as ``known(words)`` tells."""

    def look(known, text):
        said = [str(splat) for splat in oracle.splats()]
        if said and all(map(known, said)):
            known_fault(text)
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
def khugepaged(host, ssh):
    """Have khugepaged look at everything: ``khugepaged()``.

    It is ended and begun anew: one that sleeps cannot be woken in the first five minutes of a 32-bit host (5.4
    khugepaged_should_wakeup compares jiffies, which begin below zero, with 0). And it is kept from being nice, which it
    makes itself as it begins: nice 19 counts 100 ms as 7 s (kernel/sched/core.c sched_prio_to_weight), for which it
    then waits beside guests that hammer, and to be less nice only afterwards does not shorten that.
    """
    home = "/sys/kernel/mm/transparent_hugepage/khugepaged"
    not_nice = "renice 0 $(pidof khugepaged)"
    ssh.run(not_nice)  # now, for MADV_HUGEPAGE may wake it

    def scan():
        host.agent(op.memory_drain)  # it takes pages of the LRU only
        ssh.run(
            f"cd {home}; echo never > ../enabled; echo 100000 > pages_to_scan; echo 10 > scan_sleep_millisecs;"
            "was=$(cat full_scans); echo madvise > ../enabled;"
            f"for i in $(seq 600); do {not_nice}; [ $(cat full_scans) -ge $((was + 2)) ] && break; sleep 0.05; done;"
            "echo 600000 > scan_sleep_millisecs; [ $i -lt 600 ]",
            timeout=120.0,
        )

    return scan
