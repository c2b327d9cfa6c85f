"""What the memory management of a host is given for a while (swap, a file system, a memory cgroup) or told to do."""

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
    """Bytes free, caches dropped: the most seen within a while, for what is freed by RCU or a worker takes its time.

    With the pages that each CPU keeps for its next allocations (``count:`` in /proc/zoneinfo, mm/vmstat.c, Linux 5.4),
    which MemFree leaves out. They come and go with what ran where: hundreds on 5.4, 10,000 on 6.12.
    """
    pages = "awk '/pages free/ {n += $3} /count:/ {n += $2} END {print n}' /proc/zoneinfo"
    ask = f"echo 3 > /proc/sys/vm/drop_caches; {pages}; sleep 0.3"
    return max(int(host.ssh.run(ask)) for _ in range(looks)) * PAGE


def drain_lru(host: Host) -> None:
    """Put the pages that wait on a CPU's list onto the LRU.

    Until then they count as in use: they are not reclaimed, aged, split, collapsed or migrated.
    """
    host.agent(op.memory_drain)


def merge_pages(host: Host) -> None:
    """Have ksmd merge what it can of the memory that was advised MADV_MERGEABLE: three passes over it.

    Raises HostOsError (ETIMEDOUT) when ksmd makes no progress.
    """
    host.agent.ask(request(op.memory_merge), _KSM_DEADLINE)


def compact_memory(host: Host) -> None:
    """Compact the memory of the host: pages that can move go to one end of each zone, until it is done."""
    host.ssh.run("echo 1 > /proc/sys/vm/compact_memory")


def idle(host: Host, seconds: float) -> None:
    """Wait this long, by the host's own clock."""
    host.ssh.run(f"sleep {seconds}", timeout=seconds + _PATIENCE)


@contextmanager
def _zram(host: Host, size: int) -> Iterator[str]:
    """A disk of this many bytes in compressed memory, /dev/zramN."""
    number = host.ssh.run("cat /sys/class/zram-control/hot_add").strip()
    try:
        host.ssh.run(f"echo {size} > /sys/block/zram{number}/disksize")
        yield f"/dev/zram{number}"
    finally:
        host.ssh.run(f"echo 1 > /sys/block/zram{number}/reset; echo {number} > /sys/class/zram-control/hot_remove")


@contextmanager
def swap(host: Host, size: int = 64 << 20) -> Iterator[None]:
    """Within the block the host can swap."""
    with _zram(host, size) as disk:
        host.ssh.run(f"mkswap {disk} >/dev/null && swapon {disk}")
        try:
            yield
        finally:
            host.ssh.run(f"swapoff {disk}")


@contextmanager
def filesystem(host: Host, size: int = 32 << 20) -> Iterator[str]:
    """A folder on a file system that writes back and evicts, unlike the host's root, which is memory."""
    folder = "/run/disk"
    with _zram(host, size) as disk:
        host.ssh.run(f"mke2fs -b 4096 -F {disk} >/dev/null 2>&1 && mkdir -p {folder} && mount -t ext2 {disk} {folder}")
        try:
            yield folder
        finally:
            host.ssh.run(f"umount {folder}")


class MemoryCgroup:
    """A memory cgroup that holds the VMM: what it touches first from now on is charged there."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def usage(self) -> int:
        """Bytes charged."""
        return int(self._host.ssh.run(f"cat {_GROUP}/memory.current"))

    def limit(self, size: int) -> None:
        """Never more than this many bytes (memory.max): beyond, the OOM killer comes."""
        self._host.ssh.run(f"echo {size} > {_GROUP}/memory.max")

    def oom_kills(self) -> int:
        """How many processes of the group the OOM killer has taken."""
        return int(self._host.ssh.run(f"awk '/^oom_kill / {{print $2}}' {_GROUP}/memory.events"))

    def reclaim(self, size: int) -> None:
        """Have the kernel take about this many bytes back: memory.reclaim, or before 5.19 a limit below the usage."""
        limit = max(0, self.usage() - size)
        by_limit = f"echo {limit} > {_GROUP}/memory.high; echo max > {_GROUP}/memory.high"
        by_request = f"for i in 1 2 3; do echo {size} > {_GROUP}/memory.reclaim; done 2>/dev/null"
        self._host.ssh.run(f"if [ -e {_GROUP}/memory.reclaim ]; then {by_request}; else {by_limit}; fi", check=False)

    def give_up(self, looks: int = 4) -> None:
        """Have the kernel take back all that it can: some pages are found used at the first look, and only aged."""
        by_limit = f"echo 0 > {_GROUP}/memory.high; echo max > {_GROUP}/memory.high"
        self._host.ssh.run(f"for i in $(seq {looks}); do {by_limit}; done")


@contextmanager
def memory_cgroup(host: Host, pid: int = 0) -> Iterator[MemoryCgroup]:
    """Within the block a VMM, the host's first unless another is named, is in a memory cgroup of its own (v2)."""
    mounted = f"mountpoint -q {_CGROUPS} || mount -t cgroup2 none {_CGROUPS}"
    host.ssh.run(f"{mounted}; echo +memory > {_CGROUPS}/cgroup.subtree_control; mkdir -p {_GROUP}")
    pid = pid or host.agent.hello["pid"]
    host.ssh.run(f"echo {pid} > {_GROUP}/cgroup.procs")
    try:
        yield MemoryCgroup(host)
    finally:
        # A process that was killed has left it already.
        host.ssh.run(f"echo {pid} > {_CGROUPS}/cgroup.procs; rmdir {_GROUP}", check=False)


Reclaim = Callable[[Memory, int, int], None]


@contextmanager
def reclaim(host: Host) -> Iterator[Reclaim]:
    """``take(memory, offset, size)``: these pages of the VMM's memory are reclaimed, as far as guests leave a chance.

    By MADV_PAGEOUT. Where the kernel has none (before 5.4), the VMM is in a memory cgroup within the block: what it
    touches first there is charged to the group, which then gives up what is not locked.
    """
    if features.has(host, "MADV_PAGEOUT"):
        yield Memory.page_out
        return
    with memory_cgroup(host) as group:

        def take(memory: Memory, offset: int, size: int) -> None:
            with memory.locked_but(offset, size):
                group.give_up()

        yield take
