"""What a running kernel says of itself: its log, its configuration, and whether it checks itself."""

from __future__ import annotations

import gzip

from arm_kvm.host.host import Host


def kernel_log(host: Host) -> str:
    """The kernel's log as dmesg prints it, since boot."""
    return host.ssh.run("dmesg")


def configuration(host: Host) -> str:
    """The kernel's .config (CONFIG_IKCONFIG_PROC)."""
    return gzip.decompress(bytes.fromhex(host.ssh.run("od -An -v -tx1 /proc/config.gz"))).decode()


def command_line(host: Host) -> list[str]:
    """The words of the kernel's command line."""
    return host.ssh.run("cat /proc/cmdline").split()


def unchecked_caches(host: Host) -> list[str]:
    """The files of /sys/kernel/slab that say of a kmalloc cache: its objects are not poisoned, or not checked."""
    return host.ssh.run("cd /sys/kernel/slab; grep -L 1 kmalloc-*/poison kmalloc-*/sanity_checks", check=False).split()


def lock_checking(host: Host) -> bool:
    """Whether lockdep is at work: it goes off with the first fault that it finds."""
    return int(host.ssh.run("awk '/ debug_locks:/ {print $2}' /proc/lockdep_stats")) == 1
