"""Facilities for a host's memory management: swap, a file system, a memory cgroup; KSM, compaction and reclaim."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from arm_kvm.host import features
from arm_kvm.host.host import Host
from arm_kvm.vmm.client import op, request
from arm_kvm.vmm.memory import PAGE, Memory

_CGROUPS = "/sys/fs/cgroup"
_GROUP = f"{_CGROUPS}/arm-kvm"
_KSM_DEADLINE, _PATIENCE = 60.0, 30.0  #: seconds


def free_memory(host: Host, looks: int = 8) -> int:
    """Free bytes with caches dropped: the maximum of ``looks`` samples, for RCU and workers free memory with a delay.

    Includes the per-CPU page lists (``count:`` in /proc/zoneinfo, mm/vmstat.c, Linux 5.4), which MemFree leaves out.
    Their size varies with what ran on which CPU: by hundreds of pages on 5.4, by 10,000 on 6.12.
    """
    pages = "awk '/pages free/ {n += $3} /count:/ {n += $2} END {print n}' /proc/zoneinfo"
    ask = f"echo 3 > /proc/sys/vm/drop_caches; {pages}; sleep 0.3"
    return max(int(host.ssh.run(ask)) for _ in range(looks)) * PAGE


def drain_lru(host: Host) -> None:
    """Move the pages on the CPUs' LRU caches onto the LRU lists.

    Until then they count as in use, and are not reclaimed, aged, split, collapsed or migrated.
    """
    host.agent(op.memory_drain)


def merge_pages(host: Host) -> None:
    """Have ksmd scan all memory that was advised MADV_MERGEABLE three times, and merge what it can.

    Raises HostOsError (ETIMEDOUT) when ksmd makes no progress.
    """
    host.agent.ask(request(op.memory_merge), _KSM_DEADLINE)


def compact_memory(host: Host) -> None:
    """Compact the host's memory and wait: movable pages are migrated to one end of each zone."""
    host.ssh.run("echo 1 > /proc/sys/vm/compact_memory")


def idle(host: Host, seconds: float) -> None:
    """Wait for ``seconds`` of the host's own clock."""
    host.ssh.run(f"sleep {seconds}", timeout=seconds + _PATIENCE)


@contextmanager
def _zram(host: Host, size: int) -> Iterator[str]:
    """Within the block, a zram disk of ``size`` bytes; yields its path."""
    number = host.ssh.run("cat /sys/class/zram-control/hot_add").strip()
    try:
        host.ssh.run(f"echo {size} > /sys/block/zram{number}/disksize")
        yield f"/dev/zram{number}"
    finally:
        host.ssh.run(f"echo 1 > /sys/block/zram{number}/reset; echo {number} > /sys/class/zram-control/hot_remove")


@contextmanager
def swap(host: Host, size: int = 64 << 20) -> Iterator[None]:
    """Within the block the host has ``size`` bytes of swap."""
    with _zram(host, size) as disk:
        host.ssh.run(f"mkswap {disk} >/dev/null && swapon {disk}")
        try:
            yield
        finally:
            host.ssh.run(f"swapoff {disk}")


@contextmanager
def filesystem(host: Host, size: int = 32 << 20) -> Iterator[str]:
    """Within the block, a folder on an ext2 disk of ``size`` bytes, which has writeback, unlike the host's root."""
    folder = "/run/disk"
    with _zram(host, size) as disk:
        host.ssh.run(f"mke2fs -b 4096 -F {disk} >/dev/null 2>&1 && mkdir -p {folder} && mount -t ext2 {disk} {folder}")
        try:
            yield folder
        finally:
            host.ssh.run(f"umount {folder}")


class MemoryCgroup:
    """A memory cgroup that contains the VMM: pages that it is the first to touch from now on are charged to it."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def usage(self) -> int:
        """Bytes charged (memory.current)."""
        return int(self._host.ssh.run(f"cat {_GROUP}/memory.current"))

    def limit(self, size: int) -> None:
        """Limit the group to ``size`` bytes (memory.max); beyond that the OOM killer runs."""
        self._host.ssh.run(f"echo {size} > {_GROUP}/memory.max")

    def oom_kills(self) -> int:
        """How many processes of the group the OOM killer has killed."""
        return int(self._host.ssh.run(f"awk '/^oom_kill / {{print $2}}' {_GROUP}/memory.events"))

    def reclaim(self, size: int) -> None:
        """Have the kernel reclaim about ``size`` bytes: memory.reclaim, or before 5.19 a limit below the usage."""
        limit = max(0, self.usage() - size)
        by_limit = f"echo {limit} > {_GROUP}/memory.high; echo max > {_GROUP}/memory.high"
        by_request = f"for i in 1 2 3; do echo {size} > {_GROUP}/memory.reclaim; done 2>/dev/null"
        self._host.ssh.run(f"if [ -e {_GROUP}/memory.reclaim ]; then {by_request}; else {by_limit}; fi", check=False)

    def give_up(self, looks: int = 4) -> None:
        """Have the kernel reclaim all it can, in ``looks`` passes: the first only ages pages that were accessed."""
        by_limit = f"echo 0 > {_GROUP}/memory.high; echo max > {_GROUP}/memory.high"
        self._host.ssh.run(f"for i in $(seq {looks}); do {by_limit}; done")


@contextmanager
def memory_cgroup(host: Host, pid: int = 0) -> Iterator[MemoryCgroup]:
    """Within the block a VMM is in a memory cgroup of its own (v2): process ``pid``, else the host's first VMM."""
    mounted = f"mountpoint -q {_CGROUPS} || mount -t cgroup2 none {_CGROUPS}"
    host.ssh.run(f"{mounted}; echo +memory > {_CGROUPS}/cgroup.subtree_control; mkdir -p {_GROUP}")
    pid = pid or host.agent.hello["pid"]
    host.ssh.run(f"echo {pid} > {_GROUP}/cgroup.procs")
    try:
        yield MemoryCgroup(host)
    finally:
        # A process that was killed is no longer in it.
        host.ssh.run(f"echo {pid} > {_CGROUPS}/cgroup.procs; rmdir {_GROUP}", check=False)


Reclaim = Callable[[Memory, int, int], None]


@contextmanager
def reclaim(host: Host) -> Iterator[Reclaim]:
    """Within the block, a function ``take(memory, offset, size)`` that reclaims these pages of the VMM's memory.

    Pages that guests keep accessing may stay. It uses MADV_PAGEOUT; where the kernel has none (before 5.4), the VMM is
    in a memory cgroup within the block, all other memory is locked, and the group is reclaimed.
    """
    if features.has(host, "MADV_PAGEOUT"):
        yield Memory.page_out
        return
    with memory_cgroup(host) as group:

        def take(memory: Memory, offset: int, size: int) -> None:
            with memory.locked_but(offset, size):
                group.give_up()

        yield take
