"""Mutants: the catalogue is checked, a fault lands where it is meant to, and every fate can be met."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from arm_kvm.host import config, snapshots
from arm_kvm.host.kernel import obtain
from arm_kvm.mutants import catalogue, score, source
from arm_kvm.mutants.catalogue import Edit, Mutant, NotApplicable, Word
from arm_kvm.mutants.fingerprint import fingerprint
from arm_kvm.mutants.patching import put_in
from arm_kvm.mutants.score import Fate, MutantResult
from arm_kvm.recorder.facts import kernel_map
from arm_kvm.support.errors import ConfigError, KernelError
from arm_kvm.support.paths import ROOT

from .test_plugin import Run

GOOD = """
one:
  fault: it is broken
  origin: somewhere
  return: [kvm_unmap_gfn_range]
  value: 0
  look: [test_suite.py]
"""


# -- the catalogue -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("fault", "falt", "unknown key 'falt' in mutant 'one'; did you mean 'fault'"),
        ("  origin: somewhere\n", "", "mutant 'one' lacks the key 'origin'"),
        (
            "  return: [kvm_unmap_gfn_range]\n",
            "",
            "put in by one of: return, drop, localise, words, source; here by none",
        ),
        ("  value: 0", "  drop: {op: [alle1is], in: [f]}", "put in by one of"),
        ("value: 0", "value: zero", "value: 'zero' is not a number"),
        ("return: [kvm_unmap_gfn_range]", "return: kvm_unmap_gfn_range", "is not a list of names"),
        (
            "return: [kvm_unmap_gfn_range]\n  value: 0",
            'words: [{in: f, find: "123", with: "d503201f", kernel: armv8-6.1, sums: ["01234567"]}]',
            "find: '123' is not an instruction word",
        ),
        (
            "return: [kvm_unmap_gfn_range]\n  value: 0",
            'words: [{in: f, find: "d503201f", with: "d503201f", kernel: armv8, sums: ["01234567"]}]',
            "kernel: 'armv8' is not an architecture and a version",
        ),
        (
            "return: [kvm_unmap_gfn_range]\n  value: 0",
            'words: [{in: f, find: "d503201f", with: "d503201f", kernel: armv8-6.1, sums: ["1234"]}]',
            "sums: ['1234'] is not a list of eight hexadecimal digits each",
        ),
        (
            "return: [kvm_unmap_gfn_range]\n  value: 0",
            "source: [{file: mmu.c, in: f, find: a, with: b, nth: 2}]",
            "unknown key 'nth' in an edit",
        ),
        ("[kvm_unmap_gfn_range]\n  value: 0", "[]", "return is empty: nothing would be broken"),
        ("return: [kvm_unmap_gfn_range]\n  value: 0", "localise: {op: [alle1], in: [f]}", "'alle1' is local already"),
        ("return: [kvm_unmap_gfn_range]\n  value: 0", "drop: {op: [alle1], in: []}", "drop is empty"),
        ("  value: 0", "  fault: it is broken again", "'fault' is there twice"),
        ("one:", "2012:", "the key 2012 is not text: quote it"),
        ("origin: somewhere", "origin: 2012-99-99", "month must be in 1..12"),
    ],
)
def test_what_is_wrong_in_a_catalogue_is_named(tmp_path, old, new, words):
    file = tmp_path / "area.yaml"
    file.write_text(GOOD.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        catalogue.load(file)
    assert words in str(caught.value) and re.search(r"area\.yaml:\d+: ", str(caught.value))


def test_two_of_one_name(tmp_path):
    for area in "ab":
        (tmp_path / f"{area}.yaml").write_text(GOOD)
    with pytest.raises(ConfigError, match="two mutants are called 'one'"):
        catalogue.load(tmp_path)


def test_our_own_look_where_there_are_cases():
    """A mutant whose `look` matches nothing would be run against the suite in any order."""
    argv = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--collect-only", "-q", "testcases"]
    cases = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120).stdout
    mutants = catalogue.load()
    assert len(mutants) >= 40
    assert [(m.name, where) for m in mutants for where in m.look if where not in cases] == []


# -- put in ------------------------------------------------------------------------------------------------------

ARM64 = config.find("arm64")
RET, NOP = 0xD65F_03C0, 0xD503_201F
NO = ("00000000",)  #: the sum of no function


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    host = snapshots.obtain(ARM64, obtain(ARM64), logs).restore(logs)
    yield host
    host.shutdown()


def mutant(**how):
    return Mutant("m", "area", "fault", "origin", (), frozenset(), **how)


def words_at(host, name, count):
    """The first instruction words of a function."""
    start = kernel_map(host).body(name).start
    raw = host.machine.ram.read(start, 4 * count)
    return [int.from_bytes(raw[i : i + 4], "little") for i in range(0, len(raw), 4)]


def sum_of(host, name):
    body = kernel_map(host).body(name)
    return fingerprint("armv8", host.machine.ram.read(body.start, 4 * len(body)))


def test_a_function_returns_at_once(victim):
    put_in(mutant(returns=("kvm_age_gfn", "kvm_age_hva"), value=7), victim)
    assert words_at(victim, "kvm_age_gfn", 2) == [0xD280_00E0, RET]


def test_an_invalidation_is_dropped_or_made_local(victim):
    where = "__kvm_nvhe___kvm_tlb_flush_vmid_ipa"
    put_in(mutant(operations=("ipas2e1is",), functions=("__kvm_tlb_flush_vmid_ipa",), local=True), victim)
    body = words_at(victim, where, 40)
    assert [w for w in body if w & ~0x1F == 0xD50C_8420], "IPAS2E1, with the register it had"
    put_in(mutant(operations=("vmalle1is",), functions=("__kvm_tlb_flush_vmid_ipa",)), victim)
    assert NOP in words_at(victim, where, 40)


def test_a_word_is_replaced_where_it_is_the_nth(victim):
    before = words_at(victim, "kvm_set_spte_gfn", 12)
    word = before[3]
    nth = before[:4].count(word)
    sums = (sum_of(victim, "kvm_set_spte_gfn"),)
    put_in(mutant(words=(Word("kvm_set_spte_gfn", word, NOP, nth, "armv8-6.1", sums),)), victim)
    assert words_at(victim, "kvm_set_spte_gfn", 12) == [*before[:3], NOP, *before[4:]]


def test_the_function_counts_and_not_the_version(victim):
    """A word of another release is replaced where the function is the same; a branch keeps the offset it has here."""
    body = words_at(victim, "kvm_set_spte_gfn", 40)
    at = next(n for n, word in enumerate(body) if word >> 26 == 0b100101)
    elsewhere = 0x9400_0000 | ~body[at] & 0x3FF_FFFF
    nth = sum(word >> 26 == 0b100101 for word in body[: at + 1])
    jump = elsewhere & ~(1 << 31)  # BL to B, to the same place
    word = Word("kvm_set_spte_gfn", elsewhere, jump, nth, "armv8-5.10", (sum_of(victim, "kvm_set_spte_gfn"),))
    put_in(mutant(words=(word,)), victim)
    assert words_at(victim, "kvm_set_spte_gfn", 40)[at] == body[at] & ~(1 << 31)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"returns": ("no_such_function",)}, "no no_such_function in this kernel"),
        ({"operations": ("alle1os",), "functions": ("__kvm_flush_vm_context",)}, "no alle1os in"),
        ({"words": (Word("kvm_test_age_gfn", NOP, NOP, 1, "armv7-6.1", NO),)}, "of armv7-6.1, this is armv8-6.1"),
        ({"words": (Word("kvm_test_age_gfn", NOP, NOP, 1, "armv8-5.10", NO),)}, "of armv8-5.10, this is armv8-6.1"),
        (
            {"words": (Word("kvm_test_age_gfn", NOP, NOP, 1, "armv8-6.1", NO),)},
            "is not as in the catalogue's .* its sum",
        ),
        ({"words": (Word("no_such", NOP, NOP, 1, "armv8-6.1", NO),)}, "no no_such in this build of armv8-6.1"),
    ],
)
def test_what_cannot_be_put_in(victim, how, words):
    with pytest.raises(NotApplicable, match=words):
        put_in(mutant(**how), victim)


def test_a_word_that_its_function_has_not(victim):
    word = Word("kvm_test_age_gfn", 0x1234_5678, NOP, 1, "armv8-6.1", (sum_of(victim, "kvm_test_age_gfn"),))
    with pytest.raises(NotApplicable, match="has no 12345678 number 1"):
        put_in(mutant(words=(word,)), victim)


def test_what_a_function_is_wherever_it_lies():
    def text(*words):
        return b"".join(word.to_bytes(4, "little") for word in words)

    here = text(0x9000_0001, 0x9104_0021, 0x9400_0010, 0x5400_0261, 0xF940_0C21)  # adrp, add, bl, b.ne, ldr [x1, #24]
    there = text(0xB000_0501, 0x9108_4021, 0x97FF_0010, 0x5400_0141, 0xF940_1021)
    other = text(0x9000_0001, 0x9104_0021, 0x9400_0010, 0x5400_0260, 0xF940_0C21)  # b.eq
    assert fingerprint("armv8", here) == fingerprint("armv8", there) != fingerprint("armv8", other)
    assert fingerprint("armv8", text(0xF940_0C41)) != fingerprint("armv8", text(0xF940_1041))  # a member of a structure
    here, there = text(0xE301_1234, 0xEB00_0010), text(0xE30F_1ABC, 0xEBFF_0010)  # movw, bl
    assert (
        fingerprint("armv7", here)
        == fingerprint("armv7", there)
        != fingerprint("armv7", text(0xE301_2234, 0xEB00_0010))
    )


def test_a_host_that_lacks_something(victim):
    with pytest.raises(NotApplicable, match="arm64 lacks fail-nth"):
        put_in(replace(mutant(returns=("kvm_age_gfn",)), needs=frozenset({"fail-nth"})), victim)


# -- put into the source ------------------------------------------------------------------------------------------

C = """\
static void fault(struct kvm *kvm);

/* fault() takes the lock; */
static int
fault_on(struct kvm *kvm,
         unsigned long ipa)
{
        if (!ipa)
                return fault(kvm);
        lock(kvm);
        return 0;
}

static void fault(struct kvm *kvm)
{
        lock(kvm);
        map(kvm);
}

void unlock_all(void)
{
        lock(kvm);
}
"""


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "mmu.c").write_text(C)
    return tmp_path


def edit(function, find="lock(kvm)", new="nolock(kvm)", file="mmu.c"):
    return mutant(edits=(Edit(file, function, find, new),))


def patched(tree, what):
    """The lines that the patch changes in the tree, by number."""
    subprocess.run(["patch", "-p1", "-d", tree], input=source.as_patch(what, tree), text=True, check=True)
    after = (tree / "mmu.c").read_text().splitlines()
    pairs = zip(C.splitlines(), after, strict=True)
    return {number: new.strip() for number, (old, new) in enumerate(pairs, 1) if new != old}


def test_edits_become_a_patch(tree):
    """In that function's body alone: not where it is declared, called or named, nor in one of a longer name."""
    assert patched(tree, edit("fault")) == {16: "nolock(kvm);"}


def test_a_definition_of_several_lines(tree):
    assert patched(tree, edit("fault_on")) == {10: "nolock(kvm);"}


def test_edits_add_up(tree):
    edits = (*edit("fault").edits, *edit("fault", "map", "unmap").edits, *edit("fault", "gone").edits)
    assert patched(tree, mutant(edits=edits)) == {16: "nolock(kvm);", 17: "unmap(kvm);"}


@pytest.mark.parametrize("what", [edit("no_such"), edit("fault", find="gone"), edit("fault", file="arm.c")])
def test_edits_that_fit_nowhere(tree, what):
    with pytest.raises(NotApplicable, match="nothing to edit in"):
        source.as_patch(what, tree)


def test_a_tree_that_is_none(tree):
    with pytest.raises(KernelError, match="is not a kernel source tree"):
        source.broken_kernel(edit("fault"), ARM64, str(tree), tree)


def test_bytes_that_are_no_text_stay(tree):
    (tree / "mmu.c").write_bytes(C.replace("map(kvm)", "map(kvm) /* \udcfc\f */").encode(errors="surrogateescape"))
    patch = source.as_patch(edit("fault"), tree).encode(errors="surrogateescape")
    subprocess.run(["patch", "-p1", "-d", tree], input=patch, check=True)
    assert b"nolock(kvm);\n        map(kvm) /* \xfc\f */;" in (tree / "mmu.c").read_bytes()


def test_a_kernel_that_has_no_tree(tmp_path):
    with pytest.raises(NotApplicable, match="not built from a tree: --kernel arm64=PATH gives one"):
        source.broken_kernel(edit("fault"), ARM64, None, tmp_path)


# -- fates -------------------------------------------------------------------------------------------------------

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
  {fault: the debugger is not told, origin: o, return: [kvm_arch_vcpu_ioctl_translate], look: [test_suite.py]}
explained:
  {fault: f, origin: o, return: [kvm_arch_vcpu_ioctl_translate], look: [test_suite.py], survives: nobody asks}
deadly:
  fault: the first run meets an undefined instruction
  origin: o
  words: [{in: kvm_arch_vcpu_ioctl_run, find: "@", with: "00000000", kernel: armv8-6.1, sums: ["00000000"]}]
  look: [test_suite.py]
deadly-as-expected:
  fault: the first run meets an undefined instruction
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


def test_every_fate(tmp_path, victim):
    """Killed, survived, explained, wrongly killed, not applicable: by a suite of one case, on real hosts."""
    found = words_at(victim, FIRST_RUN, 1)[0]
    deadly = f'"{found:08x}", with: "00000000", kernel: armv8-6.1, sums: ["{sum_of(victim, FIRST_RUN)}"]'
    catalogue = CATALOGUE.replace('"@", with: "00000000", kernel: armv8-6.1, sums: ["00000000"]', deadly)
    (tmp_path / "mutants.yaml").write_text(catalogue)
    options = ["--mutate", "all", "--catalogue", "mutants.yaml", "--host", "arm64", "-q", "--tb=no"]
    code, said = Run(tmp_path)(SUITE, *options)
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
def test_a_death_that_the_catalogue_does_not_mean(tmp_path, end, fate):
    """``dies`` is of the host: that its QEMU ends is nothing a broken kernel does, even less that somebody kills it."""
    (tmp_path / "mutants.yaml").write_text(CATALOGUE.replace("@", "00000000").replace("survives:", "dies:"))
    options = ["--mutate", "explained", "--catalogue", "mutants.yaml", "--host", "arm64", "-q"]
    code, said = Run(tmp_path)(f"def test_one(host):\n    {end}\n", *options)
    assert code == 1 and re.search(f"explained +{fate}", said)


def nothing_cached(tmp_path):
    """Where there is no kernel for a15."""
    return {"ARM_KVM_CACHE": str(tmp_path / "cache"), "ARM_KVM_OFFLINE": "1"}


def test_a_host_that_cannot_be_had(tmp_path):
    (tmp_path / "mutants.yaml").write_text(CATALOGUE.replace("@", "00000000"))
    options = ["--mutate", "harmless", "--catalogue", "mutants.yaml", "--host", "a15", "-q"]
    code, said = Run(tmp_path)(SUITE, *options, **nothing_cached(tmp_path))
    assert code == 1 and re.search(r"harmless +not run .* linux-5.4.302.tar.xz is not cached", said)
    assert "0 of 0 applicable mutants killed, 0 %; 1 not run" in said


def test_no_case_that_could_notice_it(tmp_path):
    (tmp_path / "mutants.yaml").write_text(GOOD.replace("test_suite.py", "test_other.py"))
    options = ["--mutate", "one", "--catalogue", "mutants.yaml", "--host", "arm64", "-q", "--quick"]
    code, said = Run(tmp_path)(SUITE, *options)
    assert code == 1 and re.search(r"one +not run .* no case was chosen", said)


def test_a_case_that_fails_without_a_mutant(tmp_path):
    (tmp_path / "mutants.yaml").write_text(CATALOGUE.replace("@", "00000000"))
    options = ["--mutate", "unmap-ignored", "--catalogue", "mutants.yaml", "--host", "arm64", "-q"]
    code, said = Run(tmp_path)(SUITE.replace("is None", "is not None"), *options)
    words = r"not run .* test_suite.py::test_dontneed\S* fails where nothing is broken, too: AssertionError"
    assert code == 1 and re.search(f"unmap-ignored +{words}", said)


def test_a_case_that_fails_after_another(tmp_path):
    """Alone it passes where nothing is broken. After the same cases it does not, and has not seen the mutant."""
    (tmp_path / "mutants.yaml").write_text(CATALOGUE.replace("@", "00000000"))
    suite = """
import pytest

def test_leaves_something(host):
    host.ssh.run("touch /something")

@pytest.mark.isolation("test")
def test_between(host):
    pass

def test_stumbles_over_it(host):
    assert host.ssh.run("ls /").find("something") < 0
"""
    options = ["--mutate", "harmless", "--catalogue", "mutants.yaml", "--host", "arm64", "-q"]
    code, said = Run(tmp_path)(suite, *options)
    words = "not run .* test_suite.py::test_stumbles_over_it.* fails where nothing is broken, too: AssertionError"
    assert code == 1 and re.search(f"harmless +{words}", said)


def test_a_mutant_is_not_kept(tmp_path):
    code, said = Run(tmp_path)(SUITE, "--mutate", "unmap-ignored", "--keep", "--host", "arm64", "-n", "0")
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


def test_a_host_that_cannot_be_had_any_more(tmp_path):
    """The first case passes; for the second there is no host, which says nothing of the mutant."""
    (tmp_path / "mutants.yaml").write_text(CATALOGUE.replace("@", "00000000"))
    options = ["--mutate", "harmless", "--catalogue", "mutants.yaml", "--host", "arm64", "-q"]
    code, said = Run(tmp_path)(LOSES_ITS_COMPILER, *options)
    assert code == 1 and re.search(r"harmless +not run .* gcc is not installed", said)


def test_a_mutant_whose_worker_dies(tmp_path):
    """It is in the table all the same, and not among those that count."""
    (tmp_path / "mutants.yaml").write_text(CATALOGUE.replace("@", "00000000"))
    suite = "import os\n\ndef test_one(vm):\n    os.kill(os.getpid(), 9)\n"
    options = ["--mutate", "harmless", "--mutate", "elsewhere", "--catalogue", "mutants.yaml", "--host", "arm64"]
    code, said = Run(tmp_path)(suite, *options, "-n", "1")
    assert code == 1 and re.search(r"harmless +not run .* its worker died, or the run ended before its turn", said)
    assert "0 of 0 applicable mutants killed, 0 %; 1 not applicable, 1 not run" in said


def test_those_that_took_longest_come_first(tmp_path):
    """By what pytest's cache knows of the last run."""
    names = ("one", "other")
    (tmp_path / "mutants.yaml").write_text("".join(GOOD.replace("one:", f"{name}:") for name in names))
    known = tmp_path / ".pytest_cache/v/arm-kvm/durations"
    options = ["--mutate", "all", "--catalogue", "mutants.yaml", "--host", "a15", "-n", "1", "-v"]
    for order in (names, names[::-1]):
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text(json.dumps({f"::a15/{name}": 9.0 - place for place, name in enumerate(order)}))
        _, said = Run(tmp_path)(SUITE, *options, **nothing_cached(tmp_path))
        assert list(dict.fromkeys(re.findall(r"a15/(\w+)", said)))[:2] == list(order)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_mutant_that_is_not_there(tmp_path, workers):
    code, said = Run(tmp_path)(SUITE, "--mutate", "unmap-ignord", "--host", "arm64", "-n", workers)
    assert (
        code == 4
        and "no mutant is called 'unmap-ignord'; did you mean 'unmap-ignored'?" in said
        and "INTERNALERROR" not in said
    )


def test_a_catalogue_that_is_not_there(tmp_path):
    code, said = Run(tmp_path)(SUITE, "--mutate", "all", "--catalogue", "none.yaml", "--host", "arm64")
    assert code == 4 and "none.yaml" in said and "Traceback" not in said


def test_the_table_closes_with_the_share():
    def result(name, fate):
        return MutantResult("a15", "unmap", name, fate, seconds=1.0)

    lines = list(score.table([result("b", Fate.SURVIVED), result("a", Fate.KILLED), result("c", Fate.NOT_APPLICABLE)]))
    assert [line.split()[2] for line in lines[:3]] == ["a", "b", "c"]
    assert lines[3] == "a15: 1 of 2 applicable mutants killed, 50 %; 1 survived, 1 not applicable"
    assert list(score.table([])) == []
