"""Random sequences of guest accesses, host memory operations, memslot and VM operations, against the reference models.

After every step safety holds, and what the models claim exactly. A failure is shrunk, printed in the words of
framework/arm_kvm/sequences/steps.py, and kept as a file that ``arm-kvm replay FILE`` plays on any host and kernel.
"""

import pytest
from arm_kvm.sequences.player import Player, SequenceBroken
from arm_kvm.sequences.search import Profile, search

pytestmark = pytest.mark.native


def test_random_sequences(request, host, oracle, isa, keep, replay_line):
    """``--sequences quick``: the same few in every run; ``nightly``: many, seeded by the date."""
    profile = Profile(request.config.getoption("--sequences"))
    try:
        tally = search(lambda: Player(host, oracle, isa), profile, request.config.getoption("--count"))
    except SequenceBroken as e:
        path = keep("sequence.txt", "".join(f"{step}\n" for step in e.steps))
        words = f"{e}\nplay it again: {replay_line(path)}"
        if e.lost:
            print(words)
            raise e.lost from None
        pytest.fail(words, pytrace=False)
    assert tally.sequences and tally.steps
