"""The trial of one mutant on one host: cases run on the broken kernel until one fails, which decides its fate.

A case kills the mutant only if it passes on an unbroken kernel after the same cases. The trial checks that as well,
once for each such row of cases. What runs cases and hosts is behind a protocol.
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

#: A broken kernel can bring these about.
_DEATHS = (HostPanic, HostOops, HostLockup, HostSilent, QemuDied)
#: A broken kernel cannot: they say nothing about the mutant.
_OF_THIS_MACHINE = (QemuKilled, DiskFull, LimitReached)


class Status(Enum):
    """How a case ended."""

    PASSED = auto()
    SKIPPED = auto()  #: or failed as expected
    FAILED = auto()


class HostState(Enum):
    """The host at the end of a case."""

    UP = auto()
    LOST = auto()  #: it ended under the case
    MISSING = auto()  #: it could not be started for the case


@dataclass(frozen=True)
class Outcome:
    """What became of one case. ``failure``: what it failed with; why its host was lost or missing, where it was."""

    status: Status
    failure: BaseException | None = None
    host: HostState = HostState.UP


class Cases(Protocol):
    """The cases that a mutant is tried with, and the one host that they run on."""

    @property
    def names(self) -> Sequence[str]:
        """In the order in which they are to run."""

    def build(self) -> None:
        """Make what the broken host needs and what may take long: a kernel. Raises as :meth:`host`."""

    def host(self) -> LabError | None:
        """Start the broken host, for all cases until :meth:`discard`. Why it does not start; None where it runs.

        Raises NotApplicable where the mutant does not apply to it, LabError or OSError where it cannot be put in.
        """

    def run(self, case: str) -> Outcome:
        """Run a case on the host that there is; on an unbroken one, started for it, where there is none."""

    def discard(self) -> None:
        """End the host."""


#: What is wrong with the last case of a row on an unbroken host, after the others; "" where it passes.
Controls = dict[tuple[str, ...], str]


class Trial:
    """``controls`` may be shared by trials on the same hosts."""

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
        """Run one case after another until one fails. Raises LabError where that is not because of the mutant."""
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
        """A host may go down where the catalogue says so; QEMU never, which is not what the mutant breaks."""
        died = outcome.host is HostState.LOST or isinstance(outcome.failure, _DEATHS)
        expected = self._mutant.dies and not isinstance(outcome.failure, QemuDied)
        return Fate.WRONGLY_KILLED if died and not expected else Fate.KILLED

    # -- the control ---------------------------------------------------------------------------------------------

    def _checked(self, killed: MutantResult) -> MutantResult:
        """The result, if the case that killed the mutant passes on an unbroken host after the same cases."""
        row = tuple(self._cases.names[: killed.cases])
        if row not in self._controls:
            self._controls[row] = self._control(row)
        if wrong := self._controls[row]:
            return self._result(Fate.NOT_RUN, verdict=f"{_short(row[-1])} {wrong}")
        return killed

    def _control(self, row: Sequence[str]) -> str:
        """What goes into :data:`Controls`. Raises LabError where there is no host to tell.

        The others passed on the broken host; an unbroken one they may leave in another state.
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
    """What the case failed with. Raises it where it says nothing about the kernel."""
    failure = failed.failure
    assert failure is not None, "an outcome that failed says with what"
    if isinstance(failure, _OF_THIS_MACHINE):
        raise failure from None
    if failed.host is HostState.MISSING and not isinstance(failure, _DEATHS):
        raise failure from None
    return failure


def verdict_of(failure: BaseException) -> str:
    """The names of what is wrong with the kernel, where the failure has some; else its class and first line."""
    if isinstance(failure, Judged) and failure.verdicts:
        return ", ".join(sorted(failure.verdicts))
    first = next(iter(str(failure).strip().splitlines()), "")
    return f"{type(failure).__name__}: {first}"[:100]


def _short(name: str) -> str:
    return name.removeprefix("testcases/")
