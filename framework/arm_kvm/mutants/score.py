"""What became of each mutant, and the table that says so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum


class Fate(Enum):
    """How a mutant fared. The value is what the table shows."""

    KILLED = "killed"  #: a case failed, and says what is wrong
    SURVIVED = "survived"  #: every case passed
    EXPLAINED = "survived, as explained"  #: every case passed, and the catalogue says why
    WRONGLY_KILLED = "wrongly killed"  #: the host went down, which the catalogue does not expect
    NOT_APPLICABLE = "not applicable"  #: this kernel, or this host, cannot be broken this way
    NOT_RUN = "not run"  #: no host to break, no case to run, one that fails without the mutant, or the run ended


@dataclass(frozen=True)
class MutantResult:
    """``by``: the case that noticed; ``verdict``: what it said, or why the mutant was not noticed or not put in."""

    host: str
    area: str
    mutant: str
    fate: Fate
    by: str = ""
    verdict: str = ""
    cases: int = 0  #: that were run
    seconds: float = 0.0
    other_build: bool = False  #: not applicable, though it is to this kernel as somebody else built it

    def as_dict(self) -> dict:
        """Of strings and numbers, as a worker can send it; :meth:`of` makes it a result again."""
        return asdict(self) | {"fate": self.fate.value}

    @classmethod
    def of(cls, about: dict) -> MutantResult:
        return cls(**about | {"fate": Fate(about["fate"])})


def table(results: Sequence[MutantResult]) -> Iterator[str]:
    """The lines of the table, by host and area, closed by the share of applicable mutants that were killed."""
    results = sorted(results, key=lambda r: (r.host, r.area, r.mutant))
    rows = [
        (r.host, r.area, r.mutant, r.fate.value, f"{r.seconds:.1f} s", " ".join(filter(None, (r.by, r.verdict))))
        for r in results
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
    for row in rows:
        yield "  ".join(f"{text:{width}}" for text, width in zip(row, widths, strict=True)).rstrip()
    for host in dict.fromkeys(r.host for r in results):
        yield summary(host, [r for r in results if r.host == host])


def summary(host: str, results: Sequence[MutantResult]) -> str:
    fates = Counter(result.fate for result in results)
    applicable = len(results) - fates[Fate.NOT_APPLICABLE] - fates[Fate.NOT_RUN]
    share = 100 * fates[Fate.KILLED] / applicable if applicable else 0.0
    counts = {fate: f"{fates[fate]} {fate.value}" for fate in list(Fate)[1:] if fates[fate]}
    if missed := [result.mutant for result in results if result.other_build]:
        counts[Fate.NOT_APPLICABLE] += f" (of them in another build than the catalogue knows: {', '.join(missed)})"
    killed = f"{host}: {fates[Fate.KILLED]} of {applicable} applicable mutants killed, {share:.0f} %"
    return "; ".join(filter(None, (killed, ", ".join(counts.values()))))
