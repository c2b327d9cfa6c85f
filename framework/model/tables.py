"""Stage-2 tables as KVM builds them: map, unmap, split, coalesce, write-protect, age; and what each step does in order.

Every operation changes the tables at once and returns the ordered list of what the hardware may have seen: entries
written, translations invalidated, table pages freed. A valid entry is never overwritten by another valid one that maps
something else: break (write 0), invalidate, make (DDI 0487 D8.16.1).

A table page is counted like KVM counts it: one reference for its existence, one for each valid entry in it; a page
whose count falls to one is empty and goes at once. The root stays until :meth:`Stage2Tables.destroy`.

Sources: Linux 5.4 virt/kvm/arm/mmu.c (stage2_set_pte, stage2_set_pmd_huge, unmap_stage2_range, stage2_wp_range,
clear_stage2_pmd_entry); Linux 5.10 to 6.12 arch/arm64/kvm/hyp/pgtable.c (stage2_map_walker, stage2_unmap_walker,
kvm_pgtable_stage2_wrprotect, mkyoung, mkold; since 6.4 kvm_pgtable_stage2_split).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from . import descriptors as d
from .granule import LAST_LEVEL
from .regime import Regime


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
    """One VM's tables. Implements :class:`framework.model.walk.Words` for walks of itself.

    ``allocate`` returns the physical address of a zeroed table page (KVM: from the memory cache); what it raises passes
    through, with nothing mapped. All addresses and sizes in bytes.
    """

    def __init__(self, regime: Regime, allocate: Callable[[], int]) -> None:
        self.regime = regime
        self._allocate = allocate
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

    def map(self, ipa: int, level: int, leaf: d.Leaf) -> list[Event]:
        """Install one block or page. Pages under it go first; a block over it is broken and the rest of it unmapped.

        Raises ValueError for an IPA that is not aligned or out of range, or a leaf the level cannot hold.
        """
        self._check(ipa, level)
        word = d.encode(leaf, level, self.regime.format)
        events: list[Event] = []
        slot = self._descend(ipa, level, events)
        if self._points_to_table(slot):
            events += self.unmap(ipa, self._size(level))  # which frees the table, then its empty parents too
            slot = self._descend(ipa, level, events)
        if slot.word != word:
            events += self._replace(slot, word)
        return events

    def unmap(self, ipa: int, size: int) -> list[Event]:
        """Remove all that maps any of ``[ipa, ipa + size)``; a block that reaches beyond goes as a whole."""
        events: list[Event] = []
        for slot in list(self._leaf_slots(ipa, ipa + size)):
            events += self._replace(slot, 0)
        return events + self._prune(events)

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
        level, word = self.leaves().get(ipa, (LAST_LEVEL + 1, 0))
        if not self.regime.start_level < level <= LAST_LEVEL:
            raise ValueError(f"no page at IPA {ipa:#x} begins a table")
        leaf, size = d.decode(word, level, self.regime.format), self._size(level)
        for i in range(self.regime.granule.entries):
            part = d.encode(replace(leaf, address=leaf.address + i * size), level, self.regime.format)
            if self.leaves().get(ipa + i * size) != (level, part):
                raise ValueError(f"IPA {ipa + i * size:#x} does not continue the block")
        return self.map(ipa, level - 1, leaf)

    def write_protect(self, ipa: int, size: int) -> list[Event]:
        """Take write permission from all that maps any of the range (dirty log).

        One invalidation for the whole range.
        """
        return self._change(ipa, size, lambda word: word & ~d.S2AP.put(d.Access.WRITE))

    def make_old(self, ipa: int, size: int) -> list[Event]:
        """Clear the access flag.

        The caller of the notifier invalidates (clear_flush_young) or does not (clear_young).
        """
        return [e for e in self._change(ipa, size, lambda word: word & ~d.AF.mask) if isinstance(e, Written)]

    def make_young(self, ipa: int) -> list[Event]:
        """Set the access flag again, after an access flag fault: nothing is cached, so nothing is invalidated."""
        return [e for e in self._change(ipa, 1, lambda word: word | d.AF.mask) if isinstance(e, Written)]

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
        events: list[Event] = []
        for slot in list(self._leaf_slots(ipa, ipa + size)):
            if new(slot.word) != slot.word:
                events.append(Written(slot.at, slot.ipa, slot.level, slot.word, new(slot.word)))
                self._set(slot.at, new(slot.word))
        return [*events, Invalidated(ipa, size)] if events else []

    # -- the tree ------------------------------------------------------------------------------------------------

    def _size(self, level: int) -> int:
        return 1 << self.regime.granule.level_shift(level)

    def _check(self, ipa: int, level: int) -> None:
        if ipa & (self._size(level) - 1):
            raise ValueError(f"IPA {ipa:#x} is not aligned to a level {level} entry")
        if ipa + self._size(level) > self.regime.input_size:
            raise ValueError(f"IPA {ipa:#x} is beyond the {self.regime.input_bits}-bit space")

    def _new_table(self) -> int:
        page = self._allocate()
        self._counts[page] = 1
        return page

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
        return d.kind(slot.word, slot.level, self.regime.granule) is d.Kind.TABLE

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
        size = self._size(level)
        entries = self.regime.entries if level == self.regime.start_level else self.regime.granule.entries
        low = max(start - first, 0) // size
        high = min(-(-(end - first) // size), entries)
        for i in range(low, high):
            if table + 8 * i not in self._words:
                continue
            slot = self._slot(table, first + i * size, level)
            if self._points_to_table(slot):
                yield from self._below(self._target(slot), level + 1, slot.ipa, start, end)
            else:
                yield slot

    def _prune(self, events: list[Event]) -> list[Event]:
        """Free what became empty under the entries these events cleared, from the leaves up."""
        out: list[Event] = []
        touched = {event.ipa for event in events if isinstance(event, Written)}
        for level in range(LAST_LEVEL - 1, self.regime.start_level - 1, -1):
            for ipa in sorted({ipa & -self._size(level) for ipa in touched}):
                slot = self._table_slot(ipa, level)
                if slot is None:
                    continue
                page = self._target(slot)
                if self._counts[page] == 1:
                    out += [*self._replace(slot, 0), Freed(page)]
                    del self._counts[page]
        return out

    def _table_slot(self, ipa: int, level: int) -> _Slot | None:
        """The entry of ``level`` on the way to ``ipa``, when it points to a table."""
        table = self.regime.root
        for at_level in range(self.regime.start_level, level + 1):
            slot = self._slot(table, ipa, at_level)
            if not self._points_to_table(slot):
                return None
            table = self._target(slot)
        return slot


@dataclass(frozen=True)
class _Slot:
    """Where an entry is and what it holds."""

    at: int
    ipa: int
    level: int
    word: int
