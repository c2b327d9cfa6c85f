"""The registry of known faults: a case that names one is an expected failure, but only where the fault is known."""

import re

import pytest
from arm_kvm.known_faults import KNOWN_FAULTS, KnownFault, find
from arm_kvm.support.errors import ConfigError
from arm_kvm.support.paths import TESTCASES


@pytest.mark.parametrize(
    ("since", "until", "architecture", "kernels"),
    [
        (None, None, "", "all kernels"),
        (None, None, "armv7", "armv7 kernels"),
        (None, (5, 12), "", "kernels before 5.12"),
        ((4, 7), (6, 10), "armv8", "armv8 kernels since 4.7 before 6.10"),
    ],
)
def test_a_range_in_words(since, until, architecture, kernels):
    assert KnownFault("one", "words", "", since, until, architecture).kernels == kernels


def test_what_a_range_covers():
    fault = KnownFault("one", "words", since=(4, 7), until=(5, 12), architecture="armv7")
    releases = [(4, 6), (4, 7), (5, 4), (5, 11), (5, 12), (6, 1)]
    assert [release for release in releases if fault.covers(release, "armv7")] == [(4, 7), (5, 4), (5, 11)]
    assert not fault.covers((5, 4), "armv8")


def test_every_fault_is_named_by_a_case():
    """By ``known_fault``, or by ``quiet``, which looks for complaints of the kernel."""
    code = "\n".join(path.read_text() for path in TESTCASES.rglob("*.py"))
    named = set(re.findall(r'(?:known_fault|quiet)\([^()]*?"([a-z0-9-]+)"', code))
    assert named == set(KNOWN_FAULTS)


def test_every_fault_was_seen_somewhere():
    assert [fault.name for fault in KNOWN_FAULTS.values() if not fault.seen] == []


def test_names_are_words_joined_by_hyphens():
    assert [name for name in KNOWN_FAULTS if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", name)] == []


def test_an_unknown_name():
    with pytest.raises(ConfigError, match="no known fault is called 'block-beyond-memslots'; did you mean 'block-bey"):
        find("block-beyond-memslots")


ENTERED = """
import pytest
from arm_kvm.known_faults import KNOWN_FAULTS, KnownFault

KNOWN_FAULTS["of-all"] = KnownFault("of-all", "something that is known")
KNOWN_FAULTS["of-old"] = KnownFault("of-old", "something that went long ago", until=(2, 6))
KNOWN_FAULTS["of-new"] = KnownFault("of-new", "something that is to come", since=(99, 0))
KNOWN_FAULTS["of-arm"] = KnownFault("of-arm", "something of 32 bits", architecture="armv7")
KNOWN_FAULTS["of-arm64"] = KnownFault("of-arm64", "something of 64 bits", until=(99, 0), architecture="armv8")
"""

EXCUSED = """
def test_known(host, vm, known_fault):
    host.ssh.run("echo '<4>WARNING: CPU: 0 PID: 1 at mm/made_up.c:1' > /dev/kmsg")
    known_fault("of-all")

def test_known_and_alone(vm, known_fault):
    known_fault("of-all", seen="here")

def end(host):
    host.machine.process.kill()
    host.machine.process.wait()

@pytest.mark.may_end_host
def test_known_and_fatal(host, vm, known_fault):
    end(host)
    known_fault("of-arm64", fatal=True)

def test_fatal_for_others_too(host, vm, known_fault):
    end(host)
    known_fault("of-arm64", fatal=True)

def test_that_comes_after(vm):
    vm.guest.ping()
"""


def test_a_known_fault_excuses_nothing_else(run):
    code, said = run(ENTERED + EXCUSED, "--host", "arm64", "-k", "A64")
    assert code == 1 and "kernel-splat" in said
    assert all(count in said for count in ("2 failed", "1 passed", "2 xfailed"))
    assert re.search(r"XFAIL .*test_known_and_alone.* here: something that is known", said)
    assert re.search(r"XFAIL .*test_known_and_fatal.* something of 64 bits", said)
    assert re.search(r"FAILED .*test_fatal_for_others_too", said) and "after the test, its host is lost" in said


ELSEWHERE = """
from arm_kvm.oracle import Verdict, Violation
from arm_kvm.oracle.verdicts import Finding

@pytest.mark.parametrize("name", ["of-all", "of-arm64", "of-old", "of-new", "of-arm", "of-mars"])
def test_fault(host, name, known_fault):
    known_fault(name)

def test_fatal(host, known_fault):
    known_fault("of-old", fatal=True)

def test_violation(host, known_fault):
    try:
        raise Violation("wrong tables", [Finding(Verdict.OUTSIDE_MEMSLOTS, "less", "more", 0x4000, 0x1000)])
    except Violation:
        known_fault("of-old")
"""


def test_a_fault_on_a_kernel_that_is_not_known_to_have_it(run):
    code, said = run(ENTERED + ELSEWHERE, "--host", "arm64")
    assert code == 1 and "6 failed, 2 xfailed" in said
    assert re.search(
        r"Linux 6\.1\S* \(armv8\) shows a fault known of kernels before 2\.6 only: something that went long ago", said
    )
    assert "known of kernels since 99.0 only" in said and "known of armv7 kernels only" in said
    assert "ConfigError: no known fault is called 'of-mars'" in said
    violation = said.partition("_ test_violation")[2]
    assert "outside-memslots" in violation and "known of kernels before 2.6 only" in violation
