"""The CPUs' timers after a restore from a snapshot.

QEMU (up to 11.1) saves the deadlines of a CPU's physical and virtual timers, but not those of the EL2 timers, which a
VHE kernel uses (target/arm/machine.c, vmstate_arm_cpu). Their registers are restored, but they do not fire until one of
them is written. The kernel assumes that its next event is programmed and does not reprogram the timer for a later one,
so sleeping tasks do not wake up.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

from .libc import clock_sleep_until


def program_anew(cpus: Iterable[int]) -> None:
    """Make the kernel program the timer of each of these CPUs, by adding an event earlier than any other: in the past.

    See hrtimer_reprogram() in kernel/time/hrtimer.c.
    """
    before = os.sched_getaffinity(0)
    try:
        for cpu in cpus:
            os.sched_setaffinity(0, {cpu})
            clock_sleep_until(time.CLOCK_MONOTONIC, 1)
    finally:
        os.sched_setaffinity(0, before)
