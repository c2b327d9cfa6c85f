"""The marks of test cases. ``pytest --markers`` prints them."""

from __future__ import annotations

import pytest

MARKERS = {
    "needs(*capabilities)": "run the case only on hosts whose `can` lists all of these",
    "feature(*names)": "the case needs these features of the host's kernel; it is skipped where the kernel lacks one",
    "guests(*isas)": "run the case with these guest instruction sets only",
    "vcpus(n, pinned=False)": "the case's `vm` has n vCPUs; pinned: each is bound to a CPU of the host",
    "native": "run the case with the host's first guest instruction set only",
    "isolation(scope)": "the case has its host for itself (test), with its module or with the run (session)",
    "may_end_host": "a known fault may take down the case's host: the case gets one of its own, and meets no mutant",
    "slow": "the case takes minutes and runs with --slow only",
    "no_kvm": "run the case on hosts without KVM",
}


def pytest_configure(config: pytest.Config) -> None:
    for mark, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{mark}: {meaning}")
