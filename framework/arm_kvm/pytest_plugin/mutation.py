"""``--mutate``: instead of the cases, run the mutants of the catalogue, each against the cases until one fails.

Each mutant is a pytest item, so that workers (``-n``) share them and one mutant's trouble does not spread to others.
Its host is restored and broken before its first case; the cases where the catalogue says to look come first.
:mod:`arm_kvm.mutants.trial` decides the mutant's fate; this module runs the cases for it.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from arm_kvm.host.kernel import Kernel
from arm_kvm.hosts.pool import EVERYBODY, HostBroken, Pool
from arm_kvm.mutants import catalogue
from arm_kvm.mutants.catalogue import Mutant
from arm_kvm.mutants.patching import put_in
from arm_kvm.mutants.score import Fate, MutantResult, table
from arm_kvm.mutants.source import broken_kernel
from arm_kvm.mutants.trial import Controls, HostState, Outcome, Status, Trial
from arm_kvm.pytest_plugin.failures import HostLost, HostUnusable, Refused
from arm_kvm.pytest_plugin.order import took_last
from arm_kvm.pytest_plugin.prepare import plugin_for
from arm_kvm.pytest_plugin.selection import host_name, needs_host
from arm_kvm.pytest_plugin.stash import CAUSE, FAILED, MUTANT, POOL
from arm_kvm.support.errors import LabError
from arm_kvm.support.hints import hint

_PROPERTY = "mutant"
_CHOSEN = pytest.StashKey[list[Mutant]]()
_CONTROLS = pytest.StashKey[Controls]()  #: of this worker


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("arm-kvm")
    group.addoption(
        "--mutate", action="append", metavar="NAME", help="run the cases against this mutant; `all`: against every one"
    )
    group.addoption(
        "--quick", action="store_true", help="run a mutant against those cases only where the catalogue says to look"
    )
    group.addoption(
        "--catalogue",
        type=Path,
        default=catalogue.HOME,
        metavar="PATH",
        help="file or folder with the mutants (default: configs/mutants)",
    )


class MutantItem(pytest.Item):
    """A mutant on one host, with the cases that may kill it."""

    def __init__(self, *, mutant: Mutant, host: str, cases: list[pytest.Item], **of_pytest: Any) -> None:
        super().__init__(**of_pytest)
        self.mutant, self.host, self.cases = mutant, host, cases

    def runtest(self) -> None:
        """Not called: :func:`pytest_runtest_protocol` runs the mutant."""

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, self.name


@pytest.hookimpl(trylast=True)  # the hosts are known by then
def pytest_configure(config: pytest.Config) -> None:
    """Load the catalogue. Raises UsageError here, in the process that starts workers: a worker could not report it."""
    if names := config.getoption("--mutate"):
        if config.getoption("--keep"):
            raise pytest.UsageError("--keep is for a machine that a case failed on, not for one broken on purpose")
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
    """Put the cases where the catalogue says to look first, in its order; with ``quick``, keep only those."""

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
    with _one_host(item.config):
        controls = item.config.stash.setdefault(_CONTROLS, {})
        result = Trial(item.mutant, item.host, _PytestCases(item), controls).run()
    item.ihook.pytest_runtest_logreport(report=_report(item, result, started))
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _report(item: MutantItem, result: MutantResult, started: float) -> pytest.TestReport:
    bad = result.fate in (Fate.SURVIVED, Fate.WRONGLY_KILLED, Fate.NOT_RUN)
    stopped = time.time()
    return pytest.TestReport(
        item.nodeid,
        item.location,
        {},
        "failed" if bad else "passed",
        f"{result.fate.value}: {item.mutant.fault}\n{result.by} {result.verdict}" if bad else None,
        "call",
        user_properties=[(_PROPERTY, result.as_dict())],
        duration=stopped - started,  # its control, and a kernel's build, take the worker's time, too
        start=started,
        stop=stopped,
    )


@contextmanager
def _one_host(config: pytest.Config) -> Iterator[None]:
    """Within the block all cases share a host, regardless of their marks."""
    config.stash[MUTANT] = True
    try:
        yield
    finally:
        config.stash[MUTANT] = False


class _PytestCases:
    """The cases of a mutant, run by pytest. Implements :class:`arm_kvm.mutants.trial.Cases`."""

    def __init__(self, item: MutantItem) -> None:
        self._config, self._mutant, self._host = item.config, item.mutant, item.host
        self._items = {case.nodeid: case for case in item.cases}
        self.names = list(self._items)
        self._usual = item.config.stash[POOL]
        self._broken: Pool | None = None
        self._kernel: Kernel | None = None  # None: the host's own, which the mutant patches while it runs

    def build(self) -> None:
        if self._mutant.edits:
            pool, host = self._usual, self._host
            folder = pool.folder_apart(host, self._mutant.name)
            self._kernel = broken_kernel(self._mutant, pool.configs[host], pool.override(host), folder)

    def host(self) -> LabError | None:
        self._broken = self._usual.apart(self._host, self._mutant.name, partial(put_in, self._mutant), self._kernel)
        self._config.stash[POOL] = self._broken
        first = next(iter(self._items.values()), None)
        try:
            self._broken.host(self._host, EVERYBODY, plugin_for(first) if first else None)
        except HostBroken as e:
            return e.cause
        return None

    def run(self, case: str) -> Outcome:
        item = self._items[case]
        item.stash[CAUSE], item.stash[FAILED] = None, False  # the case may have run before, for another mutant
        runner = self._config.pluginmanager.getplugin("runner")
        return _outcome(runner.runtestprotocol(item, log=False, nextitem=None), item.stash[CAUSE])

    def discard(self) -> None:
        self._config.stash[POOL] = self._usual
        self._usual.discard(self._host)
        if self._broken is not None:
            self._broken.close()
        self._broken = None


def _outcome(reports: Sequence[pytest.TestReport], failure: BaseException | None) -> Outcome:
    """Sum up what pytest reports of a case; ``failure`` is the exception of the first report that failed."""
    if failure is None:
        return Outcome(Status.PASSED if all(report.passed for report in reports) else Status.SKIPPED)
    if isinstance(failure, HostUnusable | HostBroken):
        return Outcome(Status.FAILED, failure.cause, HostState.MISSING)
    if isinstance(failure, HostLost):
        return Outcome(Status.FAILED, failure.cause, HostState.LOST)
    return Outcome(Status.FAILED, failure.cause if isinstance(failure, Refused) else failure)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and item.stash.get(CAUSE, None) is None:
        # A strict xfail that passes fails without an exception.
        item.stash[CAUSE] = call.excinfo.value if call.excinfo else AssertionError(report.longreprtext)
    return report


# -- the score --------------------------------------------------------------------------------------------------


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    for name, about in getattr(report, "user_properties", []):
        if name == _PROPERTY and report.when == "call":
            fate = MutantResult.of(about).fate
            return fate.name.lower(), fate.name[0], fate.value.upper()
    return None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    reports = [r for kind in terminalreporter.stats.values() for r in kind if hasattr(r, "user_properties")]
    results = [MutantResult.of(about) for r in reports for name, about in r.user_properties if name == _PROPERTY]
    if _CHOSEN in config.stash and not config.option.collectonly:
        terminalreporter.section("mutants")
        for line in table(results + list(_unreported(config, results))):
            terminalreporter.write_line(line)


def _unreported(config: pytest.Config, results: list[MutantResult]) -> Iterator[MutantResult]:
    """A result for every chosen mutant without a report."""
    known = {(result.host, result.mutant) for result in results}
    why = "its worker died, or the run ended before its turn"
    for host in (c.name for c in config.stash[POOL].configs.values() if c.has_kvm):
        for mutant in config.stash[_CHOSEN]:
            if (host, mutant.name) not in known:
                yield MutantResult(host, mutant.area, mutant.name, Fate.NOT_RUN, verdict=why)
