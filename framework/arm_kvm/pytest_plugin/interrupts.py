"""Ctrl-C: what a test failed over when it was interrupted is no failure of the test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from arm_kvm.support import interrupt


@pytest.hookimpl(tryfirst=True)
def pytest_configure() -> None:
    """From here on pytest serves it."""
    interrupt.listen()


@contextmanager
def _in_a_test() -> Iterator[None]:
    """Whatever became of what Ctrl-C interrupted, a skip or a pass included, is no outcome of a test."""
    try:
        yield
    except (Exception, pytest.fail.Exception) as e:
        if interrupt.heard():
            raise KeyboardInterrupt from e
        raise
    if interrupt.heard():
        raise KeyboardInterrupt


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup():
    with _in_a_test():
        result = yield
    return result


pytest_runtest_call = pytest_runtest_teardown = pytest_runtest_setup


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_cmdline_main():
    try:
        return (yield)
    except BaseException:  # a second one while the first was served, or what a fixture then fails over
        if not interrupt.heard():
            raise
        interrupt.deaf()
        return pytest.ExitCode.INTERRUPTED
