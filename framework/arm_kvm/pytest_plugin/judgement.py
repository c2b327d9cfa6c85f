"""The judgement after every test: what the host's kernel must be like when the test's own assertions are done."""

from __future__ import annotations

import os
from contextlib import suppress
from weakref import WeakKeyDictionary

import pytest

from arm_kvm.host.host import Host
from arm_kvm.oracle import Oracle
from arm_kvm.oracle.verdicts import Finding
from arm_kvm.pytest_plugin.artifacts import TestFolder
from arm_kvm.pytest_plugin.failures import ContractBroken, HostLost, KnownDeath
from arm_kvm.pytest_plugin.stash import BLAMED, FAILED, SESSION
from arm_kvm.support.errors import LabError

_ORACLES: WeakKeyDictionary[Host, Oracle] = WeakKeyDictionary()
_DUMPED = 16  #: VMs of one test whose tables are written down; of more, only those with findings
_AFTER = "after the test, the kernel's state breaks the contract"


class HostSession:
    """What the lab holds of one test: its host, its oracle, its folder; and the judgement at its end."""

    def __init__(self, host: Host, folder: TestFolder, alone: bool) -> None:
        """``alone``: all that this machine has said is the test's."""
        self.host = host
        self.alone = alone
        self.dead = False  #: by a known fault
        first = host not in _ORACLES
        self.oracle = _ORACLES.setdefault(host, Oracle(host))  # it remembers what it has found of the host
        self.folder = folder
        folder.begin(host.machine.logs, whole=alone)
        if first and not alone:
            self.oracle.splats()  # what was said before the first test is nobody's

    def judge(self) -> list[Finding]:
        """Every VM of the test that has run, and the kernel's log."""
        findings = []
        vms = [vm for vm in self.host.vms if vm.alive and vm.entered]
        for vm, (stage2, found) in zip(vms, self.oracle.examine(*vms) if vms else [], strict=True):
            if found or len(vms) <= _DUMPED:
                self.folder.write(f"stage2-{vm.id}.txt", stage2.dump())
            findings += found
        return findings + self.oracle.splats()

    def destroy_vms(self) -> list[Finding]:
        """As after every test; what the kernel says of it. Raises LabError."""
        self.host.reset()
        return self.oracle.splats()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Judge the host after the test's own assertions: a test passes only on a kernel that kept its contract."""
    session = item.stash.get(SESSION, None)
    try:
        result = yield
    except (Exception, pytest.fail.Exception) as e:
        if session is not None and session.alone and isinstance(e, KnownDeath):
            session.dead = True
        elif session is not None and isinstance(e, pytest.skip.Exception):
            _judge_passed(session)  # it may have found out late that it can say nothing
        elif session is not None:
            _judge_failed(item, session, known=isinstance(e, pytest.xfail.Exception))
        raise
    if session is not None:
        _judge_passed(session)
    return result


def _judge_passed(session: HostSession) -> None:
    lost, findings = None, []
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
    """Of a failed test the findings are a section of its report; beside a known fault they are a failure."""
    if known:
        _judge_passed(session)
        return
    with suppress(Exception):  # whatever the test left behind, its own failure is the one to show
        if findings := session.judge():
            item.add_report_section("call", "arm-kvm", str(ContractBroken(_AFTER, findings)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    if report.skipped and (host_file := item.stash.get(BLAMED, None)):
        # One place for all of a host's skips, so that the summary has one line for them.
        report.longrepr = (os.path.relpath(host_file), 1, report.longrepr[2])
    return report
