"""One test's recording: armed, marked as the lab's operations complete, ended, and made into a trace.

The mechanisms know addresses and numbers; here they get names. Whose root is whose is not asked of the kernel either: a
root belongs to the VM whose mailbox page it maps.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from arm_kvm.events.trace import (
    Created,
    Destroyed,
    Enter,
    EntryChange,
    Event,
    Exit,
    Invalidate,
    Mark,
    Trace,
    Vttbr,
    root_of,
)
from arm_kvm.guest.payload import MAILBOX
from arm_kvm.host.host import Host
from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch import sweep
from arm_kvm.model.arch.granule import KIB4
from arm_kvm.oracle.locator import Locator
from arm_kvm.recorder.facts import kernel_map, points
from arm_kvm.recorder.points import Point, What
from arm_kvm.recorder.raw import RawEntry, RawEvent
from arm_kvm.vmm.client import Listener, Request, op
from arm_kvm.vmm.vm import Vm

_NOBODY = -1
_CREATE, _DESTROY = op.vm_create.__name__, op.vm_destroy.__name__


class Mechanism(Protocol):
    """How points are watched. ``position`` counts what was seen so far."""

    def arm(self, points: list[Point], vttbr: list[int], vtcr: list[int]) -> None: ...

    def disarm(self) -> None: ...

    @property
    def position(self) -> int: ...

    def forget(self, root: int) -> None:
        """The VM with this root is destroyed."""

    def records(self, start: int = 0) -> Iterator[RawEvent | RawEntry]: ...


@dataclass(frozen=True)
class _Said:
    """Something the lab knows, and where in the mechanism's records it belongs."""

    position: int
    ns: int
    what: type[Event]
    vm: int = 0
    text: str = ""


class Recorder(Listener):
    """Recordings of one host, one at a time, through one mechanism.

    :meth:`start` and :meth:`stop` bracket a recording; in between the recorder listens to the agent: an answered
    request is a mark, and VMs are seen to be created and destroyed.
    """

    def __init__(self, host: Host, mechanism: Mechanism, locator: Locator) -> None:
        self._host = host
        self._arch = host.config.architecture
        self._machine = host.machine
        self._mechanism = mechanism
        self._locator = locator
        self.kernel = kernel_map(host)
        self.points = points(host)
        self._roots: dict[int, int] = {}  # number of a VM -> its root, as far as VMs were seen to run

    # -- begin and end -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Record from now on."""
        self._said: list[_Said] = []
        self._roots = {vm.id: regime.root for vm in self._host.vms if (regime := self._locator.known(vm))}
        self._earlier = any(vm.entered for vm in self._host.vms if vm.alive)
        self._gone = {vm.id for vm in self._host.vms if not vm.alive}
        self._known = 0  # records whose roots were looked at
        self._locator.vmm_space(self._host.agent)  # finding it asks the agent, which is no part of the test
        with self._machine.gdb.pause() as gdb:
            self._began = time.monotonic_ns()
            cpus = range(len(gdb.threads))
            self._vttbr = [gdb.read(cpu, self._arch.vttbr)[0] for cpu in cpus]
            self._mechanism.arm(self.points, self._vttbr, [gdb.read(cpu, self._arch.vtcr)[0] for cpu in cpus])
        for vm in self._host.vms:
            self._say(Created, vm.id)
        self._host.agent.listener = self

    def stop(self) -> Trace:
        """End the recording; what was seen. Raises MachineError when the mechanism lost something."""
        self._host.agent.listener = Listener()
        self._bind()
        for vm in self._host.vms:
            if vm.alive and (root := self._roots.get(vm.id)):
                self._locator.adopt(vm, root)
        with self._machine.gdb.pause():
            self._mechanism.disarm()
        return Trace(self._facts(), list(self._events()))

    def so_far(self) -> Trace:
        """What was seen until now; the recording goes on."""
        self._bind()
        return Trace(self._facts(), list(self._events()))

    def mark(self, text: str) -> None:
        """Write a line of the test's own into the trace."""
        self._say(Mark, text=text)

    # -- what the agent is asked -------------------------------------------------------------------------------

    def before(self, request: Request[Any]) -> None:
        """A request is about to be sent. The tables of a VM can name it only while it exists."""
        if request.name == _DESTROY:
            self._bind()

    def after(self, request: Request[Any], result: object) -> None:
        """One request of those that were answered."""
        if request.name == _CREATE and isinstance(result, int):
            self._say(Created, result)
        elif request.name == _DESTROY:
            vm = request.args["vm"]
            self._say(Destroyed, vm)
            self._gone.add(vm)
            if root := self._roots.get(vm):
                self._mechanism.forget(root)

    def answered(self, name: str) -> None:
        """Whatever the kernel did for it is complete."""
        self._say(Mark, text=name)

    def _say(self, what: type[Event], vm: int = 0, text: str = "") -> None:
        self._said.append(_Said(self._mechanism.position, time.monotonic_ns(), what, vm, text))

    # -- whose root is whose -----------------------------------------------------------------------------------

    def _bind(self) -> None:
        """Find the VMs of the roots that were seen since this was last done: by what they map at the mailbox's IPA."""
        position = self._mechanism.position
        if position == self._known:
            return
        seen = {page: r.root for r in self._mechanism.records(self._known) if (page := _mailbox_in(r))}
        self._known = position
        waiting = [vm for vm in self._host.vms if vm.id not in self._gone and vm.id not in self._roots]
        if seen and waiting:
            for page, vm in self._mailboxes(waiting).items():
                if page in seen:
                    self._roots[vm.id] = seen[page]

    def _mailboxes(self, vms: list[Vm]) -> dict[int, Vm]:
        """Physical address of each VM's mailbox, per the VMM's own stage 1 -> the VM."""
        hvas = np.array([vm.mailboxes.hva for vm in vms], dtype=np.uint64)
        with self._machine.gdb.pause():
            _, pas = sweep.translate(self._locator.vmm_space(self._host.agent), self._machine.ram, hvas)
        return {int(pa): vm for pa, vm in zip(pas, vms, strict=True) if pa}

    # -- the trace ---------------------------------------------------------------------------------------------

    def _facts(self) -> dict[str, str]:
        return {
            "host": self._host.config.name,
            "kernel": self._host.release,
            "qemu": ".".join(map(str, self._host.config.board.qemu.version)),
            "cpus": str(len(self._vttbr)),
            "vmid-bits": str(self._vmid_bits()),
            "allocator": "bitmap" if "kvm_arm_vmid_clear_active" in self.kernel.symbols else "consecutive",
            **({"earlier-vms": "yes"} if self._earlier else {}),
        }

    def _vmid_bits(self) -> int:
        """What KVM uses: 16 where the CPU has them (kvm_get_vmid_bits)."""
        if not self._arch.identity:
            return 8
        with self._machine.gdb.pause() as gdb:
            return 16 if self._arch.features(*gdb.read(0, *self._arch.identity)).vmid16 else 8

    def _events(self) -> Iterator[Event]:
        for cpu, vttbr in enumerate(self._vttbr):
            if root_of(vttbr):  # VHE leaves it when it leaves the guest
                yield Vttbr(0, cpu, vttbr)
        said = deque(self._said)
        for position, record in enumerate(self._mechanism.records()):
            while said and said[0].position <= position:
                yield from self._own(said.popleft())
            yield self._event(record)
        for rest in said:
            yield from self._own(rest)

    def _own(self, said: _Said) -> Iterator[Event]:
        """The event of something the lab said. A VM that never ran has no root, and is not in the trace."""
        where = (max(0, said.ns - self._began), _NOBODY)
        if said.what is Mark:
            yield Mark(*where, said.text)
        elif root := self._roots.get(said.vm):
            yield Created(*where, root, said.vm) if said.what is Created else Destroyed(*where, root)

    def _event(self, record: RawEvent | RawEntry) -> Event:
        time_ = max(0, record.ns - self._began)
        if isinstance(record, RawEntry):
            return EntryChange(time_, _NOBODY, record.root, record.ipa, record.level, record.old, record.new)
        point, where = self.points[record.point], (time_, record.cpu)
        match point.what:
            case What.VTTBR:
                return Vttbr(*where, record.operand)
            case What.ENTER:
                return Enter(*where, record.operand)
            case What.EXIT:
                return Exit(*where)
        return Invalidate(*where, point.op, record.operand)


def _mailbox_in(record: RawEvent | RawEntry) -> int:
    """The physical page of the mailbox, when this record is of a leaf that maps it; else 0."""
    if not isinstance(record, RawEntry) or not d.VALID.of(record.new):
        return 0
    size = 1 << KIB4.level_shift(record.level)
    if record.ipa != MAILBOX & -size or d.is_table(record.new, record.level):
        return 0
    return (record.new & d.Format().address_field(record.level)) | (MAILBOX & (size - 1))
