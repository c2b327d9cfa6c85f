"""A running kernel's log and configuration, and whether its own debugging checks are active."""

from __future__ import annotations

import gzip

from arm_kvm.host.host import Host


def kernel_log(host: Host) -> str:
    """The kernel's log since boot, as dmesg prints it."""
    return host.ssh.run("dmesg")


def configuration(host: Host) -> str:
    """The kernel's .config (CONFIG_IKCONFIG_PROC)."""
    return gzip.decompress(bytes.fromhex(host.ssh.run("od -An -v -tx1 /proc/config.gz"))).decode()


def command_line(host: Host) -> list[str]:
    """The words of the kernel's command line."""
    return host.ssh.run("cat /proc/cmdline").split()


def unchecked_caches(host: Host) -> list[str]:
    """The files of /sys/kernel/slab that show a kmalloc cache whose objects are not poisoned, or not checked."""
    return host.ssh.run("cd /sys/kernel/slab; grep -L 1 kmalloc-*/poison kmalloc-*/sanity_checks", check=False).split()


def lock_checking(host: Host) -> bool:
    """Whether lockdep is active: it turns itself off at the first fault that it finds."""
    return int(host.ssh.run("awk '/ debug_locks:/ {print $2}' /proc/lockdep_stats")) == 1
