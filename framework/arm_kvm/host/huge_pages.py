"""Transparent huge pages of a host: khugepaged, huge pages of shared memory, and splitting them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from arm_kvm.host import facilities
from arm_kvm.host.host import Host

_HOME = "/sys/kernel/mm/transparent_hugepage"
_SCAN_DEADLINE = 120.0


@contextmanager
def of_shared_memory(host: Host) -> Iterator[None]:
    """Within the block shared anonymous memory and memfds get huge pages, asked for or not."""
    host.ssh.run(f"echo always > {_HOME}/shmem_enabled")
    try:
        yield
    finally:
        host.ssh.run(f"echo never > {_HOME}/shmem_enabled")


def split_all(host: Host) -> None:
    """Split every transparent huge page of the host into small pages, not only its mappings (debugfs)."""
    facilities.drain_lru(host)  # a page that waits for the LRU is in use, and not split
    host.ssh.run("echo 1 > /sys/kernel/debug/split_huge_pages")


class Khugepaged:
    """The kernel's thread that collapses pages into huge pages.

    For a scan it is ended and begun anew: one that sleeps cannot be woken in the first five minutes of a 32-bit host
    (5.4 khugepaged_should_wakeup compares jiffies, which begin below zero, with 0). And it is kept from being nice,
    which it makes itself as it begins: nice 19 counts 100 ms as 7 s (kernel/sched/core.c sched_prio_to_weight), for
    which it then waits beside guests that hammer, and to be less nice only afterwards does not shorten that.
    """

    _NOT_NICE = "renice 0 $(pidof khugepaged)"

    def __init__(self, host: Host) -> None:
        self._host = host
        host.ssh.run(self._NOT_NICE)  # now, for MADV_HUGEPAGE may wake it

    def scan(self) -> None:
        """Have it look at all memory that was advised MADV_HUGEPAGE, and wait until it has done so twice."""
        facilities.drain_lru(self._host)  # it takes pages of the LRU only
        anew = "echo never > ../enabled; echo 100000 > pages_to_scan; echo 10 > scan_sleep_millisecs"
        begin = "was=$(cat full_scans); echo madvise > ../enabled"
        scanned = "[ $(cat full_scans) -ge $((was + 2)) ]"
        wait = f"for i in $(seq 600); do {self._NOT_NICE}; {scanned} && break; sleep 0.05; done"
        self._host.ssh.run(
            f"cd {_HOME}/khugepaged; {anew}; {begin}; {wait}; echo 600000 > scan_sleep_millisecs; [ $i -lt 600 ]",
            timeout=_SCAN_DEADLINE,
        )
