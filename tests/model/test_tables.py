"""How many table pages a set of leaves needs: as many as a tree that is built from them has."""

import numpy as np
import pytest
from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch import regime, sweep
from arm_kvm.model.kvm import tables
from hypothesis import given
from hypothesis import strategies as st

from ..memory import Pages, Table

PAGE, BLOCK, GIB = 1 << 12, 1 << 21, 1 << 30
VTCR = {  # by levels below the root
    3: 5 << 16 | 2 << 6 | 64 - 48,
    2: 0x80023558,
    1: 5 << 16 | 0 << 6 | 64 - 34,
    0: 5 << 16 | 3 << 6 | 64 - 24,
}


def stage2(below, root=0x4000_0000):
    return regime.stage2_armv8(root, VTCR[below])


@given(st.sampled_from(list(VTCR)), st.lists(st.tuples(st.integers(0, (1 << 24) - 1), st.integers(0, 2)), max_size=12))
def test_as_many_as_the_tables_that_hold_the_leaves(below, picks):
    """In spaces of up to 16 TiB: pages and blocks, of which some lie in one table and some far apart."""
    memory = Pages(1024)
    r = stage2(below, memory.page(16))  # as many as a root can have
    table = Table(memory, r)
    for number, up in picks:
        level = max(3 - up, r.start_level)
        ia = (number << 12 + 9 * up) % r.input_size & -(1 << r.granule.level_shift(level))
        found = sweep.sweep(r, memory).leaves
        size = 1 << r.granule.level_shift(level)
        if level and not ((found.ia < ia + size) & (found.ia + found.size > ia)).any():
            table.put(ia, level, d.encode(d.LeafFields(0), level))
    found = sweep.sweep(r, memory)
    assert tables.needed(r, found.leaves.ia, found.leaves.level) == len(found.pages) - r.root_pages


@pytest.mark.parametrize("below", VTCR)
def test_a_page_far_from_all_others_needs_one_at_every_level_below_the_root(below):
    r = stage2(below)
    assert tables.needed(r, [0]) == tables.most_for_one_page(r) == below
    assert tables.needed(r, []) == 0


def test_what_is_shared_is_counted_once():
    r, here = stage2(2), 2 * GIB
    far = {PAGE: 2, BLOCK: 3, GIB: 4}
    assert {offset: tables.needed(r, [here, here + offset]) for offset in far} == far
    levels = np.array([2, 2, 1], dtype=np.uint8)
    assert tables.needed(r, np.array([here, here + BLOCK, 0], dtype=np.uint64), levels) == 1
