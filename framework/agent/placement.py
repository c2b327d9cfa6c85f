"""On which CPU the agent runs: at home when it answers the lab, anywhere when it runs guests beside that.

Home is the CPU that takes the interrupt of the agent's port. A thread that waits on another, idle CPU must be woken
there, and on an emulated board that takes longer than most requests. A thread inherits its parent's place, so it
begins inside :func:`anywhere`.
"""

import contextlib
import os

CPUS = os.sched_getaffinity(0)  #: all that the host began with


def stay_home():
    """This thread runs on the first CPU from now on."""
    os.sched_setaffinity(0, {min(CPUS)})


@contextlib.contextmanager
def anywhere():
    """Within the block this thread may run on every CPU, and so may what it begins."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CPUS)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
