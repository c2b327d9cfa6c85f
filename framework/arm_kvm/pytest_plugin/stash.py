"""The keys under which the parts of the plugin leave things for each other in pytest's stashes."""

from __future__ import annotations

from pathlib import Path

import pytest

from arm_kvm.hosts.pool import Pool
from arm_kvm.pytest_plugin.session import HostSession

POOL = pytest.StashKey[Pool]()  #: of the run: its hosts
SESSION = pytest.StashKey[HostSession]()  #: of a test: its host, oracle and artifacts
FAILED = pytest.StashKey[bool]()  #: of a test: set once it has failed
CAUSE = pytest.StashKey[BaseException | None]()  #: of a case that is run against a mutant: the exception it failed with
NEXT = pytest.StashKey[pytest.Item | None]()  #: of a test: the one that follows
MUTANT = pytest.StashKey[bool]()  #: of the run: whether a mutant is being tried
BLAMED = pytest.StashKey[Path]()  #: of a test: the host file that it was skipped for
