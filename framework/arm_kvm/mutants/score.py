"""The fate of each mutant, and the table of all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any


class Fate(Enum):
    """What became of a mutant. The value is what the table shows."""

    KILLED = "killed"  #: a case failed and says what is wrong
    SURVIVED = "survived"  #: every case passed
    EXPLAINED = "survived, as explained"  #: every case passed, and the catalogue says why
    WRONGLY_KILLED = "wrongly killed"  #: the host went down, which the catalogue does not expect
    NOT_APPLICABLE = "not applicable"  #: this kernel, or this host, cannot be broken this way
    NOT_RUN = "not run"  #: no host to break, no case to run, the case also fails without the mutant, or the run ended


@dataclass(frozen=True)
class MutantResult:
    """``by``: the case that noticed. ``verdict``: what it found, or why the mutant was not noticed or not put in."""

    host: str
    area: str
    mutant: str
    fate: Fate
    by: str = ""
    verdict: str = ""
    cases: int = 0  #: how many were run
    seconds: float = 0.0
    other_build: bool = False  #: not applicable to this build, though the catalogue knows another of this kernel

    def as_dict(self) -> dict[str, Any]:
        """Convert to strings and numbers, which a worker can send; :meth:`of` converts back."""
        return asdict(self) | {"fate": self.fate.value}

    @classmethod
    def of(cls, about: dict[str, Any]) -> MutantResult:
        return cls(**about | {"fate": Fate(about["fate"])})


def table(results: Sequence[MutantResult]) -> Iterator[str]:
    """Format the results by host and area, followed by each host's share of applicable mutants that were killed."""
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
