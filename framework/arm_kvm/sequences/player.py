"""Carries steps out on a host, one after the other, and compares the host with the model after each."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from arm_kvm.guest.driver import RunFailed
from arm_kvm.guest.isa import GuestException
from arm_kvm.host import facilities, features
from arm_kvm.host.host import Host
from arm_kvm.model.kvm.memslots import NOTHING_OWED, Memslot, Owed
from arm_kvm.oracle.oracle import Capture, Oracle
from arm_kvm.oracle.verdicts import Finding
from arm_kvm.oracle.witness import leaves_of
from arm_kvm.sequences.steps import PAGES, Step, StepKind
from arm_kvm.sequences.world import GIVES_MEMSLOT, PAGE, PLACES, SIZE, Answer, Complaint, Look, VmModel
from arm_kvm.support.errors import LabError
from arm_kvm.support.judged import Judged
from arm_kvm.vmm.client import Request, op, request
from arm_kvm.vmm.memory import BLOCK, Advice, Child, Memory, Prot
from arm_kvm.vmm.vm import Vm


class SequenceBroken(AssertionError, Judged):
    """The host differs from the models. ``steps`` ends with the step after which it does.

    ``lost`` is set if no other sequence can be played on that host, and says why.
    """

    def __init__(self, steps: list[Step], complaints: list[Complaint], lost: LabError | None = None) -> None:
        self.steps = list(steps)
        self.complaints = complaints
        self.verdicts = frozenset(complaint.verdict for complaint in complaints if complaint.verdict)
        self.lost = lost
        lines = [f"after step {len(steps)}:", *(f"    {complaint}" for complaint in complaints), "the sequence:"]
        super().__init__("\n".join([*lines, *(f"    {step}" for step in steps)]))


@dataclass(frozen=True)
class _Unjudged:
    """A step that was carried out and not judged yet."""

    step: Step
    number: int  #: of the step, from 1
    capture: Capture  #: of the host after the step
    owed: Owed  #: what the step requires of stage 2


class Player:
    """Plays a sequence on a host. :meth:`do` and :meth:`settle` raise SequenceBroken at the first step that goes wrong.

    A step is judged while the agent works on the next one, so the last step of a sequence is judged by :meth:`settle`,
    or by :meth:`finish`, which also judges the kernel's log. :meth:`end` cleans up; after a sequence that did not go
    wrong, :meth:`begin_anew` is faster than another player.
    """

    def __init__(self, host: Host, oracle: Oracle, isa: str) -> None:
        self._host, self._oracle, self._isa = host, oracle, isa
        self._child: Child | None = None
        self._swap: ExitStack | None = None  # set by the first step that needs swap
        self._unjudged: _Unjudged | None = None
        self._complaints: list[Complaint] = []  # about the step that was judged last
        self._judged = 0  # the number of that step
        self._idle_tracking = "idle-tracking" in host.config.can
        self._vm = self._host.create_vm(isa, vcpus=2)
        self._memory = _memory(self._vm)
        self._hvas = np.arange(PAGES, dtype=np.uint64) * np.uint64(PAGE) + np.uint64(self._memory.hva)
        pages_out = features.has(host, "MADV_PAGEOUT")
        self._ages = self._idle_tracking or (pages_out and host.kernel_version < (6, 9))
        # Without idle tracking pages are aged by an attempt to page them out, which must not succeed: no swap then.
        self._swaps = pages_out and (self._idle_tracking or not self._ages)
        self._furnish(self._new_world())
        self._begin()

    def _new_world(self) -> VmModel:
        return VmModel(self._memory.hva, self._host.kernel_version, self._ages, self._swaps)

    def _furnish(self, world: VmModel) -> None:
        for slot in world.slots:
            self._vm.set_memslot(_numbered(slot))
        self._vm.vcpus[1].pin(self._host.config.board.cpus - 1)  # vCPU 0 shares the first CPU with the agent
        self._vm.guest.ping()

    def _begin(self) -> None:
        self.steps: list[Step] = []
        self.broken = True
        self.world = self._new_world()
        self._before, findings = _reading(self._see())
        self._demand(findings + [Complaint(f"IPA {ipa:#x} is mapped at the beginning") for ipa in self._before.leaves])
        self.broken = False

    def begin_anew(self) -> None:
        """Begin another sequence with the same VM: no child, new memory, the memslots as at first."""
        self._end_child()
        requests: list[Request[Any]] = [request(op.memory_map, at=self._memory.hva, size=SIZE)]
        for wanted in map(_numbered, self._new_world().slots):
            found = self._vm.slots.get(wanted.slot)
            if found not in (wanted, None):
                requests.append(self._vm.record_memslot(replace(found, size=0)))
            if found != wanted:
                requests.append(self._vm.record_memslot(wanted))
        self._vm.agent.batch(requests)
        self._vm.exits.clear()
        self._begin()

    def _end_child(self) -> None:
        if self._child:
            self._child.end()
        self._child = None

    def end(self) -> None:
        """Release everything, as far as the host still works."""
        for give_back in (self._end_child, self._end_vm, self._memory.unmap, self._end_swap):
            with suppress(LabError):
                give_back()
        if self.broken:
            with suppress(LabError):
                self._oracle.splats()  # discard what the kernel logs as it destroys a broken VM

    def _end_vm(self) -> None:
        self._vm.destroy()
        if self._vm in self._host.vms:
            self._host.vms.remove(self._vm)

    def _end_swap(self) -> None:
        if self._swap:
            self._swap.close()
        self._swap = None

    # -- one step ------------------------------------------------------------------------------------------------

    def do(self, step: Step) -> None:
        """Carry the step out, and judge the one before. Raises SequenceBroken, or ValueError if it makes no sense."""
        if not self.world.allows(step):
            raise ValueError(f"step {len(self.steps) + 1} makes no sense here: {step}")
        self.steps.append(step)
        self.broken = True  # if anything is raised from here on
        self._vm.agent.meanwhile(self._judge)
        failed: SequenceBroken | None = None
        done: _Unjudged | None = None
        try:
            owed = self._carry_out(step)
            done = _Unjudged(step, len(self.steps), self._see(), owed)
        except SequenceBroken as e:
            failed = e
        except (LabError, GuestException, RunFailed) as e:
            failed = self._stopped_by(e)
        self._settle_before(failed)
        self._unjudged = done
        self.broken = False

    def _settle_before(self, failed: SequenceBroken | None) -> None:
        """Judge the step before the last: if it went wrong, how the last one failed may be a consequence."""
        try:
            self.settle()
        except SequenceBroken as e:
            e.lost = failed.lost if failed else None
            raise
        if failed:
            raise failed

    def _stopped_by(self, failure: Exception) -> SequenceBroken:
        """Make the failure for a step that could not be carried out, or that the host did not survive."""
        usable = self._host.machine.alive and self._host.agent.usable
        lost = failure if isinstance(failure, LabError) and not usable else None
        step = self.steps[-1] if self.steps else "before the first step"
        return SequenceBroken(self.steps, [Complaint(f"{step}: {failure}")], lost)

    def finish(self) -> None:
        """Judge the last step, and what the kernel has logged during all. Raises SequenceBroken."""
        self.settle()
        try:
            said = self._oracle.splats()
        except LabError as e:
            self.broken = True
            raise self._stopped_by(e) from e
        self._demand(_complaints(said))

    def settle(self) -> None:
        """Judge the last step unless it is judged already. Raises SequenceBroken."""
        self._judge()
        self._demand(self._complaints, self._judged)

    def _judge(self) -> None:
        """Compare what was read after the last step with the model, which is still in the state after that step."""
        if (last := self._unjudged) is not None:
            self._unjudged = None
            after, findings = _reading(last.capture)
            complaints = self.world.complaints(last.step, self._before, after, last.owed)
            self._before, self._complaints, self._judged = after, findings or complaints, last.number

    def _demand(self, complaints: list[Complaint], steps: int | None = None) -> None:
        """Raise SequenceBroken if there are complaints, with the first ``steps`` steps (None: all)."""
        if complaints:
            self.broken = True
            raise SequenceBroken(self.steps[:steps], complaints)

    def _carry_out(self, step: Step) -> Owed:
        """Carry a step out, and return what a change of a memslot or its dirty log requires of stage 2."""
        match step.kind:
            case StepKind.GUEST_READS | StepKind.GUEST_WRITES:
                self._guest(step)
            case StepKind.HOST_READS | StepKind.HOST_WRITES:
                self._touch(step)
            case kind if kind in (StepKind.SLOT_DELETE, *GIVES_MEMSLOT):
                wanted = self.world.wanted(step)
                self._vm.set_memslot(_numbered(wanted))
                return self.world.set(wanted)
            case StepKind.DIRTY_LOG:
                return self._dirty_log(step)
            case StepKind.NEW_VM:
                self._new_vm()
                return Owed(must_go=tuple((ipa, SIZE) for places in PLACES.values() for ipa in places))
            case _:
                self._host_operation(step)
        return NOTHING_OWED

    def _guest(self, step: Step) -> None:
        guest, ipa = self._vm.guests[step.vcpu], self.world.ipa(step)
        value, exits = self.world.value_for(step), len(self._vm.exits)
        answer, got = Answer.DONE, 0
        try:
            if step.kind is StepKind.GUEST_WRITES:
                guest.write(ipa, value)
            else:
                got = guest.read(ipa)
        except RunFailed as e:
            if e.errno != errno.EFAULT:
                raise
            answer = Answer.EFAULT
        if len(self._vm.exits) > exits:
            answer = Answer.MMIO
        expected = self.world.answer(step)
        if answer is not expected:
            self._demand([Complaint(f"{step}: {answer.value}, where {expected.value} was due")])
        if answer is Answer.DONE:
            self._saw(step, value, got)

    def _touch(self, step: Step) -> None:
        value, got, offset = self.world.value_for(step), 0, step.page * PAGE
        if step.kind is StepKind.HOST_WRITES:
            self._memory.write(offset, value.to_bytes(4, "little"))
        else:
            got = int.from_bytes(self._memory.read(offset, 4), "little")
        self._saw(step, value, got)

    def _saw(self, step: Step, value: int, got: int) -> None:
        """Record a store of ``value``, or check that a load may have returned ``got``."""
        if step.kind in (StepKind.GUEST_WRITES, StepKind.HOST_WRITES):
            self.world.stored(step, value)
        elif got not in (may := self.world.content[step.page]):
            stored = " or ".join(map(hex, sorted(may)))
            self._demand([Complaint(f"page {step.page} reads {got:#x}, where {stored} was stored")])

    def _host_operation(self, step: Step) -> None:
        memory, (offset, size) = self._memory, (step.page * PAGE, (step.last + 1 - step.page) * PAGE)
        match step.kind:
            case StepKind.DONTNEED:
                memory.advise(Advice.DONTNEED, offset, size)
            case StepKind.FREE:
                memory.advise(Advice.FREE, offset, size)
            case StepKind.REPLACE:
                memory.replace(offset, size)
            case StepKind.MUNMAP:
                memory.unmap(offset, size)
            case StepKind.MREMAP:
                memory.part(offset, PAGE).move(memory.part(step.to * PAGE, PAGE))
            case StepKind.PROTECT_NONE:
                memory.protect(Prot.NONE, offset, size)
            case StepKind.PROTECT_READ:
                memory.protect(Prot.READ, offset, size)
            case StepKind.PROTECT_WRITE:
                memory.protect(Prot.READ_WRITE, offset, size)
            case StepKind.FORK:
                self._child = Child(self._vm.agent)
            case StepKind.CHILD_WRITES:
                assert self._child is not None, "VmModel.allows() wants a child for it"
                self._child.write(memory, offset, b"the child's own")
            case StepKind.CHILD_EXITS:
                self._end_child()
            case StepKind.AGE:
                self._age(offset, size)
            case StepKind.PAGE_OUT:
                self._page_out(offset, size)
        self.world.host_did(step)

    def _age(self, offset: int, size: int) -> None:
        if self._idle_tracking:
            self._memory.mark_idle(offset, size)
            return
        self._vm.agent(op.memory_drain)
        self._memory.advise(Advice.PAGEOUT, offset, size)

    def _page_out(self, offset: int, size: int) -> None:
        if self._swap is None:
            with ExitStack() as swap:
                swap.enter_context(facilities.swap(self._host))
                self._swap = swap.pop_all()
        self._vm.agent(op.memory_drain)
        self._memory.page_out(offset, size)

    def _dirty_log(self, step: Step) -> Owed:
        ipa = self.world.ipa(step)
        found = self._vm.dirty_pages(ipa)
        pages, owed = self.world.slots.take_dirty_log(step.slot)
        expected = [ipa + page * PAGE for page in pages]
        if found != expected:
            self._demand([Complaint(f"the dirty log says {_hex(found)}, guests have written {_hex(expected)}")])
        return owed

    def _new_vm(self) -> None:
        self._vm.destroy()
        self._host.vms.remove(self._vm)
        self._vm = self._host.create_vm(self._isa, vcpus=2)
        self.world.new_vm()
        self._furnish(self.world)

    def _see(self) -> Capture:
        """Read the VM's tables and the frame of each page."""
        return self._oracle.look(self._vm, hvas=self._hvas)


def _reading(capture: Capture) -> tuple[Look, list[Complaint]]:
    """Split a capture into what the model is compared with, and the findings of the safety checks."""
    ((stage2, findings),) = capture.judged()
    leaves = leaves_of(stage2)
    watched = {ipa: leaf for ipa, leaf in leaves.items() if _watched(ipa)}
    return Look(watched, stage2.spare_tables, capture.frames), _complaints(findings)


def _complaints(findings: Iterable[Finding]) -> list[Complaint]:
    return [Complaint(str(finding), finding.verdict) for finding in findings]


def _watched(ipa: int) -> bool:
    return any(start <= ipa < start + SIZE for places in PLACES.values() for start in places)


def _numbered(slot: Memslot) -> Memslot:
    """Renumber a memslot of the model for the VM, where memslots 0 and 1 are the payload's."""
    return replace(slot, slot=slot.slot + 1)


def _memory(vm: Vm) -> Memory:
    """Map the pages, half of them on each side of a 2 MiB boundary, with nothing next to them. They outlive the VM."""
    area = vm.memory(2 * BLOCK, align=BLOCK)
    vm.memories.remove(area)
    start = BLOCK - SIZE // 2
    area.unmap(0, start)
    area.unmap(start + SIZE)
    return area.part(start, SIZE)


def _hex(addresses: list[int]) -> str:
    return " ".join(map(hex, addresses)) or "nothing"


def play(host: Host, oracle: Oracle, isa: str, steps: Iterable[Step]) -> Iterator[Step]:
    """Play a whole sequence, yielding each step once it is done. Skips steps that this kernel cannot do.

    Raises SequenceBroken.
    """
    player = Player(host, oracle, isa)
    try:
        for step in steps:
            if player.world.can(step.kind):
                player.do(step)
                yield step
        player.finish()
    finally:
        player.end()
