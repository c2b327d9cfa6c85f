"""Which cases ``arm-kvm test`` runs: it begins with the folder of all suites, and paths may be relative to that.

Only that command loads this. That a path is one, and not the value of an option, is known when pytest has parsed all.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from arm_kvm.support.paths import ROOT, TESTCASES, is_there


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    asked = [arg for arg in config.args if arg != str(TESTCASES)]
    if asked and not config.getoption("pyargs"):  # else they are names of modules
        config.args = [_found(arg, config.invocation_params.dir) for arg in asked]


def _found(arg: str, here: Path) -> str:
    """The path or node id in the user's folder, among the suites, or as pytest prints it. Raises UsageError."""
    path, colons, case = arg.partition("::")
    for folder in (here, TESTCASES, ROOT):
        if is_there(folder / path):
            return f"{folder / path}{colons}{case}"
    raise pytest.UsageError(
        f"{path}: there is no such file or folder, neither here nor among the suites in {TESTCASES}"
    )
