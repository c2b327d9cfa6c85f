"""The trial of one mutant on one host: cases run on the broken kernel until one fails, which decides its fate.

A case kills the mutant only if it passes on an unbroken kernel after the same cases. The trial checks that as well,
once for each such sequence of cases. Cases and hosts are behind the protocol :class:`Cases`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from arm_kvm.mutants.catalogue import Mutant, NotApplicable, OtherBuild
from arm_kvm.mutants.score import Fate, MutantResult
from arm_kvm.support.errors import (
    DiskFull,
    HostLockup,
    HostOops,
    HostPanic,
    HostSilent,
    LabError,
    LimitReached,
    QemuDied,
    QemuKilled,
)
from arm_kvm.support.judged import Judged

#: Errors that a broken kernel can cause.
_DEATHS = (HostPanic, HostOops, HostLockup, HostSilent, QemuDied)
#: Errors that it cannot cause: they say nothing about the mutant.
_OF_THIS_MACHINE = (QemuKilled, DiskFull, LimitReached)


class Status(Enum):
    """How a case ended."""

    PASSED = auto()
    SKIPPED = auto()  #: or an expected failure
    FAILED = auto()


class HostState(Enum):
    """The host at the end of a case."""

    UP = auto()
    LOST = auto()  #: it went down during the case
    MISSING = auto()  #: it could not be started for the case


@dataclass(frozen=True)
class Outcome:
    """How one case ended. ``failure``: its exception, or the reason why its host was lost or missing."""

    status: Status
    failure: BaseException | None = None
    host: HostState = HostState.UP


class Cases(Protocol):
    """The cases that a mutant is tried with, and the one host that they run on."""

    @property
    def names(self) -> Sequence[str]:
        """The cases, in the order in which they are to run."""

    def build(self) -> None:
        """Build the broken host's kernel, if it takes one of its own. Raises what :meth:`host` raises."""

    def host(self) -> LabError | None:
        """Start the broken host for all cases until :meth:`discard`. Returns the reason if it does not start.

        Raises NotApplicable where the mutant does not apply to it, LabError or OSError where it cannot be put in.
        """

    def run(self, case: str) -> Outcome:
        """Run a case on the broken host; after :meth:`discard`, on an unbroken one, started if need be."""

    def discard(self) -> None:
        """End the host, broken or not."""


#: By a sequence of cases: what is wrong with the last on an unbroken host, after the others; "" where it passes.
Controls = dict[tuple[str, ...], str]


class Trial:
    """One mutant against the cases. Trials on the same hosts may share ``controls``."""

    def __init__(self, mutant: Mutant, host: str, cases: Cases, controls: Controls) -> None:
        self._mutant, self._host, self._cases, self._controls = mutant, host, cases, controls
        self._began = time.monotonic()

    def run(self) -> MutantResult:
        """Build, break, run the cases, and check the one that failed."""
        try:
            self._cases.build()
            self._began = time.monotonic()  # a kernel's build is not the suite's time
            result = self._on_broken_host()
            return self._checked(result) if result.fate is Fate.KILLED and result.cases else result
        except NotApplicable as e:
            return self._result(Fate.NOT_APPLICABLE, verdict=str(e), other_build=isinstance(e, OtherBuild))
        except LabError as e:
            return self._result(Fate.NOT_RUN, verdict=e.one_line)
        except OSError as e:
            return self._result(Fate.NOT_RUN, verdict=str(e))

    def _result(
        self, fate: Fate, *, by: str = "", verdict: str = "", cases: int = 0, other_build: bool = False
    ) -> MutantResult:
        mutant, seconds = self._mutant, time.monotonic() - self._began
        return MutantResult(self._host, mutant.area, mutant.name, fate, by, verdict, cases, seconds, other_build)

    def _on_broken_host(self) -> MutantResult:
        try:
            if (cause := self._cases.host()) is not None:
                return self._noticed(Outcome(Status.FAILED, cause, HostState.MISSING), "boot", 0)
            return self._run_cases()
        finally:
            self._cases.discard()

    def _run_cases(self) -> MutantResult:
        """Run the cases until one fails. Raises LabError if the mutant cannot be the reason."""
        names, survives = self._cases.names, self._mutant.survives
        if not names:
            return self._result(Fate.NOT_RUN, verdict="no case was chosen that could notice it")
        for number, name in enumerate(names, 1):
            outcome = self._cases.run(name)
            if outcome.status is Status.FAILED:
                return self._noticed(outcome, _short(name), number)
        return self._result(Fate.EXPLAINED if survives else Fate.SURVIVED, verdict=survives, cases=len(names))

    def _noticed(self, outcome: Outcome, by: str, cases: int) -> MutantResult:
        verdict = verdict_of(_telling(outcome))
        return self._result(self._fate_by(outcome), by=by, verdict=verdict, cases=cases)

    def _fate_by(self, outcome: Outcome) -> Fate:
        """The host may go down where the catalogue says so; QEMU may not, since the mutant breaks only the kernel."""
        died = outcome.host is HostState.LOST or isinstance(outcome.failure, _DEATHS)
        expected = self._mutant.dies and not isinstance(outcome.failure, QemuDied)
        return Fate.WRONGLY_KILLED if died and not expected else Fate.KILLED

    # -- the control ---------------------------------------------------------------------------------------------

    def _checked(self, killed: MutantResult) -> MutantResult:
        """Confirm the kill: the case must pass on an unbroken host after the same cases."""
        row = tuple(self._cases.names[: killed.cases])
        if row not in self._controls:
            self._controls[row] = self._control(row)
        if wrong := self._controls[row]:
            return self._result(Fate.NOT_RUN, verdict=f"{_short(row[-1])} {wrong}")
        return killed

    def _control(self, row: Sequence[str]) -> str:
        """Compute the entry of :data:`Controls`. Raises LabError where no host can be started.

        The earlier cases are run again, too: they may leave an unbroken host in another state than the broken one.
        """
        try:
            for name in row:
                outcome = self._cases.run(name)
                if outcome.status is Status.FAILED:
                    which = "fails" if name == row[-1] else f"comes after {_short(name)}, which fails"
                    return f"{which} where nothing is broken, too: {verdict_of(_telling(outcome))}"
            return "" if outcome.status is Status.PASSED else "is skipped where nothing is broken"
        finally:
            self._cases.discard()


def _telling(failed: Outcome) -> BaseException:
    """Return what the case failed with; raise it instead if it says nothing about the kernel."""
    failure = failed.failure
    assert failure is not None, "an outcome that failed says with what"
    if isinstance(failure, _OF_THIS_MACHINE):
        raise failure from None
    if failed.host is HostState.MISSING and not isinstance(failure, _DEATHS):
        raise failure from None
    return failure


def verdict_of(failure: BaseException) -> str:
    """Name the verdicts of a failure; if it has none, its class and first line."""
    if isinstance(failure, Judged) and failure.verdicts:
        return ", ".join(sorted(failure.verdicts))
    first = next(iter(str(failure).strip().splitlines()), "")
    return f"{type(failure).__name__}: {first}"[:100]


def _short(name: str) -> str:
    return name.removeprefix("testcases/")
