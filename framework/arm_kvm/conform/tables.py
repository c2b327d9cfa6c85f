"""Translation tables, drawn path by path.

For a given input address every entry that does not exist yet is drawn on the way down: a table, a block, a page, or
something wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from arm_kvm.conform import layout
from arm_kvm.conform.case import Silicon
from arm_kvm.conform.registers import SLOT
from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch import stage1
from arm_kvm.model.arch.granule import LAST_LEVEL
from arm_kvm.model.arch.regime import Regime

Make = Callable[[int], int]  #: draws the entry of a level

# -- single entries ------------------------------------------------------------------------------------------

_GOOD_S2 = d.encode(d.LeafFields(0), LAST_LEVEL) & ~d.TYPE.mask
_GOOD_S1 = d.VALID.mask | d.AF.mask | d.AP.put(1) | d.SH.put(d.Shareability.INNER)

#: Stands for a change of any attributes, including ignored bits.
_ANYTHING = -1

#: Changes (by XOR) of one field, to each of its edge cases. The first is no change.
_S2_CHANGES = (
    *[0] * 12,
    *(d.S2AP.put(n) for n in (1, 2, 3)),
    *[d.AF.mask] * 3,
    *(d.XN.put(n) for n in (1, 2, 3)),
    *(d.MEMATTR.put(n) for n in range(1, 16)),
    *[d.MEMATTR.put(d.MemAttr.NORMAL_WB ^ d.MemAttr.NORMAL_WT)] * 3,
    *(d.SH.put(n) for n in (1, 2, 3)),
    d.DBM.mask | d.S2AP.put(2),
    d.CONTIGUOUS.mask,
    d.VALID.mask,
    *[_ANYTHING] * 2,
)
_S1_CHANGES = (
    *[0] * 12,
    *(d.AP.put(n) for n in (1, 2, 3)),
    d.AF.mask,
    d.UXN.mask,
    d.PXN.mask,
    d.UXN.mask | d.PXN.mask,
    *(d.ATTRINDX.put(n) for n in range(1, 8)),
    *[d.ATTRINDX.put(7)] * 3,
    *(d.SH.put(n) for n in (1, 2, 3)),
    d.CONTIGUOUS.mask,
    d.VALID.mask,
    *[_ANYTHING] * 2,
)
_S1_LIMITS = (*[0] * 8, *(d.AP_TABLE.put(n) for n in (1, 2, 3)), d.XN_TABLE.mask, d.PXN_TABLE.mask)
_IGNORED = d.SOFTWARE.mask | d.FNXS.mask  #: in a leaf: software bits, and bit 11 (stage 1: nG)
_S2_RANDOM = d.MEMATTR.mask | d.S2AP.mask | d.SH.mask | d.AF.mask | d.DBM.mask | d.CONTIGUOUS.mask | d.XN.mask
_S2_RANDOM |= _IGNORED | d.PBHA.mask | 1 << 63
_S1_RANDOM = d.ATTRINDX.mask | d.AP.mask | d.SH.mask | d.AF.mask | d.UXN.mask | d.PXN.mask | _IGNORED | 1 << 5
_IN_TABLES = 0xFFC | 0xFF << 51 | 1 << 63  #: ignored in a table entry of either stage (NSTable, in Non-secure state)

_s2_change = st.sampled_from(_S2_CHANGES)
_s1_change = st.sampled_from(_S1_CHANGES)
_s1_limit = st.sampled_from(_S1_LIMITS)
_word = st.integers(0, (1 << 64) - 1)


def _weighted(**weights: int) -> SearchStrategy[str]:
    """One of these words, as often as its weight says. Shrinks to the first."""
    return st.sampled_from([word for word, weight in weights.items() for _ in range(weight)])


_s2_upper = _weighted(table=10, leaf=6, table_with_ignored_bits=2, table_beyond=1, table_nowhere=1, invalid=2)
_s2_last = _weighted(leaf=16, reserved=1, invalid=2)
_s1_upper = _weighted(table=10, leaf=4, table_with_ignored_bits=3, table_astray=1, leaf_beyond=1, invalid=1)
_s1_last = _weighted(leaf=14, leaf_beyond=1, reserved=1, invalid=1)
_where = _weighted(frame=14, top=2, beyond=2, misaligned=1, nowhere=1)
_home = _weighted(frame=19, nowhere=1)
_frame = st.integers(0, 7)

# -- one table, path by path ---------------------------------------------------------------------------------


@dataclass
class Draft:
    """The tables of one world while they are drawn. ``words``: table entries by physical address."""

    draw: DrawFn
    silicon: Silicon
    words: dict[int, int] = field(default_factory=dict)
    next_page: int = layout.ARENA

    def page(self, size: int = SLOT) -> int:
        """Allocate ``size`` bytes of the arena, aligned to their size."""
        self.next_page = -(-self.next_page // size) * size
        pa = self.next_page
        self.next_page += size
        return pa

    def path(self, table: Table, ia: int, make: Make) -> None:
        """Walk down to ``ia`` and draw each missing entry with ``make(level)``, until an entry is not a table."""
        at, level = table.backing[table.root], table.regime.start_level
        while True:
            entry = at + 8 * table.regime.index(ia, level)
            word = self.words.get(entry)
            if word is None:
                word = self.words[entry] = make(level)
            if d.kind(word, level, table.regime.granule) is not d.EntryKind.TABLE:
                return
            below = table.backing.get(word & table.regime.format.address_field())
            if below is None:  # a pointer to no table
                return
            at = below
            level += 1


@dataclass
class Table:
    """A tree of tables. ``backing``: address in its entries (PA or, in stage 1, IPA) -> physical address."""

    regime: Regime
    root: int
    backing: dict[int, int]


# -- stage 2 -------------------------------------------------------------------------------------------------


def _s2_leaf(draft: Draft, table: Table, level: int, address: int | None = None) -> int:
    """A stage-2 block or page, mostly of a frame and mostly correct."""
    draw, fmt = draft.draw, table.regime.format
    change = draw(_s2_change)
    if change == _ANYTHING:
        change = draw(_word) & _S2_RANDOM
    if address is None:
        address = _output(draft, table.regime, 1 << fmt.granule.level_shift(level))
    good = _GOOD_S2 ^ d.MEMATTR.put(fmt.normal ^ d.MemAttr.NORMAL_WB)
    return (good ^ change) | address | d.TYPE.put(level == LAST_LEVEL)


def _output(draft: Draft, below: Regime, size: int) -> int:
    """An output address: a frame, or an edge of physical memory."""
    top, field_ = 1 << below.output_bits, below.format.address_field()
    match draft.draw(_where):
        case "top":
            return (top - size) & field_
        case "beyond":  # as far as the address field can express it
            return layout.FRAMES & -size | top & field_
        case "misaligned":
            return layout.FRAMES & -size | (below.granule.size if size > below.granule.size else 0)
        case "nowhere":
            return draft.silicon.ram_end & -size
    return layout.FRAMES + draft.draw(_frame) * SLOT & -size


def s2_entry(draft: Draft, table: Table) -> Make:
    """Draw the entries of a random stage-2 path."""

    def make(level: int) -> int:
        what = draft.draw(_s2_last if level == LAST_LEVEL else _s2_upper)
        if what == "invalid":
            return draft.draw(_word) & ~d.VALID.mask
        if what in ("leaf", "reserved"):
            return _s2_leaf(draft, table, level) ^ (d.TYPE.mask if what == "reserved" else 0)
        return _s2_pointer(draft, table, what)

    return make


def _s2_pointer(draft: Draft, table: Table, what: str = "table") -> int:
    """A table descriptor for a new page, or one that is wrong in the way that ``what`` names."""
    pa = draft.page(table.regime.granule.size)
    table.backing[pa] = pa
    fmt, ignored = table.regime.format, 0
    if what == "table_beyond":
        pa |= (1 << table.regime.output_bits) & fmt.address_field()
    if what == "table_nowhere":
        pa = draft.silicon.ram_end
    if what == "table_with_ignored_bits":
        ignored = draft.draw(_word) & (_IN_TABLES | d.AP_TABLE.mask | d.XN_TABLE.mask)
    return d.encode(d.Table(pa), 0, fmt) | ignored


def s2_fixed(draft: Draft, table: Table, pa: int, perfect: bool) -> Make:
    """Draw the entries of a path to a page at ``pa``; ``perfect``: with all rights."""

    def make(level: int) -> int:
        if level < LAST_LEVEL:
            return _s2_pointer(draft, table)
        page = pa & -table.regime.granule.size
        if perfect:
            return d.encode(d.LeafFields(page), level, table.regime.format)
        home = page if draft.draw(_home) == "frame" else draft.silicon.ram_end
        return _s2_leaf(draft, table, level, home)

    return make


# -- stage 1 -------------------------------------------------------------------------------------------------


def s1_entry(draft: Draft, upper: Table, free: list[int], targets: list[int]) -> Make:
    """Draw the entries of a stage-1 path; tables are at the IPAs in ``free``, leaves map ``targets``."""
    draw, fmt = draft.draw, upper.regime.format

    def make(level: int) -> int:
        what = draw(_s1_last if level == LAST_LEVEL else _s1_upper)
        if what == "invalid":
            return draw(_word) & ~d.VALID.mask
        if what == "table_astray":  # an IPA without a table
            return stage1.table(draw(st.sampled_from(targets)) & fmt.address_field())
        if what.startswith("table") and free:
            ignored = draw(_word) & _IN_TABLES if what == "table_with_ignored_bits" else 0
            return stage1.table(free.pop()) | draw(_s1_limit) | ignored
        change = draw(_s1_change)
        if change == _ANYTHING:
            change = draw(_word) & _S1_RANDOM
        ipa = draw(st.sampled_from(targets)) & -(1 << fmt.granule.level_shift(level))
        if what == "leaf_beyond":
            ipa |= 1 << upper.regime.output_bits
        page = d.TYPE.put(level == LAST_LEVEL and what != "reserved")
        return (_GOOD_S1 ^ change) | ipa & fmt.address_field() | page

    return make
