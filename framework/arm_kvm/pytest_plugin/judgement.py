"""The judgement after every test: the state that the host's kernel must be in once the test's own assertions hold."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import suppress

import pytest

from arm_kvm.oracle.verdicts import Finding
from arm_kvm.pytest_plugin.failures import ContractBroken, HostLost, KnownDeath
from arm_kvm.pytest_plugin.session import HostSession
from arm_kvm.pytest_plugin.stash import BLAMED, FAILED, SESSION
from arm_kvm.support.errors import LabError

_AFTER = "after the test, stage 2 or the kernel log is wrong"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Judge the host after the test's own assertions: a test passes only on a kernel that kept its contract."""
    session = item.stash.get(SESSION, None)
    try:
        result = yield
    except (Exception, pytest.fail.Exception) as e:
        if session is not None and session.alone and isinstance(e, KnownDeath):
            session.dead = True
        elif session is not None and isinstance(e, pytest.skip.Exception):
            _judge_passed(session)  # the test may have run half its course before it skipped
        elif session is not None:
            _judge_failed(item, session, known=isinstance(e, pytest.xfail.Exception))
        raise
    if session is not None:
        _judge_passed(session)
    return result


def _judge_passed(session: HostSession) -> None:
    """Judge a test that did not fail. Raises HostLost, ContractBroken."""
    lost: LabError | None = None
    findings: list[Finding] = []
    try:
        session.host.machine.check()
        session.host.agent.require()
        findings = session.judge()
    except LabError as e:
        lost = e
    if lost is not None:
        raise HostLost("after the test, its host is lost", lost)
    if findings:
        raise ContractBroken(_AFTER, findings)


def _judge_failed(item: pytest.Item, session: HostSession, known: bool) -> None:
    """Add the findings to the report of a failed test; beside a known fault, fail with them."""
    if known:
        _judge_passed(session)
        return
    with suppress(Exception):  # the test's own failure is the one to report
        if findings := session.judge():
            item.add_report_section("call", "arm-kvm", str(ContractBroken(_AFTER, findings)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    if report.skipped and isinstance(report.longrepr, tuple) and (host_file := item.stash.get(BLAMED, None)):
        # All of a host's skips get one location, so that pytest's summary folds them into one line.
        report.longrepr = (os.path.relpath(host_file), 1, report.longrepr[2])
    return report
