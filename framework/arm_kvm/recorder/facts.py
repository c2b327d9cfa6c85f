"""What is found out of a kernel once, for all hosts restored from one snapshot: symbols, and what is worth watching."""

from __future__ import annotations

from weakref import WeakSet

from arm_kvm.host.host import Host
from arm_kvm.host.origin import Once
from arm_kvm.recorder.points import ASK, KernelMap, Point, find


def _look(host: Host) -> list[Point]:
    kernel = kernel_map(host)
    with host.machine.gdb.pause() as gdb:
        return find(gdb, host.config.architecture, host.machine.ram, kernel)


#: Symbols and text of a host's kernel.
kernel_map: Once[Host, KernelMap] = Once(lambda host: KernelMap(host.ssh.run(ASK)))
_points: Once[Host, list[Point]] = Once(_look)
_changed: WeakSet[Host] = WeakSet()


def points(host: Host) -> list[Point]:
    """The instructions that the recorder watches; their numbers are indices of this list."""
    return _look(host) if host in _changed else _points(host)


def kernel_changed(host: Host) -> None:
    """This host's kernel is about to differ from that of its snapshot: what is found out of it holds for no other."""
    _changed.add(host)
