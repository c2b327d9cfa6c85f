"""Ctrl-C: what a test failed over when it was interrupted is no failure of the test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from framework import interrupt


@pytest.hookimpl(tryfirst=True)
def pytest_configure() -> None:
    """From here on pytest serves it."""
    interrupt.listen()


@contextmanager
def _in_a_test() -> Iterator[None]:
    try:
        yield
    except (Exception, pytest.fail.Exception) as e:
        if interrupt.heard():
            raise KeyboardInterrupt from e
        raise


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup():
    with _in_a_test():
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call():
    with _in_a_test():
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown():
    with _in_a_test():
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_cmdline_main():
    try:
        return (yield)
    except KeyboardInterrupt:  # a second one, while the first was served
        interrupt.deaf()
        return pytest.ExitCode.INTERRUPTED
