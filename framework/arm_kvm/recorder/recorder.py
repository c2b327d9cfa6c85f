"""Record a test through a mechanism, and turn the mechanism's records into a trace.

The records have roots and indices; the trace has VMs and operations. A root belongs to the VM whose mailbox page it
maps, so the kernel need not be asked.
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

_NO_CPU = -1
_CREATE, _DESTROY = op.vm_create.__name__, op.vm_destroy.__name__


class Mechanism(Protocol):
    """What watches points and tables."""

    def arm(self, points: list[Point], vttbr: list[int], vtcr: list[int]) -> None:
        """Watch these points, with the machine stopped. ``vttbr``, ``vtcr``: the current values of each CPU."""
        ...

    def disarm(self) -> None:
        """Stop watching, with the machine stopped."""
        ...

    @property
    def position(self) -> int:
        """The number of records so far."""
        ...

    def forget(self, root: int) -> None:
        """Stop comparing the tables under this root, whose VM is destroyed."""
        ...

    def records(self, start: int = 0) -> Iterator[RawEvent | RawEntry]:
        """Return the records from position ``start`` on. Raises MachineError when some are missing."""
        ...


@dataclass(frozen=True)
class _Said:
    """Something the lab knows, and where in the mechanism's records it belongs."""

    position: int
    ns: int
    what: type[Event]
    vm: int = 0
    text: str = ""


class Recorder(Listener):
    """Makes recordings of one host, one at a time, through one mechanism.

    Between :meth:`start` and :meth:`stop` it is the listener of the host's agent: every answered request becomes a mark
    in the trace, and the creation and destruction of VMs become events.
    """

    def __init__(self, host: Host, mechanism: Mechanism, locator: Locator) -> None:
        self._host = host
        self._arch = host.config.architecture
        self._machine = host.machine
        self._mechanism = mechanism
        self._locator = locator
        self.kernel = kernel_map(host)
        self.points = points(host)
        self._roots: dict[int, int] = {}  # number of a VM that has run -> its root

    # -- begin and end -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start a recording."""
        self._said: list[_Said] = []
        self._roots = {vm.id: regime.root for vm in self._host.vms if (regime := self._locator.known(vm))}
        self._earlier = any(vm.entered for vm in self._host.vms if vm.alive)
        self._gone = {vm.id for vm in self._host.vms if not vm.alive}
        self._known = 0  # the number of records that _bind has read
        self._locator.vmm_space(self._host.agent)  # now: finding it makes requests, which are not part of the test
        with self._machine.gdb.pause() as gdb:
            self._began = time.monotonic_ns()
            cpus = range(len(gdb.threads))
            self._vttbr = [gdb.read(cpu, self._arch.vttbr)[0] for cpu in cpus]
            self._mechanism.arm(self.points, self._vttbr, [gdb.read(cpu, self._arch.vtcr)[0] for cpu in cpus])
        for vm in self._host.vms:
            self._say(Created, vm.id)
        self._host.agent.listener = self

    def stop(self) -> Trace:
        """End the recording and return the trace. Raises MachineError when the mechanism has lost records."""
        self._host.agent.listener = Listener()
        self._bind()
        for vm in self._host.vms:
            if vm.alive and (root := self._roots.get(vm.id)):
                self._locator.adopt(vm, root)
        with self._machine.gdb.pause():
            self._mechanism.disarm()
        return Trace(self._facts(), list(self._events()))

    def so_far(self) -> Trace:
        """Return the trace up to now; the recording goes on. Raises MachineError as :meth:`stop` does."""
        self._bind()
        return Trace(self._facts(), list(self._events()))

    def mark(self, text: str) -> None:
        """Add a mark with this text to the trace."""
        self._say(Mark, text=text)

    # -- listener of the agent -----------------------------------------------------------------------------------

    def before(self, request: Request[Any]) -> None:
        """Find the roots of VMs before one is destroyed: only a VM that exists can be found by its mailbox."""
        if request.name == _DESTROY:
            self._bind()

    def after(self, request: Request[Any], result: object) -> None:
        """Note the creation and the destruction of VMs."""
        if request.name == _CREATE and isinstance(result, int):
            self._say(Created, result)
        elif request.name == _DESTROY:
            vm = request.args["vm"]
            self._say(Destroyed, vm)
            self._gone.add(vm)
            if root := self._roots.get(vm):
                self._mechanism.forget(root)

    def answered(self, name: str) -> None:
        """Add a mark: the request is complete."""
        self._say(Mark, text=name)

    def _say(self, what: type[Event], vm: int = 0, text: str = "") -> None:
        self._said.append(_Said(self._mechanism.position, time.monotonic_ns(), what, vm, text))

    # -- roots of VMs ------------------------------------------------------------------------------------------

    def _bind(self) -> None:
        """Find the VMs of the roots in new records, by the page that a root maps at the mailbox's IPA."""
        position = self._mechanism.position
        if position == self._known:
            return
        entries = (r for r in self._mechanism.records(self._known) if isinstance(r, RawEntry))
        seen = {page: entry.root for entry in entries if (page := _mailbox_in(entry))}
        self._known = position
        waiting = [vm for vm in self._host.vms if vm.id not in self._gone and vm.id not in self._roots]
        if seen and waiting:
            for page, vm in self._mailboxes(waiting).items():
                if page in seen:
                    self._roots[vm.id] = seen[page]

    def _mailboxes(self, vms: list[Vm]) -> dict[int, Vm]:
        """Map the physical address of each VM's mailbox, according to the VMM's own stage 1, to the VM."""
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
        """The number of VMID bits that KVM uses: 16 if the CPU has them, else 8 (kvm_get_vmid_bits)."""
        if not self._arch.identity:
            return 8
        with self._machine.gdb.pause() as gdb:
            return 16 if self._arch.features(*gdb.read(0, *self._arch.identity)).vmid16 else 8

    def _events(self) -> Iterator[Event]:
        for cpu, vttbr in enumerate(self._vttbr):
            if root_of(vttbr):  # not 0 with VHE, which does not clear VTTBR at an exit
                yield Vttbr(0, cpu, vttbr)
        said = deque(self._said)
        for position, record in enumerate(self._mechanism.records()):
            while said and said[0].position <= position:
                yield from self._own(said.popleft())
            yield self._event(record)
        for rest in said:
            yield from self._own(rest)

    def _own(self, said: _Said) -> Iterator[Event]:
        """The event of something that the lab did. A VM that never ran has no root and is not in the trace."""
        where = (max(0, said.ns - self._began), _NO_CPU)
        if said.what is Mark:
            yield Mark(*where, said.text)
        elif root := self._roots.get(said.vm):
            yield Created(*where, root, said.vm) if said.what is Created else Destroyed(*where, root)

    def _event(self, record: RawEvent | RawEntry) -> Event:
        time_ = max(0, record.ns - self._began)
        if isinstance(record, RawEntry):
            return EntryChange(time_, _NO_CPU, record.root, record.ipa, record.level, record.old, record.new)
        point, where = self.points[record.point], (time_, record.cpu)
        match point.what:
            case What.VTTBR:
                return Vttbr(*where, record.operand)
            case What.ENTER:
                return Enter(*where, record.operand)
            case What.EXIT:
                return Exit(*where)
        return Invalidate(*where, point.op, record.operand)


def _mailbox_in(record: RawEntry) -> int:
    """Return the PA of the mailbox's page if this record is of a leaf that maps it, else 0."""
    if not d.VALID.of(record.new):
        return 0
    size = 1 << KIB4.level_shift(record.level)
    if record.ipa != MAILBOX & -size or d.is_table(record.new, record.level):
        return 0
    return (record.new & d.Format().address_field(record.level)) | (MAILBOX & (size - 1))
