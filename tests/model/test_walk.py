"""The walk: each fault where it belongs, stage 1 under stage 2, and the two walkers in agreement on random tables."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.conform import program
from framework.conform.case import Memory, Silicon, Unknowable
from framework.conform.worlds import worlds
from framework.model import descriptors as d
from framework.model import regime, stage1, sweep, walk
from framework.model.attributes import STAGE1_OFF
from framework.model.faults import Access, Direction, Fault, FaultType
from framework.model.regime import SCTLR_M, SCTLR_UWXN, SCTLR_WXN, Features
from framework.model.stage1 import Stage1
from framework.model.walk import El10

from ..memory import Pages, Table

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
        return self.table.put(ipa, level, d.encode(d.Leaf(pa, **kind), level, self.regime.format))

    def stage2(self, access, ipa=IPA):
        return walk.stage2(self.regime, self.ram, ipa, access)

    def with_stage1(self):
        """A guest table in the page at IPA: one block of 1 GiB from VA 0 to IPA 0x8000_0000."""
        self.ram.store(self.frame, stage1.leaf(IPA, 1, ap=1))
        control = Stage1(regime.stage1_armv8(IPA, 64 - 39 | 2 << 32), 0xFF, SCTLR_M)
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
    empty = World(mapped=False)
    assert El10(None, empty.regime, 40).translate(empty.ram, IPA, READ).stage == 2


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
    assert w.with_stage1().translate(w.ram, 0, READ) == Fault(FaultType.PERMISSION, 3, 2, True, IPA, 1)
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
    return Stage1(r, 0, sctlr)


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
    assert d.kind(stage1.table(0x1000), 1, d.Format().granule) is d.Kind.TABLE
    assert stage1.leaf(0x1000, 3, attrindx=2, ap=3) == 0x17CB


# -- two walkers --------------------------------------------------------------------------------------------------

A32, A64 = program.build("A32"), program.build("A64")
CPUS = [
    (Silicon(True, Features(40), 0x8000_0000, A32.wfi), A32),
    (Silicon(False, Features(), 0x8000_0000, A64.wfi), A64),
]


class Arrays:
    """A world's memory for the vectorised walk."""

    def __init__(self, memory):
        self._memory = memory

    def fetch(self, pas):
        return np.array([self._memory.load(pa) or 0 for pa in pas.tolist()], dtype=np.uint64)

    def backed(self, pas):
        return np.array([self._memory.load(pa) is not None for pa in pas.tolist()], dtype=bool)


@pytest.mark.parametrize("which", [0, 1], ids=["armv7", "armv8"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_two_walkers_agree(which, data):
    """On the worlds of conformance: every address asked there, for every kind of access."""
    silicon, prog = CPUS[which]
    world = data.draw(worlds(silicon, prog))
    try:
        r = world.stage2()
    except regime.ImpossibleRegime:
        return
    memory = Memory(world)
    ipas = sorted({probe.va & ((1 << 48) - 1) for probe in world.probes})
    for access in (READ, WRITE, FETCH, replace(FETCH, el0=True)):
        try:
            found = sweep.resolve(r, Arrays(memory), np.array(ipas, dtype=np.uint64), access)
            one_by_one = [walk.stage2(r, memory, ipa, access) for ipa in ipas]
        except Unknowable:  # a table in memory that this world does not define
            return
        for i, scalar in enumerate(one_by_one):
            if isinstance(scalar, Fault):
                assert found.status[i] == scalar.status
            else:
                assert found.status[i] == sweep.NO_FAULT
                assert (found.oa[i], found.desc[i], found.level[i]) == (scalar.oa, scalar.desc, scalar.level)
