"""A trace arranged for drawing: which VM ran on which CPU and when, and single moments."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from arm_kvm.events.checker import violations
from arm_kvm.events.operations import OPERATIONS, Reach
from arm_kvm.events.trace import Created, Destroyed, Enter, Event, Exit, Invalidate, Trace, Vttbr, root_of, vmid_of
from arm_kvm.events.world import TraceState, full


@dataclass(eq=False)
class VmLife:
    """A VM: one of the successive owners of a root, as the kernel reuses roots."""

    name: str
    runs: list[GuestRun] = field(default_factory=list)


@dataclass(eq=False)
class GuestRun:
    """The time from a guest entry (``start``) to the exit (``end``) on a CPU, in ns."""

    vm: VmLife
    vmid: int
    cpu: int
    start: int
    end: int

    def __str__(self) -> str:
        times = f"{self.start / 1e6:.3f}-{self.end / 1e6:.3f} ms"
        return f"{self.vm.name}, VMID {self.vmid}, CPU {self.cpu}, {times}"


@dataclass(frozen=True)
class Moment:
    """Something at ``time`` (ns) that concerns a VM, or a CPU (-1: none). ``kind``: "rollover" or a key of _SHAPES."""

    kind: str
    time: int
    vm: VmLife | None
    cpu: int
    words: str

    def __str__(self) -> str:
        about = self.vm.name if self.vm else f"CPU {self.cpu}" if self.cpu >= 0 else "the host"
        return f"{self.words}, {about}, {self.time / 1e6:.3f} ms"


class History:
    """Guest runs and moments of a trace. ``vms``: those that were entered, in the order of their first entry."""

    def __init__(self, trace: Trace) -> None:
        self.vms: list[VmLife] = []
        self.runs: list[GuestRun] = []
        self.moments: list[Moment] = []
        self.violations = violations(trace)
        self._lives: dict[int, VmLife] = {}  # root -> its latest life
        self._inside: dict[int, GuestRun] = {}  # CPU -> the run that has not ended
        broken = defaultdict(list)
        for violation in self.violations:
            broken[violation.index].append(violation.rule.value)
        world = TraceState()
        for index, event in enumerate(trace.events):
            self._see(event, world)
            for name in broken[index]:
                self._note("violation", event, world, name)
            world.after(event)
        for cpu in list(self._inside):
            self._leave(cpu, trace.events[-1].time)

    @property
    def span(self) -> tuple[int, int]:
        """First and last time (ns) that concerns guests. Before the first, the lab only prepares VMs."""
        times = [m.time for m in self.moments if m.kind in ("rollover", "violation") or (m.vm and m.vm.runs)]
        times += [time for run in self.runs for time in (run.start, run.end)]
        return min(times, default=0), max(times, default=0)

    def _see(self, event: Event, world: TraceState) -> None:
        match event:
            case Created(root=root, vm=number):
                self._lives[root] = VmLife(f"VM {number}")
            case Destroyed():
                self._note("destroyed", event, world, "destroyed")
            case Vttbr() | Exit():
                self._leave(event.cpu, event.time)
            case Enter():
                self._leave(event.cpu, event.time)
                self._enter(event, world.vttbr[event.cpu])
            case Invalidate(op=op) if OPERATIONS[op].reach is not Reach.INSTRUCTIONS:
                kind = "rollover" if full(op) else "broadcast" if OPERATIONS[op].broadcast else "local"
                self._note(kind, event, world, op)

    def _enter(self, event: Enter, vttbr: int) -> None:
        vm = self._life(root_of(vttbr))
        run = self._inside[event.cpu] = GuestRun(vm, vmid_of(vttbr), event.cpu, event.time, event.time)
        if not vm.runs:
            self.vms.append(vm)
        vm.runs.append(run)
        self.runs.append(run)

    def _leave(self, cpu: int, time: int) -> None:
        if run := self._inside.pop(cpu, None):
            run.end = max(time, run.start)

    def _life(self, root: int) -> VmLife:
        return self._lives.setdefault(root, VmLife(f"{root:#x}"))

    def _note(self, kind: str, event: Event, world: TraceState, words: str) -> None:
        """Record a moment, for the VM that the event names, or else the one in VTTBR."""
        vttbr = event.value if isinstance(event, Vttbr) else world.vttbr.get(event.cpu, 0)
        root = getattr(event, "root", root_of(vttbr))
        self.moments.append(Moment(kind, event.time, self._life(root) if root else None, event.cpu, words))
