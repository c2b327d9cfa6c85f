"""The timers of CPUs that go on in another QEMU.

QEMU (up to 11.1) saves when the physical and the virtual timer of a CPU are due, but not the timers of EL2, which a
VHE kernel uses (target/arm/machine.c, vmstate_arm_cpu). Their registers are restored, but nothing fires until one of
them is written. The kernel believes its next event to be programmed and writes nothing for a later one, so nothing
that sleeps wakes up.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

from .libc import clock_sleep_until


def program_anew(cpus: Iterable[int]) -> None:
    """Have the kernel write the timer of each of these CPUs: it does so for an event that is due before its next one.

    hrtimer_reprogram() of kernel/time/hrtimer.c; the earliest event there can be is one long past.
    """
    before = os.sched_getaffinity(0)
    try:
        for cpu in cpus:
            os.sched_setaffinity(0, {cpu})
            clock_sleep_until(time.CLOCK_MONOTONIC, 1)
    finally:
        os.sched_setaffinity(0, before)
