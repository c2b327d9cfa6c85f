"""Compare the silicon with the model, in one world or in many.

Worlds come from hypothesis in batches, which bounds memory; the seed of each batch is derived from the run's seed. The
same seed gives the same worlds with the same code and version of hypothesis. Hypothesis shrinks a difference to the
smallest world that shows it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.errors import Flaky
from hypothesis.strategies import SearchStrategy

from arm_kvm.conform.case import Probe, TableWorld
from arm_kvm.conform.picture import picture
from arm_kvm.conform.predict import Expected, Predictor
from arm_kvm.conform.silicon import Lab
from arm_kvm.conform.worlds import worlds
from arm_kvm.machine.rundir import run_directory
from arm_kvm.model.arch.regime import ImpossibleRegime
from arm_kvm.support.errors import ProgramSilent, QemuDied

_BATCH = 200  #: worlds


@dataclass
class Tally:
    """Statistics of a run. A case is a probe: an address and an operation under the registers and tables of a world."""

    worlds: int = 0
    cases: int = 0
    repeated: int = 0  #: worlds that hypothesis drew again within a batch, and that were skipped
    unknowable: int = 0  #: probes not made because the architecture or the lab does not define their outcome
    silenced: int = 0  #: ... of these, because of a departure
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)  #: cases by outcome: (stage, how)
    departed: Counter[str] = field(default_factory=Counter)  #: cases whose prediction a departure changed, by its name
    #: Cases whose prediction a departure of another release would have changed, by its name.
    mended: Counter[str] = field(default_factory=Counter)

    def add(self, predictor: Predictor, asked: int) -> None:
        """Count one world."""
        self.worlds += 1
        self.cases += asked
        self.unknowable += len(predictor.world.probes) - asked
        self.silenced += predictor.silenced
        self.outcomes.update(predictor.outcomes)
        self.departed.update(predictor.departed)
        self.mended.update(predictor.mended)

    def __str__(self) -> str:
        lines = [
            f"{self.cases} cases in {self.worlds} different worlds ({self.repeated} drawn again and skipped); "
            f"{self.unknowable} probes not made, {self.silenced} of them because of a departure"
        ]
        lines += [f"  {n:>9} {how}, {stage}" for (stage, how), n in sorted(self.outcomes.items())]
        lines += [f"  {n:>9} under departure {name}" for name, n in sorted(self.departed.items())]
        lines += [f"  {n:>9} where {name} is not shown by this QEMU" for name, n in sorted(self.mended.items())]
        return "\n".join(lines)


class Difference(AssertionError):
    """Silicon and model differ. ``str()`` shows the walk and the registers that differ."""

    def __init__(self, world: TableWorld, probe: Probe | None, found: list[str], lab: Lab) -> None:
        self.world, self.probe, self.found = world, probe, found
        self._program = lab.program
        super().__init__(found[0])

    def __str__(self) -> str:
        return picture(self.world, self.probe, self.found, self._program)


def check(lab: Lab, world: TableWorld, tally: Tally) -> None:
    """Make every probe of a world that the model can predict. Raises Difference at the first that differs."""
    try:
        predictor = Predictor.of(world, lab.program)
    except ImpossibleRegime:  # the result is not defined
        return
    asked = [(probe, expected) for probe in world.probes if (expected := predictor.predict(probe)) is not None]
    try:
        results = lab.run(world, [probe for probe, _ in asked])
    except (ProgramSilent, QemuDied) as e:
        raise Difference(world, None, [f"nothing: {e}"], lab) from e
    try:
        _compare(lab, world, predictor, asked, results)
    except Difference:
        lab.heal()
        raise
    tally.add(predictor, len(asked))


def _compare(
    lab: Lab, world: TableWorld, predictor: Predictor, asked: list[tuple[Probe, Expected]], results: list[list[int]]
) -> None:
    for (probe, expected), row in zip(asked, results, strict=True):
        if found := _differences(expected, row):
            raise Difference(world, probe, found, lab)
    for pa, word in predictor.memory.stored.items():
        if (silicon := lab.peek(pa)) != word:
            raise Difference(world, None, [_word(pa, word, silicon)], lab)
    for pa, word in world.words.items():
        if asked and not predictor.hardware.explains(pa, word, silicon := lab.peek(pa)):
            raise Difference(world, None, ["the table has changed: " + _word(pa, word, silicon)], lab)
    lab.restore(list(predictor.memory.stored))


def _word(pa: int, model: int, silicon: int) -> str:
    return f"word at PA {pa:#x}: model {model:#018x}, silicon {silicon:#018x}"


def _differences(expected: Expected, row: list[int]) -> list[str]:
    return [
        f"{name:6} model {value:#018x}, silicon {row[at] & known:#018x}"
        for name, at, value, known in expected
        if row[at] & known != value
    ]


def conform(
    lab: Lab, cases: int, start: int, progress: Callable[[int], None] = lambda done: None, *, shrink: bool = True
) -> Tally:
    """Run at least ``cases`` cases from seed ``start``; ``progress`` is called with the number of cases of each batch.

    Raises Difference (minimised if ``shrink``), ValueError if the worlds contain no case.
    """
    set_hypothesis_home_dir(
        run_directory() / "hypothesis"
    )  # where it caches constants, instead of the current directory
    tally = Tally()
    strategy = worlds(lab.silicon, lab.program)
    batch = 0
    while tally.cases < cases:
        before = tally.cases
        _batch(lab, strategy, start * 1_000_003 + batch, tally, shrink)
        if tally.cases == before:
            raise ValueError("a whole batch of worlds has no probe whose answer is known")
        progress(tally.cases - before)
        batch += 1
    return tally


def _batch(lab: Lab, strategy: SearchStrategy[TableWorld], number: int, tally: Tally, shrink: bool) -> None:
    seen: set[int] = set()
    differences: list[Difference] = []

    @seed(number)
    @settings(
        max_examples=_BATCH,
        deadline=None,
        database=None,
        verbosity=Verbosity.quiet,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(world: TableWorld) -> None:
        key = hash((world.registers, tuple(world.words.items()), world.probes))
        if key in seen:
            tally.repeated += 1
            return
        try:
            check(lab, world, tally)
        except Difference as e:
            differences.append(e)
            raise
        seen.add(key)

    try:
        run()
    except Flaky:
        first = differences[0]
        first.found.append("(this did not repeat)")
        raise first from None
