"""The table of all mutants."""

from arm_kvm.mutants import score
from arm_kvm.mutants.score import Fate, MutantResult


def test_the_table_ends_with_the_share():
    def result(name, fate):
        return MutantResult("a15", "unmap", name, fate, seconds=1.0)

    lines = list(score.table([result("b", Fate.SURVIVED), result("a", Fate.KILLED), result("c", Fate.NOT_APPLICABLE)]))
    assert [line.split()[2] for line in lines[:3]] == ["a", "b", "c"]
    assert lines[3] == "a15: 1 of 2 applicable mutants killed, 50 %; 1 survived, 1 not applicable"
    assert list(score.table([])) == []
