"""What a mechanism sees, before it is known whose it is."""

from __future__ import annotations

from typing import NamedTuple


class RawEvent(NamedTuple):
    """A point was executed. ``ns``: CLOCK_MONOTONIC; ``point``: its index; ``operand``: 0 where it has none."""

    ns: int
    cpu: int
    point: int
    operand: int


class RawEntry(NamedTuple):
    """A stage-2 entry changed."""

    ns: int
    root: int
    ipa: int
    level: int
    old: int
    new: int
