"""The catalogue: mistakes are reported with their line, and our own looks where there are cases."""

import re
import subprocess
import sys

import pytest
from arm_kvm.mutants import catalogue
from arm_kvm.support.errors import ConfigError
from arm_kvm.support.paths import ROOT

from .examples import GOOD


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
def test_mistakes_in_a_catalogue_are_reported_with_their_line(tmp_path, old, new, words):
    file = tmp_path / "area.yaml"
    file.write_text(GOOD.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        catalogue.load(file)
    assert words in str(caught.value) and re.search(r"area\.yaml:\d+: ", str(caught.value))


def test_two_mutants_of_one_name(tmp_path):
    for area in "ab":
        (tmp_path / f"{area}.yaml").write_text(GOOD)
    with pytest.raises(ConfigError, match="two mutants are called 'one'"):
        catalogue.load(tmp_path)


def test_every_look_of_our_own_matches_a_case():
    """With a `look` that matches nothing, the cases would be run in the suite's order."""
    argv = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--collect-only", "-q", "testcases"]
    cases = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120).stdout
    mutants = catalogue.load()
    assert len(mutants) >= 40
    assert [(m.name, where) for m in mutants for where in m.look if where not in cases] == []
