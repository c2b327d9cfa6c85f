"""Kernel samepage merging on demand (Documentation/admin-guide/mm/ksm): ksmd runs only within :func:`merge`."""

from __future__ import annotations

import os
import time

_HOME = "/sys/kernel/mm/ksm"
_PATIENCE = 10.0
#: One pass records a page's checksum; a later pass merges it if it has not changed and an equal page exists.
_PASSES = 3


def _set(name: str, value: int) -> None:
    with open(f"{_HOME}/{name}", "w") as f:
        f.write(str(value))


def _get(name: str) -> int:
    with open(f"{_HOME}/{name}") as f:
        return int(f.read())


def merge() -> None:
    """Merge all equal pages of memory advised MADV_MERGEABLE. OSError (ETIMEDOUT) when ksmd makes no progress."""
    _set("pages_to_scan", 100_000)
    _set("sleep_millisecs", 0)
    if os.path.exists(f"{_HOME}/smart_scan"):  # since 6.7: passes skip pages that could not be merged before
        _set("smart_scan", 0)
    until, patience = _get("full_scans") + _PASSES, time.monotonic() + _PATIENCE
    _set("run", 1)
    try:
        while _get("full_scans") < until:
            if time.monotonic() > patience:
                raise OSError(110, "Connection timed out", "ksmd")
            time.sleep(0.002)
    finally:
        _set("run", 0)


def unmerge() -> None:
    """Break all sharing: every mapping of a merged page gets its own copy again."""
    _set("run", 2)
    _set("run", 0)
