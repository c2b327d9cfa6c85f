"""Fixtures of the framework's own tests."""

import os
import subprocess
import sys
import tempfile

import pytest
from arm_kvm.mutants.patching import returning
from arm_kvm.recorder.facts import kernel_map

#: Prefix of a command that must receive Ctrl-C even if the tests themselves run with SIGINT ignored.
HEARS_CTRL_C = ("env", "--default-signal=INT")


def outside_pytest(environment):
    """Remove from an environment what says that it is inside pytest, a worker of pytest, or tox.

    Under tox the pytest cache belongs to tox's environment, so the runs of different tests would share it.
    """
    return {name: value for name, value in environment.items() if not name.startswith(("PYTEST_", "TOX_"))}


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache for this test alone."""
    monkeypatch.setenv("ARM_KVM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def own_run_folder(monkeypatch):
    """Hide all machines but this test's own. The name is short since a socket's path must fit into 108 bytes."""
    with tempfile.TemporaryDirectory(prefix="ak-") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield folder


@pytest.fixture
def arm_kvm():
    """``arm_kvm("boot", "a15")``: the command line in a process of its own, as a user runs it."""

    def run(*arguments, timeout=120, env=os.environ, **how):
        argv = [sys.executable, "-m", "arm_kvm", *map(str, arguments)]
        how |= {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "env": outside_pytest(env)}
        return subprocess.run(argv, timeout=timeout, **how)

    return run


@pytest.fixture
def without(host):
    """``with without("kvm_age_hva", "kvm_age_gfn", value=0):`` makes these functions, where present, return at once.

    Without ``value``, only the first instruction changes, so a recorder still finds the others.
    """
    kernel = kernel_map(host)

    def disabled(*names, value=None):
        places = [kernel.pa(va) for name in names for va in kernel.copies_of(name)]
        assert places, f"no {' nor '.join(names)} in this kernel"
        return host.machine.patched(places, returning(host.config.architecture.name, value))

    return disabled
