"""Has hypothesis look for a sequence after which the host differs from the models, and shrink what it finds."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.errors import Flaky
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from arm_kvm.sequences.player import Player, SequenceBroken
from arm_kvm.sequences.steps import PAGES, SLOTS, Step, StepKind, every
from arm_kvm.sequences.world import Complaint
from arm_kvm.support.paths import cache_root

_LENGTH = 20  #: steps of a sequence, at most
_QUICK, _NIGHTLY = 25, 2000  #: sequences


def _any(*kinds: StepKind) -> st.SearchStrategy[Step]:
    """Draw a step of one of these kinds in a single choice: to draw each argument by itself takes longer.

    Every other range covers all pages: some faults show only at pages that a guest has used.
    """
    steps = [step for kind in kinds for step in every(kind)]
    return st.sampled_from(steps + [replace(step, page=0, last=PAGES - 1) for step in steps if step.last])


class Profile(Enum):
    """How long to search."""

    QUICK = "quick"  #: the same few sequences in every run
    NIGHTLY = "nightly"  #: many, different ones every day; those that failed before come first

    def settings(self, sequences: int | None) -> settings:
        count = sequences or (_QUICK if self is Profile.QUICK else _NIGHTLY)
        where = cache_root() / "sequences"
        return settings(
            max_examples=count,
            stateful_step_count=_LENGTH,
            derandomize=self is Profile.QUICK,
            database=DirectoryBasedExampleDatabase(where) if self is Profile.NIGHTLY else None,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.reuse, Phase.generate, Phase.shrink],
        )


@dataclass
class Tally:
    """What a search has covered."""

    sequences: int = 0
    steps: int = 0
    kinds: set[StepKind] = field(default_factory=set)


def search(make_player: Callable[[], Player], profile: Profile = Profile.QUICK, sequences: int | None = None) -> Tally:
    """Play sequences until one fails or all have passed. Raises SequenceBroken with the shortest that fails."""
    tally, players = Tally(), _Players(make_player)
    machine = _machine(players, tally)
    if profile is Profile.NIGHTLY:
        machine = seed(datetime.date.today().toordinal())(machine)
    try:
        run_state_machine_as_test(machine, settings=profile.settings(sequences))
    except Flaky as e:
        if (first := players.first) is None:
            raise
        if first.lost:  # no host is left to repeat it on
            raise first from e
        raise SequenceBroken(first.steps, [*first.complaints, Complaint("(this did not repeat)")]) from e
    finally:
        players.end()
    return tally


class _Players:
    """One player for all sequences; after a sequence that failed, a new one."""

    def __init__(self, make: Callable[[], Player]) -> None:
        self._make = make
        self._now: Player | None = None
        self.first: SequenceBroken | None = None  #: the first failure, before it was shrunk
        self._lost: SequenceBroken | None = None

    def next(self) -> Player:
        if self._lost:
            raise self._lost  # no host is left to shrink it on
        if self._now is None or self._now.broken:
            self.end()
            self._now = self._make()
        else:
            self._now.begin_anew()
        return self._now

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Remember a failure within the block."""
        try:
            yield
        except SequenceBroken as e:
            self.first = self.first or e
            self._lost = e if e.lost else None
            raise

    def end(self) -> None:
        if self._now:
            self._now.end()
        self._now = None


def _machine(players: _Players, tally: Tally) -> type[RuleBasedStateMachine]:
    """Make the rules: every kind of step, where it makes sense. Slow kinds share a rule, so they are chosen less."""

    class Sequences(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.player = players.next()
            tally.sequences += 1

        def _do(self, step: Step) -> None:
            if self.player.world.allows(step):
                with players.watched():
                    self.player.do(step)
                tally.steps += 1
                tally.kinds.add(step.kind)

        @rule(step=_any(StepKind.GUEST_WRITES))
        def guest_writes(self, step: Step) -> None:
            self._do(step)

        @rule(step=_any(StepKind.GUEST_READS))
        def guest_reads(self, step: Step) -> None:
            self._do(step)

        @rule(step=_any(StepKind.HOST_WRITES, StepKind.HOST_READS))
        def host_touches(self, step: Step) -> None:
            self._do(step)

        @rule(step=_any(StepKind.DONTNEED, StepKind.FREE, StepKind.PAGE_OUT))
        def host_drops(self, step: Step) -> None:
            self._do(step)

        @rule(step=_any(StepKind.MUNMAP, StepKind.MREMAP, *2 * [StepKind.REPLACE]))
        def host_maps(self, step: Step) -> None:
            self._do(step)

        @rule(step=_any(StepKind.PROTECT_NONE, StepKind.PROTECT_READ, StepKind.PROTECT_WRITE, *2 * [StepKind.AGE]))
        def host_protects_or_ages(self, step: Step) -> None:
            self._do(step)

        @precondition(lambda self: self.player.world.child is None)
        @rule(step=_any(StepKind.FORK))
        def fork(self, step: Step) -> None:
            self._do(step)

        @precondition(lambda self: self.player.world.child is not None)
        @rule(step=_any(StepKind.CHILD_WRITES, *8 * [StepKind.CHILD_EXITS]))
        def child(self, step: Step) -> None:
            self._do(step)

        @precondition(lambda self: any(not slot.logging for slot in self.player.world.slots))
        @rule(step=_any(StepKind.LOG_ON))
        def log(self, step: Step) -> None:
            self._do(step)

        @precondition(lambda self: any(slot.logging for slot in self.player.world.slots))
        @rule(step=_any(StepKind.DIRTY_LOG, StepKind.LOG_OFF))
        def logged(self, step: Step) -> None:
            self._do(self._of_either(step))

        @rule(step=_any(*4 * [StepKind.SLOT_DELETE, StepKind.SLOT_MOVE], *6 * [StepKind.NEW_VM]))
        def vmm(self, step: Step) -> None:
            self._do(step)

        @precondition(lambda self: len([*self.player.world.slots]) < len(SLOTS))
        @rule(step=_any(StepKind.SLOT_CREATE, StepKind.SLOT_READONLY))
        def slot_is_back(self, step: Step) -> None:
            self._do(self._of_either(step))

        def _of_either(self, step: Step) -> Step:
            """Return the step, or the same step of the other memslot if it makes sense only there."""
            other = replace(step, slot=sum(SLOTS) - step.slot)
            return other if self.player.world.allows(other) and not self.player.world.allows(step) else step

        def teardown(self) -> None:
            if not self.player.broken:
                with players.watched():
                    self.player.finish()

    return Sequences
