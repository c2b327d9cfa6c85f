"""Stage-2 tables as KVM builds them: map, unmap, split, coalesce, write-protect, age; and what each step does in order.

Every operation changes the tables at once and returns the ordered list of what the hardware may have seen: entries
written, translations invalidated, table pages freed. A valid entry is never overwritten by another valid one that maps
something else: break (write 0), invalidate, make (DDI 0487 D8.16.1).

A table page is counted like KVM counts it: one reference for its existence, one for each valid entry in it; a page
whose count falls to one is empty and goes at once. The root stays until :meth:`Stage2Tables.destroy`.

The order of events is that of 5.4, the last 32-bit KVM and the strictest: an invalidation for every entry, tables freed
as soon as their last entry goes. What later kernels do otherwise, all of it allowed: a block that replaces a table is
one clear and one invalidation of the whole VM (5.10 to 6.1) or range (6.12), the leaves below go unseen; unmap
invalidates a range once, at its end, where FEAT_TLBIRANGE and FWB are there (6.6 on); a change of permission alone is
refused by map and made in place by :meth:`Stage2Tables.relax` (5.12 on).

Sources: Linux 5.4 virt/kvm/arm/mmu.c (stage2_set_pte, stage2_set_pmd_huge, unmap_stage2_range, stage2_wp_range,
clear_stage2_pmd_entry); Linux 5.10 to 6.12 arch/arm64/kvm/hyp/pgtable.c (stage2_map_walker, stage2_unmap_walker,
kvm_pgtable_stage2_wrprotect, relax_perms, mkyoung, mkold; since 6.4 kvm_pgtable_stage2_split).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch.granule import LAST_LEVEL
from arm_kvm.model.arch.regime import Regime


@dataclass(frozen=True)
class Written:
    """A table entry changed from ``old`` to ``new``. ``at``: its physical address; ``ipa``: the first it translates."""

    at: int
    ipa: int
    level: int
    old: int
    new: int


@dataclass(frozen=True)
class Invalidated:
    """TLB entries of this VM dropped on all CPUs: those of ``[ipa, ipa + size)``, bytes."""

    ipa: int
    size: int


@dataclass(frozen=True)
class Freed:
    """A table page given back; nothing may walk through it any more."""

    page: int


Event = Written | Invalidated | Freed


class Stage2Tables:
    """One VM's tables. Implements :class:`arm_kvm.model.arch.walk.Words` for walks of itself.

    ``allocate`` returns the physical address of a zeroed table page (KVM: from the memory cache); what it raises passes
    through, with nothing changed. All addresses and sizes in bytes.
    """

    def __init__(self, regime: Regime, allocate: Callable[[], int]) -> None:
        self.regime = regime
        self._allocate = allocate
        self._spare: list[int] = []  # had for a mapping that then failed
        self._words: dict[int, int] = {}
        self._counts: dict[int, int] = {regime.root + i * regime.granule.size: 1 for i in range(regime.root_pages)}

    # -- reading ------------------------------------------------------------------------------------------

    def load(self, pa: int) -> int | None:
        """The entry at a physical address; None outside the table pages."""
        return self._words.get(pa, 0) if pa & -self.regime.granule.size in self._counts else None

    @property
    def pages(self) -> dict[int, int]:
        """Reference count by table page."""
        return dict(self._counts)

    def leaves(self) -> dict[int, tuple[int, int]]:
        """``{ipa: (level, descriptor)}`` of every valid leaf, in order of IPA."""
        return {slot.ipa: (slot.level, slot.word) for slot in self._leaf_slots(0, self.regime.input_size)}

    # -- changing -------------------------------------------------------------------------------------------

    def map(self, ipa: int, level: int, leaf: d.LeafFields) -> list[Event]:
        """Install one block or page. Pages under it go first; a block over it is broken and the rest of it unmapped.

        Raises ValueError for an IPA that is not aligned or out of range, or a leaf the level cannot hold.
        """
        self._check(ipa, level)
        word = d.encode(leaf, level, self.regime.format)
        self._have_tables_for(ipa, level)
        events: list[Event] = []
        slot = self._descend(ipa, level, events)
        if self._points_to_table(slot):
            events += self._clear(self._target(slot), level + 1, slot.ipa, ipa, ipa + self._size(level))
            events += self._drop_table(slot)
            slot = replace(slot, word=0)
        if slot.word != word:
            events += self._replace(slot, word)
        return events

    def relax(self, ipa: int, grant: d.Grant, execute: bool = False) -> list[Event]:
        """Add permissions to the leaf that maps ``ipa``, in place. ValueError when none does."""
        slot = next(self._leaf_slots(ipa, ipa + 1), None)
        if slot is None:
            raise ValueError(f"nothing maps IPA {ipa:#x}")
        more, less = d.S2AP.put(grant), d.XN.mask if execute else 0
        written = self._change(ipa, 1, lambda word: (word | more) & ~less)
        return [*written, Invalidated(slot.ipa, self._size(slot.level))] if written else []

    def unmap(self, ipa: int, size: int) -> list[Event]:
        """Remove all that maps any of ``[ipa, ipa + size)``; a block that reaches beyond goes as a whole."""
        return self._clear(self.regime.root, self.regime.start_level, 0, ipa, ipa + size)

    def split(self, ipa: int) -> list[Event]:
        """Replace the block that maps ``ipa`` by a table of the next level that maps the same.

        ValueError when none does.
        """
        slot = self._block_slot(ipa)
        leaf = d.decode(slot.word, slot.level, self.regime.format)
        size = self._size(slot.level + 1)
        table = self._new_table()
        for i in range(self.regime.granule.entries):
            part = replace(leaf, address=leaf.address + i * size)
            self._set(table + 8 * i, d.encode(part, slot.level + 1, self.regime.format))
        return self._replace(slot, d.encode(d.Table(table), slot.level, self.regime.format))

    def coalesce(self, ipa: int) -> list[Event]:
        """The inverse of :meth:`split`: one block for a table whose leaves are contiguous and alike.

        ``ipa`` is the first of the range. ValueError when the leaves do not add up to a block.
        """
        leaves = self.leaves()
        level, word = leaves.get(ipa, (LAST_LEVEL + 1, 0))
        if not self.regime.start_level < level <= LAST_LEVEL:
            raise ValueError(f"no page at IPA {ipa:#x} begins a table")
        leaf, size = d.decode(word, level, self.regime.format), self._size(level)
        for i in range(self.regime.granule.entries):
            part = d.encode(replace(leaf, address=leaf.address + i * size), level, self.regime.format)
            if leaves.get(ipa + i * size) != (level, part):
                raise ValueError(f"IPA {ipa + i * size:#x} does not continue the block")
        return self.map(ipa, level - 1, leaf)

    def write_protect(self, ipa: int, size: int) -> list[Event]:
        """Take write permission from all that maps any of the range (dirty log).

        One invalidation follows, of the whole VM. (5.4 invalidates also when nothing was writable.)
        """
        written = self._change(ipa, size, lambda word: word & ~d.S2AP.put(d.Grant.WRITE))
        return [*written, Invalidated(0, self.regime.input_size)] if written else []

    def make_old(self, ipa: int, size: int, *, first_only: bool = False) -> list[Event]:
        """Clear the access flag of the leaves in a range; ``first_only``: of the first alone, as kernels before 6.6 do.

        The caller of the notifier invalidates (clear_flush_young) or does not (clear_young).
        """
        return self._change(ipa, 1 if first_only else size, lambda word: word & ~d.AF.mask)

    def make_young(self, ipa: int) -> list[Event]:
        """Set the access flag again, after an access flag fault: nothing is cached, so nothing is invalidated."""
        return self._change(ipa, 1, lambda word: word | d.AF.mask)

    def destroy(self) -> list[Event]:
        """Unmap everything and give the root back."""
        events = self.unmap(0, self.regime.input_size)
        freed = [Freed(page) for page in self._counts]
        self._counts.clear()
        return events + freed

    # -- one entry ----------------------------------------------------------------------------------------------

    def _set(self, at: int, word: int) -> None:
        old = self._words.get(at, 0)
        page = at & -self.regime.granule.size
        self._counts[page] += d.VALID.of(word) - d.VALID.of(old)
        if word:
            self._words[at] = word
        else:
            self._words.pop(at, None)

    def _replace(self, slot: _Slot, word: int) -> list[Event]:
        """Break before make."""
        events: list[Event] = []
        old = slot.word
        if d.VALID.of(old):
            events += [Written(slot.at, slot.ipa, slot.level, old, 0), Invalidated(slot.ipa, self._size(slot.level))]
            old = 0
        if word:
            events.append(Written(slot.at, slot.ipa, slot.level, old, word))
        self._set(slot.at, word)
        return events

    def _change(self, ipa: int, size: int, new: Callable[[int], int]) -> list[Event]:
        """Rewrite the leaves of a range in place."""
        events: list[Event] = []
        for slot in list(self._leaf_slots(ipa, ipa + size)):
            if new(slot.word) != slot.word:
                events.append(Written(slot.at, slot.ipa, slot.level, slot.word, new(slot.word)))
                self._set(slot.at, new(slot.word))
        return events

    # -- the tree ------------------------------------------------------------------------------------------------

    def _size(self, level: int) -> int:
        return 1 << self.regime.granule.level_shift(level)

    def _check(self, ipa: int, level: int) -> None:
        if ipa & (self._size(level) - 1):
            raise ValueError(f"IPA {ipa:#x} is not aligned to a level {level} entry")
        if ipa + self._size(level) > self.regime.input_size:
            raise ValueError(f"IPA {ipa:#x} is beyond the {self.regime.input_bits}-bit space")

    def _new_table(self) -> int:
        page = self._spare.pop() if self._spare else self._allocate()
        self._counts[page] = 1
        return page

    def _have_tables_for(self, ipa: int, level: int) -> None:
        """Have every table page that a mapping needs, before anything is changed."""
        slot = self._slot(self.regime.root, ipa, self.regime.start_level)
        while slot.level < level and self._points_to_table(slot):
            slot = self._slot(self._target(slot), ipa, slot.level + 1)
        while len(self._spare) < level - slot.level:
            self._spare.append(self._allocate())

    def _descend(self, ipa: int, level: int, events: list[Event]) -> _Slot:
        """The slot for ``ipa`` at ``level``; missing tables are made on the way, blocks on the way broken."""
        table = self.regime.root
        for above in range(self.regime.start_level, level):
            slot = self._slot(table, ipa, above)
            if self._points_to_table(slot):
                table = self._target(slot)
            else:
                table = self._new_table()
                events += self._replace(slot, d.encode(d.Table(table), above, self.regime.format))
        return self._slot(table, ipa, level)

    def _slot(self, table: int, ipa: int, level: int) -> _Slot:
        at = table + 8 * self.regime.index(ipa, level)
        return _Slot(at, ipa & -self._size(level), level, self._words.get(at, 0))

    def _points_to_table(self, slot: _Slot) -> bool:
        return d.kind(slot.word, slot.level, self.regime.granule) is d.EntryKind.TABLE

    def _target(self, slot: _Slot) -> int:
        return d.decode(slot.word, slot.level, self.regime.format).address

    def _block_slot(self, ipa: int) -> _Slot:
        for slot in self._leaf_slots(ipa, ipa + 1):
            if slot.level < LAST_LEVEL:
                return slot
        raise ValueError(f"no block maps IPA {ipa:#x}")

    def _leaf_slots(self, start: int, end: int) -> Iterator[_Slot]:
        """Every leaf that translates any of ``[start, end)``, in order."""
        yield from self._below(self.regime.root, self.regime.start_level, 0, start, end)

    def _below(self, table: int, level: int, first: int, start: int, end: int) -> Iterator[_Slot]:
        for slot in self._entries(table, level, first, start, end):
            if self._points_to_table(slot):
                yield from self._below(self._target(slot), level + 1, slot.ipa, start, end)
            else:
                yield slot

    def _entries(self, table: int, level: int, first: int, start: int, end: int) -> Iterator[_Slot]:
        """The valid entries of one table, whose first input address is ``first``, that translate any of the range."""
        size = self._size(level)
        entries = self.regime.entries if level == self.regime.start_level else self.regime.granule.entries
        for i in range(max(start - first, 0) // size, min(-(-(end - first) // size), entries)):
            if table + 8 * i in self._words:
                yield self._slot(table, first + i * size, level)

    def _clear(self, table: int, level: int, first: int, start: int, end: int) -> list[Event]:
        """Depth first: each leaf of the range, and each table as soon as it is empty."""
        events: list[Event] = []
        for slot in list(self._entries(table, level, first, start, end)):
            if not self._points_to_table(slot):
                events += self._replace(slot, 0)
                continue
            below = self._target(slot)
            events += self._clear(below, level + 1, slot.ipa, start, end)
            if self._counts[below] == 1:
                events += self._drop_table(slot)
        return events

    def _drop_table(self, slot: _Slot) -> list[Event]:
        """Unlink an empty table and free it."""
        page = self._target(slot)
        del self._counts[page]
        return [*self._replace(slot, 0), Freed(page)]


@dataclass(frozen=True)
class _Slot:
    """Where an entry is and what it holds."""

    at: int
    ipa: int
    level: int
    word: int
