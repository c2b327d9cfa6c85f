"""Hold the silicon against the model: one world, or as many as are wanted.

Worlds come from hypothesis in batches, each with a seed of its own that follows from the run's seed, so that a run can
be repeated and its memory stays bounded. A difference is shrunk by hypothesis to the smallest world that shows it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings

from framework.errors import ProgramSilent
from framework.model.regime import ImpossibleRegime

from . import layout
from .case import Probe, World
from .picture import picture
from .predict import Expected, Predictor
from .silicon import Lab
from .worlds import worlds

_BATCH = 200  #: worlds
_NAMES = [name.removeprefix("R_") for name in layout.RESULT_FIELDS]


@dataclass
class Tally:
    """What a run did. A case is one probe: one address and one operation under one world's registers and tables."""

    worlds: int = 0
    cases: int = 0
    unknowable: int = 0  #: probes not made: the architecture or the lab cannot say what they find
    outcomes: Counter = field(default_factory=Counter)  #: cases by what became of them: (stage, how)
    departed: Counter = field(default_factory=Counter)  #: cases whose prediction a departure changed

    def __str__(self) -> str:
        lines = [f"{self.cases} cases in {self.worlds} worlds, {self.unknowable} probes not made"]
        lines += [f"  {n:>9} {how}, {stage}" for (stage, how), n in sorted(self.outcomes.items())]
        lines += [f"  {n:>9} under departure {name}" for name, n in sorted(self.departed.items())]
        return "\n".join(lines)


class Difference(AssertionError):
    """Silicon and model disagree. ``str()`` is the picture of the walk and the registers that differ."""

    def __init__(self, world: World, probe: Probe | None, found: list[str], predictor: Predictor) -> None:
        self.world, self.probe, self.found = world, probe, found
        self._predictor = predictor
        super().__init__(found[0])

    def __str__(self) -> str:
        return picture(self.world, self.probe, self.found, self._predictor)


def check(lab: Lab, world: World, tally: Tally) -> None:
    """Make every probe of a world whose answer is knowable. Raises Difference at the first that differs."""
    try:
        predictor = Predictor.of(world, lab.program)
    except ImpossibleRegime:  # and the architecture leaves open what then happens
        return
    asked = [(probe, expected) for probe in world.probes if (expected := predictor.predict(probe)) is not None]
    try:
        _compare(lab, world, predictor, asked)
    except Difference:
        lab.restore()  # wherever a guest has stored what nobody expected
        raise
    tally.worlds += 1
    tally.cases += len(asked)
    tally.unknowable += len(world.probes) - len(asked)
    tally.outcomes.update(predictor.outcomes)
    tally.departed.update(predictor.departed)


def _compare(lab: Lab, world: World, predictor: Predictor, asked: list[tuple[Probe, Expected]]) -> None:
    try:
        results = lab.run(world, [probe for probe, _ in asked])
    except ProgramSilent as e:
        raise Difference(world, None, [f"nothing: {e}"], predictor) from e
    for (probe, expected), row in zip(asked, results, strict=True):
        if found := _differences(expected, row):
            raise Difference(world, probe, found, predictor)
    for pa, word in predictor.memory.stored.items():
        if (silicon := lab.peek(pa)) != word:
            found = f"word at PA {pa:#x}: model {word:#018x}, silicon {silicon:#018x}"
            raise Difference(world, None, [found], predictor)
    lab.restore(list(predictor.memory.stored))


def _differences(expected: Expected, row: list[int]) -> list[str]:
    return [
        f"{name:6} model {value:#018x}, silicon {row[at] & known:#018x}"
        for name, at, value, known in expected
        if row[at] & known != value
    ]


def conform(lab: Lab, cases: int, start: int, progress: Callable[[int], None] = lambda done: None) -> Tally:
    """At least ``cases`` cases from seed ``start``. Raises Difference, shrunk.

    ``progress`` is told of each batch's cases.
    """
    tally = Tally()
    strategy = worlds(lab.silicon, lab.program)
    batch = 0
    while tally.cases < cases:
        before = tally.cases
        _batch(lab, strategy, start * 1_000_003 + batch, tally)
        progress(tally.cases - before)
        batch += 1
    return tally


def _batch(lab: Lab, strategy, number: int, tally: Tally) -> None:
    @seed(number)
    @settings(
        max_examples=_BATCH,
        deadline=None,
        database=None,
        verbosity=Verbosity.quiet,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(world: World) -> None:
        check(lab, world, tally)

    run()
