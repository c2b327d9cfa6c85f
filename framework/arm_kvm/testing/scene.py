"""The scene of nearly every notifier case: a VM, its memory, and a host that does something to some of its pages.

The VM has two vCPUs, and both have written to every page of its memory before the case begins. A case runs in one of
two modes, or in both, one after the other:

resting
    No guest runs while the host acts. Stage 2 must be exactly what the reference model demands and allows.
hammering
    Both vCPUs keep adding to a word of their own in every page while the host acts. They fault back in at once what is
    unmapped, so eight bystander pages after the memory, which no guest uses meanwhile, show whether too much was
    unmapped.

:meth:`Scene.host_does` judges exactly while guests rest, and as strictly as their activity allows while they hammer.
:meth:`Scene.settle` finds lost stores in both modes.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
from numpy.typing import NDArray

from arm_kvm.host import facilities
from arm_kvm.host.facilities import Reclaim
from arm_kvm.host.host import Host
from arm_kvm.model.kvm.notifier import Call, Operation
from arm_kvm.oracle.ftrace import traced
from arm_kvm.oracle.oracle import Oracle
from arm_kvm.oracle.stage2 import Leaf, Stage2
from arm_kvm.oracle.witness import Testimony, Witness, calls_in
from arm_kvm.vmm.memory import PAGE, Memory
from arm_kvm.vmm.vm import Vm

IPA = 0x8000_0000  #: where the scene's memory is
BYSTANDERS = 8  #: pages in a memslot of their own, at the IPAs that follow the memory
_HOST_WORD = 2  #: the word that the host writes in each page; vCPU n adds to word n
_GUEST_WORD = 3  #: the word that the guest writes for the host to read
_ROUNDS, _TRIES = 4, 60  #: attempts at reclaim while guests hammer, and further attempts if those unmapped no page
_PATIENCE = 10.0  #: seconds for the guests to reach every page
_SAMPLES = 16  #: pages that a guest reads one by one


class Scene:
    """A VM, its memory, and the number of times that each vCPU has added to every page that was not lost.

    ``vm`` is the VM, ``memory`` its memory at :data:`IPA`, ``pages`` the number of its pages. Pages, and the 32-bit
    words in a page, are counted from 0. vCPU 0 adds to word 0 and vCPU 1 to word 1, both of which begin as 0; word 2 of
    page ``n`` is ``n + 1``, so no two pages are alike.
    """

    def __init__(self, host: Host, vm: Vm, memory: Memory, witness: Witness, oracle: Oracle, hammering: bool) -> None:
        """Add bystander pages if the guests hammer, have every page written, and judge stage 2 at rest.

        ``memory`` is in a memslot at :data:`IPA` already.
        """
        self.vm, self.memory = vm, memory
        self.pages = memory.size // PAGE
        self._host, self._witness, self._oracle = host, witness, oracle
        self._hammering = hammering
        self._rounds = [0, 0]
        self._at_work = False
        if hammering:
            vm.add_memory(IPA + memory.size, BYSTANDERS * PAGE)
        self._number_pages()
        self.guests_write_every_page()
        if hammering:
            vm.guest.fill(IPA + memory.size, BYSTANDERS)
        self.stage2()

    def _number_pages(self) -> None:
        """Write every page from the host. A read before the first write would map the zero page."""
        numbers = np.arange(1, self.pages + 1, dtype="<u4")[:, None]
        self.memory.write(0, np.pad(numbers, ((0, 0), (_HOST_WORD, PAGE // 4 - _HOST_WORD - 1))).tobytes())

    # -- the guests ------------------------------------------------------------------------------------------------

    @contextmanager
    def guests_at_work(self) -> Iterator[None]:
        """Within the block both vCPUs add 1 to their word in every page, over and over, in either mode.

        Each completes at least one round, and none is cut short when the block ends.
        """
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

    def guests_write_every_page(self) -> None:
        """Have both vCPUs add to their word in every page at least once, and stop; in either mode."""
        with self.guests_at_work():
            pass

    @contextmanager
    def guest_activity(self) -> Iterator[None]:
        """Within the block the guests rest or hammer, as the mode says, without a pause.

        :meth:`host_does` and :meth:`page_out` call this themselves. Put several of them into one block if the guests
        must not stop in between. Blocks nest; the outermost counts.
        """
        if not self._hammering or self._at_work:
            yield
            return
        with self.guests_at_work():
            yield

    def wait_for_a_round(self) -> None:
        """Wait, within :meth:`guests_at_work`, until each guest has written every page since the call."""
        begun, deadline = self._counts(), time.monotonic() + _PATIENCE
        while (self._counts() - begun < 2).any():
            if time.monotonic() > deadline:
                raise AssertionError(f"the guests did not reach every page within {_PATIENCE:.0f} s")

    def _counts(self) -> NDArray[np.uint32]:
        """Read how often each guest has added to its word in the first page."""
        return np.frombuffer(self.memory.read(0, 4 * len(self.vm.guests)), dtype="<u4")

    # -- the host --------------------------------------------------------------------------------------------------

    @contextmanager
    def host_does(self, operation: Operation, first: int = 0, pages: int | None = None) -> Iterator[Testimony]:
        """Judge the operation that the block has the host carry out on ``pages`` pages (None: all) from ``first``.

        Meanwhile the guests rest or hammer, as the mode says. Afterwards stage 2 and the kernel's notifier events are
        compared with the reference model, exactly if the guests rest; a breach raises Violation. The testimony that is
        yielded is complete after the block; within it, ``also()`` names further operations of the host.
        """
        size = (self.pages - first if pages is None else pages) * PAGE
        witnessed = self._witness(operation, self.memory, first * PAGE, size, exact=not self._hammering)
        with self.guest_activity(), witnessed as seen:
            yield seen

    def page_out(self, reclaim: Reclaim, operation: Operation, first: int = 0, pages: int | None = None) -> None:
        """Have ``reclaim`` take ``pages`` pages from ``first`` (None: all), judged as by :meth:`host_does`.

        While guests hammer, it takes only some of them, in several attempts: the guests use most pages between
        reclaim's two checks of their accessed flags.
        """
        size = (self.pages - first if pages is None else pages) * PAGE
        facilities.drain_lru(self._host)
        if not self._hammering:
            with self.host_does(operation, first, pages):
                reclaim(self.memory, first * PAGE, size)
            return
        with self.guest_activity():
            taken = [self._page_out_some(reclaim, first * PAGE, size) for _ in range(_ROUNDS)]
            if not any(taken) and not any(self._page_out_some(reclaim, first * PAGE, size) for _ in range(_TRIES)):
                raise AssertionError(f"reclaim unmapped no page in {_ROUNDS + _TRIES} attempts")

    def _page_out_some(self, reclaim: Reclaim, offset: int, size: int) -> bool:
        """Run ``reclaim``; whether the kernel has unmapped any page in this range from stage 2."""
        start = self.memory.hva + offset
        with traced(self._host.agent, [f"kvm:{Call.UNMAP.value}"]) as seen:
            reclaim(self.memory, offset, size)
            self.stage2()
        return any(start <= hva < start + size for _, (hva, _) in calls_in(seen.events))

    # -- the judgement -----------------------------------------------------------------------------------------------

    def stage2(self) -> Stage2:
        """Read the VM's stage-2 tables with all CPUs stopped, and judge them. Raises Violation."""
        return self._oracle.stage2(self.vm)

    def leaf(self, page: int) -> Leaf | None:
        """Return the leaf that maps this page now, if any. Raises Violation, as :meth:`stage2` does."""
        return self.stage2().leaf(IPA + page * PAGE)

    def settle(self, lost: Collection[int] = ()) -> None:
        """End the case: check that no guest's store is lost except in the pages ``lost``, which the host discarded.

        In those a guest's word may have any value up to its number of rounds. Then the host writes a word to every
        page and the guest reads it, and the other way round, which shows that both use the same frames.
        """
        kept = np.setdiff1d(np.arange(self.pages), np.array(list(lost), dtype=int))
        for n, rounds in enumerate(self._rounds):
            column = self._words()[:, n]
            if wrong := sorted(set(column[kept].tolist()) - {rounds}):
                raise AssertionError(f"vCPU {n} has added {rounds} times to every page; some pages hold {wrong}")
            if (most := int(column.max())) > rounds:
                raise AssertionError(f"vCPU {n} has added {rounds} times to every page; one page holds {most}")
        if self._hammering and (changed := self.vm.guest.check(IPA + self.memory.size, BYSTANDERS)):
            raise AssertionError(f"pages that no guest used and the host left alone have changed: {changed}")
        self._exchange()

    def _exchange(self) -> None:
        """Have host and guest write a word each to every page, and check that each reads the other's."""
        self._host_writes(np.arange(self.pages) ^ 0xA5A5)
        self.vm.guest.fill(IPA + 4 * _GUEST_WORD, self.pages, seed=7)
        for page in range(0, self.pages, self.pages // min(self.pages, _SAMPLES)):
            found = self.vm.guest.read(IPA + page * PAGE + 4 * _HOST_WORD)
            if found != page ^ 0xA5A5:
                raise AssertionError(f"page {page}: the host wrote {page ^ 0xA5A5:#x}, the guest reads {found:#x}")
        written = (IPA + 4 * _GUEST_WORD + PAGE * np.arange(self.pages, dtype=np.uint64)) ^ 7
        if wrong := np.flatnonzero(self._words()[:, _GUEST_WORD] != written).tolist():
            raise AssertionError(f"the host does not read what the guest has written to pages {wrong}")
        self.stage2()

    def _words(self) -> NDArray[np.uint32]:
        """Read the first four words of every page from the host, a row for each page."""
        return np.frombuffer(self.memory.read(0, self.memory.size), dtype="<u4").reshape(self.pages, -1)[:, :4]

    def _host_writes(self, values: NDArray[np.int64]) -> None:
        """Store one word to every page from the host, while no guest runs."""
        content = np.frombuffer(self.memory.read(0, self.memory.size), dtype="<u4").reshape(self.pages, -1).copy()
        content[:, _HOST_WORD] = values
        self.memory.write(0, content.tobytes())
