"""Facts about a host's kernel, found once for all hosts restored from one snapshot: its symbols, and the points."""

from __future__ import annotations

from weakref import WeakSet

from arm_kvm.host.host import Host
from arm_kvm.host.origin import Once
from arm_kvm.recorder.points import ASK, KernelMap, Point, find


def _look(host: Host) -> list[Point]:
    kernel = kernel_map(host)
    with host.machine.gdb.pause() as gdb:
        return find(gdb, host.config.architecture, host.machine.ram, kernel)


#: The symbols and the place of a host's kernel.
kernel_map: Once[Host, KernelMap] = Once(lambda host: KernelMap(host.ssh.run(ASK)))
_points: Once[Host, list[Point]] = Once(_look)
_changed: WeakSet[Host] = WeakSet()


def points(host: Host) -> list[Point]:
    """Return the instructions that the recorder watches. Records refer to them by their index."""
    return _look(host) if host in _changed else _points(host)


def kernel_changed(host: Host) -> None:
    """Note that this host's kernel text differs from its snapshot's, so that its points are not cached."""
    _changed.add(host)
