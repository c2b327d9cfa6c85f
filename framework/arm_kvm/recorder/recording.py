"""A recording as test cases use it: the trace, and questions to it by VM."""

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
    """At the end of its block, ``trace`` is the trace and ``violations`` what the checker finds in it."""

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
            with suppress(LabError):  # the machine may have ended; the test's own failure is the one to report
                self._take()
            raise
        self._take()

    def _take(self) -> None:
        self.trace = self._recorder.stop()
        self.violations = violations(self.trace)

    def look(self) -> None:
        """Set :attr:`trace` to the trace up to now; the recording goes on."""
        self.trace = self._recorder.so_far()

    def mark(self, text: str) -> None:
        """Add a mark with this text to the trace."""
        self._recorder.mark(text)

    # -- questions to the trace ----------------------------------------------------------------------------------

    def entries(self, vm: Vm | None = None) -> list[tuple[int, int]]:
        """(CPU, VMID) of every guest entry of this VM, or of all VMs, in order."""
        return [(e.cpu, vmid_of(e.vttbr)) for e in self._entries() if vm is None or e.vm == vm.id]

    def vmids(self, vm: Vm) -> list[int]:
        """The VMIDs that the VM was entered with, in order, without immediate repetitions."""
        return [vmid for vmid, _ in groupby(vmid for _, vmid in self.entries(vm))]

    def entered_last(self, vm: Vm) -> int:
        """The index of this VM's last entry among the entries of all VMs."""
        return max(i for i, entry in enumerate(self._entries()) if entry.vm == vm.id)

    def root(self, vm: Vm) -> int:
        """The PA of the VM's stage-2 root. Raises KeyError for a VM that never ran."""
        return {event.vm: event.root for event in self.trace.events if isinstance(event, Created)}[vm.id]

    @property
    def vmid_bits(self) -> int:
        """The number of VMID bits that KVM uses, 8 or 16."""
        return self.trace.vmid_bits

    @property
    def allocator(self) -> str:
        """The kernel's VMID allocator: ``consecutive`` or ``bitmap``."""
        return self.trace.facts["allocator"]

    @property
    def first_runs(self) -> list[int]:
        """The VMID of each VM's first entry, in order of these entries."""
        first: dict[int | None, int] = {}
        for entry in self._entries():
            first.setdefault(entry.vm, vmid_of(entry.vttbr))
        return list(first.values())

    def count(self, op: str) -> int:
        """The number of times that this operation was executed."""
        return sum(event.op == op for event in self._invalidations())

    @property
    def rollovers(self) -> int:
        """The number of full invalidations, each of which begins a generation of VMIDs."""
        return sum(full(event.op) for event in self._invalidations())

    def _invalidations(self) -> Iterator[Invalidate]:
        return (event for event in self.trace.events if isinstance(event, Invalidate))

    def _entries(self) -> Iterator[_Entry]:
        world = TraceState()
        for event in self.trace.events:
            if isinstance(event, Enter):
                vttbr = world.vttbr[event.cpu]
                yield _Entry(event.cpu, vttbr, world.vms.get(root_of(vttbr)))
            world.after(event)


class _Entry(NamedTuple):
    """A guest entry: the CPU, its VTTBR, and the number of the VM that had this root at that time."""

    cpu: int
    vttbr: int
    vm: int | None
