"""A trace as a story: which VM was inside which CPU from when to when, and what happened at which moment."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from arm_kvm.events.checker import violations
from arm_kvm.events.operations import OPERATIONS, Reach
from arm_kvm.events.trace import Created, Destroyed, Enter, Event, Exit, Invalidate, Trace, Vttbr, root_of, vmid_of
from arm_kvm.events.world import TraceState, full


@dataclass(eq=False)
class VmLife:
    """One life of a root: roots are used again."""

    name: str
    stays: list[Stay] = field(default_factory=list)


@dataclass(eq=False)
class Stay:
    """A guest was inside a CPU from ``start`` to ``end`` (ns)."""

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
    """Something at ``time`` (ns): "rollover" or a key of _SHAPES; about a VM, or a CPU (-1: none)."""

    kind: str
    time: int
    vm: VmLife | None
    cpu: int
    words: str

    def __str__(self) -> str:
        about = self.vm.name if self.vm else f"CPU {self.cpu}" if self.cpu >= 0 else "the host"
        return f"{self.words}, {about}, {self.time / 1e6:.3f} ms"


class History:
    """Stays and moments of a trace. ``vms`` are those that were entered, in the order of their first entry."""

    def __init__(self, trace: Trace) -> None:
        self.vms: list[VmLife] = []
        self.stays: list[Stay] = []
        self.moments: list[Moment] = []
        self.violations = violations(trace)
        self._lives: dict[int, VmLife] = {}  # root -> its latest life
        self._inside: dict[int, Stay] = {}  # CPU -> the stay that has not ended yet
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
        """First and last time (ns) of what concerns guests: before the first, the lab only prepares VMs."""
        times = [m.time for m in self.moments if m.kind in ("rollover", "violation") or (m.vm and m.vm.stays)]
        times += [time for stay in self.stays for time in (stay.start, stay.end)]
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
        stay = self._inside[event.cpu] = Stay(vm, vmid_of(vttbr), event.cpu, event.time, event.time)
        if not vm.stays:
            self.vms.append(vm)
        vm.stays.append(stay)
        self.stays.append(stay)

    def _leave(self, cpu: int, time: int) -> None:
        if stay := self._inside.pop(cpu, None):
            stay.end = max(time, stay.start)

    def _life(self, root: int) -> VmLife:
        return self._lives.setdefault(root, VmLife(f"{root:#x}"))

    def _note(self, kind: str, event: Event, world: TraceState, words: str) -> None:
        """It is about the VM that the event names, or else the one in VTTBR."""
        vttbr = event.value if isinstance(event, Vttbr) else world.vttbr.get(event.cpu, 0)
        root = getattr(event, "root", root_of(vttbr))
        self.moments.append(Moment(kind, event.time, self._life(root) if root else None, event.cpu, words))
