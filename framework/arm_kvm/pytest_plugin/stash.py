"""What the parts of the plugin leave for each other in pytest's stashes."""

from __future__ import annotations

from pathlib import Path

import pytest

from arm_kvm.hosts.pool import Pool

POOL = pytest.StashKey[Pool]()  #: of the run: its hosts
SESSION = pytest.StashKey()  #: of a test: what the lab holds of it
FAILED = pytest.StashKey[bool]()  #: of a test, once it has
CAUSE = pytest.StashKey[BaseException | None]()  #: of a case that a mutant is run against: why it failed
NEXT = pytest.StashKey[pytest.Item | None]()  #: of a test: the one after it
MUTANT = pytest.StashKey[bool]()  #: of the run: whether it is a mutant's turn
BLAMED = pytest.StashKey[Path]()  #: of a test: the host file its skip is due to
