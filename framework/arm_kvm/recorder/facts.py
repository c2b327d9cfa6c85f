"""What is found out of a kernel once, for all hosts restored from one snapshot: symbols, and what is worth watching."""

from __future__ import annotations

from arm_kvm.host.host import Host
from arm_kvm.recorder.points import ASK, KernelMap, Point, find

_SYMBOLS, _POINTS = "kernel map", "points"


def kernel_map(host: Host) -> KernelMap:
    """Symbols and text of the host's kernel."""
    return host.fact(_SYMBOLS, lambda: KernelMap(host.ssh.run(ASK)))


def points(host: Host) -> list[Point]:
    """The instructions that the recorder watches; their numbers are indices of this list."""

    def look() -> list[Point]:
        kernel = kernel_map(host)
        with host.machine.gdb.pause() as gdb:
            return find(gdb, host.config.architecture, host.machine.ram, kernel)

    return host.fact(_POINTS, look)


def kernel_changed(host: Host) -> None:
    """This host's kernel is about to differ from that of its snapshot: what is found out of it holds for no other."""
    host.facts = {name: found for name, found in host.facts.items() if name != _POINTS}
