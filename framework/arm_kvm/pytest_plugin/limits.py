"""Limits of this machine, such as a full disk: one message, wherever in pytest they are met."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from arm_kvm.hosts.pool import HostBroken
from arm_kvm.pytest_plugin.failures import CausedFailure, Refused
from arm_kvm.pytest_plugin.stash import POOL
from arm_kvm.support import interrupt
from arm_kvm.support.errors import DiskFull, LimitReached
from arm_kvm.support.limits import is_limit, lab_error


@contextmanager
def _in_a_test(item: pytest.Item) -> Iterator[None]:
    """Turn what a limit of this machine makes the block fail with into Refused."""
    try:
        yield
    except (Exception, pytest.fail.Exception) as e:
        cause = e.cause if isinstance(e, CausedFailure | HostBroken) else e
        if is_limit(e):
            cause = lab_error(e, item.config.stash[POOL].artifacts)
        if isinstance(cause, DiskFull | LimitReached) and not isinstance(e, Refused):
            raise Refused(cause) from e
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    with _in_a_test(item):
        return (yield)


pytest_runtest_call = pytest_runtest_teardown = pytest_runtest_setup


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, None, None]:
    """Report it where pytest cannot write a report (--junitxml), and let the terminal summary follow all the same."""
    report = session.config.getoption("xmlpath", None)
    try:
        return (yield)
    except OSError as e:
        if not report or interrupt.heard():
            raise
        session.exitstatus = pytest.ExitCode.INTERNAL_ERROR
        if terminal := session.config.pluginmanager.getplugin("terminalreporter"):
            terminal.write_line(f"\narm-kvm: a report cannot be written: {lab_error(e, Path(report))}", red=True)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_cmdline_main() -> Generator[None, object, object]:
    """Report any other failed write in one line: pytest itself would fail to print its traceback."""
    try:
        return (yield)
    except OSError as e:
        with suppress(OSError):
            print(f"arm-kvm: the run cannot go on: {lab_error(e)}", file=sys.stderr, flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes stdout when it exits
        return pytest.ExitCode.INTERNAL_ERROR
