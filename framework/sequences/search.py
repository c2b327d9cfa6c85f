"""hypothesis looks for a sequence after which the host is not as the models say, and shrinks what it finds."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from framework.lab import cache_root

from .player import Player
from .steps import PAGES, SLOTS, VCPUS, Kind, Step

_LENGTH = 20  #: steps of a sequence, at most
_QUICK, _NIGHTLY = 25, 2000  #: sequences

_pages = st.integers(0, PAGES - 1)
_slots = st.sampled_from(SLOTS)
_vcpus = st.integers(0, VCPUS - 1)


@st.composite
def _ranges(draw: st.DrawFn) -> tuple[int, int]:
    first = draw(_pages)
    return first, draw(st.integers(first, PAGES - 1))


class Profile(Enum):
    """How long to look."""

    QUICK = "quick"  #: the same few sequences in every run
    NIGHTLY = "nightly"  #: many, others every day, and those that failed before first

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
    """What a search has done."""

    sequences: int = 0
    steps: int = 0
    kinds: set[Kind] = field(default_factory=set)


def search(make_player: Callable[[], Player], profile: Profile = Profile.QUICK, sequences: int | None = None) -> Tally:
    """Play sequences until one fails, or all have passed. Raises Broken with the shortest that fails."""
    tally, players = Tally(), _Players(make_player)
    machine = _machine(players, tally)
    if profile is Profile.NIGHTLY:
        machine = seed(datetime.date.today().toordinal())(machine)
    try:
        run_state_machine_as_test(machine, settings=profile.settings(sequences))
    finally:
        players.end()
    return tally


class _Players:
    """One player for all sequences, until one goes wrong: what comes after begins with another."""

    def __init__(self, make: Callable[[], Player]) -> None:
        self._make = make
        self._now: Player | None = None

    def next(self) -> Player:
        if self._now is None or self._now.broken:
            self.end()
            self._now = self._make()
        else:
            self._now.begin_anew()
        return self._now

    def end(self) -> None:
        if self._now:
            self._now.end()
        self._now = None


def _machine(players: _Players, tally: Tally) -> type[RuleBasedStateMachine]:
    """The rules: every kind of step, where it makes sense. What is slow shares a rule, and is chosen less."""

    class Sequences(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.player = players.next()
            tally.sequences += 1

        def _do(self, step: Step) -> None:
            if self.player.world.allows(step):
                self.player.do(step)
                tally.steps += 1
                tally.kinds.add(step.kind)

        @rule(kind=st.sampled_from([Kind.GUEST_WRITES, Kind.GUEST_READS]), page=_pages, vcpu=_vcpus, slot=_slots)
        def guest(self, kind: Kind, page: int, vcpu: int, slot: int) -> None:
            self._do(Step(kind, page=page, vcpu=vcpu, slot=slot))

        @rule(kind=st.sampled_from([Kind.HOST_WRITES, Kind.HOST_READS]), page=_pages)
        def host_touches(self, kind: Kind, page: int) -> None:
            self._do(Step(kind, page=page))

        @rule(kind=st.sampled_from([Kind.DONTNEED, Kind.FREE, Kind.REPLACE]), pages=_ranges())
        def host_drops(self, kind: Kind, pages: tuple[int, int]) -> None:
            self._do(Step(kind, *pages))

        @rule(
            kind=st.sampled_from([Kind.PROTECT_NONE, Kind.PROTECT_READ, Kind.PROTECT_WRITE, Kind.AGE]),
            pages=st.one_of(_ranges(), st.just((0, PAGES - 1))),
        )
        def host_protects_or_ages(self, kind: Kind, pages: tuple[int, int]) -> None:
            self._do(Step(kind, *pages))

        @rule(kind=st.sampled_from([Kind.FORK, *3 * [Kind.CHILD_WRITES], Kind.CHILD_EXITS]), page=_pages)
        def child(self, kind: Kind, page: int) -> None:
            self._do(Step(kind, page=page))

        @rule(kind=st.sampled_from([Kind.LOG_ON, Kind.LOG_OFF, Kind.DIRTY_LOG]), slot=_slots)
        def dirty_log(self, kind: Kind, slot: int) -> None:
            self._do(Step(kind, slot=slot))

        @rule(kind=st.sampled_from([*4 * [Kind.SLOT_DELETE, Kind.SLOT_CREATE], Kind.NEW_VM]), slot=_slots)
        def vmm(self, kind: Kind, slot: int) -> None:
            self._do(Step(kind, slot=slot))

    return Sequences
