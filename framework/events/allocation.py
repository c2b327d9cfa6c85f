"""VMIDs held against the reference model: is the number in VTTBR the one that the model's allocator gives?

Two things about the host cannot be read from a trace, and the model is asked in every way they can be. When a vCPU is
scheduled out (the bitmap allocator keeps the numbers of VMs that are on a CPU): every CPU may have been left or not.
And a number is taken a moment before the guest is entered: of two CPUs, the one with the later number may enter first.

A trace begins in the middle of the host's life: the first number seen is where the model begins.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import product

from framework.model.vmid import Bitmap, Consecutive

from .automata import Finding
from .trace import Created, Enter, Event, Invalidate, Trace, root_of, vmid_of
from .violations import Kind
from .world import World, full

Allocator = Consecutive | Bitmap
#: Makes an allocator whose next number is the argument.
Begin = Callable[[int], Allocator]


def _numbers(text: str) -> set[int]:
    """``1-3,7`` -> {1, 2, 3, 7}."""
    ends = [part.partition("-") for part in text.split(",") if part]
    return {number for low, _, high in ends for number in range(int(low), int(high or low) + 1)}


def begin_of(trace: Trace) -> Begin | None:
    """The allocator by the trace's facts ``allocator``, ``vmid-bits`` and ``taken``; None when they do not say."""
    bits = int(trace.facts.get("vmid-bits", "8"))
    taken = _numbers(trace.facts.get("taken", ""))
    makers: dict[str, Begin] = {
        "consecutive": lambda first: Consecutive(bits, first),
        "bitmap": lambda first: Bitmap(bits, trace.cpus, first, taken | set(range(1, first))),
    }
    return makers.get(trace.facts.get("allocator", ""))


class Allocation:
    """Equality with the model, number by number, and the full invalidation that comes with a new generation."""

    def __init__(self, begin: Begin, cpus: int) -> None:
        self._begin = begin
        self._cpus = cpus
        self._states: list[Allocator] = []  #: every state the host's allocator can be in; [] until a number is seen
        self._last: dict[int, int] = {}  #: CPU -> root of the VM that was entered there last
        self._early: list[tuple[int, int, int]] = []  #: (root, CPU, VMID) that entered before a smaller number
        self._held: dict[int, int] = {}
        self._flushed = False  #: a full invalidation was seen that no new generation has taken yet

    def see(self, event: Event, world: World) -> Iterator[Finding]:
        match event:
            case Invalidate(op=op) if full(op):
                self._flushed = True
            case Created(root=root):
                self._held.pop(root, None)
                for state in self._states:
                    state.forget(root)
            case Enter(cpu=cpu):
                value = world.vttbr[cpu]
                if vmid_of(value):
                    yield from self._enter(root_of(value), cpu, vmid_of(value), world)

    def _enter(self, root: int, cpu: int, vmid: int, world: World) -> Iterator[Finding]:
        if not self._states:
            self._states, self._flushed = [self._begin(vmid)], False
        if self._advance(root, cpu, vmid):
            self._early = [entry for entry in self._early if not self._advance(*entry)]
        elif self._may_be_early(root, cpu, vmid):
            self._early.append((root, cpu, vmid))
        else:
            yield self._why(root, vmid, world)
            self._states, self._early = [], []
        self._held[root] = vmid
        self._last[cpu] = root

    def _may_be_early(self, root: int, cpu: int, vmid: int) -> bool:
        """Another CPU has taken a smaller number, and will enter next."""
        waiting = (root, cpu, vmid) in self._early or cpu not in (entry[1] for entry in self._early)
        return waiting and len(self._early) < self._cpus - 1

    def _advance(self, root: int, cpu: int, vmid: int) -> bool:
        """Keep the states in which this VM gets this number now; False, and nothing has changed, when there is none."""
        stay = [s for s in self._states if not s.rolls_over(root) and s.peek(root) == vmid]
        rolled = self._roll_over(root, cpu, vmid) if self._flushed else []
        if not stay and not rolled:
            return False
        for state in stay:
            state.enter(root, cpu)
        self._flushed &= not rolled
        self._states = _distinct(stay + rolled)
        return True

    def _roll_over(self, root: int, cpu: int, vmid: int) -> list[Allocator]:
        out = []
        for state in self._states:
            if state.rolls_over(root):
                for left in self._schedules(root, cpu):
                    new = copy.deepcopy(state)
                    for other in left:
                        new.leave(other)
                    if new.enter(root, cpu).vmid == vmid:
                        out.append(new)
        return out

    def _schedules(self, root: int, cpu: int) -> Iterator[list[int]]:
        """Every set of CPUs whose last vCPU may have been scheduled out by now. Another VM's on this CPU has been."""
        free = [c for c, last in self._last.items() if c != cpu or last == root]
        forced = [cpu] if self._last.get(cpu, root) != root else []
        for choice in product((False, True), repeat=len(free)):
            yield forced + [c for c, left in zip(free, choice, strict=True) if left]

    def _why(self, root: int, vmid: int, world: World) -> Finding:
        """The most telling name for a number the model does not give."""
        expected = sorted({state.peek(root) for state in self._states if not state.rolls_over(root)})
        name = world.name(root)
        if not expected and not self._flushed:
            return (
                Kind.ROLLOVER_NOT_INVALIDATED,
                f"{name} begins a new generation with VMID {vmid}, nothing invalidated",
            )
        numbers = " or ".join(map(str, expected)) or "a number of a new generation"
        words = f"{name} is entered under VMID {vmid}; the model's allocator gives {numbers}"
        if self._held.get(root) == vmid:
            return Kind.OLD_GENERATION, f"{words}: {vmid} is of an old generation"
        return Kind.WRONG_VMID, words


def _distinct(states: list[Allocator]) -> list[Allocator]:
    """Each state once."""
    out: list[Allocator] = []
    for state in states:
        if all(vars(state) != vars(other) for other in out):
            out.append(state)
    return out
