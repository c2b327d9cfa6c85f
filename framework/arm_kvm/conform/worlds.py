"""The hypothesis strategy for worlds: random, with a preference for edges.

The tables map addresses at edges: the first and the last page, both sides of a seam between concatenated tables. The
harness and the guest's own tables are mapped first, so that the guest can run.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from arm_kvm.conform import layout
from arm_kvm.conform.case import Probe, Registers, Silicon, TableWorld
from arm_kvm.conform.departures import IPA_32_BITS
from arm_kvm.conform.probes import draw_probes
from arm_kvm.conform.program import Program
from arm_kvm.conform.registers import (
    PHYSICAL_SIZES,
    SCTLR,
    SLOT,
    UPPER_VA,
    draw_options,
    draw_tcr,
    impossible_shapes,
    stage1_granules,
    stage2_shapes,
    va_mask,
    va_widths,
    vtcr,
)
from arm_kvm.conform.tables import Draft, Table, s1_entry, s2_entry, s2_fixed
from arm_kvm.model.arch import regime
from arm_kvm.model.arch.granule import KIB4
from arm_kvm.model.arch.regime import Regime

_word = st.integers(0, (1 << 64) - 1)
_percent = st.integers(0, 99)
_boolean = st.booleans()

_MAIR_BYTES = (0x44, 0x00, 0x04, 0x08, 0x0C, 0xBB, 0x73, 0x4F, 0xF4, 0x37, 0x77, 0x33, 0xAA, 0xEE, 0x1B, 0xB4, 0x5D)
#: Values of MAIR: attribute 0 is write-back; among the others every base encoding occurs at every index.
_MAIRS = tuple(
    int.from_bytes(bytes((0xFF, *(_MAIR_BYTES[(start + step * i) % len(_MAIR_BYTES)] for i in range(7)))), "little")
    for step in (1, 3)
    for start in range(len(_MAIR_BYTES))
)

# -- whole worlds ----------------------------------------------------------------------------------------------


def _slots(input_bits: int) -> list[int]:
    """Places of the harness and of guest tables in IPA space: low, high, and around the middle."""
    top, middle = 1 << input_bits, 1 << (input_bits - 1)
    near = [middle + k * SLOT for k in (1, 2)]
    places = [k * SLOT for k in range(1, 7)] + [top - k * SLOT for k in range(2, 6)] + near
    return sorted({p for p in places if 0 <= p < top}) or [0]


def _ipas(table: Table) -> list[int]:
    """Addresses at edges: both ends of the IPA space, both sides of each seam between concatenated tables."""
    one = 1 << (table.regime.granule.level_shift(table.regime.start_level) + table.regime.granule.stride)
    top = table.regime.input_size
    seams = [n * one for n in range(1, min(table.regime.root_pages, 16))]
    page = table.regime.granule.size
    return [0, top - page, *(s - page for s in seams), *seams, page, top // 2]


@st.composite
def worlds(draw: DrawFn, silicon: Silicon, program: Program) -> TableWorld:
    """Draw a world."""
    if draw(_percent) >= 98 and not silicon.armv7:
        return _impossible(draw, silicon)
    draft = Draft(draw, silicon)
    shape = draw(st.sampled_from(stage2_shapes(silicon)))
    hcr, extra = draw_options(draw, silicon, shape)
    vmid = draw(_word) & (0xFFFF if silicon.features.vmid16 and not silicon.armv7 else 0xFF)
    cnp = 0 if silicon.armv7 else int(draw(_boolean))
    registers = Registers(hcr, vtcr(shape, silicon, extra), 0, SCTLR[silicon.armv7])
    root = _root(draft, TableWorld(silicon, registers).stage2())
    registers = replace(registers, vttbr=root | vmid << 48 | cnp)
    below = TableWorld(silicon, registers).stage2()
    table = Table(below, root, {root: root})
    slots = _slots(shape.input_bits)
    with_stage1 = len(slots) > 4 and draw(_boolean)
    if (silicon.armv7 and not with_stage1) or _loses_ipa_bits(silicon):
        slots = [s for s in slots if s < 1 << 32]
    harness = draw(st.sampled_from(slots))
    draft.path(table, harness, s2_fixed(draft, table, layout.HARNESS, perfect=True))
    if with_stage1:
        registers, bases, harness_va = _with_stage1(
            draft, table, registers, harness, [s for s in slots if s != harness]
        )
    else:
        bases, harness_va = _interesting(draw, table), harness
        for ipa in bases:
            draft.path(table, ipa, s2_entry(draft, table))
    registers = replace(registers, vbar=harness_va & va_mask(silicon))
    probes = draw_probes(draw, silicon, program, bases, harness_va)
    return TableWorld(silicon, registers, draft.words, harness_va, harness, tuple(probes))


def _loses_ipa_bits(silicon: Silicon) -> bool:
    return silicon.qemu == "qemu-system-arm" and IPA_32_BITS.shown_by(silicon)


def _impossible(draw: DrawFn, silicon: Silicon) -> TableWorld:
    """An impossible regime, or a root beyond physical memory. No guest can run, but AT instructions give a result."""
    root = layout.ARENA
    if draw(_boolean):
        shape = draw(st.sampled_from(impossible_shapes(silicon)))
        hcr, extra = draw_options(draw, silicon, shape)
    else:
        shape = draw(st.sampled_from(stage2_shapes(silicon)))
        hcr, extra = draw_options(draw, silicon, shape)
        root |= 1 << min(PHYSICAL_SIZES[extra >> 16 & 7], silicon.features.pa_bits, 48) & (1 << 48) - 1
    registers = Registers(hcr, vtcr(shape, silicon, extra), root, SCTLR[False])
    if draw(_boolean):
        granule = draw(st.sampled_from(stage1_granules(silicon)))
        tcr = draw_tcr(draw, silicon, granule, draw(st.sampled_from(va_widths(silicon, granule))), 0)
        registers = replace(registers, sctlr=registers.sctlr | regime.SCTLR_M, tcr=tcr, mair=_MAIRS[0])
    vas = draw(st.lists(st.integers(0, (1 << 55) - 1), min_size=1, max_size=3))
    return TableWorld(silicon, registers, probes=tuple(Probe.at(op, va & ~0xF) for va in vas for op in range(4)))


def _root(draft: Draft, below: Regime) -> int:
    """An aligned address for the stage-2 root in the first half of the arena."""
    size = max(64, below.root_size)
    places = max(1, min(16, layout.ARENA_SIZE // 2 // size))
    draft.next_page += draft.draw(st.integers(0, places - 1)) * size
    return draft.page(size)


def _interesting(draw: DrawFn, table: Table) -> list[int]:
    """IPAs at edges, or random ones."""
    places = st.sampled_from(_ipas(table))
    return [
        draw(places) if draw(_boolean) else draw(_word) % table.regime.input_size & -table.regime.granule.size
        for _ in range(draw(st.integers(1, 4)))
    ]


# -- stage 1 -------------------------------------------------------------------------------------------------


def _with_stage1(
    draft: Draft, table: Table, registers: Registers, harness: int, slots: list[int]
) -> tuple[Registers, list[int], int]:
    """Turn stage 1 on: a root and a few tables at IPAs of their own, and VAs that map to IPAs at edges.

    Return the registers, the VAs, and the VA of the harness.
    """
    draw, silicon = draft.draw, draft.silicon
    homes: dict[int, int] = {}
    for ipa in draw(st.lists(st.sampled_from(slots), min_size=1, max_size=5, unique=True)):
        homes[ipa] = draft.page()
        draft.path(table, ipa, s2_fixed(draft, table, homes[ipa], perfect=draw(_percent) < 60))
    granule = KIB4 if silicon.armv7 else draw(st.sampled_from(stage1_granules(silicon)))
    va_bits = draw(st.sampled_from(va_widths(silicon, granule)))
    first, *free = homes
    bits = regime.SCTLR_M | draw(st.sampled_from((0, 0, 0, regime.SCTLR_WXN)))
    if silicon.armv7:
        bits |= draw(st.sampled_from((0, 0, regime.SCTLR_UWXN)))
    registers = replace(
        registers,
        sctlr=registers.sctlr | bits,
        tcr=draw_tcr(draw, silicon, granule, va_bits, harness),
        ttbr0=first,
        ttbr1=harness + layout.UPPER_TABLE,
        mair=draw(st.sampled_from(_MAIRS)),
    )
    size = max(64, TableWorld(silicon, registers).enabled_stage1().regime.root_size)
    offset = draw(st.integers(0, 3)) * size if size < 0x1000 else 0  # a small root may be anywhere in its page
    registers = replace(registers, ttbr0=first + offset)
    homes[first + offset] = homes[first] + offset
    upper = Table(TableWorld(silicon, registers).enabled_stage1().regime, first + offset, dict(homes))
    targets = _interesting(draw, table)
    top = min(1 << va_bits, UPPER_VA[silicon.armv7])
    vas = [v & -SLOT for v in (0, top - 1, draw(_word) % top)][: draw(st.integers(1, 3))]
    for va in vas:
        draft.path(upper, va, s1_entry(draft, upper, free, targets))
    for ipa in targets:
        draft.path(table, ipa, s2_entry(draft, table))
    block = harness & -layout.UPPER_BLOCK
    harness_va = UPPER_VA[silicon.armv7] + harness - block
    return registers, vas, harness_va
