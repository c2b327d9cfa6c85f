"""The vocabulary as text: every step is parsed as it was written, and mistakes are reported with their line."""

import pytest
from arm_kvm.sequences.steps import PAGES, SLOTS, VCPUS, Step, StepKind, every, load, parse
from arm_kvm.support.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st


@st.composite
def steps(draw):
    first = draw(st.integers(0, PAGES - 1))
    arguments = {
        "page": first,
        "last": draw(st.integers(first, PAGES - 1)),
        "to": draw(st.integers(0, PAGES - 1)),
        "vcpu": draw(st.integers(0, VCPUS - 1)),
        "slot": draw(st.sampled_from(SLOTS)),
    }
    kind = draw(st.sampled_from(StepKind))
    return Step(kind, **{name: value for name, value in arguments.items() if f"{{{name}}}" in kind.value})


@given(steps())
def test_a_step_is_parsed_as_it_was_written(step):
    assert parse(str(step)) == parse(f"  {step}  # why") == step


def test_comments_and_empty_lines_are_skipped(tmp_path):
    file = tmp_path / "sequence.txt"
    file.write_text("# found on a15\n\nfork\nhost writes page 3 # then\n")
    assert load(file) == [Step(StepKind.FORK), Step(StepKind.HOST_WRITES, page=3)]


@pytest.mark.parametrize(
    "line",
    [
        "guest 0 jumps",
        "host writes page 16",
        "guest 2 reads page 0 through memslot 1",
        "memslot 3 is deleted",
        "madvise DONTNEED pages 5 to 4",
        "host writes page -1",
        "fork twice",
    ],
)
def test_a_line_that_is_no_step_is_reported_with_its_number(tmp_path, line):
    file = tmp_path / "sequence.txt"
    file.write_text(f"fork\n{line}\n")
    with pytest.raises(ConfigError, match=r"sequence.txt:2"):
        load(file)


@pytest.mark.parametrize(("data", "words"), [(b"# fork\n\n", "has no step in it"), (b"\xff\xfe", "it is not text")])
def test_a_file_without_steps(tmp_path, data, words):
    path = tmp_path / "sequence.txt"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=words):
        load(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize("kind", StepKind)
def test_every_step_of_a_kind_is_listed_once_the_simplest_first(kind):
    listed = every(kind)
    assert len(set(listed)) == len(listed) and listed[0] == Step(kind)


@given(steps())
def test_every_step_is_listed(step):
    assert step in every(step.kind)
