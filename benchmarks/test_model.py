"""How fast the model is: the walk of a full gibibyte, vectorised and scalar; a conformance case.

The README quotes the medians; no figure decides a test.
"""

import pytest
from arm_kvm.conform.run import conform
from arm_kvm.conform.silicon import Lab
from arm_kvm.host import config
from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch import regime, sweep, walk
from arm_kvm.model.arch.faults import Access, Direction

from tests.memory import Pages

GIB, PAGE = 1 << 30, 1 << 12
LEAVES = GIB // PAGE


@pytest.fixture(scope="module")
def gibibyte():
    """1 GiB of guest memory in 4 KiB pages, under the root that Linux 5.4 gives an A15's guests."""
    memory = Pages(520)
    r = regime.stage2_armv7(memory.page(2), 0x80003558)
    middle = memory.page()
    memory.store(r.root, d.encode(d.Table(middle), 1))
    for block in range(512):
        table = memory.page()
        memory.store(middle + 8 * block, d.encode(d.Table(table), 2))
        for page in range(512):
            leaf = d.LeafFields(GIB + (block * 512 + page) * PAGE, xn=d.Never.EL0_EL1)
            memory.store(table + 8 * page, d.encode(leaf, 3))
    return r, memory


def test_sweep_of_262144_leaves(benchmark, gibibyte):
    """Every leaf of 1 GiB: how long a verdict on a large guest keeps the machine stopped."""
    found = benchmark.pedantic(sweep.sweep, args=gibibyte, rounds=30, warmup_rounds=3)
    assert len(found.leaves) == LEAVES and not found.malformed


def test_scalar_walk_of_262144_leaves(benchmark, gibibyte):
    """The same, address by address, by the walker that is written for readability."""
    r, memory = gibibyte
    read = Access(Direction.READ)

    def every_page():
        return sum(walk.stage2(r, memory, ipa, read).oa == GIB + ipa for ipa in range(0, GIB, PAGE))

    assert benchmark.pedantic(every_page, rounds=3) == LEAVES


@pytest.mark.parametrize("name", ["a15", "arm64"])
def test_conformance_cases(benchmark, tmp_path, name):
    """20,000 cases: generate, predict, run on the emulated CPU, compare."""
    with Lab(config.find(name), tmp_path) as lab:
        tally = benchmark.pedantic(conform, args=(lab, 20_000, 1), rounds=3)
    benchmark.extra_info["cases_a_minute"] = round(tally.cases / benchmark.stats["median"] * 60)
