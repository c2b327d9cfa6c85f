"""A recording as a test case holds it: what happened, VM by VM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import groupby
from typing import NamedTuple

from arm_kvm.events.checker import violations
from arm_kvm.events.trace import Created, Enter, Invalidate, Trace, root_of, vmid_of
from arm_kvm.events.violations import RuleViolation
from arm_kvm.events.world import TraceState, full
from arm_kvm.recorder.recorder import Recorder
from arm_kvm.support.errors import LabError
from arm_kvm.vmm.vm import Vm


class Recording:
    """Filled when its ``with`` block ends: ``trace``, and ``violations``, what the checker says of it."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.trace = Trace()
        self.violations: list[RuleViolation] = []

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
        return [(e.cpu, vmid_of(e.vttbr)) for e in self._entries() if vm is None or e.vm == vm.id]

    def vmids(self, vm: Vm) -> list[int]:
        """The VMIDs that the VM was entered under, each as often as it changed."""
        return [vmid for vmid, _ in groupby(vmid for _, vmid in self.entries(vm))]

    def entered_last(self, vm: Vm) -> int:
        """Which of all entries, counted from 0, was this VM's last."""
        return max(i for i, entry in enumerate(self._entries()) if entry.vm == vm.id)

    def root(self, vm: Vm) -> int:
        """The VM's stage-2 root. KeyError for a VM that never ran."""
        return {event.vm: event.root for event in self.trace.of(Created)}[vm.id]

    @property
    def vmid_bits(self) -> int:
        return self.trace.vmid_bits

    @property
    def allocator(self) -> str:
        """``consecutive`` or ``bitmap``, by the kernel."""
        return self.trace.facts["allocator"]

    @property
    def first_runs(self) -> list[int]:
        """The VMIDs in the order in which they were first entered, each VM's first."""
        first: dict[int | None, int] = {}
        for entry in self._entries():
            first.setdefault(entry.vm, vmid_of(entry.vttbr))
        return list(first.values())

    def count(self, op: str) -> int:
        """How often this invalidation was executed."""
        return sum(event.op == op for event in self.trace.of(Invalidate))

    @property
    def rollovers(self) -> int:
        """Full invalidations: each begins a generation of VMIDs."""
        return sum(full(event.op) for event in self.trace.of(Invalidate))

    def _entries(self) -> Iterator[_Entry]:
        world = TraceState()
        for event in self.trace.events:
            if isinstance(event, Enter):
                vttbr = world.vttbr[event.cpu]
                yield _Entry(event.cpu, vttbr, world.vms.get(root_of(vttbr)))
            world.after(event)


class _Entry(NamedTuple):
    """A guest entry: under which VTTBR, and the number of the VM whose root that was then."""

    cpu: int
    vttbr: int
    vm: int | None
