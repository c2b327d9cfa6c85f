"""Traces as text: reading returns what was written, and invalid text is refused by file and line."""

from __future__ import annotations

import pytest
from arm_kvm.events.operations import OPERATIONS
from arm_kvm.events.trace import (
    MAGIC,
    Created,
    Destroyed,
    Enter,
    EntryChange,
    Event,
    Exit,
    Invalidate,
    Mark,
    Trace,
    Vttbr,
    format_event,
    parse_event,
    root_of,
    vmid_of,
)
from arm_kvm.support.errors import TraceError
from hypothesis import given
from hypothesis import strategies as st

FACTS = "host=a15 kernel=5.4.302 cpus=2 vmid-bits=8 allocator=consecutive"

times = st.integers(0, 10**9).map(lambda us: us * 1000)  # a line has microseconds
cpus = st.integers(-1, 255)
words = st.integers(0, (1 << 64) - 1)
texts = st.text(st.characters(codec="ascii", categories=("L", "N", "P"), exclude_characters="#"), max_size=12)


def _invalidations() -> st.SearchStrategy[Invalidate]:
    with_operand = sorted(op for op, what in OPERATIONS.items() if what.has_operand)
    without = sorted(set(OPERATIONS) - set(with_operand))
    return st.builds(Invalidate, times, cpus, st.sampled_from(with_operand), words) | st.builds(
        Invalidate, times, cpus, st.sampled_from(without)
    )


KINDS: dict[type[Event], st.SearchStrategy[Event]] = {
    Vttbr: st.builds(Vttbr, times, cpus, words),
    Enter: st.builds(Enter, times, cpus, words),
    Exit: st.builds(Exit, times, cpus),
    Invalidate: _invalidations(),
    EntryChange: st.builds(EntryChange, times, cpus, words, words, st.integers(0, 3), words, words),
    Created: st.builds(Created, times, cpus, words, st.integers(0, 10**6)),
    Destroyed: st.builds(Destroyed, times, cpus, words),
    Mark: st.builds(Mark, times, cpus, texts | st.just("memory_advise of 2 pages")),
}
words_of_facts = st.from_regex(r"[!-\"$-~]*", fullmatch=True)  # neither white space nor a comment
facts = st.fixed_dictionaries(
    {"host": words_of_facts},
    optional={"kernel": words_of_facts, "allocator": words_of_facts}
    | {key: st.integers(1, 16).map(str) for key in ("cpus", "vmid-bits")},
)


def test_every_kind_of_event_is_tried():
    assert {kind.word for kind in KINDS} == {kind.word for kind in Event.__subclasses__()}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.word)
@given(data=st.data())
def test_an_event_survives_its_text(kind, data):
    event = data.draw(KINDS[kind])
    assert parse_event(format_event(event)) == event


@given(facts=facts, events=st.lists(st.one_of(*KINDS.values()), max_size=20))
def test_a_trace_survives_its_text(facts, events):
    trace = Trace(facts, events)
    assert Trace.parse(trace.lines()) == trace


def test_what_is_saved_is_what_is_loaded(tmp_path):
    path = tmp_path / "deep" / "down" / "one.trace"
    trace = Trace({"host": "a15", "cpus": "2"}, [Created(1000, -1, 0x812A4000, 1), Vttbr(2000, 0, 0x1812A4000)])
    trace.save(path)
    assert Trace.load(path) == trace and trace.cpus == 2


def test_the_example_of_the_modules_docstring_is_a_trace():
    """The format is described by an example; it must be one."""
    import arm_kvm.events.trace as module

    example = module.__doc__.partition("::\n")[2].partition("\n\nA line has")[0]
    trace = Trace.parse(example.splitlines())
    assert [event.word for event in trace.events] == (
        ["created", "vttbr", "enter", "exit", "vttbr", "entry", "inv", "inv", "destroyed", "mark"]
    )
    assert trace.facts["allocator"] == "consecutive"
    assert [" ".join(line.split()) for line in example.splitlines() if line.strip()] == list(trace.lines())


def test_comments_and_empty_lines_are_ignored():
    trace = Trace.parse(["# what this is", MAGIC, "", FACTS, "0.1 0 exit # back", "# the end"])
    assert trace.events == [Exit(100_000_000, 0)]


def test_a_trace_may_end_after_its_first_line():
    assert Trace.parse([MAGIC]) == Trace() and Trace().cpus == 1


def test_a_saved_trace_that_was_cut_is_not_whole(tmp_path):
    """It was cut at the end of a line, so that each line is valid."""
    path = tmp_path / "one.trace"
    Trace({"cpus": "2"}, [Exit(1, 0), Exit(2, 1)]).save(path)
    assert Trace.load(path).facts == {"cpus": "2"}
    path.write_text(path.read_text().rpartition("\n")[0].rpartition("\n")[0] + "\n")
    with pytest.raises(TraceError, match="is not whole: 1 of 2 events"):
        Trace.load(path)


def test_events_by_kind():
    trace = Trace({}, [Exit(0, 0), Mark(0, -1, "a"), Exit(0, 1), Destroyed(0, -1, 2)])
    assert list(trace.of(Exit, Mark)) == trace.events[:3]


def test_vttbr_in_parts():
    """VMID in [63:48], the root below, CnP in bit 0."""
    assert vmid_of(0xFF00_0000_812A_4001) == 0xFF00 and root_of(0xFF00_0000_812A_4001) == 0x812A4000


# -- what is refused ---------------------------------------------------------------------------------------

NONSENSE = {
    "unknown word": "0.1 0 return",
    "no word": "0.1 0",
    "no time": "- 0 exit",
    "no such cpu": "0.1 zero exit",
    "enter without its vCPU": "0.1 0 enter",
    "exit with an operand": "0.1 0 exit vcpu=0x1",
    "exit with a word": "0.1 0 exit now",
    "entry without what it was": "0.1 - entry root=0x1000 ipa=0x0 level=3 new=0x0",
    "entry with something else": "0.1 - entry root=0x1000 ipa=0x0 level=3 old=0x0 new=0x0 asid=0x1",
    "vttbr without its value": "0.1 0 vttbr",
    "vttbr that is no number": "0.1 0 vttbr root",
    "no operation": "0.1 0 inv",
    "unknown operation": "0.1 0 inv vae1is 0x0",
    "missing operand": "0.1 0 inv ipas2e1is",
    "operand where none belongs": "0.1 0 inv vmalle1is 0x0000000000008000",
    "negative address": "0.1 0 vttbr -0x1",
    "negative operand": "0.1 - destroyed root=-0x1000",
    "operand that is no number": "0.1 0 inv ipas2e1is here",
}


@pytest.mark.parametrize("line", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_refused_by_file_and_line(tmp_path, line):
    path = tmp_path / "odd.trace"
    path.write_text(f"# a comment\n{MAGIC}\n{FACTS}\n0.0 0 exit\n{line}\n", encoding="ascii")
    with pytest.raises(TraceError) as refused:
        Trace.load(path)
    assert f"{path}, line 5: {line!r}" in str(refused.value)


@pytest.mark.parametrize("text", ["", "# nothing\n", "arm-kvm-trace 2\n", f"{FACTS}\n{MAGIC}\n"])
def test_a_trace_begins_with_its_magic_line(tmp_path, text):
    path = tmp_path / "odd.trace"
    path.write_text(text, encoding="ascii")
    with pytest.raises(TraceError, match=f"odd.trace is no trace: its first line is not {MAGIC!r}"):
        Trace.load(path)


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "odd.trace"
    path.write_bytes(f"{MAGIC}\n{FACTS}\n0.1 - mark caf\xe9\n".encode("latin-1"))
    with pytest.raises(TraceError, match="cannot read the trace .*odd.trace: it is not text"):
        Trace.load(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(TraceError, match="cannot read the trace .*none.trace: No such file or directory"):
        Trace.load(tmp_path / "none.trace")


@pytest.mark.parametrize("line", ["host", "cpus=two", "vmid-bits="])
def test_facts_that_make_no_sense_are_refused(line):
    with pytest.raises(TraceError, match="line 2"):
        Trace.parse([MAGIC, line])


def test_a_time_without_end_is_refused():
    with pytest.raises(TraceError, match="line 3"):
        Trace.parse([MAGIC, FACTS, "inf 0 exit"])


def test_a_trace_without_facts_survives_its_text():
    trace = Trace({}, [Exit(0, 0)])
    assert Trace.parse(trace.lines()) == trace
