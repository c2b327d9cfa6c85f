"""pytest with the plugin, run in a process of its own on a small suite, as a user runs it."""

import os
import subprocess
import sys

import pytest

from .conftest import HEARS_CTRL_C, outside_pytest

PASSING = """
def test_vm_runs(vm, stage2):
    vm.add_memory(0x80000000, 0x1000)
    vm.guest.write(0x80000000, 1)
    assert stage2(vm).leaf(0x80000000).writable
"""


class Run:
    """Runs pytest on ``suite`` with the installed plugin, without this repository's own options.

    The result is the exit code, and everything that was printed.
    """

    def __init__(self, folder):
        self.folder = folder

    def argv(self, suite, *options):
        (self.folder / "test_suite.py").write_text(suite)
        (self.folder / "pytest.ini").write_text("[pytest]\naddopts = -ra --tb=short -p no:logging\n")
        plain = ["-c", "pytest.ini", "--artifacts", "artifacts"]
        return [*HEARS_CTRL_C, sys.executable, "-m", "pytest", *plain, *options, "test_suite.py"]

    def start(self, suite, *options, **environment):
        env = outside_pytest(os.environ | environment)
        env.pop("CI", None)  # with it pytest repeats every failure in full
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(self.argv(suite, *options), cwd=self.folder, env=env, **how)

    def __call__(self, suite, *options, **environment):
        process = self.start(suite, *options, **environment)
        said, _ = process.communicate(timeout=120)
        return process.returncode, said


@pytest.fixture
def run(tmp_path):
    """``code, said = run(suite, "--host", "arm64")`` in a folder of its own."""
    return Run(tmp_path)


@pytest.fixture
def empty_cache(tmp_path):
    """The environment of a run with an empty cache and no network: no kernel can be obtained."""
    return {"ARM_KVM_CACHE": str(tmp_path / "cache"), "ARM_KVM_OFFLINE": "1"}
