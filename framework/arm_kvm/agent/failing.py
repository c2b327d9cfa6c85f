"""Fault injection: the n-th allocation of a task fails (Documentation/fault-injection, fail-nth)."""

from __future__ import annotations

import os

_KNOBS: dict[str, dict[str, str | int]] = {
    "/sys/kernel/debug/fail_page_alloc": {
        "min-order": 0,
        "ignore-gfp-wait": "N",
        "ignore-gfp-highmem": "Y",
        "verbose": 0,
    },
    "/sys/kernel/debug/failslab": {"ignore-gfp-wait": "N", "verbose": 0},
}


def prepare() -> None:
    """Make the kernel's own allocations eligible to fail, order 0 included, but not those of user pages."""
    for folder, knobs in _KNOBS.items():
        for name, value in knobs.items():
            with open(f"{folder}/{name}", "w") as f:
                f.write(str(value))


class Nth:
    """``with Nth(3) as nth:`` makes the third allocation of this thread within the block fail.

    After the block, ``nth.injected`` says whether there was a third.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self.injected = False

    def __enter__(self) -> Nth:
        self._fd = os.open("/proc/thread-self/fail-nth", os.O_RDWR)  # once, because opening allocates memory
        os.pwrite(self._fd, b"%d" % self._n, 0)
        return self

    def __exit__(self, *_: object) -> None:
        left = os.pread(self._fd, 16, 0)
        os.pwrite(self._fd, b"0", 0)
        os.close(self._fd)
        self.injected = int(left) == 0
