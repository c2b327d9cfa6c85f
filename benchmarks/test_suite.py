"""The suite and the mutants, run as a user runs them: how long a patch waits for its verdict."""

import subprocess
import sys

import pytest
from arm_kvm.support.paths import ROOT

HOSTS = ("--host", "a15", "--host", "arm64")
#: Short and long cases; the whole suite takes some three times as long.
SOME = ("testcases/stage2", "testcases/device", "testcases/lifecycle")
MUTANTS = ("unmap-ignored", "nothing-is-protected", "tables-never-freed", "interrupts-lost")


def pytest_on(*arguments):
    argv = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-q", *HOSTS, *arguments]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("workers", [1, 2])
def test_suites(benchmark, workers):
    """testcases/stage2, device and lifecycle on both hosts."""
    benchmark.pedantic(pytest_on, args=(*SOME, "-n", str(workers)), rounds=3)


def test_isolated_suites(benchmark):
    """The same, with a restored host for every case."""
    benchmark.pedantic(pytest_on, args=(*SOME, "--isolation", "test"), rounds=3)


def test_mutants(benchmark):
    """Four mutants that are killed soon, on both hosts, with two workers; the start of pytest is included."""
    names = [word for name in MUTANTS for word in ("--mutate", name)]
    benchmark.pedantic(pytest_on, args=("testcases", "-n", "2", *names), rounds=3)
    killed = len(MUTANTS) * 2
    benchmark.extra_info["mutants_a_minute"] = round(60 * killed / benchmark.stats.stats.median)
