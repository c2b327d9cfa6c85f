"""Hypothesis strategies that make worlds: random, but drawn to the edges.

A table is made path by path: an address is chosen (first page, last page, both sides of a seam between concatenated
tables), and on the way down every entry that does not exist yet is drawn: a table, a block, a page, or something
wrong. The harness and the guest's own tables get their paths first, so that the guest can run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product

from hypothesis import strategies as st

from arm_kvm.conform import layout
from arm_kvm.conform.case import Probe, Registers, Silicon, TableWorld
from arm_kvm.conform.departures import IPA_32_BITS
from arm_kvm.conform.program import Program
from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch import regime, stage1
from arm_kvm.model.arch.faults import Access, Direction
from arm_kvm.model.arch.granule import KIB4, KIB64, LAST_LEVEL, Granule
from arm_kvm.model.arch.regime import Regime

_SLOT = 0x1_0000  #: what the harness and the guest's tables are aligned to: the largest page
_UPPER_VA = {True: 0xFE00_0000, False: 0xFFFF_FFFF_FE00_0000}  #: 25-bit upper ranges, by Armv7

# -- shapes of tables ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Values of VTCR that are consistent with each other."""

    granule: Granule
    sl0: int
    input_bits: int


_TG0 = {granule: number for number, granule in regime.TG0.items()}


def _edges(low: int, high: int) -> list[int]:
    """Widths of an input range: its ends, and what lies around where tables begin to be concatenated."""
    middle = (low + high) // 2
    return sorted({n for n in (low, low + 1, middle, high - 4, high - 3, high - 1, high) if low <= n <= high})


@cache
def stage2_shapes(silicon: Silicon) -> list[Shape]:
    """All start levels, each with the edges of its input widths.

    KVM's own choice comes first: failures shrink to it.
    """
    widths: dict[tuple[Granule, int], list[int]] = {}
    for shape, why in _all_shapes(silicon):
        if why is None:
            widths.setdefault((shape.granule, shape.sl0), []).append(shape.input_bits)
    chosen = [Shape(*start, bits) for start, found in widths.items() for bits in _edges(min(found), max(found))]
    return sorted(chosen, key=lambda s: (s != Shape(KIB4, 1, 40), s.granule.shift, s.sl0, -s.input_bits))


@cache
def _impossible_shapes(silicon: Silicon) -> list[Shape]:
    """Values of VTCR_EL2 that contradict each other, and of which the architecture says what happens."""
    return [shape for shape, why in _all_shapes(silicon) if why is not None and why.level0]


def _all_shapes(silicon: Silicon) -> Iterator[tuple[Shape, regime.ImpossibleRegime | None]]:
    """Every value of the fields that make a shape, and what the model has against it."""
    granules = (KIB4,) if silicon.armv7 else silicon.features.granules
    for granule, sl0, bits in product(granules, range(4), range(25, 41) if silicon.armv7 else range(16, 49)):
        shape = Shape(granule, sl0, bits)
        try:
            TableWorld(silicon, Registers(0, vtcr(shape, silicon, 0), 0, 0)).stage2()
        except regime.ImpossibleRegime as e:
            yield shape, e
        else:
            yield shape, None


def vtcr(shape: Shape, silicon: Silicon, extra: int) -> int:
    """VTCR for a shape; ``extra``: PS and what else is optional."""
    if silicon.armv7:
        size = 32 - shape.input_bits & 0x1F
        return 1 << 31 | shape.sl0 << 6 | (size & 0x10) | (size & 0xF) | 3 << 12 | 5 << 8
    return 1 << 31 | (64 - shape.input_bits) | shape.sl0 << 6 | _TG0[shape.granule] << 14 | 3 << 12 | 5 << 8 | extra


# -- single entries ------------------------------------------------------------------------------------------

_GOOD_S2 = d.encode(d.LeafFields(0), LAST_LEVEL) & ~d.TYPE.mask
_GOOD_S1 = d.VALID.mask | d.AF.mask | d.AP.put(1) | d.SH.put(d.Shareability.INNER)

#: Stands for any change of any attribute, ignored bits among them.
_ANYTHING = -1

#: One thing changed: the corners of each field. The first is no change.
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
_IGNORED = d.SOFTWARE.mask | d.FNXS.mask  #: in a leaf: the operating system's, and bit 11 (stage 1: nG)
_S2_RANDOM = d.MEMATTR.mask | d.S2AP.mask | d.SH.mask | d.AF.mask | d.DBM.mask | d.CONTIGUOUS.mask | d.XN.mask
_S2_RANDOM |= _IGNORED | d.PBHA.mask | 1 << 63
_S1_RANDOM = d.ATTRINDX.mask | d.AP.mask | d.SH.mask | d.AF.mask | d.UXN.mask | d.PXN.mask | _IGNORED | 1 << 5
_IN_TABLES = 0xFFC | 0xFF << 51 | 1 << 63  #: ignored in a table entry of either stage (NSTable, in Non-secure state)

_s2_change = st.sampled_from(_S2_CHANGES)
_s1_change = st.sampled_from(_S1_CHANGES)
_s1_limit = st.sampled_from(_S1_LIMITS)
_word = st.integers(0, (1 << 64) - 1)
_percent = st.integers(0, 99)
_boolean = st.booleans()


def _weighted(**weights: int):
    """One of these words, each as often as its weight says; shrinks to the first."""
    return st.sampled_from([word for word, weight in weights.items() for _ in range(weight)])


_s2_upper = _weighted(table=10, leaf=6, table_with_ignored_bits=2, table_beyond=1, table_nowhere=1, invalid=2)
_s2_last = _weighted(leaf=16, reserved=1, invalid=2)
_s1_upper = _weighted(table=10, leaf=4, table_with_ignored_bits=3, table_astray=1, leaf_beyond=1, invalid=1)
_s1_last = _weighted(leaf=14, leaf_beyond=1, reserved=1, invalid=1)
_where = _weighted(frame=14, top=2, beyond=2, misaligned=1, nowhere=1)
_home = _weighted(frame=19, nowhere=1)
_frame = st.integers(0, 7)

_MAIR_BYTES = (0x44, 0x00, 0x04, 0x08, 0x0C, 0xBB, 0x73, 0x4F, 0xF4, 0x37, 0x77, 0x33, 0xAA, 0xEE, 0x1B, 0xB4, 0x5D)
#: MAIR: attribute 0 is write-back, the others any base encoding: every byte at every place.
_MAIRS = tuple(
    int.from_bytes(bytes((0xFF, *(_MAIR_BYTES[(start + step * i) % len(_MAIR_BYTES)] for i in range(7)))), "little")
    for step in (1, 3)
    for start in range(len(_MAIR_BYTES))
)

Make = Callable[[int], int]  #: draws the entry of a level


# -- one table, path by path ----------------------------------------------------------------------------------


@dataclass
class _Draft:
    """What is made for one world. ``words`` by physical address; :meth:`page` hands out fresh pages of the arena."""

    draw: Callable
    silicon: Silicon
    words: dict[int, int] = field(default_factory=dict)
    next_page: int = layout.ARENA

    def page(self, size: int = _SLOT) -> int:
        self.next_page = -(-self.next_page // size) * size
        pa = self.next_page
        self.next_page += size
        return pa

    def path(self, table: _Table, ia: int, make: Make) -> None:
        """Walk down to ``ia``; draw each missing entry with ``make(level)`` until one is not a table."""
        at, level = table.backing[table.root], table.regime.start_level
        while True:
            entry = at + 8 * table.regime.index(ia, level)
            word = self.words.get(entry)
            if word is None:
                word = self.words[entry] = make(level)
            if d.kind(word, level, table.regime.granule) is not d.EntryKind.TABLE:
                return
            at = table.backing.get(word & table.regime.format.address_field())
            if at is None:  # a pointer that leads astray
                return
            level += 1


@dataclass
class _Table:
    """A table in the making. ``backing``: address as its entries know it -> physical address (the same, at stage 2)."""

    regime: Regime
    root: int
    backing: dict[int, int]


def _s2_leaf(draft: _Draft, table: _Table, level: int, address: int | None = None) -> int:
    """A stage-2 block or page, mostly of the frames, mostly right."""
    draw, fmt = draft.draw, table.regime.format
    change = draw(_s2_change)
    if change == _ANYTHING:
        change = draw(_word) & _S2_RANDOM
    if address is None:
        address = _output(draft, table.regime, 1 << fmt.granule.level_shift(level))
    good = _GOOD_S2 ^ d.MEMATTR.put(fmt.normal ^ d.MemAttr.NORMAL_WB)
    return (good ^ change) | address | d.TYPE.put(level == LAST_LEVEL)


def _output(draft: _Draft, below: Regime, size: int) -> int:
    """An output address: a frame, or an edge of physical memory."""
    top, field_ = 1 << below.output_bits, below.format.address_field()
    match draft.draw(_where):
        case "top":
            return (top - size) & field_
        case "beyond":  # if the descriptor can say so
            return layout.FRAMES & -size | top & field_
        case "misaligned":
            return layout.FRAMES & -size | (below.granule.size if size > below.granule.size else 0)
        case "nowhere":
            return draft.silicon.ram_end & -size
    return layout.FRAMES + draft.draw(_frame) * _SLOT & -size


def _s2_entry(draft: _Draft, table: _Table) -> Make:
    """Draws the entries of a random stage-2 path."""

    def make(level: int) -> int:
        what = draft.draw(_s2_last if level == LAST_LEVEL else _s2_upper)
        if what == "invalid":
            return draft.draw(_word) & ~d.VALID.mask
        if what in ("leaf", "reserved"):
            return _s2_leaf(draft, table, level) ^ (d.TYPE.mask if what == "reserved" else 0)
        return _s2_pointer(draft, table, what)

    return make


def _s2_pointer(draft: _Draft, table: _Table, what: str = "table") -> int:
    """A table descriptor with a fresh page, or one that is wrong as ``what`` says."""
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


def _s2_fixed(draft: _Draft, table: _Table, pa: int, perfect: bool) -> Make:
    """Entries of a path that leads to a page at ``pa``; ``perfect``: and grants everything."""

    def make(level: int) -> int:
        if level < LAST_LEVEL:
            return _s2_pointer(draft, table)
        page = pa & -table.regime.granule.size
        if perfect:
            return d.encode(d.LeafFields(page), level, table.regime.format)
        home = page if draft.draw(_home) == "frame" else draft.silicon.ram_end
        return _s2_leaf(draft, table, level, home)

    return make


# -- whole worlds ----------------------------------------------------------------------------------------------


def _slots(input_bits: int) -> list[int]:
    """Places of the harness and of guest tables in IPA space: low, high, and around the middle."""
    top, middle = 1 << input_bits, 1 << (input_bits - 1)
    near = [middle + k * _SLOT for k in (1, 2)]
    places = [k * _SLOT for k in range(1, 7)] + [top - k * _SLOT for k in range(2, 6)] + near
    return sorted({p for p in places if 0 <= p < top}) or [0]


def _ipas(table: _Table) -> list[int]:
    """Addresses worth a path: both ends of the space, both sides of each seam between concatenated tables."""
    one = 1 << (table.regime.granule.level_shift(table.regime.start_level) + table.regime.granule.stride)
    top = table.regime.input_size
    seams = [n * one for n in range(1, min(table.regime.root_pages, 16))]
    page = table.regime.granule.size
    return [0, top - page, *(s - page for s in seams), *seams, page, top // 2]


@st.composite
def worlds(draw, silicon: Silicon, program: Program) -> TableWorld:
    """A world with everything that a probe needs."""
    if draw(_percent) >= 98 and not silicon.armv7:
        return _impossible(draw, silicon)
    draft = _Draft(draw, silicon)
    shape = draw(st.sampled_from(stage2_shapes(silicon)))
    hcr, extra = _options(draw, silicon, shape)
    vmid = draw(_word) & (0xFFFF if silicon.features.vmid16 and not silicon.armv7 else 0xFF)
    cnp = 0 if silicon.armv7 else int(draw(_boolean))
    registers = Registers(hcr, vtcr(shape, silicon, extra), 0, _SCTLR[silicon.armv7])
    root = _root(draft, TableWorld(silicon, registers).stage2())
    registers = replace(registers, vttbr=root | vmid << 48 | cnp)
    below = TableWorld(silicon, registers).stage2()
    table = _Table(below, root, {root: root})
    slots = _slots(shape.input_bits)
    with_stage1 = len(slots) > 4 and draw(_boolean)
    if (silicon.armv7 and not with_stage1) or _loses_ipa_bits(silicon):
        slots = [s for s in slots if s < 1 << 32]
    harness = draw(st.sampled_from(slots))
    draft.path(table, harness, _s2_fixed(draft, table, layout.HARNESS, perfect=True))
    if with_stage1:
        registers, bases, harness_va = _with_stage1(
            draft, table, registers, harness, [s for s in slots if s != harness]
        )
    else:
        bases, harness_va = _interesting(draw, table), harness
        for ipa in bases:
            draft.path(table, ipa, _s2_entry(draft, table))
    registers = replace(registers, vbar=harness_va & _va_mask(silicon))
    probes = _probes(draw, silicon, program, bases, harness_va)
    return TableWorld(silicon, registers, draft.words, harness_va, harness, tuple(probes))


def _loses_ipa_bits(silicon: Silicon) -> bool:
    return silicon.qemu == "qemu-system-arm" and IPA_32_BITS.shown_by(silicon)


def _impossible(draw, silicon: Silicon) -> TableWorld:
    """A regime that cannot be, or a root beyond physical memory: no guest runs, the AT instructions still answer."""
    root = layout.ARENA
    if draw(_boolean):
        shape = draw(st.sampled_from(_impossible_shapes(silicon)))
        hcr, extra = _options(draw, silicon, shape)
    else:
        shape = draw(st.sampled_from(stage2_shapes(silicon)))
        hcr, extra = _options(draw, silicon, shape)
        root |= 1 << min(_PS[extra >> 16 & 7], silicon.features.pa_bits, 48) & (1 << 48) - 1
    registers = Registers(hcr, vtcr(shape, silicon, extra), root, _SCTLR[False])
    if draw(_boolean):
        granule = draw(st.sampled_from(_stage1_granules(silicon)))
        tcr = _tcr(draw, silicon, granule, draw(st.sampled_from(_va_widths(silicon, granule))), 0)
        registers = replace(registers, sctlr=registers.sctlr | regime.SCTLR_M, tcr=tcr, mair=_MAIRS[0])
    vas = draw(st.lists(st.integers(0, (1 << 55) - 1), min_size=1, max_size=3))
    return TableWorld(silicon, registers, probes=tuple(Probe.at(op, va & ~0xF) for va in vas for op in range(4)))


def _va_mask(silicon: Silicon) -> int:
    return (1 << 32) - 1 if silicon.armv7 else (1 << 64) - 1


def _root(draft: _Draft, below: Regime) -> int:
    """Where the stage-2 root is: anywhere in the first half of the arena that it is aligned."""
    size = max(64, below.root_size)
    places = max(1, min(16, layout.ARENA_SIZE // 2 // size))
    draft.next_page += draft.draw(st.integers(0, places - 1)) * size
    return draft.page(size)


def _interesting(draw, table: _Table) -> list[int]:
    places = st.sampled_from(_ipas(table))
    return [
        draw(places) if draw(_boolean) else draw(_word) % table.regime.input_size & -table.regime.granule.size
        for _ in range(draw(st.integers(1, 4)))
    ]


_HCR = {True: 1 << 13 | 1, False: 1 << 31 | 1 << 13 | 1}  #: TWI, VM; RW in AArch64
_SCTLR = {True: 0x00C5_0078, False: 0x30D5_0800}  #: RES1 bits, nTWI and nTWE
_PS = {ps: regime.PHYSICAL_SIZES[ps] for ps in (2, 5, 4, 3, 1, 0)}  #: VTCR_EL2.PS, TCR_EL1.IPS: bits; KVM's own first


def _physical_size(draw, shape: Shape) -> int:
    """VTCR_EL2.PS, mostly one that is at least as wide as the IPA space."""
    if draw(_percent) < 90 and (wide := [ps for ps, bits in _PS.items() if bits >= shape.input_bits]):
        return draw(st.sampled_from(wide))
    return draw(st.sampled_from(tuple(_PS)))


def _options(draw, silicon: Silicon, shape: Shape) -> tuple[int, int]:
    """HCR, and the optional fields of VTCR_EL2."""
    hcr = _HCR[silicon.armv7] | (regime.HCR_PTW if draw(_percent) >= 80 else 0)
    if silicon.armv7:
        return hcr, 0
    if silicon.features.fwb and draw(_boolean):
        hcr |= regime.HCR_FWB
    extra = _physical_size(draw, shape) << 16
    if silicon.features.hafdbs:
        extra |= draw(st.sampled_from((0, 0, 1, 2, 3, 3))) << 21
    return hcr, extra | silicon.features.vmid16 << 19


# -- stage 1 -------------------------------------------------------------------------------------------------


def _with_stage1(draft: _Draft, table: _Table, registers: Registers, harness: int, slots: list[int]):
    """Turn stage 1 on: a root and a few tables at IPAs of their own, VAs that lead to interesting IPAs."""
    draw, silicon = draft.draw, draft.silicon
    homes = {}
    for ipa in draw(st.lists(st.sampled_from(slots), min_size=1, max_size=5, unique=True)):
        homes[ipa] = draft.page()
        draft.path(table, ipa, _s2_fixed(draft, table, homes[ipa], perfect=draw(_percent) < 60))
    granule = KIB4 if silicon.armv7 else draw(st.sampled_from(_stage1_granules(silicon)))
    va_bits = draw(st.sampled_from(_va_widths(silicon, granule)))
    first, *free = homes
    bits = regime.SCTLR_M | draw(st.sampled_from((0, 0, 0, regime.SCTLR_WXN)))
    if silicon.armv7:
        bits |= draw(st.sampled_from((0, 0, regime.SCTLR_UWXN)))
    registers = replace(
        registers,
        sctlr=registers.sctlr | bits,
        tcr=_tcr(draw, silicon, granule, va_bits, harness),
        ttbr0=first,
        ttbr1=harness + layout.UPPER_TABLE,
        mair=draw(st.sampled_from(_MAIRS)),
    )
    size = max(64, TableWorld(silicon, registers).stage1().regime.root_size)
    offset = draw(st.integers(0, 3)) * size if size < 0x1000 else 0  # a small root is anywhere it is aligned
    registers = replace(registers, ttbr0=first + offset)
    homes[first + offset] = homes[first] + offset
    upper = _Table(TableWorld(silicon, registers).stage1().regime, first + offset, dict(homes))
    targets = _interesting(draw, table)
    top = min(1 << va_bits, _UPPER_VA[silicon.armv7])
    vas = [v & -_SLOT for v in (0, top - 1, draw(_word) % top)][: draw(st.integers(1, 3))]
    for va in vas:
        draft.path(upper, va, _s1_entry(draft, upper, free, targets))
    for ipa in targets:
        draft.path(table, ipa, _s2_entry(draft, table))
    block = harness & -layout.UPPER_BLOCK
    harness_va = _UPPER_VA[silicon.armv7] + harness - block
    return registers, vas, harness_va


def _va_widths(silicon: Silicon, granule: Granule) -> list[int]:
    if silicon.armv7:
        return [32, 31, 30, 29, 26, 25]
    least = 64 - ((47 if granule is KIB64 else 48) if silicon.features.small_tables else 39)
    return sorted({48, 39, 36, least, least + 1, 42, 40}, reverse=True)


def _stage1_granules(silicon: Silicon) -> list[Granule]:
    wide = silicon.features.pa_bits > 48  # 64 KiB is then another format
    return [g for g in silicon.features.stage1_granules if g is not KIB64 or not wide]


def _tcr(draw, silicon: Silicon, granule: Granule, va_bits: int, harness: int) -> int:
    if silicon.armv7:
        return 1 << 31 | 32 - va_bits | 7 << 16
    enough = sorted((ips for ips, bits in _PS.items() if not (harness + _SLOT - 1) >> bits), reverse=True)
    ips = draw(st.sampled_from(enough))
    return 64 - va_bits | _TG0[granule] << 14 | 39 << 16 | 2 << 30 | ips << 32


def _s1_entry(draft: _Draft, upper: _Table, free: list[int], targets: list[int]) -> Make:
    """Draws the entries of a stage-1 path; tables come from the homes that are left."""
    draw, fmt = draft.draw, upper.regime.format

    def make(level: int) -> int:
        what = draw(_s1_last if level == LAST_LEVEL else _s1_upper)
        if what == "invalid":
            return draw(_word) & ~d.VALID.mask
        if what == "table_astray":  # an IPA that nobody made a table at
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


# -- probes --------------------------------------------------------------------------------------------------

_OFFSETS = (0, 0xFF0, 0xFFF0, 0x10, layout.FRAMES & 0x3FFF_FFFF, 0x1F_FFF0, 0x3FFF_FFF0)


def _probes(draw, silicon: Silicon, program: Program, bases: list[int], harness: int) -> list[Probe]:
    """Each address: the four AT instructions; a load and a store by EL1, by EL1 with EL0's rights, by EL0; fetches."""
    probes = []
    top = _UPPER_VA[True] if silicon.armv7 else 1 << 64
    for base in bases:
        for offset in draw(st.lists(st.sampled_from(_OFFSETS), min_size=1, max_size=3, unique=True)):
            va = base + offset
            if draw(_percent) >= 95:  # beyond the range
                va |= 1 << draw(st.sampled_from(_STRAY_BITS))
            if va < top:
                probes += _questions(draw, program, va & _va_mask(silicon))
    return probes


#: Bits that lead an address out of its range. (Bit 55 would choose the upper range.)
_STRAY_BITS = (*range(25, 55), *range(56, 64))


def _questions(draw, program: Program, va: int) -> list[Probe]:
    value, data = draw(_word), va | 8
    run = layout.OPS.index("RUN")
    probes = [Probe.at(op, va) for op in range(4)]
    for write in (True, False):
        direction = Direction.WRITE if write else Direction.READ
        plain, unprivileged = gadgets_of(program, write, False), gadgets_of(program, write, True)
        one, other = plain[value % len(plain)], unprivileged[value % len(unprivileged)]
        probes.append(Probe(run, data, Access(direction), one, value))
        probes.append(Probe(run, data, Access(direction, el0=True), other, value))
        probes.append(Probe(run, data, Access(direction, el0=True), one, value, user=True))
    return probes + [Probe(run, va, Access(Direction.FETCH, el0), user=el0) for el0 in (False, True)]


@cache
def gadgets_of(program: Program, write: bool, el0: bool) -> list[int]:
    """Numbers of the gadgets that load or store with these rights."""
    return [n for n, g in enumerate(program.gadgets) if g.access.write == write and g.el0 == el0]
