"""A recording as a test case holds it: what happened, VM by VM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from framework.errors import LabError
from framework.events.checker import violations
from framework.events.trace import Enter, Invalidate, Trace, Vttbr, root_of, vmid_of
from framework.events.violations import Violation
from framework.events.world import full
from framework.host.vm import Vm

from .recorder import Recorder


class Recording:
    """Filled when its ``with`` block ends: ``trace``, and ``violations``, what the checker says of it."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.trace = Trace()
        self.violations: list[Violation] = []

    @contextmanager
    def running(self) -> Iterator[Recording]:
        """Record within the block."""
        self._recorder.start()
        try:
            yield self
        except BaseException:
            with suppress(LabError):  # the machine may be gone; the test's own failure is the one to show
                self._take()
            raise
        self._take()

    def _take(self) -> None:
        self.trace = self._recorder.stop()
        self.violations = violations(self.trace)

    def look(self) -> None:
        """Fill :attr:`trace` with what has happened so far; the recording goes on."""
        self.trace = self._recorder.so_far()

    def mark(self, text: str) -> None:
        """A line of the test's own in the trace."""
        self._recorder.mark(text)

    # -- what test cases ask -------------------------------------------------------------------------------------

    def entries(self, vm: Vm | None = None) -> list[tuple[int, int]]:
        """(CPU, VMID) of every guest entry, in order; of one VM or of all."""
        return [
            (cpu, vmid_of(vttbr)) for cpu, vttbr in self._entered() if vm is None or root_of(vttbr) == self.root(vm)
        ]

    def vmids(self, vm: Vm) -> list[int]:
        """The VMIDs that the VM was entered under, each as often as it changed."""
        numbers = [vmid for _, vmid in self.entries(vm)]
        return [n for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n]

    def entered_last(self, vm: Vm) -> int:
        """Which of all entries, counted from 0, was this VM's last."""
        return max(i for i, (_, vttbr) in enumerate(self._entered()) if root_of(vttbr) == self.root(vm))

    def root(self, vm: Vm) -> int:
        """The VM's stage-2 root. KeyError for a VM that never ran."""
        return self._recorder.roots[vm.id]

    @property
    def vmid_bits(self) -> int:
        return int(self.trace.facts["vmid-bits"])

    @property
    def allocator(self) -> str:
        """``consecutive`` or ``bitmap``, by the kernel."""
        return self.trace.facts["allocator"]

    @property
    def first_runs(self) -> list[int]:
        """The VMIDs in the order in which they were first entered, each VM's first."""
        first: dict[int, int] = {}
        for _, vttbr in self._entered():
            first.setdefault(root_of(vttbr), vmid_of(vttbr))
        return list(first.values())

    def count(self, op: str) -> int:
        """How often this invalidation was executed."""
        return sum(event.op == op for event in self.trace.of(Invalidate))

    @property
    def rollovers(self) -> int:
        """Full invalidations: each begins a generation of VMIDs."""
        return sum(full(event.op) for event in self.trace.of(Invalidate))

    def _entered(self) -> Iterator[tuple[int, int]]:
        vttbr: dict[int, int] = {}
        for event in self.trace.of(Vttbr, Enter):
            if isinstance(event, Vttbr):
                vttbr[event.cpu] = event.value
            else:
                yield event.cpu, vttbr.get(event.cpu, 0)
