"""Which cases ``arm-kvm test`` runs: all suites, unless paths are given, which may be relative to the suites' folder.

Only that command loads this plugin. Here pytest has parsed all arguments and knows paths from values of options.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from arm_kvm.support.paths import ROOT, TESTCASES, is_there


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    asked = [arg for arg in config.args if arg != str(TESTCASES)]
    if asked and not config.getoption("pyargs"):  # with --pyargs they are names of modules
        config.args = [_found(arg, config.invocation_params.dir) for arg in asked]


def _found(arg: str, here: Path) -> str:
    """Find a path or node id in the user's folder, among the suites, or as pytest prints it. Raises UsageError."""
    path, colons, case = arg.partition("::")
    for folder in (here, TESTCASES, ROOT):
        if is_there(folder / path):
            return f"{folder / path}{colons}{case}"
    raise pytest.UsageError(
        f"{path}: there is no such file or folder, neither here nor among the suites in {TESTCASES}"
    )
