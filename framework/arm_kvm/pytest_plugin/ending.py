"""The end of a run. Machines kept for the user live until Ctrl-C; all others end at once.

A run in which every case was skipped has judged nothing: it says so, and fails.
"""

from __future__ import annotations

import time
from contextlib import suppress

import pytest

from arm_kvm.hosts.pool import Pool
from arm_kvm.pytest_plugin.order import worker_of
from arm_kvm.pytest_plugin.stash import POOL
from arm_kvm.support import interrupt


class _Judged:
    """Whether any case was judged, in this process or in its workers."""

    def __init__(self) -> None:
        self._skipped, self._judged = 0, 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self._skipped += 1
        elif report.when == "call" or report.failed:
            self._judged += 1

    @property
    def nothing(self) -> bool:
        return self._skipped > 0 and self._judged == 0

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.nothing and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.nothing:
            terminalreporter.write_line(
                f"arm-kvm: nothing was judged: all {self._skipped} cases were skipped", red=True
            )


def pytest_configure(config: pytest.Config) -> None:
    if not worker_of(config):
        config.pluginmanager.register(_Judged())


@pytest.hookimpl(tryfirst=True)  # before the hooks that write reports, which may fail
def pytest_sessionfinish(session: pytest.Session) -> None:
    pool = session.config.stash.get(POOL, None)
    if interrupt.heard():
        _end_fixtures(session)
    if pool is None:
        return
    try:
        if pool.kept:
            _wait_with(pool, session.config)
    finally:
        pool.close()


def _end_fixtures(session: pytest.Session) -> None:
    """Tear down the fixtures of the interrupted test while its host still exists, and ignore how they fail.

    pytest does so later in this hook; a failure there would keep it from writing its reports.
    """
    with suppress(BaseException):
        session.config.pluginmanager.getplugin("runner").pytest_sessionfinish(session)


def _wait_with(pool: Pool, config: pytest.Config) -> None:
    """Wait for Ctrl-C: the kept machines live exactly as long as this process."""
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        for host in pool.kept:
            print(f"\narm-kvm: {host.config.name} is kept as the failed test left it:")
            print(f"  shell:   {host.ssh_command}\n  tables:  arm-kvm stage2 {host.config.name}")
        try:
            print("Ctrl-C ends it.", flush=True)
            while any(host.machine.process.poll() is None for host in pool.kept):
                time.sleep(0.2)
        except KeyboardInterrupt:
            pass
