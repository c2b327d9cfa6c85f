"""Random sequences of guest accesses and of memory, memslot and VM operations of the host, checked against the models.

After every step stage 2 must be safe, and what the models predict must hold exactly. A failing sequence is shrunk,
printed in the text form of framework/arm_kvm/sequences/steps.py and kept in a file, which ``arm-kvm replay FILE``
plays on any host and kernel.
"""

import pytest
from arm_kvm.vocabulary import player, search

pytestmark = pytest.mark.native


def test_random_sequences(request, host, oracle, isa, keep, replay_line):
    """``--sequences quick`` plays the same few in every run, ``nightly`` many, seeded by the date."""
    profile = search.Profile(request.config.getoption("--sequences"))
    try:
        tally = search.search(lambda: player.Player(host, oracle, isa), profile, request.config.getoption("--count"))
    except player.SequenceBroken as e:
        path = keep("sequence.txt", "".join(f"{step}\n" for step in e.steps))
        text = f"{e}\nto replay it: {replay_line(path)}"
        if e.lost:
            print(text)
            raise e.lost from None
        pytest.fail(text, pytrace=False)
    assert tally.sequences and tally.steps
