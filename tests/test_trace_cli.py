"""``arm-kvm trace`` for its users: the verdict, the exit code, and the picture."""

from xml.etree import ElementTree

import pytest
from arm_kvm.support.errors import ProtocolViolation, SetupError, TraceError

HEAD = """arm-kvm-trace 1
host=a15 kernel=5.4.302 cpus=2 vmid-bits=8 allocator=consecutive
0.000000 - created root=0x81000000 vm=1
0.000010 - created root=0x82000000 vm=2
"""
#: Two VMs: VM 1 has the last VMID, VM 2 the first of the next generation, and VM 1 the second.
GOOD = (
    HEAD
    + """0.001000 0 vttbr 0x00ff000081000000
0.001010 0 inv tlbiall
0.001100 0 enter vcpu=0xc1000000
0.002500 0 exit
0.003000 1 inv tlbiallnsnhis
0.003010 1 inv icialluis
0.003100 1 vttbr 0x0001000082000000
0.003200 1 enter vcpu=0xc2000000
0.004200 1 exit
0.004500 1 inv tlbiallis
0.005000 0 vttbr 0x0002000081000000
0.005100 0 enter vcpu=0xc1000000
0.006100 0 exit
0.007000 - destroyed root=0x82000000
"""
)
#: VM 2 is entered under VM 1's VMID.
BAD = (
    HEAD
    + """0.001000 0 vttbr 0x0007000081000000
0.001100 0 enter vcpu=0xc1000000
0.002500 0 exit
0.003100 1 vttbr 0x0007000082000000
0.003200 1 enter vcpu=0xc2000000
0.004200 1 exit
"""
)


@pytest.fixture
def trace(tmp_path):
    """``trace(text)``: the text as a file."""

    def write(text, name="a.trace"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.fixture
def drawn(arm_kvm, trace):
    """``drawn(text)``: the picture of the trace, parsed."""

    def draw(text):
        done = arm_kvm("trace", "draw", file := trace(text))
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"{file.with_suffix('.svg')}\n"
        return ElementTree.parse(file.with_suffix(".svg")).getroot()

    return draw


def of_class(svg, name, within="."):
    """Titles of the elements of a class."""
    found = svg.find(within).iter()
    return ["".join(element.itertext()) for element in found if element.get("class") == name]


def one_message(done, error):
    assert done.returncode == error.exit_code
    assert done.stderr.startswith("arm-kvm: ") and "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("command", ["check", "draw"])
def test_every_command_explains_itself(arm_kvm, command):
    done = arm_kvm("trace", command, "--help")
    assert done.returncode == 0 and "usage: arm-kvm trace" in done.stdout


# -- check --------------------------------------------------------------------------------------------------


def test_a_good_trace(arm_kvm, trace):
    done = arm_kvm("trace", "check", file := trace(GOOD))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{file}: 16 events, 3 guest entries, 1 rollovers: the rules are kept\n"


def test_a_bad_trace_is_named_with_its_violation_and_the_others_are_judged_too(arm_kvm, trace):
    bad, good = trace(BAD), trace(GOOD, "b.trace")
    done = arm_kvm("trace", "check", bad, good)
    said = one_message(done, ProtocolViolation)
    assert f"1 of 2 traces break the rules of VMIDs and TLB maintenance: {bad}\n" in said
    assert "vmid-shared" in done.stdout and "event 6: 0.003200 1 enter" in done.stdout
    assert f"{good}: 16 events" in done.stdout


@pytest.mark.parametrize("command", ["check", "draw"])
@pytest.mark.parametrize(
    "text, words",
    {
        "not a trace": ("VMIDs are numbers\n", "is no trace"),
        "no event": (f"{HEAD}0.1 0 jump\n", "line 5"),
        "cut short": (f"{HEAD}0.001000 0 vttbr\n", "line 5"),
        "empty": ("", "is no trace"),
        "binary": ("\0\xff", "it is not text"),
    }.values(),
)
def test_garbage_names_file_and_line(arm_kvm, trace, command, text, words):
    done = arm_kvm("trace", command, file := trace(text))
    said = one_message(done, TraceError)
    assert str(file) in said and words in said


@pytest.mark.parametrize("command", ["check", "draw"])
def test_no_such_file(arm_kvm, tmp_path, command):
    assert "No such file" in one_message(arm_kvm("trace", command, tmp_path / "none.trace"), TraceError)


# -- draw ---------------------------------------------------------------------------------------------------


def test_a_picture_has_a_bar_for_each_entry_on_the_row_of_its_vm_and_on_the_strip_of_its_cpu(drawn):
    svg = drawn(GOOD)
    bars = ["VM 1, VMID 255, CPU 0, 1.100-2.500 ms", "VM 1, VMID 2, CPU 0, 5.100-6.100 ms"]
    bars.append("VM 2, VMID 1, CPU 1, 3.200-4.200 ms")
    assert of_class(svg, "run") == bars
    assert sorted(of_class(svg, "strip")) == sorted(bars)
    words = [element.text for element in svg.iterfind(".//{*}text")]
    assert {"VM 1", "VM 2", "CPU 0", "CPU 1", "255", "the rules are kept"} <= set(words)


def test_a_picture_has_rollovers_invalidations_and_ends_of_vms(drawn):
    svg = drawn(GOOD)
    assert of_class(svg, "rollover") == ["rollover: tlbiallnsnhis, CPU 1, 3.000 ms"]
    moments = ".//*[@id='moments']"
    assert of_class(svg, "broadcast", moments) == ["tlbiallis, VM 2, 4.500 ms"]
    assert of_class(svg, "local", moments) == ["tlbiall, VM 1, 1.010 ms"]
    assert of_class(svg, "destroyed", moments) == ["destroyed, VM 2, 7.000 ms"]
    assert of_class(svg, "violation", moments) == []


def test_violations_are_marked_and_described(drawn):
    svg = drawn(BAD)
    assert "vmid-shared, VM 2, 3.200 ms" in of_class(svg, "violation", ".//*[@id='moments']")
    assert any(
        (element.text or "").startswith("event 6: vmid-shared: VMID 7") for element in svg.iterfind(".//{*}text")
    )


def test_a_run_ends_where_the_next_vttbr_is_written(drawn):
    """The first entry was aborted at its last step, and the recording stopped inside a guest."""
    turned_back = f"{HEAD}0.001 0 vttbr 0x0007000081000000\n0.002 0 enter vcpu=0x1\n0.003 0 vttbr 0x0\n"
    svg = drawn(f"{turned_back}0.004 0 vttbr 0x0007000081000000\n0.005 0 enter vcpu=0x1\n0.006 - mark\n")
    assert [title.rpartition(", ")[2] for title in of_class(svg, "run")] == ["2.000-3.000 ms", "5.000-6.000 ms"]


def test_a_root_that_is_used_again_is_another_row(drawn):
    svg = drawn(f"{GOOD}0.008 - created root=0x82000000 vm=3\n0.009 1 vttbr 0x0003000082000000\n0.010 1 enter vcpu=1\n")
    assert "VM 3" in [element.text for element in svg.iterfind(".//{*}text")]
    assert sum(title.startswith("VM 3, VMID 3") for title in of_class(svg, "run")) == 1


@pytest.mark.parametrize("text", [HEAD, "arm-kvm-trace 1\n"], ids=["no entry", "nothing at all"])
def test_a_trace_without_guests_is_drawn_too(drawn, text):
    assert of_class(drawn(text), "run") == []


def test_facts_may_contain_any_characters(drawn):
    svg = drawn(HEAD.replace("a15", "<&\"'>"))
    assert any("<&\"'>" in (element.text or "") for element in svg.iterfind(".//{*}text"))


def test_the_picture_of_ten_thousand_events_has_a_reasonable_size(arm_kvm, trace, tmp_path):
    lines = []
    for n in range(3333):
        us = 100 * n
        lines.append(f"{us / 1e6:.6f} 0 vttbr {(n % 255 + 1) << 48 | (n % 255 + 1) << 16:#x}")
        lines.append(f"{(us + 10) / 1e6:.6f} 0 enter vcpu={n % 255:#x}")
        lines.append(f"{(us + 60) / 1e6:.6f} 0 exit")
    out = tmp_path / "big.svg"
    assert arm_kvm("trace", "draw", trace(HEAD + "\n".join(lines)), "-o", out).stdout == f"{out}\n"
    assert out.stat().st_size < 1_500_000
    assert len(of_class(ElementTree.parse(out).getroot(), "run")) == 3333


@pytest.mark.parametrize("where", ["none/a.svg", "."])
def test_an_unwritable_picture_gets_one_message(arm_kvm, trace, tmp_path, where):
    done = arm_kvm("trace", "draw", trace(GOOD), "-o", tmp_path / where)
    said = one_message(done, SetupError)
    assert said.startswith(f"arm-kvm: cannot write the picture {tmp_path / where}: ") and done.stdout == ""


def test_a_full_disk_gets_one_message(arm_kvm, trace):
    assert "No space left" in one_message(arm_kvm("trace", "draw", trace(GOOD), "-o", "/dev/full"), SetupError)


def test_a_trace_is_not_overwritten_by_its_picture(arm_kvm, trace):
    file = trace(GOOD, "a.svg")
    assert "would overwrite" in one_message(arm_kvm("trace", "draw", file), SetupError)
    assert file.read_text() == GOOD
