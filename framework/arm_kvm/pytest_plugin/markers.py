"""The marks of test cases. ``pytest --markers`` prints them."""

from __future__ import annotations

import pytest

MARKERS = {
    "needs(*capabilities)": "the case runs on hosts whose `can` lists all of these",
    "feature(*names)": "the case needs these of the host's kernel, which is asked; where it lacks one, it is skipped",
    "guests(*isas)": "the case is about these guest instruction sets only",
    "vcpus(n, pinned=False)": "the case's `vm` has n vCPUs; pinned: each is bound to a CPU of the host",
    "native": "the case runs with the host's first guest instruction set only",
    "isolation(scope)": "the case has its host for itself (test), with its module or with the run (session)",
    "may_end_host": "a known fault may take the case's host along: it has one for itself, and no mutant meets it",
    "slow": "the case takes minutes, and runs with --slow only",
    "no_kvm": "the case runs on hosts without KVM",
}


def pytest_configure(config: pytest.Config) -> None:
    for mark, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{mark}: {meaning}")
