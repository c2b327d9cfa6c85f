"""On which CPU the agent runs: at home while it answers the lab, short runs of guests included; other threads anywhere.

Home is the CPU that takes the interrupt of the agent's port. A thread that waits on another, idle CPU must be woken
there, and on an emulated board that takes longer than most requests. A thread inherits its parent's place, so it
begins inside :func:`anywhere`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

CPUS = set(range(os.sysconf("SC_NPROCESSORS_CONF")))  #: all that the host has, on line or not


def stay_home() -> None:
    """This thread runs on the first CPU from now on."""
    os.sched_setaffinity(0, {min(CPUS)})


@contextlib.contextmanager
def anywhere() -> Iterator[None]:
    """Within the block this thread may run on every CPU, and so may what it begins."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CPUS)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
