"""Transparent huge pages of a host: khugepaged, huge pages in shared memory, and splitting them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from arm_kvm.host import facilities
from arm_kvm.host.host import Host

_HOME = "/sys/kernel/mm/transparent_hugepage"
_SCAN_DEADLINE = 120.0


@contextmanager
def of_shared_memory(host: Host) -> Iterator[None]:
    """Within the block shared anonymous memory and memfds get huge pages without MADV_HUGEPAGE."""
    host.ssh.run(f"echo always > {_HOME}/shmem_enabled")
    try:
        yield
    finally:
        host.ssh.run(f"echo never > {_HOME}/shmem_enabled")


def split_all(host: Host) -> None:
    """Split every transparent huge page of the host, the pages as well as their mappings (debugfs)."""
    facilities.drain_lru(host)  # pages in a CPU's LRU cache count as in use, and are not split
    host.ssh.run("echo 1 > /sys/kernel/debug/split_huge_pages")


class Khugepaged:
    """The kernel's thread that collapses pages into huge pages.

    It is stopped and started for each scan: in the first five minutes of a 32-bit host a sleeping one cannot be woken
    (5.4 khugepaged_should_wakeup compares jiffies, which start below zero, with 0). It is also reniced as soon as it
    starts, for it makes itself nice 19, at which 100 ms of CPU time count as 7 s (kernel/sched/core.c
    sched_prio_to_weight): it would then wait that long for its turn beside busy guests, even if reniced later.
    """

    _NOT_NICE = "renice 0 $(pidof khugepaged)"

    def __init__(self, host: Host) -> None:
        self._host = host
        host.ssh.run(self._NOT_NICE)  # before MADV_HUGEPAGE wakes it

    def scan(self) -> None:
        """Have it scan all memory that was advised MADV_HUGEPAGE, and wait for two full scans."""
        facilities.drain_lru(self._host)  # it collapses only pages on the LRU lists
        anew = "echo never > ../enabled; echo 100000 > pages_to_scan; echo 10 > scan_sleep_millisecs"
        begin = "was=$(cat full_scans); echo madvise > ../enabled"
        scanned = "[ $(cat full_scans) -ge $((was + 2)) ]"
        wait = f"for i in $(seq 600); do {self._NOT_NICE}; {scanned} && break; sleep 0.05; done"
        self._host.ssh.run(
            f"cd {_HOME}/khugepaged; {anew}; {begin}; {wait}; echo 600000 > scan_sleep_millisecs; [ $i -lt 600 ]",
            timeout=_SCAN_DEADLINE,
        )
