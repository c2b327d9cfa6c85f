"""``--mutate``: instead of the cases, the mutants of the catalogue, each against the cases until one fails.

A mutant is an item of its own, so that workers share them (``-n``), and what happens to one stays with it. Its host is
restored for it and broken before its first case; the cases where the catalogue says to look come first. What kills it
is a case that passes where nothing is broken, after the same cases: every worker tries that, once for each such row.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

from arm_kvm.events.violations import ProtocolBroken
from arm_kvm.host.config import hint
from arm_kvm.host.kernel import Kernel
from arm_kvm.hosts.pool import EVERYBODY, HostBroken, Pool
from arm_kvm.mutants import catalogue
from arm_kvm.mutants.catalogue import Mutant, NotApplicable, OtherBuild
from arm_kvm.mutants.patching import put_in
from arm_kvm.mutants.score import Fate, MutantResult, table
from arm_kvm.mutants.source import broken_kernel
from arm_kvm.oracle.verdicts import Verdict, Violation
from arm_kvm.pytest_plugin.fixtures import HostUnusable, plugin_for
from arm_kvm.pytest_plugin.judgement import HostLost
from arm_kvm.pytest_plugin.order import took_last
from arm_kvm.pytest_plugin.selection import host_name, needs_host
from arm_kvm.pytest_plugin.stash import CAUSE, FAILED, MUTANT, POOL
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

_PROPERTY = "mutant"
_CHOSEN = pytest.StashKey[list[Mutant]]()
#: What is wrong, where nothing is broken, with rows of cases of which the last killed a mutant; "": they pass.
_CONTROLS = pytest.StashKey[dict[tuple[str, ...], str]]()
_VERDICTS = re.compile("|".join(rf"^\s+({kind.value})\b" for kind in Verdict), re.M)
_DEATHS = (HostPanic, HostOops, HostLockup, HostSilent, QemuDied, HostLost)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("arm-kvm")
    group.addoption(
        "--mutate", action="append", metavar="NAME", help="run this mutant against the cases; `all`: every one"
    )
    group.addoption(
        "--quick", action="store_true", help="run a mutant against those cases only where the catalogue says to look"
    )
    group.addoption(
        "--catalogue", type=Path, default=catalogue.HOME, metavar="PATH", help="its folder or file (configs/mutants)"
    )


class MutantItem(pytest.Item):
    """A mutant on one host, and the cases that are to notice it."""

    def __init__(self, *, mutant: Mutant, host: str, cases: list[pytest.Item], **of_pytest) -> None:
        super().__init__(**of_pytest)
        self.mutant, self.host, self.cases = mutant, host, cases

    def runtest(self) -> None:
        """See :func:`pytest_runtest_protocol`."""

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, self.name


@pytest.hookimpl(trylast=True)  # when the hosts are known
def pytest_configure(config: pytest.Config) -> None:
    """A catalogue that is not right is said before workers start, which could not."""
    if names := config.getoption("--mutate"):
        if config.getoption("--keep"):
            raise pytest.UsageError("--keep is for a machine that a case failed on, not one that was broken for it")
        if not any(host.has_kvm for host in config.stash[POOL].configs.values()):
            raise pytest.UsageError("--mutate: none of these hosts has a KVM to break")
        try:
            config.stash[_CHOSEN] = _chosen(catalogue.load(config.getoption("--catalogue")), names)
        except LabError as e:
            raise pytest.UsageError(str(e)) from e


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    if _CHOSEN not in config.stash:
        return
    quick = config.getoption("--quick")
    hosts = [c.name for c in config.stash[POOL].configs.values() if c.has_kvm]
    suite = [item for item in items if needs_host(item) and not item.get_closest_marker("may_end_host")]
    cases = {host: [item for item in suite if host_name(item) == host] for host in hosts}
    items[:] = [
        MutantItem.from_parent(
            session, name=f"{host}/{m.name}", mutant=m, host=host, cases=_ordered(m, cases[host], quick)
        )
        for host in hosts
        for m in config.stash[_CHOSEN]
    ]
    took = took_last(config)
    items.sort(key=lambda item: -took.get(item.nodeid, 0))


def _chosen(mutants: list[Mutant], names: Sequence[str]) -> list[Mutant]:
    known = {mutant.name for mutant in mutants}
    if unknown := sorted(set(names) - known - {"all"}):
        raise pytest.UsageError(f"no mutant is called {unknown[0]!r}; {hint(unknown[0], sorted(known), 'there are')}")
    return [mutant for mutant in mutants if "all" in names or mutant.name in names]


def _ordered(mutant: Mutant, cases: list[pytest.Item], quick: bool) -> list[pytest.Item]:
    """First where the catalogue says to look, in its order; and only there, if it is to be quick."""

    def place(case: pytest.Item) -> int:
        return next((n for n, where in enumerate(mutant.look) if where in case.nodeid), len(mutant.look))

    return sorted((case for case in cases if not quick or place(case) < len(mutant.look)), key=place)


# -- one mutant ------------------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if not isinstance(item, MutantItem):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    started = time.time()
    result = _run(item)
    bad = result.fate in (Fate.SURVIVED, Fate.WRONGLY_KILLED, Fate.NOT_RUN)
    report = pytest.TestReport(
        item.nodeid,
        item.location,
        {},
        "failed" if bad else "passed",
        f"{result.fate.value}: {item.mutant.fault}\n{result.by} {result.verdict}" if bad else None,
        "call",
        user_properties=[(_PROPERTY, result.as_dict())],
        duration=time.time() - started,  # its control, and a kernel's build, take the worker's time, too
        start=started,
        stop=time.time(),
    )
    item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _run(item: MutantItem) -> MutantResult:
    """What becomes of the mutant: it is put in, and the cases are run."""
    pool, mutant, began = item.config.stash[POOL], item.mutant, time.monotonic()

    def result(fate: Fate, **more) -> MutantResult:
        seconds = time.monotonic() - began
        return MutantResult(item.host, mutant.area, mutant.name, fate, seconds=seconds, **more)

    try:
        kernel = _kernel(mutant, item.host, pool)
        began = time.monotonic()  # a kernel's build is not the suite's time
        with _in_place_of(item.config, pool.apart(item.host, mutant.name, partial(put_in, mutant), kernel)):
            outcome, cases = _noticed(item, result)
        if outcome.fate is Fate.KILLED and cases:
            _require_control(cases)
        return outcome
    except NotApplicable as e:
        return result(Fate.NOT_APPLICABLE, verdict=str(e), other_build=isinstance(e, OtherBuild))
    except LabError as e:
        return result(Fate.NOT_RUN, verdict=e.one_line)
    except OSError as e:
        return result(Fate.NOT_RUN, verdict=str(e))


def _kernel(mutant: Mutant, host: str, pool: Pool) -> Kernel | None:
    """A kernel built with the fault in it; None for a mutant that is put into the running one."""
    if not mutant.edits:
        return None
    return broken_kernel(mutant, pool.configs[host], pool.override(host), pool.folder_apart(host, mutant.name))


@contextmanager
def _in_place_of(config: pytest.Config, apart: Pool) -> Iterator[None]:
    """Within the block the cases get their hosts from this pool."""
    usual, config.stash[POOL] = config.stash[POOL], apart
    try:
        with _one_host(config):
            yield
    finally:
        config.stash[POOL] = usual
        apart.close()


@contextmanager
def _one_host(config: pytest.Config) -> Iterator[None]:
    """Within the block all cases share a host, whatever their marks say."""
    config.stash[MUTANT] = True
    try:
        yield
    finally:
        config.stash[MUTANT] = False


def _noticed(item: MutantItem, result: Callable[..., MutantResult]) -> tuple[MutantResult, list[pytest.Item]]:
    """The cases one after another on the broken host, until one fails: those up to that one, too."""
    pool, mutant = item.config.stash[POOL], item.mutant
    try:
        pool.host(item.host, EVERYBODY, plugin_for(item.cases[0]) if item.cases else None)
    except HostBroken as e:
        cause = _of_the_mutant(e)
        return result(_killed(mutant, cause), by="boot", verdict=verdict_of(cause)), []
    if not item.cases:
        return result(Fate.NOT_RUN, verdict="no case was chosen that could notice it"), []
    for number, case in enumerate(item.cases, 1):
        _try(case)
        if (failure := case.stash[CAUSE]) is not None:
            cause = _of_the_mutant(failure)
            about = {"by": _short(case.nodeid), "verdict": verdict_of(cause), "cases": number}
            return result(_killed(mutant, cause), **about), item.cases[:number]
    fate = Fate.EXPLAINED if mutant.survives else Fate.SURVIVED
    return result(fate, verdict=mutant.survives, cases=len(item.cases)), []


def _require_control(cases: list[pytest.Item]) -> None:
    """Raises LabError unless the last passes on a host that is whole, or it says nothing of the mutant."""
    controls = cases[0].config.stash.setdefault(_CONTROLS, {})
    row = tuple(case.nodeid for case in cases)
    if row not in controls:
        with _one_host(cases[0].config):
            controls[row] = _control(cases)
    if wrong := controls[row]:
        raise LabError(f"{_short(row[-1])} {wrong}")


def _control(cases: list[pytest.Item]) -> str:
    """What is wrong with the last case after the others; "": nothing. Raises LabError: there is no host to try it on.

    The others have passed on the broken host; what they leave of a whole one may be another thing.
    """
    pool, host = cases[0].config.stash[POOL], host_name(cases[0])
    pool.discard(host)  # as the broken one, it begins with nothing
    try:
        for case in cases:
            reports = _try(case)
            if (failure := case.stash[CAUSE]) is not None:
                which = "fails" if case is cases[-1] else f"comes after {_short(case.nodeid)}, which fails"
                return f"{which} where nothing is broken, too: {verdict_of(_of_the_mutant(failure))}"
        return "" if all(report.passed for report in reports) else "is skipped where nothing is broken"
    finally:
        pool.discard(host)  # one QEMU at a time


def _of_the_mutant(failure: BaseException) -> BaseException:
    """What failed. Raises it when it was for want of a host, of its QEMU or of this machine's means: that says nothing
    of the mutant.
    """
    cause = getattr(failure, "cause", failure)
    if isinstance(cause, QemuKilled | DiskFull | LimitReached):
        raise cause from None
    if not isinstance(failure, HostBroken | HostUnusable):
        return failure
    if not isinstance(cause, _DEATHS):
        raise cause from None
    return cause


def _killed(mutant: Mutant, cause: BaseException) -> Fate:
    died = isinstance(cause, _DEATHS)
    of_qemu = isinstance(getattr(cause, "cause", cause), QemuDied)  # not of what runs on the board
    return Fate.WRONGLY_KILLED if died and (of_qemu or not mutant.dies) else Fate.KILLED


def _try(case: pytest.Item) -> list[pytest.TestReport]:
    """Run the case; why it failed is then in its stash. What another run of it left there does not count."""
    case.stash[CAUSE], case.stash[FAILED] = None, False
    return runtestprotocol(case, log=False, nextitem=None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.failed and item.stash.get(CAUSE, None) is None:
        item.stash[CAUSE] = call.excinfo.value
    return report


def verdict_of(cause: BaseException) -> str:
    """The names of what is wrong, where the failure has some; else its first line."""
    if isinstance(cause, Violation):
        return ", ".join(sorted(kind.value for kind in cause.kinds))
    if isinstance(cause, ProtocolBroken):
        return ", ".join(sorted({violation.kind.value for violation in cause.violations}))
    text = str(cause)
    if named := {name for match in _VERDICTS.findall(text) for name in match if name}:
        return ", ".join(sorted(named))
    return f"{type(cause).__name__}: {text.strip().splitlines()[0] if text.strip() else ''}"[:100]


def _short(nodeid: str) -> str:
    return nodeid.removeprefix("testcases/")


# -- the score --------------------------------------------------------------------------------------------------


def pytest_report_teststatus(report: pytest.TestReport):
    for name, about in getattr(report, "user_properties", []):
        if name == _PROPERTY and report.when == "call":
            fate = MutantResult.of(about).fate
            return fate.name.lower(), fate.name[0], fate.value.upper()
    return None


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    reports = [r for kind in terminalreporter.stats.values() for r in kind if hasattr(r, "user_properties")]
    results = [MutantResult.of(about) for r in reports for name, about in r.user_properties if name == _PROPERTY]
    if _CHOSEN in config.stash and not config.option.collectonly:
        terminalreporter.section("mutants")
        for line in table(results + list(_unreported(config, results))):
            terminalreporter.write_line(line)


def _unreported(config: pytest.Config, results: list[MutantResult]) -> Iterator[MutantResult]:
    """Mutants that were chosen and of which nothing is known."""
    known = {(result.host, result.mutant) for result in results}
    why = "its worker died, or the run ended before its turn"
    for host in (c.name for c in config.stash[POOL].configs.values() if c.has_kvm):
        for mutant in config.stash[_CHOSEN]:
            if (host, mutant.name) not in known:
                yield MutantResult(host, mutant.area, mutant.name, Fate.NOT_RUN, verdict=why)
