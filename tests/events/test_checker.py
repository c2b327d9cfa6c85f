"""The checker against minimal traces: traces/NAME.bad.trace breaks the one rule that NAME begins with, and
NAME.good.trace, which differs from it in one place, keeps them all. The traces are meant to be read.
"""

from __future__ import annotations

from difflib import SequenceMatcher
from pathlib import Path

import pytest
from arm_kvm.events import automata
from arm_kvm.events.allocation import Allocation
from arm_kvm.events.checker import automata_for, violations
from arm_kvm.events.operations import OPERATIONS, Reach, Span, span
from arm_kvm.events.trace import Created, Destroyed, Enter, Exit, Invalidate, Trace, Vttbr, format_event
from arm_kvm.events.violations import ProtocolBroken, TraceRule
from arm_kvm.events.world import TraceState
from arm_kvm.support.judged import Judged

TRACES = Path(__file__).parent / "traces"
GOOD = sorted(path.name.removesuffix(".good.trace") for path in TRACES.glob("*.good.trace"))
BAD = sorted(path.name.removesuffix(".bad.trace") for path in TRACES.glob("*.bad.trace"))

#: The automaton that looks after a rule.
KEEPER = {
    TraceRule.BREAK_BEFORE_MAKE: automata.Invalidations,
    TraceRule.NOT_INVALIDATED: automata.Invalidations,
    TraceRule.VMID_REUSED: automata.Owners,
    TraceRule.VMID_SHARED: automata.Owners,
    TraceRule.VMID_SPLIT: automata.OneVmidPerVm,
    TraceRule.VMID_ZERO: automata.Zero,
    TraceRule.STALE_VTTBR: automata.Stale,
    TraceRule.NO_LOCAL_FLUSH: automata.LocalFlush,
    TraceRule.WRONG_VMID: Allocation,
}


def load(name: str, which: str) -> Trace:
    return Trace.load(TRACES / f"{name}.{which}.trace")


def kind_of(name: str) -> TraceRule:
    """The rule a trace is about: its name, or the beginning of it."""
    return max((kind for kind in TraceRule if name.startswith(kind.value)), key=lambda kind: len(kind.value))


def keeper_of(name: str) -> type:
    """In traces whose facts name an allocator, only the comparison with the model finds these."""
    kind = kind_of(name)
    if kind in (TraceRule.OLD_GENERATION, TraceRule.ROLLOVER_NOT_INVALIDATED):
        return Allocation if "allocator" in load(name, "bad").facts else automata.Owners
    return KEEPER[kind]


def lines(trace: Trace) -> list[str]:
    """The events without their times."""
    return [format_event(event).split(None, 1)[1] for event in trace.events]


# -- the traces -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOOD)
def test_a_good_trace_breaks_no_rule(name):
    assert violations(load(name, "good")) == []


@pytest.mark.parametrize("name", BAD)
def test_a_bad_trace_breaks_its_rule_once_and_no_other(name):
    assert [violation.rule for violation in violations(load(name, "bad"))] == [kind_of(name)]


@pytest.mark.parametrize("name", BAD)
def test_good_and_bad_differ_in_one_place(name):
    """So that it is this place that the verdict depends on."""
    pair = (lines(load(name, "good")), lines(load(name, "bad")))
    edits = SequenceMatcher(None, *pair, autojunk=False).get_opcodes()
    assert len([edit for edit in edits if edit[0] != "equal"]) == 1


@pytest.mark.parametrize("kind", TraceRule, ids=lambda kind: kind.value)
def test_every_rule_has_its_pair(kind):
    assert kind.value in BAD and kind.value in GOOD


@pytest.mark.parametrize("path", sorted(TRACES.iterdir()), ids=lambda path: path.name)
def test_every_trace_says_what_happens(path):
    assert kind_of(path.name) and path.read_text(encoding="ascii").splitlines()[1].startswith("# ")


# -- the automata -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAD)
def test_only_its_automaton_finds_it(name):
    """Each automaton is needed: without it nothing is found, with it alone the same."""
    trace, keeper = load(name, "bad"), keeper_of(name)
    alone = [rule for rule in automata_for(trace) if type(rule) is keeper]
    others = [rule for rule in automata_for(trace) if type(rule) is not keeper]
    assert len(alone) == 1 and violations(trace, others) == []
    assert violations(trace, alone) == violations(trace)


def test_every_automaton_has_a_bad_trace():
    trace = Trace({"allocator": "bitmap", "cpus": "2"})
    assert {type(rule) for rule in automata_for(trace)} == set(map(keeper_of, BAD))


def test_without_an_allocator_nothing_is_compared_with_the_model():
    assert not any(isinstance(rule, Allocation) for rule in automata_for(Trace()))


# -- the report -------------------------------------------------------------------------------------------


def test_a_violation_names_the_rule_the_event_and_the_reason():
    (found,) = violations(load("vmid-shared", "bad"))
    assert found.index == 7 and str(found).splitlines() == [
        "  vmid-shared              event 7: 0.000096 1 enter vcpu=0xc4a31f00",
        "      VMID 1 of VM 1 (root 0x812a4000) is given to VM 2 (root 0x812a6000) in the same generation",
    ]


def test_the_report_shows_the_events_that_led_to_it():
    trace = load("vmid-shared", "bad")
    broken = ProtocolBroken(trace, violations(trace))
    text = str(broken)
    assert isinstance(broken, Judged) and broken.verdicts == {TraceRule.VMID_SHARED}
    assert (
        text.count("\n        ") == 7 and "1 vttbr 0x00010000812a6000" in text and "created root=0x812a4000" not in text
    )


def test_the_report_of_many_violations_stays_short():
    trace = load("vmid-zero", "bad")
    trace.events *= 6
    found = violations(trace)
    broken = ProtocolBroken(trace, found)
    assert broken.violations == found and str(broken).endswith(f"... and {len(found) - 4} more")


# -- reasons ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("not-invalidated", "was unmapped; no operation reached it since"),
        ("not-invalidated-stage1", "was unmapped; what combines it with stage 1 was not invalidated (VMALLE1IS)"),
        ("not-invalidated-read-only", "was made less accessible"),
        ("not-invalidated-execute-never", "was made less executable"),
        ("vmid-split", "runs under 1 on CPU 0"),
        ("vmid-split-in-turn", "was under 1 in this generation"),
        ("stale-vttbr", "root of VM 1 (root 0x812a4000, destroyed)"),
        ("stale-vttbr-entered", "VM 1 (root 0x484ce000, destroyed) is entered"),
        ("rollover-not-invalidated", "after 255, and nothing was invalidated between"),
        ("rollover-not-invalidated-model", "begins a new generation with VMID 1, nothing invalidated"),
        ("old-generation", "255 is of an old generation"),
        ("wrong-vmid", "is entered under VMID 4; the model's allocator gives 2"),
    ],
)
def test_the_reason_is_the_right_one(name, words):
    (found,) = violations(load(name, "bad"))
    assert words in found.why


def test_a_table_that_becomes_another_table_is_not_lost():
    """Software bits of a table may change in place, and the entries below it remain: no invalidation is due."""
    change = "old=0x4833b003 new=0x8000004833b003"
    world = "0 0 vttbr 0x10000484ce000", "0 0 enter vcpu=0x1", "0 0 exit"
    text = [*world, f"0 - entry root=0x484ce000 ipa=0x0 level=2 {change}", "0 - mark a", "0 - mark b"]
    assert violations(Trace.parse(["arm-kvm-trace 1", "cpus=1", *text])) == []


# -- the world --------------------------------------------------------------------------------------------

VM, OTHER = 0x484CE000, 0x484D0000


def under(vmid: int, root: int = VM) -> int:
    return vmid << 48 | root


def world_after(*events) -> TraceState:
    world = TraceState()
    for event in events:
        world.after(event)
    return world


def test_vttbr_is_each_cpus_own():
    world = world_after(Vttbr(0, 0, under(1)), Vttbr(0, 1, under(2)))
    assert (world.vttbr[0], world.vttbr[1], world.vttbr[2]) == (under(1), under(2), 0)


def test_a_guest_is_inside_until_it_exits():
    enter = Vttbr(0, 0, under(1)), Enter(0, 0, 0xA)
    assert world_after(*enter).inside == {0: under(1)}
    assert world_after(*enter, Exit(0, 0)).inside == {}


def test_an_aborted_entry_has_no_exit():
    """An interrupt was pending at the last step of the world switch; next the host's VTTBR is loaded."""
    assert world_after(Vttbr(0, 0, under(1)), Enter(0, 0, 0xA), Vttbr(0, 0, 0)).inside == {}


def test_an_exit_without_an_entry_is_the_beginning_of_a_recording():
    assert world_after(Exit(0, 0)).inside == {}


def test_what_has_run_is_cached_until_the_full_invalidation():
    ran = Vttbr(0, 0, under(1)), Enter(0, 0, 0xA), Exit(0, 0)
    assert world_after(*ran).cached == {VM: {1}}
    flushed = world_after(*ran, Invalidate(0, 0, "alle1is"))
    assert (flushed.cached, flushed.flushes) == ({}, 1)


def test_guests_that_run_on_are_cached_again_at_once():
    world = world_after(Vttbr(0, 1, under(8)), Enter(0, 1, 0xA), Invalidate(0, 0, "alle1is"))
    assert world.cached == {VM: {8}}


@pytest.mark.parametrize("op", ["alle1", "vmalls12e1is", "tlbiallnsnh", "tlbiallis", "ialluis"])
def test_less_than_everything_everywhere_is_no_full_invalidation(op):
    world = world_after(Vttbr(0, 0, under(1)), Enter(0, 0, 0xA), Invalidate(0, 0, op))
    assert (world.flushes, world.cached) == (0, {VM: {1}})


def test_a_root_used_again_is_another_vm():
    gone = Created(0, -1, VM, 1), Vttbr(0, 0, under(1)), Enter(0, 0, 0xA), Exit(0, 0), Destroyed(0, -1, VM)
    world = world_after(*gone)
    assert world.destroyed == {VM} and world.name(VM) == "VM 1 (root 0x484ce000, destroyed)"
    world.after(Created(0, -1, VM, 2))
    assert (world.destroyed, world.cached) == (set(), {}) and world.name(VM) == "VM 2 (root 0x484ce000)"


def test_a_vm_that_the_lab_did_not_create_has_a_root_at_least():
    assert TraceState().name(OTHER) == "a VM (root 0x484d0000)"


def test_others_inside_are_the_vms_own_vcpus_elsewhere():
    world = world_after(*(e for cpu in range(2) for e in (Vttbr(0, cpu, under(1)), Enter(0, cpu, cpu))))
    world.after(Vttbr(0, 2, under(2, OTHER)))
    world.after(Enter(0, 2, 0xC))
    assert list(world.others_inside(0, VM)) == [(1, under(1))]


# -- operands, DDI 0487 C5.5: TLBI IPAS2E1IS and TLBI RIPAS2E1IS -------------------------------------------

TG_4K = 1 << 46


@pytest.mark.parametrize("op", sorted(op for op, what in OPERATIONS.items() if what.reach is Reach.STAGE2_IPA))
def test_one_ipa_is_in_pages(op):
    """IPA[47:12] in bits [35:0]; NS (bit 63) and the reserved bits are ignored."""
    assert span(op, 0x8000) == span(op, 1 << 63 | 0x8000) == Span(0x8000000, 0x8001000)
    assert span(op, 0xFFFFFFFFF) == Span((1 << 48) - 0x1000, 1 << 48)


@pytest.mark.parametrize(("ttl", "level"), [(0b0101, 1), (0b0110, 2), (0b0111, 3), (0b0000, 0), (0b0011, 0)])
def test_ttl_of_one_ipa(ttl, level):
    """TTL[3:2] is the granule, 0: no hint, whatever TTL[1:0]. TTL[1:0] is the level of the leaf."""
    assert span("ipas2e1is", ttl << 44 | 0x8000).level == level


def test_a_range_of_the_smallest_and_of_the_largest_size():
    """(NUM + 1) * 2^(5 * SCALE + 1) granules from BaseADDR: 2 pages to 2 M pages (8 GiB)."""
    assert span("ripas2e1is", TG_4K | 0x8000) == Span(0x8000000, 0x8002000)
    assert span("ripas2e1is", TG_4K | 3 << 44 | 31 << 39) == Span(0, 8 << 30)


@pytest.mark.parametrize(("scale", "num", "pages"), [(0, 0, 2), (0, 30, 62), (1, 0, 64), (1, 7, 512), (2, 0, 2048)])
def test_the_size_of_a_range(scale, num, pages):
    assert span("ripas2e1is", TG_4K | scale << 44 | num << 39 | 0x40000).end == 0x40000000 + pages * 0x1000


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_ttl_of_a_range(level):
    assert span("ripas2le1os", TG_4K | level << 37 | 0x8000).level == level


@pytest.mark.parametrize(("granule", "shift"), [(1, 12), (2, 14), (3, 16)])
def test_the_base_of_a_range_is_in_granules(granule, shift):
    """BaseADDR is IPA[48:12], [50:14] or [52:16] by TG."""
    assert span("ripas2e1is", granule << 46 | 0x100) == Span(0x100 << shift, 0x102 << shift, granule=shift)


@pytest.mark.parametrize("op", ["vmalle1is", "alle1is", "tlbiallis"])
def test_an_operation_without_an_operand_has_no_span(op):
    with pytest.raises(ValueError, match=f"{op} has no operand"):
        span(op, 0)


def test_a_span_reaches_what_it_overlaps():
    pages = Span(0x2000, 0x4000)
    assert [pages.reaches(ipa, 0x1000, 3, False) for ipa in (0x1000, 0x2000, 0x3000, 0x4000)] == [0, 1, 1, 0]
    assert pages.reaches(0, 2 << 20, 2, False) and pages.reaches(0, 2 << 20, 2, True)


def test_a_hint_is_about_leaves_of_its_level():
    hinted = Span(0, 0x1000, 2)
    assert hinted.reaches(0, 2 << 20, 2, False)
    assert not hinted.reaches(0, 0x1000, 3, False) and not hinted.reaches(0, 2 << 20, 2, True)


@pytest.mark.parametrize("op", OPERATIONS)
def test_the_suffix_determines_the_cpus(op):
    """IS and OS are broadcast; of Armv7's names those that end in IS."""
    assert OPERATIONS[op].broadcast == op.endswith(("is", "os"))


# -- where a simpler rule would be wrong -------------------------------------------------------------------

RUN = "0 vttbr 0x10000484ce000\n0 enter vcpu=0x1\n0 exit\n"
ANOTHER = "0 vttbr 0x20000484d0000\n0 enter vcpu=0x2\n0 exit\n"
PAGE_GONE = "- entry root=0x484ce000 ipa=0x8000000 level=3 old=0x475507ff new=0x0\n"
BLOCK_GONE = "- entry root=0x484ce000 ipa=0x8000000 level=2 old=0x474007fd new=0x0\n"
DONE = "0 inv vmalle1is\n- mark memory_unmap\n- mark vcpu_pin\n"

SUBTLE = {
    "the local invalidation is under VMID 0, the vCPU before ran under 1": (
        RUN + "0 vttbr 0x484ce000\n0 inv vmalle1\n0 vttbr 0x10000484ce000\n0 enter vcpu=0x2\n",
        [TraceRule.NO_LOCAL_FLUSH],
    ),
    "TG of the range is 16 KiB, the entry is of 4 KiB tables: no entry is required to go": (
        f"{RUN}{PAGE_GONE}0 inv ripas2e1is 0x0000800000002000\n{DONE}",
        [TraceRule.NOT_INVALIDATED],
    ),
    "TTL of the range is 2, and BaseADDR not aligned to 2 MiB: no entry is required to go": (
        f"{RUN}{BLOCK_GONE}0 inv ripas2e1is {TG_4K | 1 << 44 | 2 << 37 | 0x8001:#x}\n{DONE}",
        [TraceRule.NOT_INVALIDATED],
    ),
    "a destroyed VM's number is used again, and it was not the newest: no rollover": (
        f"{RUN}{ANOTHER}- destroyed root=0x484ce000\n0 vttbr 0x10000484d2000\n0 enter vcpu=0x3\n",
        [TraceRule.VMID_REUSED],
    ),
    "a VM has another's number, and not the newest: no rollover": (
        f"{RUN}{ANOTHER}0 vttbr 0x10000484d2000\n0 enter vcpu=0x3\n",
        [TraceRule.VMID_SHARED],
    ),
    "FEAT_XNX, XN 2 (nobody) to 3 (EL1 alone): a right is granted": (
        f"{RUN}- entry root=0x484ce000 ipa=0x8000000 level=3 old=0x400000475507ff new=0x600000475507ff\n"
        "- mark memory_map\n- mark vcpu_pin\n",
        [],
    ),
}


@pytest.mark.parametrize(("text", "expected"), SUBTLE.values(), ids=SUBTLE)
def test_subtle_cases(text, expected):
    trace = Trace.parse(["arm-kvm-trace 1", "cpus=2", *(f"0 {line}" for line in text.splitlines())])
    assert [violation.rule for violation in violations(trace)] == expected
