"""The state of the host at one moment of a trace, which the automata share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from arm_kvm.events.operations import OPERATIONS, Reach
from arm_kvm.events.trace import Created, Destroyed, Enter, Event, Exit, Invalidate, Vttbr, root_of, vmid_of


class TraceState:
    """The state *before* the event that an automaton processes.

    ``vttbr``: CPU -> its VTTBR. ``inside``: CPU -> the VTTBR of the guest that runs there. ``vms``: root -> the lab's
    number of the VM. ``destroyed``: roots of destroyed VMs. ``cached``: root -> the VMIDs under which TLBs may hold
    its translations. ``flushes``: number of full invalidations so far.
    """

    def __init__(self) -> None:
        self.vttbr: dict[int, int] = defaultdict(int)
        self.inside: dict[int, int] = {}
        self.vms: dict[int, int] = {}
        self.destroyed: set[int] = set()
        self.cached: dict[int, set[int]] = defaultdict(set)
        self.flushes = 0

    def after(self, event: Event) -> None:
        """Update the state by ``event``."""
        match event:
            case Vttbr(cpu=cpu, value=value):
                self.vttbr[cpu] = value
                self.inside.pop(
                    cpu, None
                )  # also an entry that was aborted at the last step, because of a pending interrupt
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
        """Drop what is cached, except under the VTTBRs of guests that are running."""
        self.flushes += 1
        self.cached.clear()
        for value in self.inside.values():
            self.cached[root_of(value)].add(vmid_of(value))

    def name(self, root: int) -> str:
        """The VM with this root, for messages."""
        vm = f"VM {self.vms[root]}" if root in self.vms else "a VM"
        return f"{vm} (root {root:#x}{', destroyed' if root in self.destroyed else ''})"

    def others_inside(self, cpu: int, root: int) -> Iterator[tuple[int, int]]:
        """(CPU, VTTBR) of this VM's guests that run on other CPUs."""
        return ((c, v) for c, v in self.inside.items() if c != cpu and root_of(v) == root)


def full(op: str) -> bool:
    """Whether this operation invalidates every VM's translations on all CPUs."""
    operation = OPERATIONS[op]
    return operation.reach is Reach.ALL_VMS and operation.broadcast
