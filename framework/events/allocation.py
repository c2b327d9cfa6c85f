"""VMIDs held against the reference model: is the number in VTTBR the one that the model's allocator gives?

Two things about the host cannot be read from a trace, and the model is asked in every way they can be. When a vCPU is
scheduled out (the bitmap allocator keeps the numbers of VMs that are on a CPU): every CPU may have been left or not.
And a number is taken some time before the guest is entered: other CPUs may enter with later numbers first.

A trace begins in the middle of the host's life: the first number seen is where the model begins. With the bitmap
allocator VMs from before may hold numbers above it, so until the first new generation a number may be larger than the
model's, and the generation may end early. Where VMs from before run on (``earlier-vms``) nothing is judged here.

Not followed, so that they would be false alarms: the very first number of a trace entered after the second; before the
model's, and the generation may end early. Where VMs from before run on (``earlier-vms``) nothing is judged.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from itertools import product

from framework.model.vmid import Bitmap, Consecutive

from .automata import Finding
from .trace import Created, Enter, Event, Invalidate, Trace, root_of, vmid_of
from .violations import Kind
from .world import World, full

Allocator = Consecutive | Bitmap
#: Makes an allocator whose next number is the argument.
Begin = Callable[[int], Allocator]


def begin_of(trace: Trace) -> Begin | None:
    """The allocator by the trace's facts ``allocator`` and ``vmid-bits``; None when they do not say."""
    if "earlier-vms" in trace.facts:
        return None
    bits = int(trace.facts.get("vmid-bits", "8"))
    makers: dict[str, Begin] = {
        "consecutive": lambda first: Consecutive(bits, first),
        "bitmap": lambda first: Bitmap(bits, trace.cpus, first),
    }
    return makers.get(trace.facts.get("allocator", ""))


@dataclass
class _Guess:
    """One state that the host's allocator can be in. ``gaps``: numbers taken by CPUs that have yet to enter."""

    allocator: Allocator
    gaps: set[int] = field(default_factory=set)

    def holds(self, root: int, vmid: int) -> bool:
        """Whether this entry changes nothing that matters."""
        return not self.allocator.rolls_over(root) and self.allocator.peek(root) == vmid

    def fill_gap(self, root: int, vmid: int) -> None:
        self.gaps.discard(vmid)
        self.allocator.rename(_Gap(vmid), root)

    def take(self, vm: Hashable, cpu: int, flushed: bool, left: list[int]) -> tuple[_Guess, int, bool] | None:
        """The state after ``vm`` took its number, the number, whether that began a generation; None if it may not."""
        rolls = self.allocator.rolls_over(vm)
        if rolls and not flushed:
            return None
        after = copy.deepcopy(self)
        if rolls and isinstance(after.allocator, Consecutive):
            after.gaps.clear()  # whoever was about to enter asks again
        for other in left if rolls else ():
            after.allocator.leave(other)
        return after, after.allocator.enter(vm, cpu).vmid, rolls


@dataclass(frozen=True)
class _Gap:
    """Stands for the VM whose number this is, until it is seen."""

    vmid: int


class Allocation:
    """Equality with the model, number by number, and the full invalidation that comes with a new generation."""

    def __init__(self, begin: Begin, cpus: int) -> None:
        self._begin = begin
        self._cpus = cpus
        self._guesses: list[_Guess] = []  #: [] until a number is seen
        self._last: dict[int, int] = {}  #: CPU -> root of the VM that was entered there last
        self._held: dict[int, int] = {}
        self._young = False  #: no new generation was seen yet
        self._flushed = False  #: a full invalidation was seen that no new generation has taken yet

    def see(self, event: Event, world: World) -> Iterator[Finding]:
        match event:
            case Invalidate(op=op) if full(op):
                self._flushed = True
            case Created(root=root):
                self._held.pop(root, None)
                for guess in self._guesses:
                    guess.allocator.forget(root)
            case Enter(cpu=cpu):
                value = world.vttbr[cpu]
                if vmid_of(value):
                    yield from self._enter(root_of(value), cpu, vmid_of(value), world)

    def _enter(self, root: int, cpu: int, vmid: int, world: World) -> Iterator[Finding]:
        if not self._guesses:
            self._guesses, self._flushed = [_Guess(self._begin(vmid))], False
            self._young = isinstance(self._guesses[0].allocator, Bitmap)
        if self._young:
            self._learn(root, vmid)
        if not self._advance(root, cpu, vmid):
            yield self._why(root, vmid, world)
            self._guesses = []
        self._held[root] = vmid
        self._last[cpu] = root

    def _learn(self, root: int, vmid: int) -> None:
        """Numbers that are skipped before the first new generation are taken."""
        for guess in self._guesses:
            allocator = guess.allocator
            if vmid not in guess.gaps and not guess.holds(root, vmid) and not allocator.rolls_over(root):
                allocator.skip(allocator.size if self._flushed else vmid)

    def _advance(self, root: int, cpu: int, vmid: int) -> bool:
        """Keep the guesses in which this VM has this number now; False, and nothing changed, when there are none."""
        stay = [guess for guess in self._guesses if guess.holds(root, vmid)]
        if stay:
            for guess in stay:
                guess.allocator.enter(root, cpu)
            self._guesses = stay
            return True
        after = [new for guess in self._guesses for new in self._outcomes(guess, root, cpu, vmid)]
        if not after:
            return False
        if any(rolled for _, rolled in after):
            self._flushed = self._young = False
        self._guesses = _distinct([guess for guess, _ in after])
        return True

    def _outcomes(self, guess: _Guess, root: int, cpu: int, vmid: int) -> Iterator[tuple[_Guess, bool]]:
        """Every way in which the VM can have got this number, and whether a generation began on it."""
        if vmid in guess.gaps:
            new = copy.deepcopy(guess)
            new.fill_gap(root, vmid)
            yield new, False
            return
        for left in self._schedules(root, cpu):
            if (taken := guess.take(root, cpu, self._flushed, left)) and taken[1] == vmid:
                yield taken[0], taken[2]
            yield from self._after_another(guess, root, cpu, vmid, left)

    def _after_another(
        self, guess: _Guess, root: int, cpu: int, vmid: int, left: list[int]
    ) -> Iterator[tuple[_Guess, bool]]:
        """Another CPU took a number just before, and has not entered with it yet."""
        if len(guess.gaps) >= self._cpus - 1 or (guess.allocator.rolls_over(root) and not self._flushed):
            return
        gap = 1 if guess.allocator.rolls_over(_Gap(0)) else guess.allocator.peek(_Gap(0))
        for other in (c for c in range(self._cpus) if c != cpu):
            if (first := guess.take(_Gap(gap), other, self._flushed, left)) is None:
                continue
            after, taken, rolled = first
            after.allocator.rename(_Gap(gap), _Gap(taken))
            after.gaps.add(taken)
            second = after.take(root, cpu, self._flushed and not rolled, left)
            if second and second[1] == vmid:
                yield second[0], rolled or second[2]
            if not rolled:
                yield from self._after_another(after, root, cpu, vmid, left)

    def _schedules(self, root: int, cpu: int) -> Iterator[list[int]]:
        """Every set of CPUs whose last vCPU may have been scheduled out by now. Another VM's on this CPU has been."""
        free = [c for c, last in self._last.items() if c != cpu or last == root]
        forced = [cpu] if self._last.get(cpu, root) != root else []
        for choice in product((False, True), repeat=len(free)):
            yield forced + [c for c, left in zip(free, choice, strict=True) if left]

    def _why(self, root: int, vmid: int, world: World) -> Finding:
        """The most telling name for a number the model does not give."""
        allocators = [guess.allocator for guess in self._guesses]
        expected = sorted({a.peek(root) for a in allocators if not a.rolls_over(root)})
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


def _distinct(guesses: list[_Guess]) -> list[_Guess]:
    """Each state once."""
    out: list[_Guess] = []
    for guess in guesses:
        if not any(vars(guess.allocator) == vars(o.allocator) and guess.gaps == o.gaps for o in out):
            out.append(guess)
    return out
