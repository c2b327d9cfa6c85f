"""A host whose kernel may be broken, and pytest run by tests."""

import pytest
from arm_kvm.host import snapshots
from arm_kvm.host.kernel import obtain

from ..pytest_run import empty_cache, run
from .examples import ARM64

__all__ = ["empty_cache", "run"]


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    """A host whose running kernel the tests of a module break, one after the other."""
    logs = tmp_path_factory.mktemp("logs")
    host = snapshots.obtain(ARM64, obtain(ARM64), logs).restore(logs)
    yield host
    host.shutdown()
