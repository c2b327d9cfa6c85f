"""VMIDs compared with the reference model: whether the VMID in VTTBR is the one that the model's allocator gives.

A VMID is allocated under the allocator's lock, some time before the guest is entered with it, so other CPUs may enter
with later VMIDs first: a VMID that was skipped in a trace is pending until it is seen. A new generation begins, and its
first VMID is allocated, where the full invalidation is executed, under the same lock. A trace does not show when a vCPU
is scheduled out (the bitmap allocator keeps the VMIDs of VMs that are on a CPU), so both are possible for every CPU.

A trace begins in the middle of the host's uptime: the model begins with the first VMID seen. With the bitmap allocator
earlier VMs may hold VMIDs above it, so until the first new generation a VMID may be larger than the model's, and the
generation may end early. If earlier VMs are still running (``earlier-vms``) nothing is judged. Not supported: a VMID
of the bitmap that is pending over the first new generation of a trace.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product

from arm_kvm.events.automata import Finding
from arm_kvm.events.trace import Created, Enter, Event, Invalidate, Trace, root_of, vmid_of
from arm_kvm.events.violations import TraceRule
from arm_kvm.events.world import TraceState, full
from arm_kvm.model.kvm.vmid import Bitmap, Consecutive

EARLIER_VM = -1  #: in place of a CPU: a VM from before the trace
_UNSEEN = -1  #: in place of a root: a VM that has allocated a VMID and was not yet seen with it
Allocator = Consecutive[int] | Bitmap[int]  #: VMs are identified by their roots
#: Makes an allocator whose next VMID is the argument.
Begin = Callable[[int], Allocator]


def begin_of(trace: Trace) -> Begin | None:
    """The allocator that the trace's facts ``allocator`` and ``vmid-bits`` name; None if they name none."""
    if "earlier-vms" in trace.facts:
        return None
    bits = trace.vmid_bits
    makers: dict[str, Begin] = {
        "consecutive": lambda first: Consecutive(bits, first),
        "bitmap": lambda first: Bitmap(bits, trace.cpus, first),
    }
    return makers.get(trace.facts.get("allocator", ""))


@dataclass
class _State:
    """One state that the host's allocator can be in.

    ``pending``: VMIDs that were skipped -> the CPUs that may enter with them; with EARLIER_VM among these, the VMID may
    also be that of a VM from before the trace. ``reclaimed``: roots of VMs that got their old VMID again, and were not
    yet seen with it.
    """

    allocator: Allocator
    pending: dict[int, frozenset[int]] = field(default_factory=dict)
    reclaimed: set[int] = field(default_factory=set)

    def gives(self, root: int, vmid: int) -> bool:
        """Whether this is the VM's VMID, or the one that it gets next."""
        return not self.allocator.rolls_over(root) and self.allocator.peek(root) == vmid

    def is_pending(self, vmid: int, cpu: int) -> bool:
        """Whether this CPU may enter with a pending VMID.

        If a CPU is sure to have allocated it, any CPU may be the first to enter: the vCPUs of a VM share its VMID.
        """
        cpus = self.pending.get(vmid, frozenset({EARLIER_VM}))
        return cpu in cpus or EARLIER_VM not in cpus

    @property
    def outstanding(self) -> int:
        """Number of CPUs that have allocated a VMID and were not yet seen with it."""
        return sum(EARLIER_VM not in cpus for cpus in self.pending.values()) + len(self.reclaimed)

    def allocate_unseen(self, cpus: frozenset[int]) -> None:
        """Allocate the next VMID on one of these CPUs, for a VM that is not yet seen with it."""
        number = self.allocator.peek(_UNSEEN)
        self.allocator.enter(_UNSEEN, min(cpus))
        self.allocator.forget(_UNSEEN)
        self.pending[number] = cpus

    def rivals(self, root: int) -> set[int]:
        """Other VMs that had the same old VMID as this one. In the bitmap, the first VM to enter gets it."""
        if not isinstance(self.allocator, Bitmap) or self.allocator.rolls_over(root):
            return set()
        return self.allocator.formerly(self.allocator.peek(root)) - {root}

    def reclaim(self, root: int, cpus: frozenset[int]) -> None:
        """Give this VM its old VMID on one of these CPUs. It is not yet seen with it."""
        self.allocator.enter(root, min(cpus))
        self.reclaimed.add(root)

    def begin_generation(self, cpu: int, left: list[int]) -> None:
        """Begin a generation on this CPU and allocate its first VMID there; ``left``: CPUs without a guest."""
        for other in left:
            self.allocator.leave(other)
        # A vCPU about to enter keeps its VMID with the bitmap, and allocates again with the consecutive allocator.
        keep = not isinstance(self.allocator, Consecutive)
        self.pending = {n: cpus for n, cpus in self.pending.items() if keep and EARLIER_VM not in cpus}
        number = self.allocator.enter(_UNSEEN, cpu).vmid
        self.allocator.forget(_UNSEEN)
        self.pending[number] = frozenset({cpu})

    def enter(self, root: int, cpu: int, vmid: int) -> None:
        """Record that the VM is seen with its VMID."""
        if vmid in self.pending and not self.allocator.has(root):
            self.allocator.give(root, vmid)
        self.pending.pop(vmid, None)
        self.reclaimed.discard(root)
        self.allocator.enter(root, cpu)


class Allocation:
    """Every VMID equals the model's, and every new generation begins with the full invalidation."""

    def __init__(self, begin: Begin, cpus: int) -> None:
        self._begin = begin
        self._cpus = frozenset(range(cpus))
        self._states: list[_State] = []  #: possible states; [] until a VMID is seen
        self._last: dict[int, int] = {}  #: CPU -> root of the VM that was entered there last
        self._held: dict[int, int] = {}
        self._young = True  #: no new generation has been seen

    def see(self, event: Event, world: TraceState) -> Iterator[Finding]:
        match event:
            case Invalidate(cpu=cpu, op=op) if full(op):
                self._roll_over(cpu)
            case Created(root=root):
                self._held.pop(root, None)
                for state in self._states:
                    state.allocator.forget(root)
            case Enter(cpu=cpu):
                value = world.vttbr[cpu]
                if vmid_of(value):
                    yield from self._enter(root_of(value), cpu, vmid_of(value), world)

    # -- a guest is entered ----------------------------------------------------------------------------------

    def _enter(self, root: int, cpu: int, vmid: int, world: TraceState) -> Iterator[Finding]:
        if not self._states:
            self._states = [self._first_state(cpu, vmid)]
        after = [new for state in self._states if (new := self._explain(state, root, cpu, vmid))]
        if not after:
            yield self._why(root, vmid, world)
        for state in after:
            state.enter(root, cpu, vmid)
        self._states = after
        self._held[root] = vmid
        self._last[cpu] = root

    def _first_state(self, cpu: int, first: int) -> _State:
        """Smaller VMIDs may be pending; in the consecutive allocator, as many as there are other CPUs."""
        allocator = self._begin(first)
        self._young = True
        least = 1 if isinstance(allocator, Bitmap) else max(1, first - len(self._cpus) + 1)
        return _State(allocator, dict.fromkeys(range(least, first), self._cpus - {cpu} | {EARLIER_VM}))

    def _explain(self, state: _State, root: int, cpu: int, vmid: int) -> _State | None:
        """The state that follows from ``state`` and in which this VM has this VMID; None if there is none."""
        if state.gives(root, vmid):
            return state
        if state.allocator.has(root):
            return None
        if state.is_pending(vmid, cpu):
            return state
        return self._after_others(state, root, cpu, vmid) or self._reclaimed_before(state, root, cpu, vmid)

    def _reclaimed_before(self, state: _State, root: int, cpu: int, vmid: int) -> _State | None:
        """The state in which a VM with the same old VMID reclaimed it on another CPU before this VM entered."""
        others = self._cpus - {cpu}
        if state.outstanding >= len(others):
            return None
        for rival in state.rivals(root):
            new = copy.deepcopy(state)
            new.reclaim(rival, others)
            if explained := new if new.gives(root, vmid) else self._after_others(new, root, cpu, vmid):
                return explained
        return None

    def _after_others(self, state: _State, root: int, cpu: int, vmid: int) -> _State | None:
        """The state in which other CPUs have allocated VMIDs before this one, and have not yet entered with them."""
        if state.allocator.rolls_over(_UNSEEN):
            return None
        new, others = copy.deepcopy(state), self._cpus - {cpu}
        if self._young and isinstance(new.allocator, Bitmap) and vmid > new.allocator.peek(_UNSEEN):
            new.pending |= dict.fromkeys(range(new.allocator.peek(_UNSEEN), vmid), others | {EARLIER_VM})
            new.allocator.skip(vmid)
        while new.outstanding < len(others) and not new.allocator.rolls_over(_UNSEEN):
            if new.gives(root, vmid):
                break
            new.allocate_unseen(others)
        return new if new.gives(root, vmid) else None

    # -- a generation begins -----------------------------------------------------------------------------------

    def _roll_over(self, cpu: int) -> None:
        """Begin a generation in all states that allow it. If none does, the model's next VMID will differ."""
        ready = [new for state in self._states if (new := self._exhausted(state, cpu))]
        after = []
        for state in ready:
            for left in self._schedules():
                new = copy.deepcopy(state)
                new.begin_generation(cpu, left)
                after.append(new)
        if after:
            self._states, self._young = _distinct(after), False

    def _exhausted(self, state: _State, cpu: int) -> _State | None:
        """The state with no VMID left: the last ones may be pending, or those of earlier VMs."""
        new, others = copy.deepcopy(state), self._cpus - {cpu}
        if self._young and isinstance(new.allocator, Bitmap):
            new.allocator.skip(new.allocator.size)
        while new.outstanding < len(others) and not new.allocator.rolls_over(_UNSEEN):
            new.allocate_unseen(others)
        return new if new.allocator.rolls_over(_UNSEEN) else None

    def _schedules(self) -> Iterator[list[int]]:
        """Every set of CPUs whose last vCPU may have been scheduled out."""
        for choice in product((False, True), repeat=len(self._last)):
            yield [c for c, left in zip(self._last, choice, strict=True) if left]

    # -- messages ------------------------------------------------------------------------------------------------

    def _why(self, root: int, vmid: int, world: TraceState) -> Finding:
        """Name the rule that explains best a VMID that the model does not give."""
        allocators = [state.allocator for state in self._states]
        expected = sorted({a.peek(root) for a in allocators if not a.rolls_over(root)})
        name = world.name(root)
        if not expected and self._held.get(root) != vmid:
            return (
                TraceRule.ROLLOVER_NOT_INVALIDATED,
                f"{name} begins a new generation with VMID {vmid}, nothing invalidated",
            )
        numbers = " or ".join(map(str, expected)) or "a VMID of a new generation"
        words = f"{name} is entered under VMID {vmid}; the model's allocator gives {numbers}"
        if self._held.get(root) == vmid:
            return TraceRule.OLD_GENERATION, f"{words}: {vmid} is of an old generation"
        return TraceRule.WRONG_VMID, words


def _distinct(states: list[_State]) -> list[_State]:
    """Drop duplicates."""
    out: list[_State] = []
    for state in states:
        if not any(
            (vars(state.allocator), state.pending, state.reclaimed) == (vars(o.allocator), o.pending, o.reclaimed)
            for o in out
        ):
            out.append(state)
    return out
