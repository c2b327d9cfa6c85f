"""Every verdict on a table that violates its rule, and no verdict on a correct table.

The judge is pure, so these are constructed tables in constructed RAM. test_verdicts_live.py has the same verdicts on a
real kernel's tables.
"""

from dataclasses import replace

import numpy as np
import pytest
from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch import regime, stage1, sweep
from arm_kvm.model.kvm import notifier
from arm_kvm.model.kvm.memslots import Memslot, SlotFlags, Window
from arm_kvm.oracle import ftrace as trace
from arm_kvm.oracle import judge, splats, witness
from arm_kvm.oracle.stage2 import Stage2
from arm_kvm.oracle.verdicts import Reason, Verdict, Violation
from arm_kvm.support.judged import Judged

from .memory import Pages, Table

PAGE = 0x1000
BLOCK = 2 << 20
IPA, HVA = 0x8000_0000, 0x1000_0000
DEVICE_PA = 0x0801_0000


class World:
    """One VM: a stage-2 table, the VMM's own stage 1, and one memslot of 4 MiB."""

    def __init__(self, flags=SlotFlags.NONE):
        self.ram = Pages(2048)
        self.stage2 = Table(self.ram, regime.stage2_armv7(self.ram.page(2) | 1 << 48, 0x80003558))
        self.host = Table(self.ram, regime.stage1_armv7(self.ram.page(), 1 << 31))
        self.slots = (Memslot(2, IPA, 2 * BLOCK, HVA, flags),)
        self.frame = self.ram.page(512)
        self.written = False
        self.windows = ()

    def host_maps(self, page, pa, writable=True):
        self.host.put(HVA + page * PAGE, 3, stage1.leaf(pa, 3) | (0 if writable else d.ARM_L_PTE_RDONLY.mask))

    def maps(self, page, pa, **kind):
        return self.stage2.put(IPA + page * PAGE, 3, d.encode(replace(d.LeafFields(pa, xn=d.Never.EL0_EL1), **kind), 3))

    def verdicts(self):
        return [finding.verdict for finding in self.findings()]

    def findings(self):
        tables = sweep.sweep(self.stage2.regime, self.ram)
        view = judge.host_view(
            tables.leaves, self.slots, lambda hvas: sweep.translate(self.host.regime, self.ram, hvas)
        )
        written = np.full(len(view.ipa), self.written)
        writable = d.linux_arm_writable(view.host_desc)
        return judge.Case(tables, self.slots, view, writable, written, self.ram, self.windows).findings()


@pytest.fixture
def world():
    w = World()
    w.host_maps(0, w.frame)
    return w


def test_a_correct_leaf(world):
    world.maps(0, world.frame)
    assert world.findings() == []


def test_a_leaf_with_fewer_permissions_than_permitted_is_correct(world):
    world.maps(0, world.frame, s2ap=d.Grant.READ)
    assert world.findings() == []


def test_other_frame(world):
    world.maps(0, world.frame + PAGE)
    (finding,) = world.findings()
    assert (finding.verdict, finding.reason, finding.ipa) == (Verdict.WRONG_FRAME, None, IPA)
    assert f"{world.frame:#x}" in finding.expected and f"{world.frame + PAGE:#x}" in finding.found


def test_frame_where_the_host_has_none(world):
    world.maps(1, world.frame)
    (finding,) = world.findings()
    assert (finding.verdict, finding.reason) == (Verdict.WRONG_FRAME, Reason.HOST_HAS_NO_PAGE)
    assert "the host has no page" in finding.expected


def test_writable_where_the_host_is_read_only(world):
    world.host_maps(0, world.frame, writable=False)
    world.maps(0, world.frame)
    (finding,) = world.findings()
    assert finding.verdict is Verdict.EXCESS_PERMISSION and " ro at HVA" in finding.expected


def test_writable_in_a_read_only_memslot():
    w = World(SlotFlags.READONLY)
    w.host_maps(0, w.frame)
    w.maps(0, w.frame)
    (finding,) = w.findings()
    assert finding.verdict is Verdict.EXCESS_PERMISSION and "read-only" in finding.expected


@pytest.mark.parametrize("written", [False, True])
def test_writable_while_clean_in_the_dirty_log(written):
    w = World(SlotFlags.LOG_DIRTY_PAGES)
    w.written = written
    w.host_maps(0, w.frame)
    w.maps(0, w.frame)
    assert w.verdicts() == ([] if written else [Verdict.EXCESS_PERMISSION])


def test_outside_every_memslot(world):
    world.stage2.put(IPA - PAGE, 3, d.encode(d.LeafFields(world.frame), 3))
    assert world.verdicts() == [Verdict.OUTSIDE_MEMSLOTS]


@pytest.mark.parametrize("how", [{"memattr": d.MemAttr.DEVICE_nGnRE}, {"sh": d.Shareability.NON}])
def test_ram_of_the_wrong_memory_type(world, how):
    world.maps(0, world.frame, **how)
    assert world.verdicts() == [Verdict.WRONG_MEMORY_TYPE]


def test_device_is_device_memory_and_never_executable(world):
    world.host_maps(0, DEVICE_PA)
    world.maps(0, DEVICE_PA, memattr=d.MemAttr.DEVICE_nGnRE)
    assert world.findings() == []
    world.maps(0, DEVICE_PA, memattr=d.MemAttr.DEVICE_nGnRE, xn=d.Never.NONE)
    assert world.verdicts() == [Verdict.EXCESS_PERMISSION]
    world.maps(0, DEVICE_PA, memattr=d.MemAttr.NORMAL_WB)
    assert world.verdicts() == [Verdict.WRONG_MEMORY_TYPE]


def test_malformed_entry(world):
    world.ram.store(world.maps(0, world.frame), world.frame | 1)
    assert world.verdicts() == [Verdict.MALFORMED_ENTRY]


def test_block_is_judged_page_by_page(world):
    """A block over 512 host pages, one of which has another frame: the finding is exactly that page."""
    for page in range(512):
        world.host_maps(page, world.frame + page * PAGE)
    world.stage2.put(IPA, 2, d.encode(d.LeafFields(world.frame), 2))
    assert world.findings() == []
    world.host_maps(77, world.frame + 78 * PAGE)
    (finding,) = world.findings()
    assert (finding.verdict, finding.ipa, finding.size) == (Verdict.WRONG_FRAME, IPA + 77 * PAGE, PAGE)


def test_neighbouring_bad_pages_are_one_finding(world):
    for page in (1, 2, 3, 9):
        world.maps(page, world.frame)
    assert [(f.ipa, f.size) for f in world.findings()] == [(IPA + PAGE, 3 * PAGE), (IPA + 9 * PAGE, PAGE)]


def test_table_page_with_two_users():
    one, two = World(), World()
    two.ram = two.stage2.memory = one.ram
    two.stage2 = Table(one.ram, regime.stage2_armv7(one.ram.page(2), 0x80003558))
    one.maps(0, one.frame)
    shared = one.ram.load(one.stage2.regime.root + 2 * 8)
    one.ram.store(two.stage2.regime.root + 2 * 8, shared)
    tables = {name: sweep.sweep(w.stage2.regime, one.ram) for name, w in (("VM 1", one), ("VM 2", two))}
    found = judge.shared_tables(tables)
    assert {f.verdict for f in found["VM 1"] + found["VM 2"]} == {Verdict.SHARED_TABLE}
    assert "VM 1, VM 2" in found["VM 1"][0].found


def test_table_page_a_guest_can_reach(world):
    world.maps(0, world.frame)
    table = d.decode(world.ram.load(world.stage2.regime.root + 2 * 8), 1).address
    world.maps(1, table)
    found = judge.shared_tables({"VM 1": sweep.sweep(world.stage2.regime, world.ram)})["VM 1"]
    assert [(f.verdict, f.ipa) for f in found] == [(Verdict.SHARED_TABLE, IPA + PAGE)]


def test_a_table_that_maps_nothing_is_spare(world):
    entry = world.maps(0, world.frame)
    world.maps(1, world.frame + PAGE)
    assert Stage2(sweep.sweep(world.stage2.regime, world.ram)).spare_tables == 0
    for at in (entry, entry + 8):
        world.ram.store(at, 0)
    assert Stage2(sweep.sweep(world.stage2.regime, world.ram)).spare_tables == 2  # of levels 2 and 3


def test_no_table_is_shared_in_a_correct_world(world):
    world.maps(0, world.frame)
    assert judge.shared_tables({"VM 1": sweep.sweep(world.stage2.regime, world.ram)}) == {"VM 1": []}


def test_the_diff_shows_verdict_place_expected_found_and_context(world):
    world.maps(0, world.frame + PAGE)
    text = str(Violation("stage 2 of VM 1", world.findings(), "Last requests to the agent:\n  > 7 vcpu_run"))
    for part in ("wrong-frame", f"IPA [{IPA:#x}", "expected", "found", "level 3", "HVA 0x10000000", "> 7 vcpu_run"):
        assert part in text


def test_a_violation_carries_its_verdicts(world):
    world.maps(0, world.frame + PAGE)
    world.stage2.put(IPA - PAGE, 3, d.encode(d.LeafFields(world.frame), 3))
    broken = Violation("stage 2", world.findings())
    assert isinstance(broken, Judged) and broken.verdicts == {Verdict.WRONG_FRAME, Verdict.OUTSIDE_MEMSLOTS}
    assert broken.verdicts == {"wrong-frame", "outside-memslots"}, "names, for modules that do not know the oracle"


def test_a_long_list_of_findings_is_cut_with_a_count(world):
    for page in range(0, 40, 2):
        world.maps(page + 1, world.frame)
    assert "... and 12 more" in str(Violation("stage 2", world.findings()))


# -- windows onto devices ----------------------------------------------------------------------------------------

DEVICE = {"memattr": d.MemAttr.DEVICE_nGnRE}


@pytest.fixture
def window(world):
    """The world with a window of two pages onto a device, outside every memslot."""
    world.windows = (Window(IPA - 2 * PAGE, 2 * PAGE, DEVICE_PA),)
    return world


def test_a_window_shows_its_device(window):
    window.maps(-2, DEVICE_PA, **DEVICE)
    window.maps(-1, DEVICE_PA + PAGE, **DEVICE)
    assert window.findings() == []


def test_a_window_over_a_memslot_is_no_wrong_frame(world):
    world.windows = (Window(IPA, PAGE, DEVICE_PA),)
    world.maps(0, DEVICE_PA, **DEVICE)
    assert world.findings() == []


@pytest.mark.parametrize(
    ("page", "pa", "kind", "verdict"),
    [
        (-1, DEVICE_PA, DEVICE, Verdict.OUTSIDE_MEMSLOTS),  # the other page of the device
        (-3, DEVICE_PA - PAGE, DEVICE, Verdict.OUTSIDE_MEMSLOTS),  # beside the window
        (-2, DEVICE_PA, {}, Verdict.WRONG_MEMORY_TYPE),
        (-2, DEVICE_PA, DEVICE | {"xn": d.Never.NONE}, Verdict.EXCESS_PERMISSION),
    ],
)
def test_what_a_window_does_not_allow(window, page, pa, kind, verdict):
    window.maps(page, pa, **kind)
    assert window.verdicts() == [verdict]


# -- operations of the host -----------------------------------------------------------------------------------------


def test_every_breach_of_the_notifier_model_is_a_verdict():
    assert [Verdict.of(kind).name for kind in notifier.BreachKind] == [kind.name for kind in notifier.BreachKind]


def test_notifier_calls_are_read_from_the_trace():
    text = """
 python3-60    [001] ....    12.345: kvm_unmap_hva_range: mmu notifier unmap range: 0xb6000000 -- 0xb6002000
 python3-60    [001] ....    12.346: kvm_set_spte_hva: mmu notifier set pte hva: 0xb6000000
 python3-60    [001] ....    12.347: kvm_age_hva: mmu notifier age hva: 0xb6000000 -- 0xb6001000
 python3-60    [001] ....    12.348: kvm_entry: PC: 0x08000000
"""
    assert witness.calls_in(trace.parse(text)) == [
        (notifier.Call.UNMAP, (0xB600_0000, 0xB600_2000)),
        (notifier.Call.SET, (0xB600_0000, 0xB600_1000)),
        (notifier.Call.AGE, (0xB600_0000, 0xB600_1000)),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "WARNING: CPU: 0 PID: 1 at virt/kvm/arm/mmu.c:1",
        "pagealloc: memory corruption",
        "pagealloc: single bit error",
        "INFO: trying to register non-static key.",
    ],
)
def test_a_complaint_of_the_kernel(text):
    (finding,) = splats.find(f"4,1,2,-;{text}\n6,2,3,-;all is well\n".encode())
    assert (finding.verdict, finding.ipa) == (Verdict.KERNEL_SPLAT, None)
    assert str(finding).splitlines()[:2] == ["  kernel-splat", "      expected  a quiet kernel log"]
    assert splats.find(b"6,2,3,-;all is well\n") == []
