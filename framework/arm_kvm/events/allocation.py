"""VMIDs held against the reference model: is the number in VTTBR the one that the model's allocator gives?

A number is taken under the allocator's lock, some time before the guest is entered with it, so other CPUs may enter
with later numbers first: a number that is passed over is late, until it is seen. A new generation begins, and its first
number is taken, where its full invalidation is executed, under the same lock. And a trace does not say when a vCPU is
scheduled out (the bitmap allocator keeps the numbers of VMs that are on a CPU): every CPU may have been left or not.

A trace begins in the middle of the host's life: the first number seen is where the model begins. With the bitmap
allocator VMs from before may hold numbers above it, so until the first new generation a number may be larger than the
model's, and the generation may end early. Where VMs from before run on (``earlier-vms``) nothing is judged here. Not
followed: a number of the bitmap that is late over the first new generation of a trace.
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

NOBODY = -1
Allocator = Consecutive | Bitmap
#: Makes an allocator whose next number is the argument.
Begin = Callable[[int], Allocator]


def begin_of(trace: Trace) -> Begin | None:
    """The allocator by the trace's facts ``allocator`` and ``vmid-bits``; None when they do not say."""
    if "earlier-vms" in trace.facts:
        return None
    bits = trace.vmid_bits
    makers: dict[str, Begin] = {
        "consecutive": lambda first: Consecutive(bits, first),
        "bitmap": lambda first: Bitmap(bits, trace.cpus, first),
    }
    return makers.get(trace.facts.get("allocator", ""))


@dataclass
class _Guess:
    """One state that the host's allocator can be in.

    ``late``: numbers that were passed over -> the CPUs that may come with them. With NOBODY among these, it may also be
    the number of a VM from before. ``ahead``: roots of VMs that have a number and are yet to be seen with it.
    """

    allocator: Allocator
    late: dict[int, frozenset[int]] = field(default_factory=dict)
    ahead: set[int] = field(default_factory=set)

    def gives(self, root: int, vmid: int) -> bool:
        """Whether this is the VM's number, or the next one that is given."""
        return not self.allocator.rolls_over(root) and self.allocator.peek(root) == vmid

    def is_late(self, vmid: int, cpu: int) -> bool:
        """Whether this CPU may come with a number that was passed over.

        When a CPU surely has it, any may be the first to: the vCPUs of a VM share its number.
        """
        cpus = self.late.get(vmid, frozenset({NOBODY}))
        return cpu in cpus or NOBODY not in cpus

    @property
    def outstanding(self) -> int:
        """CPUs that have a number and are yet to be seen with it."""
        return sum(NOBODY not in cpus for cpus in self.late.values()) + len(self.ahead)

    def pass_over(self, cpus: frozenset[int]) -> None:
        """The next number is taken by one of these CPUs, for a VM that is yet to be seen with it."""
        number = self.allocator.peek(_Unseen())
        self.allocator.enter(_Unseen(), min(cpus))
        self.allocator.forget(_Unseen())
        self.late[number] = cpus

    def rivals(self, root: int) -> set[int]:
        """Other VMs that had the old number for which this one asks: of the bitmap, whoever asks first gets it."""
        if not isinstance(self.allocator, Bitmap) or self.allocator.rolls_over(root):
            return set()
        return self.allocator.formerly(self.allocator.peek(root)) - {root}

    def get_ahead(self, root: int, cpus: frozenset[int]) -> None:
        """This VM gets its number on one of these CPUs, and is yet to be seen with it."""
        self.allocator.enter(root, min(cpus))
        self.ahead.add(root)

    def begin_generation(self, cpu: int, left: list[int]) -> None:
        """This CPU finds no number left, and takes the first of the new generation; ``left``: CPUs without a guest."""
        for other in left:
            self.allocator.leave(other)
        # With the consecutive allocator, whoever was about to enter asks again; with the other, it keeps its number.
        keep = not isinstance(self.allocator, Consecutive)
        self.late = {n: cpus for n, cpus in self.late.items() if keep and NOBODY not in cpus}
        number = self.allocator.enter(_Unseen(), cpu).vmid
        self.allocator.forget(_Unseen())
        self.late[number] = frozenset({cpu})

    def enter(self, root: int, cpu: int, vmid: int) -> None:
        """The VM is seen with its number."""
        if vmid in self.late and not self.allocator.has(root):
            self.allocator.give(root, vmid)
        self.late.pop(vmid, None)
        self.ahead.discard(root)
        self.allocator.enter(root, cpu)


@dataclass(frozen=True)
class _Unseen:
    """Stands for a VM that took a number and is yet to be seen with it."""


class Allocation:
    """Equality with the model, number by number, and the full invalidation that comes with a new generation."""

    def __init__(self, begin: Begin, cpus: int) -> None:
        self._begin = begin
        self._cpus = frozenset(range(cpus))
        self._guesses: list[_Guess] = []  #: [] until a number is seen
        self._last: dict[int, int] = {}  #: CPU -> root of the VM that was entered there last
        self._held: dict[int, int] = {}
        self._young = True  #: no new generation was seen yet

    def see(self, event: Event, world: TraceState) -> Iterator[Finding]:
        match event:
            case Invalidate(cpu=cpu, op=op) if full(op):
                self._roll_over(cpu)
            case Created(root=root):
                self._held.pop(root, None)
                for guess in self._guesses:
                    guess.allocator.forget(root)
            case Enter(cpu=cpu):
                value = world.vttbr[cpu]
                if vmid_of(value):
                    yield from self._enter(root_of(value), cpu, vmid_of(value), world)

    # -- a guest is entered ----------------------------------------------------------------------------------

    def _enter(self, root: int, cpu: int, vmid: int, world: TraceState) -> Iterator[Finding]:
        if not self._guesses:
            self._guesses = [self._first_guess(cpu, vmid)]
        after = [new for guess in self._guesses if (new := self._explain(guess, root, cpu, vmid))]
        if not after:
            yield self._why(root, vmid, world)
        for guess in after:
            guess.enter(root, cpu, vmid)
        self._guesses = after
        self._held[root] = vmid
        self._last[cpu] = root

    def _first_guess(self, cpu: int, first: int) -> _Guess:
        """Smaller numbers may be late: of the consecutive allocator as many as there are other CPUs."""
        allocator = self._begin(first)
        self._young = True
        least = 1 if isinstance(allocator, Bitmap) else max(1, first - len(self._cpus) + 1)
        return _Guess(allocator, dict.fromkeys(range(least, first), self._cpus - {cpu} | {NOBODY}))

    def _explain(self, guess: _Guess, root: int, cpu: int, vmid: int) -> _Guess | None:
        """The state in which this VM has this number now, if there is one."""
        if guess.gives(root, vmid):
            return guess
        if guess.allocator.has(root):
            return None
        if guess.is_late(vmid, cpu):
            return guess
        return self._pass_over(guess, root, cpu, vmid) or self._beaten(guess, root, cpu, vmid)

    def _beaten(self, guess: _Guess, root: int, cpu: int, vmid: int) -> _Guess | None:
        """On another CPU, a VM with the same old number has got it before this one asked."""
        others = self._cpus - {cpu}
        if guess.outstanding >= len(others):
            return None
        for rival in guess.rivals(root):
            new = copy.deepcopy(guess)
            new.get_ahead(rival, others)
            if explained := new if new.gives(root, vmid) else self._pass_over(new, root, cpu, vmid):
                return explained
        return None

    def _pass_over(self, guess: _Guess, root: int, cpu: int, vmid: int) -> _Guess | None:
        """Other CPUs have taken numbers before this one, and will come with them."""
        if guess.allocator.rolls_over(_Unseen()):
            return None
        new, others = copy.deepcopy(guess), self._cpus - {cpu}
        if self._young and isinstance(new.allocator, Bitmap) and vmid > new.allocator.peek(_Unseen()):
            new.late |= dict.fromkeys(range(new.allocator.peek(_Unseen()), vmid), others | {NOBODY})
            new.allocator.skip(vmid)
        while new.outstanding < len(others) and not new.allocator.rolls_over(_Unseen()):
            if new.gives(root, vmid):
                break
            new.pass_over(others)
        return new if new.gives(root, vmid) else None

    # -- a generation begins -----------------------------------------------------------------------------------

    def _roll_over(self, cpu: int) -> None:
        """The model follows where it can; where it cannot, its next number will not be the kernel's."""
        ready = [new for guess in self._guesses if (new := self._exhausted(guess, cpu))]
        after = []
        for guess in ready:
            for left in self._schedules():
                new = copy.deepcopy(guess)
                new.begin_generation(cpu, left)
                after.append(new)
        if after:
            self._guesses, self._young = _distinct(after), False

    def _exhausted(self, guess: _Guess, cpu: int) -> _Guess | None:
        """The state with no number left: the last ones may be late, or be those of VMs from before."""
        new, others = copy.deepcopy(guess), self._cpus - {cpu}
        if self._young and isinstance(new.allocator, Bitmap):
            new.allocator.skip(new.allocator.size)
        while new.outstanding < len(others) and not new.allocator.rolls_over(_Unseen()):
            new.pass_over(others)
        return new if new.allocator.rolls_over(_Unseen()) else None

    def _schedules(self) -> Iterator[list[int]]:
        """Every set of CPUs whose last vCPU may have been scheduled out by now."""
        for choice in product((False, True), repeat=len(self._last)):
            yield [c for c, left in zip(self._last, choice, strict=True) if left]

    # -- what to say ---------------------------------------------------------------------------------------------

    def _why(self, root: int, vmid: int, world: TraceState) -> Finding:
        """The most telling name for a number the model does not give."""
        allocators = [guess.allocator for guess in self._guesses]
        expected = sorted({a.peek(root) for a in allocators if not a.rolls_over(root)})
        name = world.name(root)
        if not expected and self._held.get(root) != vmid:
            return (
                TraceRule.ROLLOVER_NOT_INVALIDATED,
                f"{name} begins a new generation with VMID {vmid}, nothing invalidated",
            )
        numbers = " or ".join(map(str, expected)) or "a number of a new generation"
        words = f"{name} is entered under VMID {vmid}; the model's allocator gives {numbers}"
        if self._held.get(root) == vmid:
            return TraceRule.OLD_GENERATION, f"{words}: {vmid} is of an old generation"
        return TraceRule.WRONG_VMID, words


def _distinct(guesses: list[_Guess]) -> list[_Guess]:
    """Each state once."""
    out: list[_Guess] = []
    for guess in guesses:
        if not any(
            (vars(guess.allocator), guess.late, guess.ahead) == (vars(o.allocator), o.late, o.ahead) for o in out
        ):
            out.append(guess)
    return out
