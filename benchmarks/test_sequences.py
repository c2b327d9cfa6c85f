"""Random sequences: how many judged steps a second. Run by `tox -e bench`; no figure decides a test."""

import pytest
from arm_kvm.sequences.player import Player
from arm_kvm.sequences.search import search


@pytest.mark.native
def test_random_sequences(benchmark, host, oracle, isa):
    """100 sequences, the same in every round."""
    tallies = []

    def look():
        tallies.append(search(lambda: Player(host, oracle, isa), sequences=100))

    benchmark.pedantic(look, rounds=5, warmup_rounds=1)
    benchmark.extra_info["steps_a_second"] = round(tallies[-1].steps / benchmark.stats.stats.median)
