"""CPU affinity of the agent: its main thread stays on one CPU, other threads may run on all.

The main thread, which answers the lab and makes short runs of vCPUs, runs on the first CPU, which takes the interrupt
of the agent's port. To wake it on another, idle CPU would take longer than most requests on an emulated board. A thread
inherits its parent's affinity, so threads are started inside :func:`anywhere`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

CPUS = set(range(os.sysconf("SC_NPROCESSORS_CONF")))  #: all CPUs of the host, online or not


def move_home() -> None:
    """Bind this thread to the first CPU."""
    os.sched_setaffinity(0, {min(CPUS)})


@contextlib.contextmanager
def anywhere() -> Iterator[None]:
    """Within the block, this thread may run on every CPU, and so may the threads and processes that it starts."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CPUS)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
