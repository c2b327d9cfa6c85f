"""The model: descriptors round trip, registers give the right shape, and two walkers agree."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.model import descriptors as d
from framework.model import memslots, regime, walk
from framework.model.memslots import Memslot, SlotFlags

from .memory import BASE, Pages, Table

A15_VTCR = 0x80003558  # what Linux 5.4 writes on the A15 board
A57_VTCR = 0x80023558  # what Linux 6.1 writes on the arm64 board
PAGE = 0x1000


def a15(root=BASE):
    return regime.stage2_armv7(root | 5 << 48, A15_VTCR)


# -- regimes -----------------------------------------------------------------------------------------


def test_a15_regime_is_kvms_40_bit_space():
    r = a15()
    assert (r.input_bits, r.start_level, r.entries, r.root_pages) == (40, 1, 1024, 2)
    assert (r.vmid, r.vmid_bits, r.output_bits) == (5, 8, 40)


def test_arm64_regime():
    r = regime.stage2_armv8(BASE | 7 << 48 | 1, A57_VTCR)
    assert (r.input_bits, r.start_level, r.root_pages, r.root) == (40, 1, 2, BASE)
    assert (r.vmid, r.vmid_bits, r.output_bits) == (7, 8, 40)
    wide = regime.stage2_armv8(BASE | 300 << 48, A57_VTCR | 1 << 19)
    assert (wide.vmid, wide.vmid_bits) == (300, 16)


def test_fwb_changes_the_encoding_of_normal_memory():
    assert regime.stage2_armv8(BASE, A57_VTCR).memattr_normal == 0b1111
    assert regime.stage2_armv8(BASE, A57_VTCR, regime.HCR_FWB).memattr_normal == 0b0110


def test_stage1_regimes():
    arm = regime.stage1_armv7(BASE, 1 << 31)
    assert (arm.input_bits, arm.start_level, arm.entries) == (32, 1, 4)
    arm64 = regime.stage1_armv8(BASE | 9 << 48, 16)
    assert (arm64.input_bits, arm64.start_level, arm64.entries, arm64.root) == (48, 0, 512, BASE)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: regime.stage2_armv7(BASE, A15_VTCR & ~0x10), "S does not repeat"),
        (lambda: regime.stage2_armv7(BASE, A15_VTCR | 0x80), "SL0"),
        (lambda: regime.stage2_armv7(BASE + PAGE, A15_VTCR), "not aligned"),
        (lambda: regime.stage2_armv8(BASE, A57_VTCR | 1 << 14), "TG0"),
        (lambda: regime.stage2_armv8(BASE, A57_VTCR | 7 << 16), "PS 7"),
        (lambda: regime.stage2_armv8(BASE, A57_VTCR & ~0xC0), "concatenated"),
        (lambda: regime.stage2_armv8(BASE, (A57_VTCR & ~0x3F) | 40), "does not reach"),
        (lambda: regime.stage1_armv7(BASE, 0), "EAE"),
        (lambda: regime.stage1_armv8(BASE, 1 << 14 | 16), "TG0"),
    ],
)
def test_impossible_registers_are_refused_with_the_reason(make, reason):
    with pytest.raises(regime.ImpossibleRegime, match=reason):
        make()


def test_a_regime_reads_like_one():
    assert "start level 1, 40-bit input, 40-bit output, VMID 5" in str(a15())


# -- descriptors -----------------------------------------------------------------------------------------


@given(
    page=st.integers(0, (1 << 28) - 1),
    write=st.booleans(),
    execute=st.booleans(),
    read=st.booleans(),
    memattr=st.sampled_from(d.MemAttr),
)
def test_a_leaf_decodes_to_what_was_encoded(page, write, execute, read, memattr):
    desc = d.block_or_page(page << 12, 3, write=write, execute=execute, read=read, memattr=memattr)
    assert (d.address(desc), d.s2_writable(desc), d.s2_executable(desc)) == (page << 12, write, execute)
    assert (d.s2_readable(desc), d.s2_memattr(desc), d.access_flag(desc)) == (read, memattr, True)
    assert d.is_valid(desc) and d.shareability(desc) == d.Shareability.INNER


def test_a_block_must_be_aligned():
    with pytest.raises(ValueError, match="not aligned"):
        d.block_or_page(BASE + PAGE, 2, write=True)


def test_linux_permission_bits():
    assert d.linux_arm_writable(0) and not d.linux_arm_writable(1 << 58)
    assert d.linux_arm64_writable(1 << 51) and not d.linux_arm64_writable(0)


# -- walks -------------------------------------------------------------------------------------------------


@st.composite
def tables(draw):
    """A random table of pages and blocks, and what each input address must translate to."""
    memory = Pages()
    table = Table(memory, a15(memory.page(2)))
    expected = {}
    for _ in range(draw(st.integers(0, 12))):
        level = draw(st.sampled_from([2, 3, 3, 3]))
        shift = d.level_shift(level)
        ia = draw(st.sampled_from([0, 1 << 30, (1 << 40) - (1 << 30)])) + (draw(st.integers(0, 511)) << shift)
        if any(a < ia + (1 << shift) and ia < a + size for a, (_, size) in expected.items()):
            continue
        pa = draw(st.integers(0, 255)) << shift
        table.put(ia, level, d.block_or_page(pa, level, write=draw(st.booleans())))
        expected[ia] = (pa, 1 << shift)
    return memory, table.regime, expected


@given(tables())
def test_walk_finds_every_leaf_and_nothing_else(made):
    memory, r, expected = made
    found = walk.walk(r, memory)
    assert (
        dict(
            zip(
                found.leaves.ia.tolist(),
                zip(found.leaves.pa.tolist(), found.leaves.size.tolist(), strict=True),
                strict=True,
            )
        )
        == expected
    )
    assert found.leaves.ia.tolist() == sorted(expected) and found.malformed == []


@given(tables(), st.lists(st.integers(0, (1 << 41) - 1), max_size=8))
def test_translate_agrees_with_walk(made, elsewhere):
    memory, r, expected = made
    inside = [ia + offset for ia, (_, size) in expected.items() for offset in (0, size // 2 + 4, size - 1)]
    _, pas = walk.translate(r, memory, np.array(inside + elsewhere, dtype=np.uint64))

    def by_hand(address):
        for ia, (pa, size) in expected.items():
            if ia <= address < ia + size:
                return pa + address - ia
        return 0

    assert pas.tolist() == [by_hand(a) for a in inside + elsewhere]


MALFORMED = {
    "reserved encoding": (3, d.block_or_page(BASE, 3, write=True) & ~2),
    "beyond the 40-bit": (3, d.block_or_page(1 << 41, 3, write=True)),
    "not aligned": (2, d.block_or_page(BASE, 2, write=True) | PAGE),
    "reserved shareability": (3, d.block_or_page(BASE, 3, write=True, sh=1)),
    "reserved MemAttr": (3, d.block_or_page(BASE, 3, write=True, memattr=0b0100)),
    "no RAM backs": (2, d.table(0x1000)),
}


@pytest.mark.parametrize("why", MALFORMED)
def test_malformed_entries_are_named_and_not_followed(why):
    level, desc = MALFORMED[why]
    memory = Pages()
    table = Table(memory, a15(memory.page(2)))
    good = d.block_or_page(BASE, 3, write=True)
    table.put(0, 3, good)
    at = table.put(1 << 31, level, desc)
    found = walk.walk(table.regime, memory)
    assert found.leaves.desc.tolist() == [good]
    (m,) = found.malformed
    assert why in m.why and (m.pa, m.ia, m.level, m.desc) == (at, 1 << 31, level, desc)


def test_a_block_at_level_0_is_malformed():
    memory = Pages()
    r = regime.stage2_armv8(memory.page(), (A57_VTCR & ~0xFF) | 2 << 6 | 64 - 44)
    memory.store(r.root, d.block_or_page(0, 0, write=True))
    assert [m.why for m in walk.walk(r, memory).malformed] == ["a block at level 0"]


# -- memslots ----------------------------------------------------------------------------------------------


def test_memslot_covers_its_range_only():
    slots = [Memslot(0, 0, PAGE, 0x7000_0000), Memslot(1, 2 * PAGE, PAGE, 0x7100_0000, SlotFlags.READONLY)]
    ipas = np.array([0, PAGE - 1, PAGE, 2 * PAGE, 3 * PAGE], dtype=np.uint64)
    assert memslots.covering(slots, ipas).tolist() == [0, 0, -1, 1, -1]
    assert slots[1].hva_of(2 * PAGE + 8) == 0x7100_0008 and slots[1].readonly and not slots[1].logging
    with pytest.raises(ValueError, match="not in memslot 0"):
        slots[0].hva_of(PAGE)
