"""Ctrl-C: a test that fails because it was interrupted has not failed."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager

import pytest

from arm_kvm.support import interrupt


@pytest.hookimpl(tryfirst=True)
def pytest_configure() -> None:
    """From here on pytest handles Ctrl-C itself."""
    interrupt.listen()


@contextmanager
def _in_a_test() -> Iterator[None]:
    """Turn any outcome of the block into KeyboardInterrupt if Ctrl-C came meanwhile, be it a failure, skip or pass."""
    try:
        yield
    except (Exception, pytest.fail.Exception) as e:
        if interrupt.heard():
            raise KeyboardInterrupt from e
        raise
    if interrupt.heard():
        raise KeyboardInterrupt


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup() -> Generator[None, object, object]:
    with _in_a_test():
        result = yield
    return result


pytest_runtest_call = pytest_runtest_teardown = pytest_runtest_setup


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_cmdline_main() -> Generator[None, object, object]:
    try:
        return (yield)
    except BaseException:  # a second Ctrl-C, or a fixture that failed because of the first
        if not interrupt.heard():
            raise
        interrupt.deaf()
        return pytest.ExitCode.INTERRUPTED
