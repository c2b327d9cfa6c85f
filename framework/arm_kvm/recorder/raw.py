"""The records of a mechanism, which refer to points by index and to VMs by root."""

from __future__ import annotations

from typing import NamedTuple


class RawEvent(NamedTuple):
    """A point was executed. ``ns``: CLOCK_MONOTONIC; ``point``: its index; ``operand``: 0 if it has none."""

    ns: int
    cpu: int
    point: int
    operand: int


class RawEntry(NamedTuple):
    """A stage-2 entry changed: descriptors before and after, at ``level`` for ``ipa``, under this root's PA."""

    ns: int
    root: int
    ipa: int
    level: int
    old: int
    new: int
