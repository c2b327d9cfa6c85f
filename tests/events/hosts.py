"""Hosts that keep the rules: the model's own allocators run random VMs on random CPUs and write a trace.

They also do what a trace does not show: they schedule vCPUs out, and allocate a VMID some time before the entry.
"""

from __future__ import annotations

from arm_kvm.events.trace import VMID_SHIFT, Created, Destroyed, Enter, Event, Exit, Invalidate, Trace, Vttbr
from arm_kvm.model.kvm.vmid import Bitmap, Consecutive
from hypothesis import strategies as st

BITS = 3  # seven VMIDs: histories of a few dozen steps roll over several times
SLOTS = 12  # stage-2 roots; a destroyed VM's root is the next VM's
ROOT, VCPU = 0x48400000, 0x96B188000000
FLUSH = {"consecutive": "tlbiallnsnhis", "bitmap": "alle1is"}


def make(name: str, cpus: int) -> Consecutive | Bitmap:
    """The model's allocator of this name."""
    return Consecutive(BITS) if name == "consecutive" else Bitmap(BITS, cpus)


def root_in(slot: int) -> int:
    return ROOT + slot * 0x2000


class Host:
    """The world switch of KVM, as far as it concerns VMIDs. Each VM has one vCPU per CPU, bound to that CPU."""

    def __init__(self, name: str, cpus: int = 2, before: int = 0) -> None:
        """``before``: number of VMs that ran once before the recording began, and still hold their VMIDs."""
        self._name, self._cpus = name, cpus
        self._allocator = make(name, cpus)
        for vm in range(before):
            self._allocator.enter(("before", vm), 0)
            self._allocator.leave(0)
        self._vm = {slot: slot for slot in range(SLOTS)}
        self._next_vm = SLOTS
        self._loaded: dict[int, int] = {}  # CPU -> slot of the VM whose vCPU is loaded
        self._inside: set[int] = set()
        self._taken: dict[int, int] = {}  # CPU -> the VMID with which it is about to enter
        self.events: list[Event] = []
        for slot in range(SLOTS):
            self._say(Created, -1, root_in(slot), slot)

    @property
    def trace(self) -> Trace:
        facts = {"host": "model", "cpus": str(self._cpus), "vmid-bits": str(BITS), "allocator": self._name}
        return Trace(facts, self.events)

    def _say(self, kind: type[Event], cpu: int, *what: object) -> None:
        self.events.append(kind(len(self.events) * 1000, cpu, *what))

    def play(self, steps: list[tuple[str, int, int]]) -> Trace:
        """Do these steps: (name of a method, slot, CPU)."""
        for what, slot, cpu in steps:
            getattr(self, what)(slot, cpu % self._cpus)
        return self.trace

    # -- steps ----------------------------------------------------------------------------------------

    def run(self, slot: int, cpu: int) -> None:
        """Enter the VM, which runs until something else happens on its CPU."""
        self.delay(slot, cpu)
        self._enter(cpu)

    def delay(self, slot: int, cpu: int) -> None:
        """Allocate the VM's VMID; the CPU enters with it at its next step."""
        self._leave(cpu)
        if self._loaded.get(cpu, slot) != slot:
            self.out(slot, cpu)
        self._loaded[cpu] = slot
        self._take(cpu)

    def out(self, _slot: int, cpu: int) -> None:
        """Schedule out the vCPU on this CPU, which the trace does not show."""
        self._leave(cpu)
        self._allocator.leave(cpu)
        self._loaded.pop(cpu, None)

    def destroy(self, slot: int, _cpu: int) -> None:
        """Destroy the VM, and create another one with its root."""
        for cpu in [cpu for cpu, loaded in self._loaded.items() if loaded == slot]:
            self.out(slot, cpu)
        self._allocator.forget(self._vm[slot])
        self._say(Destroyed, -1, root_in(slot))
        self._vm[slot], self._next_vm = self._next_vm, self._next_vm + 1
        self._say(Created, -1, root_in(slot), self._vm[slot])

    # -- parts of them ----------------------------------------------------------------------------------

    def _take(self, cpu: int) -> None:
        entry = self._allocator.enter(self._vm[self._loaded[cpu]], cpu)
        if entry.invalidations:
            for other in sorted(self._inside) if self._name == "consecutive" else ():
                self._exit(other)  # force_vm_exit()
            self._say(Invalidate, cpu, FLUSH[self._name])
        self._taken[cpu] = entry.vmid

    def _enter(self, cpu: int) -> None:
        if self._name == "consecutive":
            self._take(cpu)  # need_new_vmid_gen() is called again, with interrupts off
        slot = self._loaded[cpu]
        self._say(Vttbr, cpu, self._taken.pop(cpu) << VMID_SHIFT | root_in(slot))
        self._say(Enter, cpu, VCPU + self._vm[slot] * 64 + cpu)
        self._inside.add(cpu)

    def _exit(self, cpu: int) -> None:
        self._inside.discard(cpu)
        self._say(Exit, cpu)
        self._say(Vttbr, cpu, 0)

    def _leave(self, cpu: int) -> None:
        """Complete an entry that has begun, and exit from the guest."""
        if cpu in self._taken:
            self._enter(cpu)
        if cpu in self._inside:
            self._exit(cpu)


def steps(*names: str, slots: int = SLOTS, size: int = 60) -> st.SearchStrategy[list[tuple[str, int, int]]]:
    """Histories of these steps, most likely running a VM."""
    return st.lists(
        st.tuples(st.sampled_from(("run", "run", *names)), st.integers(0, slots - 1), st.integers(0, 3)), max_size=size
    )
