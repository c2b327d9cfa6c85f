"""What is known at one moment of a trace: the state that several automata share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from arm_kvm.events.operations import OPERATIONS, Reach
from arm_kvm.events.trace import Created, Destroyed, Enter, Event, Exit, Invalidate, Vttbr, root_of, vmid_of


class TraceState:
    """The state *before* the event that an automaton is shown.

    ``vttbr``: CPU -> its VTTBR. ``inside``: CPU -> the VTTBR its guest runs under. ``vms``: root -> the lab's number
    of the VM. ``destroyed``: roots of VMs that are gone. ``cached``: root -> the VMIDs under which TLBs may hold its
    translations. ``flushes``: full invalidations so far.
    """

    def __init__(self) -> None:
        self.vttbr: dict[int, int] = defaultdict(int)
        self.inside: dict[int, int] = {}
        self.vms: dict[int, int] = {}
        self.destroyed: set[int] = set()
        self.cached: dict[int, set[int]] = defaultdict(set)
        self.flushes = 0

    def after(self, event: Event) -> None:
        """``event`` has happened."""
        match event:
            case Vttbr(cpu=cpu, value=value):
                self.vttbr[cpu] = value
                self.inside.pop(cpu, None)  # an entry that turned back at its last step: an interrupt was pending
            case Enter(cpu=cpu):
                value = self.inside[cpu] = self.vttbr[cpu]
                self.cached[root_of(value)].add(vmid_of(value))
            case Exit(cpu=cpu):
                self.inside.pop(cpu, None)
            case Invalidate(op=op):
                if full(op):
                    self._flush()
            case Created(root=root, vm=vm):
                self.vms[root] = vm
                self.destroyed.discard(root)
                self.cached.pop(root, None)
            case Destroyed(root=root):
                self.destroyed.add(root)

    def _flush(self) -> None:
        """Nothing is cached any more, but for guests that run on."""
        self.flushes += 1
        self.cached.clear()
        for value in self.inside.values():
            self.cached[root_of(value)].add(vmid_of(value))

    def name(self, root: int) -> str:
        """The VM with this root, in words."""
        vm = f"VM {self.vms[root]}" if root in self.vms else "a VM"
        return f"{vm} (root {root:#x}{', destroyed' if root in self.destroyed else ''})"

    def others_inside(self, cpu: int, root: int) -> Iterator[tuple[int, int]]:
        """(CPU, VTTBR) of the guests of this VM that run on other CPUs."""
        return ((c, v) for c, v in self.inside.items() if c != cpu and root_of(v) == root)


def full(op: str) -> bool:
    """Whether this operation invalidates every VM's translations on all CPUs."""
    operation = OPERATIONS[op]
    return operation.reach is Reach.ALL_VMS and operation.broadcast
