"""Carries steps out on a host, one after the other, and holds the host against the world after each."""

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
    """A step after which the host is not as the models say. ``steps`` are all that led there, it included.

    ``lost`` says why that host takes no other sequence, when it does not.
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
    """The last step, how many there are with it, what was read of the host then, and what it owes."""

    step: Step
    number: int
    capture: Capture
    owed: Owed


class Player:
    """One sequence on one host. :meth:`do` and :meth:`settle` raise SequenceBroken at the first step that goes wrong.

    What was read of the host after a step is judged while the agent is at work on the next one, so the last step of a
    sequence is judged by :meth:`settle`, or by :meth:`finish` with what the kernel said of all. :meth:`end` cleans up;
    after a sequence that did not go wrong, :meth:`begin_anew` is faster than another player.
    """

    def __init__(self, host: Host, oracle: Oracle, isa: str) -> None:
        self._host, self._oracle, self._isa = host, oracle, isa
        self._child: Child | None = None
        self._swap: ExitStack | None = None  # once a step has needed it
        self._unjudged: _Unjudged | None = None
        self._complaints: list[Complaint] = []  # of the step that was judged last
        self._judged = 0  # its number
        self._idle_tracking = "idle-tracking" in host.config.can
        self._vm = self._host.create_vm(isa, vcpus=2)
        self._memory = _memory(self._vm)
        self._hvas = np.arange(PAGES, dtype=np.uint64) * np.uint64(PAGE) + np.uint64(self._memory.hva)
        takes_out = features.has(host, "MADV_PAGEOUT")
        self._ages = self._idle_tracking or (takes_out and host.kernel_version < (6, 9))
        # Without idle tracking pages age by an attempt to page them out, and must not go.
        self._swaps = takes_out and (self._idle_tracking or not self._ages)
        self._furnish(self._new_world())
        self._begin()

    def _new_world(self) -> VmModel:
        return VmModel(self._memory.hva, self._host.kernel_version, self._ages, self._swaps)

    def _furnish(self, world: VmModel) -> None:
        for slot in world.slots:
            self._vm.set_memslot(_numbered(slot))
        self._vm.vcpus[1].pin(self._host.config.board.cpus - 1)  # the other is on the agent's, the first
        self._vm.guest.ping()

    def _begin(self) -> None:
        self.steps: list[Step] = []
        self.broken = True
        self.world = self._new_world()
        self._before, findings = _reading(self._see())
        self._demand(findings + [Complaint(f"IPA {ipa:#x} is mapped at the beginning") for ipa in self._before.leaves])
        self.broken = False

    def begin_anew(self) -> None:
        """Another sequence with the same VM: no child, new memory, and the memslots as they were at first."""
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
        """Give everything back, as far as the host lets."""
        for give_back in (self._end_child, self._end_vm, self._memory.unmap, self._end_swap):
            with suppress(LabError):
                give_back()
        if self.broken:
            with suppress(LabError):
                self._oracle.splats()  # what the kernel says of a broken VM's end is not the next player's

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
        """Carry it out, and judge the step before. Raises SequenceBroken; ValueError: it makes no sense now."""
        if not self.world.allows(step):
            raise ValueError(f"step {len(self.steps) + 1} makes no sense here: {step}")
        self.steps.append(step)
        self.broken = True  # whatever it fails with
        self._vm.agent.meanwhile(self._judge)
        failed, seen, owed = None, None, NOTHING_OWED
        try:
            owed = self._carry_out(step)
            seen = self._see()
        except SequenceBroken as e:
            failed = e
        except (LabError, GuestException, RunFailed) as e:
            failed = self._stopped_by(e)
        self._settle_before(failed)
        self._unjudged = _Unjudged(step, len(self.steps), seen, owed)
        self.broken = False

    def _settle_before(self, failed: SequenceBroken | None) -> None:
        """Judge the step before the last: if that went wrong, whatever the last one met may come from it."""
        try:
            self.settle()
        except SequenceBroken as e:
            e.lost = failed.lost if failed else None
            raise
        if failed:
            raise failed

    def _stopped_by(self, failure: Exception) -> SequenceBroken:
        """The last step was not carried out, or the host did not outlive it, because of this."""
        usable = self._host.machine.alive and self._host.agent.usable
        lost = failure if isinstance(failure, LabError) and not usable else None
        step = self.steps[-1] if self.steps else "before the first step"
        return SequenceBroken(self.steps, [Complaint(f"{step}: {failure}")], lost)

    def finish(self) -> None:
        """Judge the last step, and what the kernel has said of all of them. Raises SequenceBroken."""
        self.settle()
        try:
            said = self._oracle.splats()
        except LabError as e:
            self.broken = True
            raise self._stopped_by(e) from e
        self._demand(_complaints(said))

    def settle(self) -> None:
        """Judge the last step, if it was not judged yet. Raises SequenceBroken."""
        self._judge()
        self._demand(self._complaints, self._judged)

    def _judge(self) -> None:
        """Hold what was read after the last step against the world, which is still as that step left it."""
        if (last := self._unjudged) is not None:
            self._unjudged = None
            after, findings = _reading(last.capture)
            complaints = self.world.complaints(last.step, self._before, after, last.owed)
            self._before, self._complaints, self._judged = after, findings or complaints, last.number

    def _demand(self, complaints: list[Complaint], steps: int | None = None) -> None:
        """After so many steps (all) there is nothing to complain of. Raises SequenceBroken."""
        if complaints:
            self.broken = True
            raise SequenceBroken(self.steps[:steps], complaints)

    def _carry_out(self, step: Step) -> Owed:
        """What a memslot operation or its dirty log owes."""
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
        """A store was carried out, or a load found ``got``."""
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

    # -- looking -------------------------------------------------------------------------------------------------

    def _see(self) -> Capture:
        """The host as it stands: the VM's tables, and the frame of each page."""
        return self._oracle.look(self._vm, hvas=self._hvas)


def _reading(capture: Capture) -> tuple[Look, list[Complaint]]:
    """What the world is held against; and what safety says of it."""
    ((stage2, findings),) = capture.judged()
    leaves = leaves_of(stage2)
    watched = {ipa: leaf for ipa, leaf in leaves.items() if _watched(ipa)}
    return Look(watched, stage2.spare_tables, capture.frames), _complaints(findings)


def _complaints(findings: Iterable[Finding]) -> list[Complaint]:
    return [Complaint(str(finding), finding.verdict) for finding in findings]


def _watched(ipa: int) -> bool:
    return any(start <= ipa < start + SIZE for places in PLACES.values() for start in places)


def _numbered(slot: Memslot) -> Memslot:
    """As the VM has it, whose memslots 0 and 1 are the payload's."""
    return replace(slot, slot=slot.slot + 1)


def _memory(vm: Vm) -> Memory:
    """The pages, half of them on each side of a boundary of 2 MiB; nothing is mapped beside them. Outlives the VM."""
    area = vm.memory(2 * BLOCK, align=BLOCK)
    vm.memories.remove(area)
    start = BLOCK - SIZE // 2
    area.unmap(0, start)
    area.unmap(start + SIZE)
    return area.part(start, SIZE)


def _hex(addresses: list[int]) -> str:
    return " ".join(map(hex, addresses)) or "nothing"


def play(host: Host, oracle: Oracle, isa: str, steps: Iterable[Step]) -> Iterator[Step]:
    """A whole sequence, each step as it was done; what this kernel cannot do is left out. Raises SequenceBroken."""
    player = Player(host, oracle, isa)
    try:
        for step in steps:
            if player.world.can(step.kind):
                player.do(step)
                yield step
        player.finish()
    finally:
        player.end()
