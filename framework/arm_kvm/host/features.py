"""Features that some kernels lack, probed on a live host once for all hosts restored from the same snapshot."""

from __future__ import annotations

import errno
from collections.abc import Callable

from arm_kvm.agent.ioctls import KVM_CHECK_EXTENSION, PAGEMAP_SCAN
from arm_kvm.host.host import Host
from arm_kvm.host.origin import Once
from arm_kvm.support.errors import HostOsError
from arm_kvm.vmm.client import op
from arm_kvm.vmm.memory import BLOCK, Advice, File, Memory


class Feature:
    """A feature of some kernels or CPUs. ``source``: what introduced it, for the reason of a skip."""

    def __init__(self, source: str, ask: Callable[[Host], bool]) -> None:
        self.source = source
        self.on: Once[Host, bool] = Once(ask)


def _takes(advice: Advice) -> Callable[[Host], bool]:
    return lambda host: host.agent(op.memory_takes, advice=int(advice))


def _collapses(host: Host) -> bool:
    """Probe MADV_COLLAPSE on memory that can be a huge page: on any other it fails with EINVAL, as if unknown."""
    memory = Memory(host.agent, host.agent(op.memory_map, size=BLOCK, align=BLOCK), BLOCK)
    memory.write(0, b"there")
    try:
        memory.advise(Advice.COLLAPSE)
    except HostOsError as e:
        return e.errno != errno.EINVAL
    finally:
        memory.unmap()
    return True


def _has_extension(number: int) -> Callable[[Host], bool]:
    return lambda host: host.has_kvm and host.kvm.ioctl(KVM_CHECK_EXTENSION, number) > 0


def _scans_pagemap(host: Host) -> bool:
    try:
        File.open(host.agent, "/proc/self/pagemap").exchange(PAGEMAP_SCAN, bytes(96))
    except HostOsError as e:
        return e.errno == errno.EINVAL  # the size in the structure is 0
    return True


def _sets_access_flags(host: Host) -> bool:
    arch = host.config.architecture
    if not arch.identity:  # Armv7
        return False
    with host.machine.gdb.pause() as gdb:
        return arch.features(*gdb.read(0, *arch.identity)).haf


#: The argument of a case's mark ``feature`` -> the feature.
FEATURES = {
    "MADV_COLD": Feature("Linux 5.4", _takes(Advice.COLD)),
    "MADV_PAGEOUT": Feature("Linux 5.4", _takes(Advice.PAGEOUT)),
    "MADV_COLLAPSE": Feature("Linux 6.1", _collapses),
    "PAGEMAP_SCAN": Feature("Linux 6.7", _scans_pagemap),
    "dirty-ring": Feature("Linux 6.2", _has_extension(223)),  # KVM_CAP_DIRTY_LOG_RING_ACQ_REL
    "inject-abort": Feature("Linux 5.5", _has_extension(178)),  # KVM_CAP_ARM_INJECT_EXT_DABT
    "nisv-to-user": Feature("Linux 5.5", _has_extension(177)),  # KVM_CAP_ARM_NISV_TO_USER
    "FEAT_HAFDBS": Feature("newer CPUs", _sets_access_flags),
}


def has(host: Host, name: str) -> bool:
    """Whether this host's kernel has the feature of this name."""
    return FEATURES[name].on(host)


def lacking(host: Host, name: str) -> str:
    """The reason to skip a case that needs this feature; "" if the host has it."""
    if has(host, name):
        return ""
    return f"{host.config.name} with Linux {host.release} has no {name}: it comes with {FEATURES[name].source}"
