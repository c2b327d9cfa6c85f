"""``pytest --mutate``: every fate, on real hosts with suites of a few cases."""

import json
import re

import pytest

from .examples import GOOD, sum_of, words_at

SUITE = """
from arm_kvm.vmm.memory import Advice

def test_dontneed(vm, stage2):
    memory = vm.add_memory(0x80000000, 0x1000)
    vm.guest.write(0x80000000, 1)
    memory.advise(Advice.DONTNEED)
    assert stage2(vm).leaf(0x80000000) is None
"""


FIRST_RUN = "kvm_arch_vcpu_ioctl_run"


CATALOGUE = """
unmap-ignored:
  {fault: f, origin: o, return: [kvm_unmap_gfn_range], value: 0, look: [test_suite.py]}
harmless:
  {fault: the debugger gets no translation, origin: o, return: [kvm_arch_vcpu_ioctl_translate], look: [test_suite.py]}
explained:
  {fault: f, origin: o, return: [kvm_arch_vcpu_ioctl_translate], look: [test_suite.py], survives: no case calls it}
deadly:
  fault: the first run executes an undefined instruction
  origin: o
  words: [{in: kvm_arch_vcpu_ioctl_run, find: "@", with: "00000000", kernel: armv8-6.1, sums: ["00000000"]}]
  look: [test_suite.py]
deadly-as-expected:
  fault: the first run executes an undefined instruction
  origin: o
  words: [{in: kvm_arch_vcpu_ioctl_run, find: "@", with: "00000000", kernel: armv8-6.1, sums: ["00000000"]}]
  look: [test_suite.py]
  dies: an undefined instruction
elsewhere:
  {fault: f, origin: o, return: [kvm_unmap_hva_range], look: [test_suite.py]}
other-build:
  fault: f
  origin: o
  words: [{in: kvm_arch_vcpu_ioctl_run, find: "12345678", with: "00000000", kernel: armv8-6.1, sums: ["00000000"]}]
  look: [test_suite.py]
"""


def test_every_fate(run, tmp_path, victim):
    """Killed, survived, explained, wrongly killed, not applicable: by a suite of one case, on real hosts."""
    found = words_at(victim, FIRST_RUN, 1)[0]
    deadly = f'"{found:08x}", with: "00000000", kernel: armv8-6.1, sums: ["{sum_of(victim, FIRST_RUN)}"]'
    catalogue = CATALOGUE.replace('"@", with: "00000000", kernel: armv8-6.1, sums: ["00000000"]', deadly)
    (tmp_path / "mutants.yaml").write_text(catalogue)
    options = ["--mutate", "all", "--catalogue", "mutants.yaml", "--host", "arm64", "-q", "--tb=no"]
    code, said = run(SUITE, *options)
    fates = dict(re.findall(r"^arm64 +mutants +(\S+) +(.*?)  ", said, re.M))
    assert fates == {
        "unmap-ignored": "killed",
        "harmless": "survived",
        "explained": "survived, as explained",
        "deadly": "wrongly killed",
        "deadly-as-expected": "killed",
        "elsewhere": "not applicable",
        "other-build": "not applicable",
    }
    assert re.search(
        r"unmap-ignored +killed .* test_suite.py::test_dontneed\[arm64-A\d\d\] .*(wrong-frame|stale)", said
    )
    assert "arm64: 2 of 5 applicable mutants killed, 40 %" in said
    assert "2 not applicable (of them in another build than the catalogue knows: other-build)" in said
    assert code == 1, "one survived unexplained, one was wrongly killed"


@pytest.mark.parametrize(
    ("end", "fate"),
    [
        ("host.machine.qmp('quit'); host.machine.process.wait()", r"wrongly killed .*QEMU ended \(exit code 0\)"),
        ("host.machine.process.kill(); host.machine.process.wait()", r"not run .*QEMU ended \(signal 9\)"),
    ],
)
def test_dies_does_not_cover_the_end_of_qemu(run, tmp_path, end, fate):
    """``dies`` is about the host's kernel, which can neither make QEMU exit nor have it killed."""
    (tmp_path / "mutants.yaml").write_text(CATALOGUE.replace("@", "00000000").replace("survives:", "dies:"))
    options = ["--mutate", "explained", "--catalogue", "mutants.yaml", "--host", "arm64", "-q"]
    code, said = run(f"def test_one(host):\n    {end}\n", *options)
    assert code == 1 and re.search(f"explained +{fate}", said)


def test_a_host_without_a_kernel(run, tmp_path, empty_cache):
    (tmp_path / "mutants.yaml").write_text(CATALOGUE.replace("@", "00000000"))
    options = ["--mutate", "harmless", "--catalogue", "mutants.yaml", "--host", "a15", "-q"]
    code, said = run(SUITE, *options, **empty_cache)
    assert code == 1 and re.search(r"harmless +not run .* linux-5.4.302.tar.xz is not cached", said)
    assert "0 of 0 applicable mutants killed, 0 %; 1 not run" in said


def test_no_case_to_run(run, tmp_path):
    (tmp_path / "mutants.yaml").write_text(GOOD.replace("test_suite.py", "test_other.py"))
    options = ["--mutate", "one", "--catalogue", "mutants.yaml", "--host", "arm64", "-q", "--quick"]
    code, said = run(SUITE, *options)
    assert code == 1 and re.search(r"one +not run .* no case was chosen", said)


def test_a_case_that_fails_without_a_mutant(run, tmp_path):
    (tmp_path / "mutants.yaml").write_text(CATALOGUE.replace("@", "00000000"))
    options = ["--mutate", "unmap-ignored", "--catalogue", "mutants.yaml", "--host", "arm64", "-q"]
    code, said = run(SUITE.replace("is None", "is not None"), *options)
    words = r"not run .* test_suite.py::test_dontneed\S* fails where nothing is broken, too: AssertionError"
    assert code == 1 and re.search(f"unmap-ignored +{words}", said)


def test_a_case_that_fails_after_another(run, tmp_path):
    """On an unbroken host it passes alone and fails after the same cases, so the mutant is not the reason."""
    (tmp_path / "mutants.yaml").write_text(CATALOGUE.replace("@", "00000000"))
    suite = """
import pytest

def test_leaves_something(host):
    host.ssh.run("touch /something")

@pytest.mark.isolation("test")
def test_between(host):
    pass

def test_fails_over_it(host):
    assert host.ssh.run("ls /").find("something") < 0
"""
    options = ["--mutate", "harmless", "--catalogue", "mutants.yaml", "--host", "arm64", "-q"]
    code, said = run(suite, *options)
    words = "not run .* test_suite.py::test_fails_over_it.* fails where nothing is broken, too: AssertionError"
    assert code == 1 and re.search(f"harmless +{words}", said)


def test_a_mutant_is_not_kept(run):
    code, said = run(SUITE, "--mutate", "unmap-ignored", "--keep", "--host", "arm64", "-n", "0")
    assert code == 4 and "--keep is for a machine that a case failed on" in said


LOSES_ITS_COMPILER = """
from arm_kvm.support.errors import SetupError
from arm_kvm.pytest_plugin import prepare

def missing(qemu):
    raise SetupError("gcc is not installed")

prepare.Probe = missing

def test_one(vm):
    vm.guest.ping()

def test_two(vm, record):
    pass
"""


def test_a_host_that_is_no_longer_available(run, tmp_path):
    """The first case passes; for the second there is no host, which says nothing about the mutant."""
    (tmp_path / "mutants.yaml").write_text(CATALOGUE.replace("@", "00000000"))
    options = ["--mutate", "harmless", "--catalogue", "mutants.yaml", "--host", "arm64", "-q"]
    code, said = run(LOSES_ITS_COMPILER, *options)
    assert code == 1 and re.search(r"harmless +not run .* gcc is not installed", said)


def test_a_mutant_whose_worker_dies(run, tmp_path):
    """It is still in the table, but not among the applicable mutants."""
    (tmp_path / "mutants.yaml").write_text(CATALOGUE.replace("@", "00000000"))
    suite = "import os\n\ndef test_one(vm):\n    os.kill(os.getpid(), 9)\n"
    options = ["--mutate", "harmless", "--mutate", "elsewhere", "--catalogue", "mutants.yaml", "--host", "arm64"]
    code, said = run(suite, *options, "-n", "1")
    assert code == 1 and re.search(r"harmless +not run .* its worker died, or the run ended before its turn", said)
    assert "0 of 0 applicable mutants killed, 0 %; 1 not applicable, 1 not run" in said


def test_the_slowest_mutants_come_first(run, tmp_path, empty_cache):
    """By their durations in the last run, which pytest's cache keeps."""
    names = ("one", "other")
    (tmp_path / "mutants.yaml").write_text("".join(GOOD.replace("one:", f"{name}:") for name in names))
    known = tmp_path / ".pytest_cache/v/arm-kvm/durations"
    options = ["--mutate", "all", "--catalogue", "mutants.yaml", "--host", "a15", "-n", "1", "-v"]
    for order in (names, names[::-1]):
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text(json.dumps({f"::a15/{name}": 9.0 - place for place, name in enumerate(order)}))
        _, said = run(SUITE, *options, **empty_cache)
        assert list(dict.fromkeys(re.findall(r"a15/(\w+)", said)))[:2] == list(order)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_unknown_mutant(run, workers):
    code, said = run(SUITE, "--mutate", "unmap-ignord", "--host", "arm64", "-n", workers)
    assert (
        code == 4
        and "no mutant is called 'unmap-ignord'; did you mean 'unmap-ignored'?" in said
        and "INTERNALERROR" not in said
    )


def test_a_missing_catalogue(run):
    code, said = run(SUITE, "--mutate", "all", "--catalogue", "none.yaml", "--host", "arm64")
    assert code == 4 and "none.yaml" in said and "Traceback" not in said
