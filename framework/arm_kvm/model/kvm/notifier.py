"""What each operation of the host's memory management requires of stage 2.

Guest memory is ordinary process memory. Before the host changes a mapping, its MMU notifiers call KVM
(invalidate_range_start), and from then on stage 2 may map no more of the notified range than the duty below allows. KVM
on Arm unmaps the range on every notification (no version from 5.4 to 6.12 looks at ``range->event``), which is more
than required; how much more it may unmap is bounded, too: see :meth:`Notice.may_go`.

Sources, read in Linux 5.4, 6.1 and 6.12: mm/madvise.c, mm/memory.c (zap_page_range, wp_page_copy, copy_page_range),
mm/mprotect.c, mm/mremap.c, mm/ksm.c, mm/huge_memory.c, mm/khugepaged.c, mm/migrate.c, mm/rmap.c, mm/shmem.c;
virt/kvm/kvm_main.c; virt/kvm/arm/mmu.c (5.4), arch/arm64/kvm/mmu.c and hyp/pgtable.c (6.1, 6.12).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch.granule import KIB4, LAST_LEVEL
from arm_kvm.model.kvm.memslots import Memslot

_PAGE = KIB4.size
_HUGE = 1 << KIB4.level_shift(2)

Kernel = tuple[int, int]
CHANGE_PTE_GONE: Kernel = (6, 10)  #: the first kernel without that notifier
Span = tuple[int, int]  #: ``[start, end)``, bytes
Leaves = dict[int, tuple[int, int]]  #: IPA -> (level, descriptor), of every valid block and page


class Duty(Enum):
    """The minimum that stage 2 must do in the range of an operation."""

    GO = "must go"  #: no leaf of the old frame remains
    READ_ONLY = "must go or become read-only"
    STAY = "may stay"  #: frame and permission are unchanged


class Notified(Enum):
    """The range for which the notifiers are called."""

    RANGE = "the range"
    HUGE = "the aligned 2 MiB around it"
    VMA = "the whole VMA"
    AGED = "the range, to clear its access flags"  #: clear_young, clear_flush_young
    NONE = "none"


class Call(Enum):
    """A call of KVM by the notifiers. The value is its trace event (trace system ``kvm``)."""

    UNMAP = "kvm_unmap_hva_range"  #: invalidate_range_start
    SET = "kvm_set_spte_hva"  #: change_pte
    AGE = "kvm_age_hva"  #: clear_young, clear_flush_young
    TEST = "kvm_test_age_hva"  #: test_young


class Operation(Enum):
    """An operation of the host on guest memory."""

    DONTNEED = "madvise(MADV_DONTNEED)"
    FREE = "madvise(MADV_FREE), the call"
    FREE_RECLAIMED = "reclaim of a page after MADV_FREE"
    RECLAIM_GIVEN_UP = "the same for a page that was written since, and is kept"
    MUNMAP = "munmap, without deleting the memslot"
    MREMAP = "mremap, in the old range"
    MPROTECT_READ = "mprotect(PROT_READ)"
    MPROTECT_NONE = "mprotect(PROT_NONE)"
    MPROTECT_WIDER = "mprotect back to read and write"
    FORK = "fork, private memory, in the parent"
    FORK_SHARED = "fork, shared memory"
    COW_COPY = "a write by parent or guest after fork, copied"
    COW_COPY_HUGE = "the same for a shared huge page, copied as a whole (up to 5.7)"
    COW_REUSE = "a write after fork, or to a merged page, by its only owner: the page is kept"
    ZERO_WRITE = "the first write over the zero page"
    CHILD_WRITE = "a write by the child"
    KSM_PROTECT = "KSM, write protection of a candidate"
    KSM_MERGE = "KSM, merge"
    KSM_UNSHARE = "a write to a merged page"
    THP_SPLIT = "split of an anonymous huge page's mapping"
    THP_SPLIT_FILE = "split of a file's huge page's mapping"
    THP_SPLIT_PAGE = "split of a huge page itself"
    THP_COLLAPSE = "khugepaged, collapse"
    MIGRATE = "migration, compaction"
    SWAP_OUT = "swap out"
    FILE_OUT = "reclaim of a file's page"
    WRITE_BACK = "write-back of a file's dirty page"
    SWAP_IN = "swap in, or the first touch by the host"
    PUNCH_HOLE = "fallocate(FALLOC_FL_PUNCH_HOLE)"
    TRUNCATE = "ftruncate to a smaller size"
    POISON = "memory failure"
    UFFD_PROTECT = "userfaultfd, write protection"
    AGE = "page_referenced, idle page tracking"


@dataclass(frozen=True)
class Rule:
    """One line of the table: the duty, the notified range, and whether change_pte follows."""

    duty: Duty
    notified: Notified
    change_pte: bool = False  #: up to 6.9 KVM then maps the new frame read-only if a level 3 table is left


_O, _GO, _RO, _STAY = Operation, Duty.GO, Duty.READ_ONLY, Duty.STAY

RULES: dict[Operation, Rule] = {
    _O.DONTNEED: Rule(_GO, Notified.RANGE),
    # The frame stays, but is marked clean: a write through a leaf that is still writable would be lost.
    _O.FREE: Rule(_RO, Notified.RANGE),
    _O.FREE_RECLAIMED: Rule(_GO, Notified.RANGE),
    # The mapping is removed, found dirty and restored (mm/rmap.c try_to_unmap_one).
    _O.RECLAIM_GIVEN_UP: Rule(_STAY, Notified.RANGE),
    _O.MUNMAP: Rule(_GO, Notified.RANGE),
    _O.MREMAP: Rule(_GO, Notified.RANGE),
    _O.MPROTECT_READ: Rule(_RO, Notified.RANGE),
    _O.MPROTECT_NONE: Rule(_GO, Notified.RANGE),
    _O.MPROTECT_WIDER: Rule(_STAY, Notified.RANGE),
    _O.FORK: Rule(_RO, Notified.VMA),
    _O.FORK_SHARED: Rule(_STAY, Notified.NONE),
    _O.COW_COPY: Rule(_GO, Notified.RANGE, change_pte=True),
    _O.COW_COPY_HUGE: Rule(_GO, Notified.HUGE),
    _O.COW_REUSE: Rule(_STAY, Notified.NONE),
    _O.ZERO_WRITE: Rule(_GO, Notified.RANGE, change_pte=True),
    _O.CHILD_WRITE: Rule(_STAY, Notified.NONE),
    _O.KSM_PROTECT: Rule(_RO, Notified.RANGE, change_pte=True),
    _O.KSM_MERGE: Rule(_GO, Notified.RANGE, change_pte=True),
    _O.KSM_UNSHARE: Rule(_GO, Notified.RANGE, change_pte=True),
    _O.THP_SPLIT: Rule(_STAY, Notified.HUGE),
    _O.THP_SPLIT_FILE: Rule(_GO, Notified.HUGE),
    _O.THP_SPLIT_PAGE: Rule(_GO, Notified.HUGE),
    _O.THP_COLLAPSE: Rule(_GO, Notified.HUGE),
    _O.MIGRATE: Rule(_GO, Notified.RANGE),
    _O.SWAP_OUT: Rule(_GO, Notified.RANGE),
    _O.FILE_OUT: Rule(_GO, Notified.RANGE),
    # The page is marked clean (mm/rmap.c page_mkclean_one), as with MADV_FREE.
    _O.WRITE_BACK: Rule(_RO, Notified.RANGE),
    _O.SWAP_IN: Rule(_STAY, Notified.NONE),
    _O.PUNCH_HOLE: Rule(_GO, Notified.RANGE),
    _O.TRUNCATE: Rule(_GO, Notified.RANGE),
    _O.POISON: Rule(_GO, Notified.RANGE),
    _O.UFFD_PROTECT: Rule(_RO, Notified.RANGE),
    # Ageing clears nothing but the access flag, in every version.
    _O.AGE: Rule(_STAY, Notified.AGED),
}


@dataclass(frozen=True)
class Notice:
    """One operation on ``[start, end)`` of host-virtual memory, within the VMA ``vma``, on a host kernel."""

    operation: Operation
    start: int
    end: int
    vma: Span
    kernel: Kernel = (5, 4)

    def __post_init__(self) -> None:
        if not self.vma[0] <= self.start < self.end <= self.vma[1]:
            raise ValueError(f"[{self.start:#x}, {self.end:#x}) is not a range within the VMA")

    @property
    def rule(self) -> Rule:
        return RULES[self.operation]

    @property
    def owed(self) -> Span:
        """The HVA range of the duty, in whole pages. A hole or a truncation does not affect pages it covers partly."""
        if self.rule.notified is Notified.VMA:
            return self.vma
        if self.rule.notified is Notified.HUGE:
            return _around(self.start, self.end, _HUGE)
        if self.operation in (Operation.PUNCH_HOLE, Operation.TRUNCATE):
            first, last = -(-self.start // _PAGE) * _PAGE, self._end // _PAGE * _PAGE
            return first, max(first, last)
        return _around(self.start, self.end, _PAGE)

    @property
    def may_go(self) -> Span | None:
        """The HVA range that may be unmapped afterwards; None if no change is notified, so that nothing may be.

        Wider than :attr:`owed`: splitting a VMA or a huge mapping at an edge notifies the aligned 2 MiB there. Blocks
        that reach into the range are unmapped as a whole (:func:`violations` allows for them).
        """
        if self.rule.notified in (Notified.AGED, Notified.NONE):
            return None
        owed = self.owed
        return _around(min(self.start, owed[0]), max(self._end, owed[1]), _HUGE)

    @property
    def call(self) -> Call | None:
        """The call that is required for every page in :attr:`owed` that stage 2 mapped; None: none is allowed."""
        return {Notified.AGED: Call.AGE, Notified.NONE: None}.get(self.rule.notified, Call.UNMAP)

    @property
    def _end(self) -> int:
        """The end of the operation: of a truncation, the end of the VMA."""
        return self.vma[1] if self.operation is Operation.TRUNCATE else self.end

    @property
    def maps_read_only(self) -> bool:
        """Whether KVM maps the new frame read-only if a level 3 table is left (change_pte, up to 6.9)."""
        return self.rule.change_pte and self.kernel < CHANGE_PTE_GONE


def _around(start: int, end: int, size: int) -> Span:
    return start & -size, -(-end // size) * size


# -- as documentation ------------------------------------------------------------------------------------------------


def document() -> str:
    """The rules as a page in Markdown: a heading, an explanation and the table."""
    text = """# What the host's memory management requires of stage 2

Generated by `arm-kvm obligations` from the reference model (`arm_kvm.model.kvm.notifier`), which cites the kernel's
sources. From the moment that the MMU notifiers have notified KVM of a range, stage 2 may map no more of it than this.
KVM on Arm unmaps every notified range; the aligned 2 MiB around the range, and blocks that reach into it, may go, too.

"""
    return text + "\n".join(table()) + "\n"


def table() -> list[str]:
    """The rules as a table in Markdown, one line per operation."""
    head = ["| what the host does | stage 2 | range notified | up to 6.9 change_pte then maps |", "|---|---|---|---|"]
    words = {True: "the new frame, read-only", False: ""}
    return head + [
        f"| {operation.value} | {rule.duty.value} | {rule.notified.value} | {words[rule.change_pte]} |"
        for operation, rule in RULES.items()
    ]


# -- checking a kernel against the rules ------------------------------------------------------------------------------


class BreachKind(Enum):
    """What is wrong with a page of stage 2."""

    STALE = "the old frame is still mapped"
    WRITABLE = "still writable"
    ALTERED = "changed without a notification"
    APPEARED = "mapped without a guest's access"
    LOST = "unmapped, and outside what may go"
    NOT_MAPPED = "the new frame is not mapped, though a level 3 table was left"
    NOT_TOLD = "the notifier's trace event is missing"
    TOLD = "the notifier was called without a cause"


@dataclass(frozen=True)
class Breach:
    """One page of guest memory that is wrong after an operation."""

    kind: BreachKind
    ipa: int


def violations(notices: Sequence[Notice], slots: Iterable[Memslot], before: Leaves, after: Leaves) -> list[Breach]:
    """Compare stage 2 before and after some operations, page by page. No guest may have run in between."""
    slots = list(slots)
    old, new = _pages(before), _pages(after)
    owed = [(notice, _Spans(_ipas(slots, notice.owed))) for notice in notices]
    notified = [span for notice in notices if notice.may_go for span in _ipas(slots, notice.may_go)]
    in_notified = _Spans(notified)
    may_go = _Spans(
        notified + [leaf for leaf in map(_extent, before.items()) if in_notified.meets(*leaf)]
    )  # blocks go as a whole
    to_map = {ipa for n in notices if n.maps_read_only for ipa in _pages_in(_ipas(slots, n.owed))}
    tables = {ipa & -_HUGE for ipa, (level, _) in after.items() if level == LAST_LEVEL and ipa in old.keys() - to_map}
    out = []
    for ipa in sorted(old.keys() | new.keys() | to_map):
        page = (ipa, ipa + _PAGE)
        owing = [notice for notice, spans in owed if spans.meets(*page)]
        breach = _breach(owing, old.get(ipa, 0), new.get(ipa, 0), may_go.meets(*page))
        if ipa in to_map and ipa not in new and ipa & -_HUGE in tables:
            breach = BreachKind.NOT_MAPPED
        if breach:
            out.append(Breach(breach, ipa))
    return out


def _breach(owing: list[Notice], old: int, new: int, may_go: bool) -> BreachKind | None:
    """What is wrong with one page, given as level 3 descriptors (0: not mapped)."""
    duties = {notice.rule.duty for notice in owing}
    if not new:
        return None if may_go or not old else BreachKind.LOST
    if duties & {Duty.GO, Duty.READ_ONLY} and d.s2_writable(new):
        return BreachKind.STALE if Duty.GO in duties and _same_frame(old, new) else BreachKind.WRITABLE
    if old and _same_frame(old, new):
        return BreachKind.STALE if Duty.GO in duties else _changed_rights(old, new, may_go)
    if any(notice.maps_read_only for notice in owing):
        return None
    return BreachKind.ALTERED if old else BreachKind.APPEARED


def unasked(
    slots: Iterable[Memslot], before: Leaves, after: Leaves, calls: Iterable[tuple[Call, Span]]
) -> list[Breach]:
    """Find leaves that are gone although no traced call that unmaps (UNMAP, SET) covers any of their bytes.

    An operation may notify more than it changes, so :func:`violations` lets a whole VMA go. This check uses the ranges
    that were in fact notified.
    """
    slots = list(slots)
    unmapping = [span for call, span in calls if call in (Call.UNMAP, Call.SET)]
    named = _Spans([part for span in unmapping for part in _ipas(slots, span)])
    new = _pages(after)
    gone = [leaf[0] for leaf in before.items() if leaf[0] not in new and not named.meets(*_extent(leaf))]
    return [Breach(BreachKind.LOST, ipa) for ipa in sorted(gone)]


def unheard(
    notices: Sequence[Notice], slots: Iterable[Memslot], before: Leaves, calls: Iterable[tuple[Call, Span]]
) -> list[Breach]:
    """Compare the calls that the kernel traced, as HVA ranges, with those that the operations require.

    A page that stage 2 mapped must be in a call if its operation notifies. Where an operation does not notify, no page
    may be in a call unless another operation notifies it; if no operation notifies, no page of these slots may.
    """
    slots, calls = list(slots), list(calls)
    named = {call: [s for c, span in calls if c is call for s in _ipas(slots, span)] for call in Call}
    out = []
    for notice, call in [(n, n.call) for n in notices]:
        if call is None:
            continue
        owed, heard = _Spans(_ipas(slots, notice.owed)), _Spans(named[call])
        missing = [ipa for ipa in _pages(before) if owed.meets(ipa, ipa + _PAGE) and not heard.meets(ipa, ipa + _PAGE)]
        out += [Breach(BreachKind.NOT_TOLD, ipa) for ipa in missing]
    taken = named[Call.UNMAP] + named[Call.SET]
    if not any(notice.call for notice in notices):
        return out + [Breach(BreachKind.TOLD, start) for start, _ in taken]
    quiet = _Spans([s for n in notices if not n.call for s in _ipas(slots, n.owed)])
    notified = _Spans([s for n in notices if n.call for s in _ipas(slots, n.owed)])
    pages = [ipa for ipa in sorted({*_pages_in(taken)}) if quiet.meets(ipa, ipa + _PAGE)]
    return out + [Breach(BreachKind.TOLD, ipa) for ipa in pages if not notified.meets(ipa, ipa + _PAGE)]


def _changed_rights(old: int, new: int, may_go: bool) -> BreachKind | None:
    """A page may lose its access flag at any time, and its write permission if it may go; nothing else may change."""
    may_lose = d.AF.mask | (d.S2AP.put(d.Grant.WRITE) if may_go else 0)
    return BreachKind.ALTERED if (old ^ new) & ~may_lose or new & ~old else None


def _same_frame(old: int, new: int) -> bool:
    return bool(old) and (old ^ new) & d.Format().address_field() == 0


def _pages(leaves: Leaves) -> dict[int, int]:
    """Every leaf as the level 3 entries that it is equivalent to, by IPA."""
    out = {}
    for ipa, (level, desc) in leaves.items():
        for offset in range(0, 1 << KIB4.level_shift(level), _PAGE):
            out[ipa + offset] = (desc | d.TYPE.mask) + offset
    return out


def _pages_in(spans: Iterable[Span]) -> Iterator[int]:
    return (ipa for start, end in spans for ipa in range(start, end, _PAGE))


def _extent(item: tuple[int, tuple[int, int]]) -> Span:
    ipa, (level, _) = item
    return ipa, ipa + (1 << KIB4.level_shift(level))


def _ipas(slots: list[Memslot], span: Span) -> list[Span]:
    """The IPA ranges of an HVA range, in every slot that maps it."""
    found = (slot.ipas_of(span[0], span[1] - span[0]) for slot in slots)
    return [(part[0], part[0] + part[1]) for part in found if part]


class _Spans:
    """A set of addresses, for repeated look-ups."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self._merged: list[Span] = []
        for start, end in sorted(spans):
            if self._merged and start <= self._merged[-1][1]:
                before = self._merged.pop()
                start, end = before[0], max(before[1], end)
            self._merged.append((start, end))
        self._starts = [start for start, _ in self._merged]

    def meets(self, start: int, end: int) -> bool:
        """Whether any address of ``[start, end)`` is in the set."""
        last = bisect_left(self._starts, end) - 1
        return last >= 0 and self._merged[last][1] > start
