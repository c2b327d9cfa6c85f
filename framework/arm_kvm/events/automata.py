"""The rules, one small automaton each. They process the events in order, with the world's state before each event.

Sources: ARM DDI 0406C.d, B3.10 (TLB maintenance); ARM DDI 0487 M.b, D8.17 (for changes of an entry see
arm_kvm.model.arch.changes);
Linux 5.4 virt/kvm/arm/{arm,mmu}.c, 6.1 and 6.12 arch/arm64/kvm/{arm,mmu,vmid}.c, hyp/pgtable.c.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from arm_kvm.events.operations import OPERATIONS, Operation, Reach, span
from arm_kvm.events.trace import (
    Created,
    Destroyed,
    Enter,
    EntryChange,
    Event,
    Invalidate,
    Mark,
    Vttbr,
    root_of,
    vmid_of,
)
from arm_kvm.events.violations import TraceRule
from arm_kvm.events.world import TraceState, full
from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch.changes import Loss, loss, skips_break
from arm_kvm.model.arch.granule import KIB4
from arm_kvm.model.kvm.vmid import VcpuLoads

Finding = tuple[TraceRule, str]


class Automaton(Protocol):
    """A rule. ``see`` processes an event and yields the violations that it is."""

    def see(self, event: Event, world: TraceState) -> Iterator[Finding]: ...


# -- the tables ---------------------------------------------------------------------------------------------


@dataclass
class _Pending:
    """An entry that TLBs may still hold, and that the kernel has to invalidate."""

    change: EntryChange
    loss: Loss
    stage1_only: bool = False  #: stage 2 was invalidated, what combines it with stage 1 was not
    complete: int = 0  #: operations of the lab completed since

    @property
    def size(self) -> int:
        return 1 << KIB4.level_shift(self.change.level)

    def completed_by(self, op: Operation, event: Invalidate) -> bool:
        """Whether the entry is fully invalidated with this operation, which is executed under the right VMID."""
        if op.reach in (Reach.ALL_VMS, Reach.VM):
            return True
        if op.reach is Reach.STAGE1:
            return self.stage1_only
        if op.has_operand and not (op.last_level and self._table):
            self.stage1_only |= span(event.op, event.operand).reaches(
                self.change.ipa, self.size, self.change.level, self._table
            )
        return False

    @property
    def _table(self) -> bool:
        return d.is_table(self.change.old, self.change.level)

    def __str__(self) -> str:
        stage1 = "what combines it with stage 1 was not invalidated (VMALLE1IS)"
        missing = stage1 if self.stage1_only else "no operation reached it"
        where = f"IPA {self.change.ipa:#x} (level {self.change.level}, was {self.change.old:#x})"
        return f"{where} was {self.loss.value}; {missing} since, on all CPUs and under the VM's VMID"


class Invalidations:
    """Entries and rights that a guest loses are invalidated: under the VM's VMID, for the IPA or all, on all CPUs.

    This must be complete before the kernel's operation returns and the page can be reused. The first Mark after the
    change may belong to a concurrent operation, the second may not.
    """

    _GRACE = 2

    def __init__(self) -> None:
        self._pending: dict[int, list[_Pending]] = defaultdict(list)

    def see(self, event: Event, world: TraceState) -> Iterator[Finding]:
        match event:
            case EntryChange(root=root):
                yield from self._change(event, world.cached[root] != set())
            case Invalidate(op=op, cpu=cpu) if OPERATIONS[op].broadcast:
                self._invalidated(event, world.vttbr[cpu], world)
            case Mark():
                yield from self._due()
            case Destroyed(root=root) | Created(root=root):
                self._pending.pop(root, None)

    def _change(self, entry: EntryChange, cached: bool) -> Iterator[Finding]:
        if skips_break(entry.old, entry.new):
            yield TraceRule.BREAK_BEFORE_MAKE, f"valid {entry.old:#x} became valid {entry.new:#x} in one step"
        elif not d.VALID.of(entry.old) and (pending := self._pending_at(entry)):
            yield TraceRule.BREAK_BEFORE_MAKE, f"valid again, but {pending}"
        elif cached and (lost := loss(entry.old, entry.new, entry.level)):
            self._pending[entry.root].append(_Pending(entry, lost))

    def _pending_at(self, entry: EntryChange) -> _Pending | None:
        """A pending invalidation of memory that the new entry maps."""
        end = entry.ipa + (1 << KIB4.level_shift(entry.level))
        for pending in self._pending[entry.root]:
            ipa = pending.change.ipa
            if ipa < end and entry.ipa < ipa + pending.size and pending.loss is Loss.MAPPING:
                return pending
        return None

    def _invalidated(self, event: Invalidate, vttbr: int, world: TraceState) -> None:
        operation = OPERATIONS[event.op]
        roots = list(self._pending) if operation.reach is Reach.ALL_VMS else [root_of(vttbr)]
        for root in roots:
            if operation.reach is Reach.ALL_VMS or world.cached[root] <= {vmid_of(vttbr)}:
                self._pending[root] = [p for p in self._pending[root] if not p.completed_by(operation, event)]

    def _due(self) -> Iterator[Finding]:
        for root, entries in self._pending.items():
            for pending in entries:
                pending.complete += 1
                if pending.complete == self._GRACE:
                    yield TraceRule.NOT_INVALIDATED, str(pending)
            self._pending[root] = [pending for pending in entries if pending.complete < self._GRACE]


# -- VMIDs ---------------------------------------------------------------------------------------------------


class Zero:
    """VMID 0 belongs to the host; no guest is entered with it. (Maintenance for a VM that never ran may use it.)"""

    def see(self, event: Event, world: TraceState) -> Iterator[Finding]:
        if isinstance(event, Enter) and vmid_of(value := world.vttbr[event.cpu]) == 0:
            yield TraceRule.VMID_ZERO, f"{world.name(root_of(value))} is entered under VTTBR {value:#x}"


#: The last VMIDs of a generation may be reserved for VMs that were running during the previous rollover.
_RESERVED = 4


#: A VM: its root, and how many VMs had that root before. The kernel reuses roots.
_Life = tuple[int, int]


class Owners:
    """Between two full invalidations a VMID belongs to one VM, even after that VM is destroyed."""

    def __init__(self, bits: int) -> None:
        self._last = (1 << bits) - 1  #: VMID of a generation
        self._owner: dict[int, _Life] = {}  #: VMID -> its VM
        self._lives: dict[int, int] = defaultdict(int)  #: root -> VMs that have had it
        self._before: dict[int, int] = {}  #: root -> its last VMID in any generation
        self._largest = 0

    def see(self, event: Event, world: TraceState) -> Iterator[Finding]:
        if isinstance(event, Invalidate) and full(event.op):
            self._owner = {vmid_of(v): self._life(root_of(v)) for v in world.inside.values()}
            self._largest = 0
        elif isinstance(event, Created):  # another VM, though the VMIDs of the root's former VM remain in use
            self._lives[event.root] += 1
            self._before.pop(event.root, None)
        elif isinstance(event, Enter):
            value = world.vttbr[event.cpu]
            yield from self._enter(vmid_of(value), root_of(value), world)

    def _life(self, root: int) -> _Life:
        return root, self._lives[root]

    def _enter(self, vmid: int, root: int, world: TraceState) -> Iterator[Finding]:
        owner = self._owner.get(vmid)
        if owner != self._life(root):
            if owner is not None and vmid:
                rule, why = self._clash(vmid, owner, root, world)
                yield rule, why
                if rule is TraceRule.ROLLOVER_NOT_INVALIDATED:  # report it once
                    self._owner, self._largest = {}, 0
            self._owner[vmid] = self._life(root)
            self._largest = max(self._largest, vmid)
        self._before[root] = vmid

    def _clash(self, vmid: int, owner: _Life, root: int, world: TraceState) -> Finding:
        name = world.name(owner[0])
        if self._before.get(root) == vmid:
            words = f"{world.name(root)} is entered under VMID {vmid}, which it had before the rollover"
            return TraceRule.OLD_GENERATION, f"{words}, and which is {name}'s now"
        words = f"VMID {vmid} of {name} is given to {world.name(root)}"
        if self._largest >= self._last - _RESERVED:
            return (
                TraceRule.ROLLOVER_NOT_INVALIDATED,
                f"{words} after {self._largest}, and nothing was invalidated between",
            )
        gone = owner != self._life(owner[0]) or owner[0] in world.destroyed
        return (TraceRule.VMID_REUSED if gone else TraceRule.VMID_SHARED), f"{words} in the same generation"


class OneVmidPerVm:
    """All vCPUs of a VM run under one VMID, which changes only with a full invalidation, and for all of them."""

    def __init__(self) -> None:
        self._vmid: dict[int, tuple[int, int]] = {}  # root -> (VMID, number of full invalidations at the last entry)

    def see(self, event: Event, world: TraceState) -> Iterator[Finding]:
        if isinstance(event, Created):
            self._vmid.pop(event.root, None)
        if not isinstance(event, Enter):
            return
        value = world.vttbr[event.cpu]
        root, vmid = root_of(value), vmid_of(value)
        before, flushes = self._vmid.get(root, (vmid, world.flushes))
        for cpu, other in world.others_inside(event.cpu, root):
            if vmid_of(other) != vmid:
                yield (
                    TraceRule.VMID_SPLIT,
                    f"{world.name(root)} is entered under VMID {vmid}, and runs under {vmid_of(other)} on CPU {cpu}",
                )
                break
        else:
            if before != vmid and flushes == world.flushes:
                yield (
                    TraceRule.VMID_SPLIT,
                    f"{world.name(root)} is entered under VMID {vmid}, and was under {before} in this generation",
                )
        self._vmid[root] = vmid, world.flushes


class Stale:
    """The root of a destroyed VM is free memory, so VTTBR is not loaded with it again."""

    def see(self, event: Event, world: TraceState) -> Iterator[Finding]:
        if isinstance(event, Vttbr) and (root := root_of(event.value)) in world.destroyed:
            yield TraceRule.STALE_VTTBR, f"VTTBR is loaded with the root of {world.name(root)}"
        if isinstance(event, Enter) and (root := root_of(world.vttbr[event.cpu])) in world.destroyed:
            yield TraceRule.STALE_VTTBR, f"{world.name(root)} is entered"


class LocalFlush:
    """Before another vCPU of a VM enters on a CPU, the VM's translations there are invalidated (the model's VcpuLoads).

    TLBs identify a VM by its VMID, and a local operation applies to the VMID in VTTBR.
    """

    def __init__(self) -> None:
        self._loads: VcpuLoads[tuple[_Life, int]] = VcpuLoads()  #: a VM is its life and VMID
        self._lives: dict[int, int] = defaultdict(int)  #: root -> VMs that have had it

    def see(self, event: Event, world: TraceState) -> Iterator[Finding]:
        match event:
            case Invalidate(cpu=cpu, op=op):
                self._forget(cpu, OPERATIONS[op], world.vttbr[cpu])
            case Created(root=root):
                self._lives[root] += 1
            case Enter(cpu=cpu, vcpu=vcpu):
                vm = self._tag(world.vttbr[cpu])
                last = self._loads.last(vm, cpu)
                if self._loads.load(vm, vcpu, cpu) and last is not None:
                    name = world.name(root_of(world.vttbr[cpu]))
                    yield TraceRule.NO_LOCAL_FLUSH, f"vCPU {vcpu:#x} of {name} is entered where vCPU {last:#x} ran last"

    def _tag(self, vttbr: int) -> tuple[_Life, int]:
        root = root_of(vttbr)
        return (root, self._lives[root]), vmid_of(vttbr)

    def _forget(self, cpu: int, operation: Operation, vttbr: int) -> None:
        if operation.reach in (Reach.ALL_VMS, Reach.VM, Reach.STAGE1):
            vm = None if operation.reach is Reach.ALL_VMS else self._tag(vttbr)
            self._loads.invalidated(vm, None if operation.broadcast else cpu)
