"""Sweeps: every leaf and nothing else, every address as the leaves map it, malformed entries named and not followed."""

import numpy as np
import pytest
from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch import regime, sweep
from arm_kvm.model.arch.granule import KIB4, KIB64
from hypothesis import given
from hypothesis import strategies as st

from ..memory import BASE, Pages, Table

A15_VTCR = 0x80003558
A57_VTCR = 0x80023558
PAGE = 0x1000


def a15(root=BASE):
    return regime.stage2_armv7(root | 5 << 48, A15_VTCR)


@st.composite
def tables(draw):
    """A random table of pages and blocks, and what each input address must translate to."""
    memory = Pages()
    table = Table(memory, a15(memory.page(2)))
    expected = {}
    for _ in range(draw(st.integers(0, 12))):
        level = draw(st.sampled_from([2, 3, 3, 3]))
        shift = KIB4.level_shift(level)
        ia = draw(st.sampled_from([0, 1 << 30, (1 << 40) - (1 << 30)])) + (draw(st.integers(0, 511)) << shift)
        if any(a < ia + (1 << shift) and ia < a + size for a, (_, size) in expected.items()):
            continue
        pa = draw(st.integers(0, 255)) << shift
        table.put(ia, level, d.encode(d.LeafFields(pa), level, d.LPAE))
        expected[ia] = (pa, 1 << shift)
    return memory, table.regime, expected


@given(tables())
def test_a_sweep_finds_every_leaf_and_nothing_else(made):
    memory, r, expected = made
    found = sweep.sweep(r, memory)
    leaves = found.leaves
    assert list(zip(leaves.ia.tolist(), leaves.pa.tolist(), leaves.size.tolist(), strict=True)) == [
        (ia, pa, size) for ia, (pa, size) in sorted(expected.items())
    ]
    assert found.malformed == [] and len(leaves) == len(expected)


@given(tables(), st.lists(st.integers(0, (1 << 41) - 1), max_size=8))
def test_translate_agrees_with_the_sweep(made, elsewhere):
    memory, r, expected = made
    inside = [ia + offset for ia, (_, size) in expected.items() for offset in (0, size // 2 + 4, size - 1)]
    _, pas = sweep.translate(r, memory, np.array(inside + elsewhere, dtype=np.uint64))

    def by_hand(address):
        for ia, (pa, size) in expected.items():
            if ia <= address < ia + size:
                return pa + address - ia
        return 0

    assert pas.tolist() == [by_hand(a) for a in inside + elsewhere]


GOOD = d.encode(d.LeafFields(BASE), 3)
#: Why -> level, entry, and whether a walk goes through it all the same.
MALFORMED = {
    "reserved encoding": (3, GOOD & ~2, False),
    "beyond the 40-bit": (3, d.encode(d.LeafFields(1 << 41), 3), True),
    "not aligned": (2, d.encode(d.LeafFields(BASE), 2) | PAGE, True),
    "reserved shareability": (3, d.encode(d.LeafFields(BASE, sh=1), 3), True),
    "reserved MemAttr": (3, d.encode(d.LeafFields(BASE, memattr=0b0100), 3), True),
    "no RAM backs": (2, d.encode(d.Table(0x1000), 2), False),
}


@pytest.mark.parametrize("why", MALFORMED)
def test_malformed_entries_are_named_and_kept_where_a_walk_goes_through_them(why):
    level, desc, translates = MALFORMED[why]
    memory = Pages()
    r = regime.stage2_armv8(memory.page(2), A57_VTCR) if "40-bit" in why else a15(memory.page(2))
    table = Table(memory, r)
    table.put(0, 3, GOOD)
    at = table.put(1 << 31, level, desc)
    found = sweep.sweep(table.regime, memory)
    assert found.leaves.desc.tolist() == [GOOD, desc][: 1 + (translates and "40-bit" not in why)]
    (m,) = found.malformed
    assert why in m.why and (m.pa, m.ia, m.level, m.desc) == (at, 1 << 31, level, desc)


def test_a_root_without_memory():
    found = sweep.sweep(a15(0x1_0000_0000), Pages())
    assert [m.why for m in found.malformed] == ["a root table that no RAM backs"] and len(found.leaves) == 0


@pytest.mark.parametrize(("tg0", "sl0", "bits", "level"), [(0, 2, 44, 0), (1, 2, 44, 1)])
def test_a_block_above_the_first_level_of_blocks_is_malformed(tg0, sl0, bits, level):
    memory = Pages()
    r = regime.stage2_armv8(memory.page(16), 5 << 16 | tg0 << 14 | sl0 << 6 | 64 - bits)
    memory.store(r.root, GOOD & ~2)
    assert f"a block at level {level}" in sweep.sweep(r, memory).malformed[0].why
    assert sweep.resolve(r, memory, np.zeros(1, np.uint64)).status.tolist() == [0b000100 + level]


def test_stage_1_entries_are_judged_by_their_type_alone():
    """The bits of SH and MemAttr are other fields in stage 1."""
    memory = Pages()
    table = Table(memory, regime.stage1_armv7(memory.page(), 1 << 31))
    table.put(0, 3, d.encode(d.LeafFields(BASE, memattr=0b0100, sh=1), 3))
    table.put(PAGE, 3, GOOD & ~2)
    found = sweep.sweep(table.regime, memory)
    assert len(found.leaves) == 1 and [m.why for m in found.malformed] == ["reserved encoding (0b01) at the last level"]


def test_leaves_of_several_levels_come_in_order():
    memory = Pages()
    table = Table(memory, a15(memory.page(2)))
    for ia, level in ((4 << 20, 2), (0, 3), (1 << 30, 1)):
        table.put(ia, level, d.encode(d.LeafFields(0), level))
    leaves = sweep.sweep(table.regime, memory).leaves
    assert leaves.ia.tolist() == [0, 4 << 20, 1 << 30] and leaves.level.tolist() == [3, 2, 1]
    assert leaves[leaves.level == 2].size.tolist() == [2 << 20]


def test_a_large_granule():
    memory = Pages(256)
    r = regime.stage2_armv8(memory.page(16), 5 << 16 | 1 << 14 | 1 << 6 | 64 - 36)
    table_page = memory.page(16)
    memory.store(r.root, d.encode(d.Table(table_page), 2, r.format))
    memory.store(table_page + 8, d.encode(d.LeafFields(BASE), 3, r.format))
    leaves = sweep.sweep(r, memory).leaves
    assert (leaves.ia.tolist(), leaves.size.tolist(), r.granule) == ([1 << 16], [1 << 16], KIB64)
