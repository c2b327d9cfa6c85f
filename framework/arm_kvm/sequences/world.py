"""What must hold after each step: the state that the models predict for the VM, its memory and its memslots. Pure.

The frames behind the pages are not predicted but observed: whether a store after fork copies a page depends on page
references that cannot be observed. Everything else follows from the models of memslots and MMU notifiers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum

from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch.granule import KIB4
from arm_kvm.model.kvm import notifier
from arm_kvm.model.kvm.memslots import NOTHING_OWED, Memslot, Memslots, Owed, SlotFlags
from arm_kvm.model.kvm.notifier import Kernel, Leaves, Notice, Operation
from arm_kvm.oracle.verdicts import Verdict
from arm_kvm.sequences.steps import PAGES, SLOTS, Step, StepKind

PAGE = KIB4.size
SIZE = PAGES * PAGE  #: bytes of the memory
_ACROSS = SIZE // 2  #: how far before a boundary the memory begins where it straddles one, bytes
#: The IPAs of each memslot, at first and after it has moved: across two level 3 tables or within one, and across two
#: level 2 tables.
PLACES = dict(zip(SLOTS, ((0x8020_0000 - _ACROSS, 0xA000_0000), (0x9000_0000, 0xC000_0000 - _ACROSS)), strict=True))
ZERO = 0  #: what a page holds that was never written


class Answer(Enum):
    """How a guest's access can end."""

    DONE = "it is carried out"
    MMIO = "an MMIO exit"
    EFAULT = "KVM_RUN answers EFAULT"


class Rights(Enum):
    """What the VMM's own mapping of a page permits."""

    NONE = "none"
    READ = "read"
    WRITE = "read and write"
    HOLE = "there is no mapping"


@dataclass(frozen=True)
class Look:
    """The host at one moment: what stage 2 maps of the memslots, and the frame of each page."""

    leaves: Leaves
    spare_tables: int  #: table pages that map nothing
    frames: tuple[int, ...]  #: physical address of each page; 0: none


@dataclass(frozen=True)
class Complaint:
    """Something wrong after a step: a description, and the verdict if there is one."""

    words: str
    verdict: Verdict | None = None

    def __str__(self) -> str:
        return self.words


@dataclass
class VmModel:
    """The model of one VM: two memslots that map the same 16 pages at ``hva``."""

    hva: int
    kernel: Kernel
    ages: bool = True  #: whether the host can be made to age pages
    swaps: bool = True  #: whether the host can be made to swap out pages
    rights: list[Rights] = field(default_factory=lambda: [Rights.WRITE] * PAGES)
    #: What each page may hold: one value, or two after MADV_FREE.
    content: list[set[int]] = field(default_factory=lambda: [{ZERO} for _ in range(PAGES)])
    freed: set[int] = field(default_factory=set)  #: pages given to MADV_FREE, whether or not they were reclaimed
    child: list[Rights] | None = None  #: what a forked child may do: the VMM's rights at the time of the fork
    written: int = 0  #: stores so far; each stores a different value

    def __post_init__(self) -> None:
        self.new_vm()

    def new_vm(self) -> None:
        """Start over with a VM that has not run and has both memslots at their first IPAs."""
        self.slots = Memslots(ipa_bits=40)
        self.starts = {number: places[0] for number, places in PLACES.items()}
        for number in SLOTS:
            self.slots.set(self._slot(number))

    def _slot(self, number: int) -> Memslot:
        return Memslot(number, self.starts[number], SIZE, self.hva)

    def _present(self, step: Step) -> Memslot | None:
        """The step's memslot; None if it is deleted."""
        return self.slots.at(self.starts[step.slot])

    def ipa(self, step: Step) -> int:
        """The IPA of the step's page in the step's memslot, whether or not that is deleted."""
        return self.starts[step.slot] + step.page * PAGE

    def wanted(self, step: Step) -> Memslot:
        """The memslot as the step sets it; of size 0 if the step deletes it."""
        slot = self._present(step) or self._slot(step.slot)
        match step.kind:
            case StepKind.SLOT_DELETE:
                return replace(slot, size=0)
            case StepKind.SLOT_READONLY:
                return slot.with_flags(SlotFlags.READONLY)
            case StepKind.SLOT_MOVE:
                first, second = PLACES[step.slot]
                return replace(slot, ipa=second if slot.ipa == first else first)
            case StepKind.LOG_ON:
                return slot.with_flags(slot.flags | SlotFlags.LOG_DIRTY_PAGES)
            case StepKind.LOG_OFF:
                return slot.with_flags(slot.flags & ~SlotFlags.LOG_DIRTY_PAGES)
        return slot

    def _asked(self, step: Step) -> list[Memslot]:
        """The memslots that the step asks KVM to create or to change."""
        if step.kind is StepKind.NEW_VM:
            return [self._slot(number) for number in SLOTS]
        return [self.wanted(step)] if step.kind in GIVES_MEMSLOT else []

    def set(self, slot: Memslot) -> Owed:
        """Record that KVM has accepted this memslot, and return what stage 2 owes for it."""
        self.starts[slot.slot] = slot.ipa
        return self.slots.set(slot)

    # -- which steps make sense ------------------------------------------------------------------------------------

    def can(self, kind: StepKind) -> bool:
        """Whether this host can do that. Some kernels cannot age pages, or only by paging them out."""
        return {StepKind.AGE: self.ages, StepKind.PAGE_OUT: self.swaps}.get(kind, True)

    def allows(self, step: Step) -> bool:
        """Whether the step can be carried out now."""
        if not self.can(step.kind):
            return False
        slot = self._present(step)
        if any(not asked.readonly for asked in self._asked(step)) and not {*self.rights} <= _WRITABLE:
            return False
        if step.kind in _NEED_MAPPED and Rights.HOLE in self.rights[step.page : step.last + 1]:
            return False
        match step.kind:
            case StepKind.HOST_WRITES:
                return self.rights[step.page] is Rights.WRITE
            case StepKind.HOST_READS:
                return self.rights[step.page] in (Rights.READ, Rights.WRITE)
            case StepKind.MREMAP:
                return step.page != step.to and self.rights[step.page] is not Rights.HOLE
            case StepKind.CHILD_WRITES:
                return self.child is not None and self.child[step.page] is Rights.WRITE
            case StepKind.CHILD_EXITS:
                return self.child is not None
            case StepKind.FORK:
                return self.child is None
            case StepKind.SLOT_CREATE | StepKind.SLOT_READONLY:
                return slot is None
            case StepKind.SLOT_DELETE | StepKind.SLOT_MOVE:
                return slot is not None
            case StepKind.LOG_ON:
                return slot is not None and not slot.logging
            case StepKind.LOG_OFF | StepKind.DIRTY_LOG:
                return slot is not None and slot.logging
            case StepKind.NEW_VM:  # the memory of the new VM's payload might be mapped into a hole
                return Rights.HOLE not in self.rights
        return True

    def value_for(self, step: Step) -> int:
        """The value that a store of this step stores."""
        return (self.written + 1) << 8 | step.page | 0x4000_0000

    # -- guests ------------------------------------------------------------------------------------------------------

    def answer(self, step: Step) -> Answer:
        """How a guest's access must end."""
        slot = self._present(step)
        if slot is None or (slot.readonly and step.kind is StepKind.GUEST_WRITES):
            return Answer.MMIO
        needed = {Rights.WRITE} if step.kind is StepKind.GUEST_WRITES else {Rights.READ, Rights.WRITE}
        return Answer.DONE if self.rights[step.page] in needed else Answer.EFAULT

    def stored(self, step: Step, value: int) -> None:
        """Record a store by guest or host."""
        self.written += 1
        self.content[step.page] = {value}
        if step.kind is StepKind.GUEST_WRITES:
            self.slots.written(self.ipa(step))

    # -- what the host owes --------------------------------------------------------------------------------------

    def pages(self, step: Step) -> range:
        return range(step.page, step.last + 1)

    def host_did(self, step: Step) -> None:
        """Record a memory operation of the host."""
        match step.kind:
            case StepKind.DONTNEED | StepKind.REPLACE:
                self.freed -= {*self.pages(step)}
                for page in self.pages(step):
                    self.content[page] = {ZERO}
                    if step.kind is StepKind.REPLACE:
                        self.rights[page] = Rights.WRITE
            case StepKind.MUNMAP:
                for page in self.pages(step):
                    self.rights[page] = Rights.HOLE
            case StepKind.MREMAP:
                self.content[step.to], self.rights[step.to] = self.content[step.page], self.rights[step.page]
                self.rights[step.page] = Rights.HOLE
                self.freed = self.freed - {step.page, step.to} | ({step.to} if step.page in self.freed else set())
            case StepKind.FREE:
                self.freed |= {*self.pages(step)}
                for page in self.pages(step):
                    self.content[page] |= {ZERO}
            case StepKind.PROTECT_NONE | StepKind.PROTECT_READ | StepKind.PROTECT_WRITE:
                for page in self.pages(step):
                    self.rights[page] = _RIGHTS[step.kind]
            case StepKind.FORK:
                self.child = list(self.rights)
            case StepKind.CHILD_EXITS:
                self.child = None

    def notices(self, step: Step, before: Look, after: Look) -> list[list[Notice]]:
        """The notifier calls that stage 2 may owe the step: it must conform to one of these lists."""
        match step.kind:
            case StepKind.FORK:
                return [[self._notice(Operation.FORK, 0, PAGES - 1)]]
            case StepKind.MREMAP:
                return [[self._notice(Operation.MREMAP, step.page), self._notice(Operation.MUNMAP, step.to)]]
            case StepKind.AGE | StepKind.PAGE_OUT:
                return [self._aged_or_out(step, before, after)]
            case StepKind.GUEST_READS | StepKind.GUEST_WRITES | StepKind.HOST_READS | StepKind.HOST_WRITES:
                became = self._what_became(before.frames[step.page], after.frames[step.page])
                return [[self._notice(operation, step.page)] for operation in became]
        if step.kind in _OPERATIONS:
            return [[self._notice(_OPERATIONS[step.kind], step.page, step.last)]]
        return [[]]

    def _what_became(self, before: int, after: int) -> list[Operation]:
        """Tell from the frames which operations an access may have been: a first page, the same page, or a copy."""
        if before:
            return [Operation.COW_REUSE if before == after else Operation.COW_COPY]
        # A page that a child shares may be copied as soon as it is swapped in.
        return [Operation.SWAP_IN, *([Operation.COW_COPY] if self.child else [])]

    def _aged_or_out(self, step: Step, before: Look, after: Look) -> list[Notice]:
        """Pages are aged, or reclaimed. Ageing by way of reclaim takes pages that MADV_FREE has given up."""
        notices = [self._notice(Operation.AGE, step.page, step.last)]
        for page in self.pages(step):
            out = before.frames[page] and not after.frames[page]
            if page in self.freed:
                operation = Operation.FREE_RECLAIMED if out else Operation.RECLAIM_GIVEN_UP
                notices.append(self._notice(operation, page))
            elif out and step.kind is StepKind.PAGE_OUT:
                notices.append(self._notice(Operation.SWAP_OUT, page))
        return notices

    def _notice(self, operation: Operation, page: int, last: int = 0) -> Notice:
        start, end = (self.hva + n * PAGE for n in (page, max(page, last) + 1))
        return Notice(operation, start, end, (self.hva, self.hva + SIZE), self.kernel)

    # -- the verdict ----------------------------------------------------------------------------------------------

    def complaints(self, step: Step, before: Look, after: Look, owed: Owed = NOTHING_OWED) -> list[Complaint]:
        """List all that is wrong with stage 2 after this step.

        ``owed`` is what the change of a memslot, or reading its dirty log, requires of stage 2.
        """
        own = self.ipa(step)
        tried = step.kind in (StepKind.GUEST_READS, StepKind.GUEST_WRITES)
        accessed = tried and self.answer(step) is Answer.DONE
        gone = _pages_in(owed.must_go)
        was = {ipa: leaf for ipa, leaf in before.leaves.items() if ipa not in gone}
        now = {ipa: leaf for ipa, leaf in after.leaves.items() if ipa not in gone}
        out = [Complaint(f"IPA {ipa:#x} is still mapped") for ipa in after.leaves if ipa in gone]
        if accessed:
            out += self._accessed(step, own, now.pop(own, None))
            was.pop(own, None)
        elif tried and _young(was.get(own)) == now.get(own):
            was.pop(own, None), now.pop(own, None)  # KVM has served an access flag fault before the fault it refuses
        was = _protected(was, _pages_in(owed.must_be_read_only))
        found = [notifier.violations(notices, self.slots, was, now) for notices in self.notices(step, before, after)]
        broken = min(found, key=len)
        out += [_complaint(breach) for breach in broken if not (accessed and breach.ipa == own)]
        if after.spare_tables:
            out.append(Complaint(f"{after.spare_tables} table pages map nothing"))
        return out + self._aged(step, after)

    def _accessed(self, step: Step, ipa: int, leaf: tuple[int, int] | None) -> list[Complaint]:
        """Check the page that a guest has just accessed."""
        if leaf is None:
            return [Complaint(f"IPA {ipa:#x} is not mapped after the guest's access")]
        if not d.AF.of(leaf[1]):
            return [Complaint(f"IPA {ipa:#x} is not young after the guest's access")]
        if step.kind is StepKind.GUEST_WRITES and not d.s2_writable(leaf[1]):
            return [Complaint(f"IPA {ipa:#x} is not writable after the guest's store")]
        return []

    def _aged(self, step: Step, after: Look) -> list[Complaint]:
        """Check that ageing has cleared the access flags in stage 2. While a child exists, the host may skip pages."""
        if step.kind is not StepKind.AGE or self.child:
            return []
        # The zero page does not age, and the host skips pages that the VMM may not access.
        pages = [p for p in self.pages(step) if self.rights[p] is Rights.WRITE and ZERO not in self.content[p]]
        aged = {start + page * PAGE for start in self.starts.values() for page in pages}
        young = [ipa for ipa in sorted(aged & after.leaves.keys()) if d.AF.of(after.leaves[ipa][1])]
        return [Complaint(f"IPA {ipa:#x} is still young") for ipa in young]


#: Steps that create or change a memslot.
GIVES_MEMSLOT = (StepKind.SLOT_CREATE, StepKind.SLOT_READONLY, StepKind.SLOT_MOVE, StepKind.LOG_ON, StepKind.LOG_OFF)
#: The rights that a memslot's pages must have unless it is read-only; else EPERM (5.4 kvm_arch_prepare_memory_region).
_WRITABLE = {Rights.WRITE, Rights.HOLE}
#: Steps that fail with ENOMEM, half done, if the range has a hole.
_NEED_MAPPED = (
    StepKind.DONTNEED,
    StepKind.FREE,
    StepKind.PROTECT_NONE,
    StepKind.PROTECT_READ,
    StepKind.PROTECT_WRITE,
    StepKind.AGE,
    StepKind.PAGE_OUT,
)
_RIGHTS = {StepKind.PROTECT_NONE: Rights.NONE, StepKind.PROTECT_READ: Rights.READ, StepKind.PROTECT_WRITE: Rights.WRITE}
_OPERATIONS = {
    StepKind.DONTNEED: Operation.DONTNEED,
    StepKind.FREE: Operation.FREE,
    StepKind.REPLACE: Operation.MUNMAP,
    StepKind.MUNMAP: Operation.MUNMAP,
    StepKind.PROTECT_NONE: Operation.MPROTECT_NONE,
    StepKind.PROTECT_READ: Operation.MPROTECT_READ,
    StepKind.PROTECT_WRITE: Operation.MPROTECT_WIDER,
    StepKind.CHILD_WRITES: Operation.CHILD_WRITE,
}


def _complaint(breach: notifier.Breach) -> Complaint:
    return Complaint(f"IPA {breach.ipa:#x}: {breach.kind.value}", Verdict.of(breach.kind))


def _pages_in(ranges: Iterable[tuple[int, int]]) -> set[int]:
    """The IPA of every page in these ranges ``(ipa, size in bytes)``."""
    return {ipa for start, size in ranges for ipa in range(start, start + size, PAGE)}


def _protected(leaves: Leaves, pages: set[int]) -> Leaves:
    """Clear the write permission of those leaves that must have lost it."""
    unwritable = ~d.S2AP.put(d.Grant.WRITE)
    return {ipa: (level, desc & unwritable if ipa in pages else desc) for ipa, (level, desc) in leaves.items()}


def _young(leaf: tuple[int, int] | None) -> tuple[int, int] | None:
    return leaf and (leaf[0], leaf[1] | d.AF.mask)
