"""The trial of a mutant: every fate and every control, without hosts, on cases with prescribed outcomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from arm_kvm.events.violations import TraceRule
from arm_kvm.mutants.catalogue import Mutant, NotApplicable, OtherBuild
from arm_kvm.mutants.score import Fate
from arm_kvm.mutants.trial import Cases, HostState, Outcome, Status, Trial, verdict_of
from arm_kvm.oracle.verdicts import Finding, Verdict, Violation
from arm_kvm.support.errors import (
    AgentTimeout,
    BuildFailed,
    DiskFull,
    HostOops,
    HostPanic,
    LabError,
    LimitReached,
    QemuDied,
    QemuKilled,
    SetupError,
)
from arm_kvm.support.judged import Judged

PASSED, SKIPPED = Outcome(Status.PASSED), Outcome(Status.SKIPPED)
STALE = Violation("stage 2 of VM 1", [Finding(Verdict.STALE, "nothing", "something", 0x8000_0000, 0x1000)])


def failed(why: BaseException = STALE, host: HostState = HostState.UP) -> Outcome:
    return Outcome(Status.FAILED, why, host)


class Prescribed:
    """Cases with prescribed outcomes: ``broken`` on the broken host, ``whole`` (default: passed) on an unbroken one."""

    def __init__(
        self,
        broken: Mapping[str, Outcome],
        whole: Mapping[str, Outcome] | None = None,
        boot: LabError | None = None,
        cannot: Mapping[str, Exception] | None = None,
    ) -> None:
        self.names: Sequence[str] = list(broken)
        self._broken, self._whole, self._boot, self._cannot = broken, whole or {}, boot, cannot or {}
        self._on_broken = False
        self.log: list[str] = []

    def _step(self, what: str) -> None:
        self.log.append(what)
        if what in self._cannot:
            raise self._cannot[what]

    def build(self) -> None:
        self._step("build")

    def host(self) -> LabError | None:
        self._step("host")
        self._on_broken = True
        return self._boot

    def run(self, case: str) -> Outcome:
        self._step(case)
        return self._broken[case] if self._on_broken else self._whole.get(case, PASSED)

    def discard(self) -> None:
        self._step("discard")
        self._on_broken = False


def mutant(dies: str = "", survives: str = "") -> Mutant:
    return Mutant("unmap-ignored", "unmap", "fault", "origin", (), frozenset(), dies=dies, survives=survives)


def trial(cases: Cases, about: Mutant | None = None, controls: dict[tuple[str, ...], str] | None = None):
    return Trial(about or mutant(), "arm64", cases, {} if controls is None else controls).run()


# -- fates -------------------------------------------------------------------------------------------------------


def test_killed():
    """By the first case that fails. The control repeats the cases up to it; those after it are not run."""
    cases = Prescribed(
        {"testcases/a": PASSED, "testcases/b": SKIPPED, "testcases/c": failed(), "testcases/d": failed()}
    )
    result = trial(cases)
    assert (result.fate, result.by, result.verdict, result.cases) == (Fate.KILLED, "c", "stale", 3)
    assert (result.host, result.area, result.mutant) == ("arm64", "unmap", "unmap-ignored")
    row = ["testcases/a", "testcases/b", "testcases/c", "discard"]
    assert cases.log == ["build", "host", *row, *row]


@pytest.mark.parametrize(("survives", "fate"), [("", Fate.SURVIVED), ("no case calls it", Fate.EXPLAINED)])
def test_survived(survives, fate):
    cases = Prescribed({"a": PASSED, "b": SKIPPED})
    result = trial(cases, mutant(survives=survives))
    assert (result.fate, result.verdict, result.cases, result.by) == (fate, survives, 2, "")
    assert cases.log == ["build", "host", "a", "b", "discard"], "without a kill no control is needed"


@pytest.mark.parametrize(
    ("outcome", "verdict"),
    [
        (failed(HostPanic("the host's kernel panicked")), "HostPanic: the host's kernel panicked"),
        (failed(AgentTimeout("no answer"), HostState.LOST), "AgentTimeout: no answer"),
        (failed(HostOops("an oops"), HostState.MISSING), "HostOops: an oops"),
    ],
)
@pytest.mark.parametrize(("dies", "fate"), [("", Fate.WRONGLY_KILLED), ("it panics", Fate.KILLED)])
def test_a_host_that_goes_down(outcome, verdict, dies, fate):
    """Wrongly, unless the catalogue says so."""
    result = trial(Prescribed({"a": outcome}), mutant(dies=dies))
    assert (result.fate, result.by, result.verdict, result.cases) == (fate, "a", verdict, 1)


@pytest.mark.parametrize("state", [HostState.UP, HostState.LOST])
def test_a_mutant_cannot_end_qemu(state):
    result = trial(Prescribed({"a": failed(QemuDied("QEMU ended (exit code 0)"), state)}), mutant(dies="it panics"))
    assert (result.fate, result.verdict) == (Fate.WRONGLY_KILLED, "QemuDied: QEMU ended (exit code 0)")


@pytest.mark.parametrize(("dies", "fate"), [("", Fate.WRONGLY_KILLED), ("it panics", Fate.KILLED)])
def test_a_host_that_does_not_boot(dies, fate):
    cases = Prescribed({"a": PASSED}, boot=HostPanic("panicked"))
    result = trial(cases, mutant(dies=dies))
    assert (result.fate, result.by, result.cases) == (fate, "boot", 0)
    assert cases.log == ["build", "host", "discard"], "there is no case to try on an unbroken host"


@pytest.mark.parametrize("where", ["build", "host"])
@pytest.mark.parametrize(("why", "other"), [(NotApplicable("no such function"), False), (OtherBuild("a sum"), True)])
def test_not_applicable(where, why, other):
    result = trial(Prescribed({"a": failed()}, cannot={where: why}))
    assert (result.fate, result.verdict, result.other_build) == (Fate.NOT_APPLICABLE, str(why), other)


@pytest.mark.parametrize(
    ("where", "why"), [("build", BuildFailed("no")), ("host", LabError("no")), ("host", OSError("no"))]
)
def test_what_cannot_be_built_is_not_run(where, why):
    result = trial(Prescribed({"a": failed()}, cannot={where: why}))
    assert (result.fate, result.verdict) == (Fate.NOT_RUN, "no")


def test_no_case_at_all():
    result = trial(Prescribed({}))
    assert (result.fate, result.verdict) == (Fate.NOT_RUN, "no case was chosen that could notice it")


SILENT = [QemuKilled("signal 9"), DiskFull("full"), LimitReached("no memory")]


@pytest.mark.parametrize("state", HostState)
@pytest.mark.parametrize("why", SILENT)
def test_limits_of_this_machine_say_nothing(why, state):
    cases = Prescribed({"a": failed(why, state)})
    result = trial(cases, mutant(dies="it panics"))
    assert (result.fate, result.verdict) == (Fate.NOT_RUN, why.message) and cases.log[-1] == "discard"


@pytest.mark.parametrize("why", [*SILENT, SetupError("gcc is not installed")])
def test_a_host_missing_for_another_reason_says_nothing(why):
    assert trial(Prescribed({"a": PASSED}, boot=why)).fate is Fate.NOT_RUN
    assert trial(Prescribed({"a": failed(why, HostState.MISSING)})).fate is Fate.NOT_RUN


def test_the_host_is_always_discarded():
    cases = Prescribed({"a": PASSED}, cannot={"a": KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        trial(cases)
    assert cases.log[-1] == "discard"


# -- controls ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("whole", "words"),
    [
        ({"b": failed()}, "b fails where nothing is broken, too: stale"),
        ({"a": failed()}, "b comes after a, which fails where nothing is broken, too: stale"),
        ({"b": SKIPPED}, "b is skipped where nothing is broken"),
        ({"b": failed(QemuKilled("signal 9"), HostState.LOST)}, "signal 9"),
    ],
)
def test_a_case_that_does_not_pass_on_an_unbroken_host(whole, words):
    cases = Prescribed({"a": PASSED, "b": failed()}, whole)
    result = trial(cases)
    assert (result.fate, result.verdict) == (Fate.NOT_RUN, words) and cases.log[-1] == "discard"


def test_a_case_before_it_may_be_skipped():
    assert trial(Prescribed({"a": PASSED, "b": failed()}, {"a": SKIPPED})).fate is Fate.KILLED


def test_a_sequence_of_cases_is_tried_once():
    """Whatever the result. Another sequence has its own control; one that lacked a host is tried again."""
    controls: dict[tuple[str, ...], str] = {}
    assert (
        trial(Prescribed({"a": failed()}, {"a": failed(QemuKilled("signal 9"))}), None, controls).fate is Fate.NOT_RUN
    )
    assert controls == {}
    assert trial(Prescribed({"a": failed()}, {"a": failed()}), None, controls).fate is Fate.NOT_RUN
    again = Prescribed({"a": failed()})
    assert trial(again, None, controls).fate is Fate.NOT_RUN and again.log == ["build", "host", "a", "discard"]
    other = Prescribed({"a": PASSED, "b": failed()})
    assert trial(other, None, controls).fate is Fate.KILLED and other.log.count("b") == 2


# -- verdicts ----------------------------------------------------------------------------------------------------


class Broken(Exception, Judged):
    verdicts = frozenset({TraceRule.VMID_ZERO, TraceRule.STALE_VTTBR})


class Unnamed(AssertionError, Judged):
    """Blames the kernel without a verdict."""


@pytest.mark.parametrize(
    ("failure", "verdict"),
    [
        (Broken("\n  wrong-frame  IPA [0x0, 0x1000)"), "stale-vttbr, vmid-zero"),
        (Unnamed("after step 3:\n    wrong"), "Unnamed: after step 3:"),
        (AssertionError("\n  wrong-frame  IPA [0x0, 0x1000)"), "AssertionError: wrong-frame  IPA [0x0, 0x1000)"),
        (AssertionError(), "AssertionError: "),
        (ValueError("x" * 200), "ValueError: " + "x" * 88),
    ],
)
def test_verdicts_come_from_the_failure_and_not_from_its_text(failure, verdict):
    assert verdict_of(failure) == verdict
