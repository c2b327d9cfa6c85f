"""The walk: every fault, stage 1 under stage 2, and the agreement of both walkers on random tables."""

from dataclasses import replace

import numpy as np
import pytest
from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch import regime, stage1, sweep, walk
from arm_kvm.model.arch.attributes import STAGE1_OFF, STAGE1_OFF_FETCH
from arm_kvm.model.arch.faults import Access, Direction, Fault, FaultType
from arm_kvm.model.arch.granule import KIB4, KIB64
from arm_kvm.model.arch.regime import SCTLR_M, SCTLR_UWXN, SCTLR_WXN, Features
from arm_kvm.model.arch.stage1 import Stage1Regime
from arm_kvm.model.arch.walk import El10
from hypothesis import given, settings
from hypothesis import strategies as st

from ..memory import BASE, Pages, Table

PAGE = 0x1000
READ, WRITE, FETCH = (Access(direction) for direction in Direction)
IPA = 0x8000_0000


class World:
    """One page of guest memory at IPA, mapped as a test says; a stage 1 on demand."""

    def __init__(self, armv7=False, hcr=0, vtcr=0, **kind):
        self.ram = Pages()
        root = self.ram.page(2)
        make = regime.stage2_armv7 if armv7 else regime.stage2_armv8
        self.regime = make(root, (0x80003558 if armv7 else 0x80023558) | vtcr, hcr)
        self.table = Table(self.ram, self.regime)
        self.frame = self.ram.page()
        if kind.pop("mapped", True):
            self.maps(IPA, self.frame, **kind)

    def maps(self, ipa, pa, level=3, **kind):
        return self.table.put(ipa, level, d.encode(d.LeafFields(pa, **kind), level, self.regime.format))

    def stage2(self, access, ipa=IPA):
        return walk.stage2(self.regime, self.ram, ipa, access)

    def with_stage1(self):
        """A guest table in the page at IPA: one block of 1 GiB from VA 0 to IPA 0x8000_0000."""
        self.ram.store(self.frame, stage1.leaf(IPA, 1, ap=1))
        control = Stage1Regime(regime.stage1_armv8(IPA, 64 - 39 | 2 << 32), 0xFF, SCTLR_M)
        return El10(control, self.regime, 40)


# -- stage 2 alone -------------------------------------------------------------------------------------------


def test_a_mapped_byte_is_found():
    w = World()
    found = w.stage2(READ, IPA + 0x123)
    assert (found.oa, found.level) == (w.frame + 0x123, 3)


@pytest.mark.parametrize(
    ("kind", "access", "fault"),
    [
        ({"mapped": False}, READ, FaultType.TRANSLATION),
        ({"af": False}, READ, FaultType.ACCESS_FLAG),
        ({"s2ap": 1}, WRITE, FaultType.PERMISSION),
        ({"s2ap": 2}, READ, FaultType.PERMISSION),
        ({"xn": 2}, FETCH, FaultType.PERMISSION),
        ({"xn": 1}, FETCH, FaultType.PERMISSION),
        ({"xn": 3}, replace(FETCH, el0=True), FaultType.PERMISSION),
        ({"s2ap": 0}, FETCH, None),
        ({"s2ap": 1}, READ, None),
        ({"s2ap": 2}, WRITE, None),
        ({"xn": 1}, replace(FETCH, el0=True), None),
    ],
)
def test_each_fault_of_a_leaf(kind, access, fault):
    outcome = World(**kind).stage2(access)
    assert getattr(outcome, "type", None) is fault
    if fault:
        level = 3 if kind.get("mapped", True) else 1
        assert (outcome.level, outcome.stage, outcome.ipa, outcome.s1ptw) == (level, 2, IPA, False)


def test_armv7_fetches_only_what_it_may_read():
    assert World(armv7=True, s2ap=0).stage2(FETCH).type is FaultType.PERMISSION
    assert World(armv7=True).stage2(FETCH).oa


def test_invalid_beats_address_size_beats_access_flag_beats_permission():
    w = World(s2ap=0, af=False)
    at = w.maps(IPA, 1 << 41, s2ap=0, af=False)
    assert w.stage2(READ).type is FaultType.ADDRESS_SIZE
    w.ram.store(at, w.ram.load(at) & ~1)
    assert w.stage2(READ).type is FaultType.TRANSLATION
    w.maps(IPA, w.frame, s2ap=0, af=False)
    assert w.stage2(READ).type is FaultType.ACCESS_FLAG


def test_out_of_range_and_a_root_beyond_physical_memory():
    w = World()
    assert w.stage2(READ, 1 << 40) == Fault(FaultType.TRANSLATION, 0, 2, ipa=1 << 40)
    far = replace(w.regime, root=1 << 41)
    assert walk.stage2(far, w.ram, IPA, READ) == Fault(FaultType.ADDRESS_SIZE, 0, 2, ipa=IPA)
    assert sweep.resolve(far, w.ram, np.array([IPA], np.uint64)).status.tolist() == [0]
    assert World(armv7=True).stage2(READ, 1 << 40).level == 1


def test_a_table_where_no_memory_is():
    w = World(mapped=False)
    w.table.put(IPA, 2, d.encode(d.Table(0x1000), 2))
    assert w.stage2(READ) == Fault(FaultType.EXTERNAL_ON_WALK, 3, 2, ipa=IPA)


def test_hardware_sets_the_access_flag_and_the_dirty_state():
    assert World(vtcr=1 << 21, af=False).stage2(READ).oa
    assert World(vtcr=3 << 21, s2ap=1, dbm=True).stage2(WRITE).oa
    assert World(vtcr=1 << 21, s2ap=1, dbm=True).stage2(WRITE).type is FaultType.PERMISSION
    assert World(vtcr=3 << 21, s2ap=1).stage2(WRITE).type is FaultType.PERMISSION


# -- both stages -----------------------------------------------------------------------------------------------


def test_stage_1_off():
    w = World()
    el10 = El10(None, w.regime, 40)
    there = el10.translate(w.ram, IPA + 8, READ)
    assert (there.ipa, there.pa, there.first) == (IPA + 8, w.frame + 8, STAGE1_OFF)
    assert el10.translate(w.ram, 1 << 40, READ) == Fault(FaultType.ADDRESS_SIZE, 0, 1)
    assert El10(None, World(armv7=True).regime, 40).translate(w.ram, 1 << 40, READ).stage == 2
    assert el10.translate(w.ram, IPA, FETCH).first == STAGE1_OFF_FETCH
    empty = World(mapped=False)
    assert El10(None, empty.regime, 40).translate(empty.ram, IPA, READ).stage == 2


def test_the_upper_range_is_not_modelled():
    w = World()
    with pytest.raises(ValueError, match="upper range"):
        El10(None, w.regime, 40).translate(w.ram, 1 << 55, READ)


def test_a_va_goes_through_both_stages():
    w = World()
    w.maps(IPA + PAGE, w.ram.page())
    trace = []
    there = w.with_stage1().translate(w.ram, PAGE + 4, READ, trace)
    assert there.ipa == IPA + PAGE + 4 and there.pa & 0xFFF == 4
    assert [(s.stage, s.level) for s in trace] == [(2, 1), (2, 2), (2, 3), (1, 1), (2, 1), (2, 2), (2, 3)]


def test_stage_2_refuses_the_guests_table():
    w = World(s2ap=2)
    fault = w.with_stage1().translate(w.ram, 0, WRITE)
    assert fault == Fault(FaultType.PERMISSION, 3, 2, s1ptw=True, ipa=IPA, walk_level=1)
    assert "on a stage 1 walk, IPA 0x80000000" in str(fault)


def test_protected_walks_refuse_device_memory():
    w = World(hcr=regime.HCR_PTW, memattr=d.MemAttr.DEVICE_nGnRE)
    assert w.with_stage1().translate(w.ram, 0, READ) == Fault(FaultType.PERMISSION, 3, 2, True, IPA, 1, protected=True)
    w = World(memattr=d.MemAttr.DEVICE_nGnRE)
    assert w.with_stage1().translate(w.ram, 0, READ).pa == w.frame


def test_the_guests_table_where_no_memory_is():
    w = World(mapped=False)
    w.maps(IPA, 0x1000)
    assert w.with_stage1().translate(w.ram, 0, READ) == Fault(FaultType.EXTERNAL_ON_WALK, 1, 1, ipa=IPA)


@pytest.mark.parametrize(
    ("bits", "access", "fault"),
    [(1 << 10, READ, FaultType.ACCESS_FLAG), (1, READ, FaultType.TRANSLATION), (1 << 7, WRITE, FaultType.PERMISSION)],
)
def test_faults_of_stage_1(bits, access, fault):
    w = World()
    el10 = w.with_stage1()
    w.ram.store(w.frame, w.ram.load(w.frame) ^ bits)
    outcome = el10.translate(w.ram, 0, access)
    assert (outcome.type, outcome.stage, outcome.level, outcome.ipa) == (fault, 1, 1, None)


# DDI 0487 D8.4, table of AP[2:1], UXN and PXN; DDI 0406C.d B3.7.1: (AP, bits, EL0 rwx, EL1 rwx).
XN, PXN = 1 << 54, 1 << 53
V8 = [
    (0b00, 0, "--x", "rwx"),
    (0b01, 0, "rwx", "rw-"),
    (0b10, 0, "--x", "r-x"),
    (0b11, 0, "r-x", "r-x"),
    (0b01, XN, "rw-", "rw-"),
    (0b11, XN, "r--", "r-x"),
    (0b11, PXN, "r-x", "r--"),
    (0b00, XN | PXN, "---", "rw-"),
]
V7 = [
    (0b00, 0, "---", "rwx"),
    (0b01, 0, "rwx", "rwx"),
    (0b10, 0, "---", "r-x"),
    (0b11, 0, "r-x", "r-x"),
    (0b01, XN, "rw-", "rw-"),
    (0b11, PXN, "r-x", "r--"),
]


def rights(control, desc, inherited, el0):
    accesses = (Access(direction, el0) for direction in (Direction.READ, Direction.WRITE, Direction.FETCH))
    return "".join(c if control.allows(desc, inherited, a) else "-" for a, c in zip(accesses, "rwx", strict=True))


def control(armv7, sctlr=0):
    r = regime.stage1_armv7(0, 1 << 31) if armv7 else regime.stage1_armv8(0, 25)
    return Stage1Regime(r, 0, sctlr)


@pytest.mark.parametrize(("armv7", "row"), [(False, row) for row in V8] + [(True, row) for row in V7])
def test_stage_1_permissions(armv7, row):
    ap, bits, el0, el1 = row
    desc = stage1.leaf(0, 3, ap=ap) | bits
    assert (rights(control(armv7), desc, 0, True), rights(control(armv7), desc, 0, False)) == (el0, el1)


@pytest.mark.parametrize(
    ("limit", "el0", "el1"),
    [
        (1 << 61, "--x", "rwx"),
        (2 << 61, "r-x", "r-x"),
        (1 << 60, "rw-", "rw-"),
        (1 << 59, "rwx", "rw-"),
    ],
)
def test_tables_limit_what_is_below_them(limit, el0, el1):
    desc = stage1.leaf(0, 3, ap=0b01)
    assert (rights(control(False), desc, limit, True), rights(control(False), desc, limit, False)) == (el0, el1)


def test_writable_means_never_executable():
    desc = stage1.leaf(0, 3, ap=0b00)
    assert rights(control(False, SCTLR_WXN), desc, 0, False) == "rw-"
    assert rights(control(False, SCTLR_WXN), stage1.leaf(0, 3, ap=0b11), 0, False) == "r-x"
    assert rights(control(True, SCTLR_UWXN), stage1.leaf(0, 3, ap=0b01), 0, False) == "rw-"


def test_a_guests_tables():
    assert d.kind(stage1.table(0x1000), 1, d.Format().granule) is d.EntryKind.TABLE
    assert stage1.leaf(0x1000, 3, attrindx=2, ap=3) == 0x17CB


# -- two walkers --------------------------------------------------------------------------------------------------

A57 = Features(44, (KIB4, KIB64), (KIB4, KIB64), False, False, False, False, False, False, False)
SHAPES = [
    (0, 0, 34),
    (0, 1, 40),
    (0, 1, 43),
    (0, 2, 44),
    (0, 3, 25),
    (1, 0, 33),
    (1, 1, 42),
    (1, 2, 46),
    (2, 1, 40),
    (2, 2, 47),
]


@st.composite
def regimes(draw, root):
    """Stage 2 of either architecture, any granule and start level; stage 1 too."""
    if draw(st.integers(0, 3)) == 0:
        return regime.stage2_armv7(root, draw(st.sampled_from([0x80003558, 0x8000351E])))
    if draw(st.integers(0, 3)) == 0:
        return regime.stage1_armv8(root, draw(st.sampled_from([16, 25, 1 << 14 | 22, 2 << 14 | 17])) | 5 << 32)
    tg0, sl0, bits = draw(st.sampled_from(SHAPES))
    extra = draw(st.sampled_from([5, 2, 1])) << 16 | draw(st.sampled_from([0, 1, 3])) << 21
    hcr = draw(st.sampled_from([0, regime.HCR_FWB]))
    features = A57 if tg0 < 2 and sl0 < 3 and bits <= 44 and draw(st.booleans()) else Features()
    return regime.stage2_armv8(root, extra | tg0 << 14 | sl0 << 6 | 64 - bits, hcr, features)


@st.composite
def noisy_tables(draw):
    """Six random paths: tables, leaves with random attributes, noise; high address bits, tables without memory."""
    memory = Pages(2048)
    root = memory.page(256)
    r = draw(regimes(root))
    ias = draw(st.lists(st.integers(0, r.input_size - 1), min_size=1, max_size=6))
    for ia in ias:
        table = r.root
        for level in range(r.start_level, 4):
            at = table + 8 * r.index(ia, level)
            if (word := memory.load(at)) == 0:
                word = draw(noise(memory, r, level))
                memory.store(at, word)
            if d.kind(word, level, r.granule) is not d.EntryKind.TABLE:
                break
            table = word & r.format.address_field()
            if memory.load(table) is None:
                break
    near = [ia ^ 1 << draw(st.integers(0, 47)) for ia in ias]
    return memory, r, sorted({*ias, *near, 0, r.input_size - 1, r.input_size})


@st.composite
def noise(draw, memory, r, level):
    what = draw(st.integers(0, 19))
    attributes = draw(st.integers(0, (1 << 64) - 1)) & ~r.format.address_field() & ~3
    high = 1 << draw(st.integers(r.output_bits, 48)) & r.format.address_field() if what in (0, 7) else 0
    if what < 3 or (level == 3 and what > 8):
        return attributes | high | draw(st.integers(0, 15)) << 30 | draw(st.integers(0, 3))
    if level == 3 or what < 6:
        return attributes | high | BASE | (3 if level == 3 else 1)
    where = 0x1000_0000 if what == 6 else memory.page(r.granule.size >> 12)
    return where | high | 3


@settings(max_examples=400, deadline=None)
@given(noisy_tables())
def test_the_two_walkers_agree(made):
    """On random words: addresses, faults and levels."""
    memory, r, ias = made
    found = sweep.resolve(r, memory, np.array(ias, dtype=np.uint64))
    for i, ia in enumerate(ias):
        scalar = walk.descend(r, ia, reader(memory, r))
        if isinstance(scalar, Fault):
            assert found.status[i] == scalar.status, (hex(ia), str(scalar))
        else:
            assert found.status[i] == sweep.NO_FAULT
            assert (found.oa[i], found.desc[i], found.level[i]) == (scalar.oa, scalar.desc, scalar.level)


def reader(memory, r):
    def read(pa, level):
        word = memory.load(pa)
        return Fault(FaultType.EXTERNAL_ON_WALK, level, r.stage) if word is None else word

    return read


@settings(max_examples=200, deadline=None)
@given(noisy_tables())
def test_a_sweep_finds_what_the_scalar_walk_finds(made):
    """Both ends of every leaf translate to it; every address that translates is in a leaf of the sweep."""
    memory, r, ias = made
    leaves = sweep.sweep(r, memory).leaves
    for ia, desc, level, size in zip(leaves.ia, leaves.desc, leaves.level, leaves.size, strict=True):
        for address in (int(ia), int(ia) + int(size) - 1):
            found = walk.descend(r, address, reader(memory, r))
            assert (found.desc, found.level) == (desc, level)
    for ia in ias:
        if isinstance(walk.descend(r, ia, reader(memory, r)), walk.Found):
            assert ((leaves.ia <= ia) & (ia - leaves.ia < leaves.size)).any()
