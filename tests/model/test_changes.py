"""Changes of an entry: which need break-before-make, and what the guest loses by each."""

import pytest
from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch.changes import Loss, loss, skips_break

PA = 0x5000_0000
TABLE, MOVED_TABLE = (d.encode(d.Table(pa), 2) for pa in (PA, PA + 0x1000))


def leaf(pa=PA, level=3, **kind):
    return d.encode(d.LeafFields(pa, **kind), level, d.Format(xnx=True, dbm=True))


IN_PLACE = [{"s2ap": d.Grant.READ}, {"af": False}, {"dbm": True}, {"xn": d.Never.EL0_EL1}, {"software": 5}]
IN_STEPS = [{"memattr": d.MemAttr.NORMAL_NC}, {"sh": d.Shareability.NON}, {"contiguous": True}, {"pa": PA + 0x1000}]


@pytest.mark.parametrize("kind", IN_PLACE)
def test_rights_flags_and_software_bits_change_in_place(kind):
    assert not skips_break(leaf(), leaf(**kind)) and not skips_break(leaf(**kind), leaf())


@pytest.mark.parametrize("kind", IN_STEPS)
def test_everything_else_must_be_invalid_in_between(kind):
    assert skips_break(leaf(), leaf(**kind))
    assert not skips_break(leaf(), 0) and not skips_break(0, leaf(**kind))


def test_a_table_for_a_block_and_a_block_for_a_table():
    block = leaf(level=2, pa=PA & -(1 << 21))
    assert skips_break(block, TABLE) and skips_break(TABLE, block) and skips_break(TABLE, MOVED_TABLE)


@pytest.mark.parametrize(
    ("old", "new", "taken"),
    [
        (leaf(), 0, Loss.MAPPING),
        (leaf(), leaf(s2ap=d.Grant.READ), Loss.ACCESS),
        (leaf(s2ap=d.Grant.READ), leaf(), None),
        (leaf(s2ap=d.Grant.READ), leaf(s2ap=d.Grant.WRITE), Loss.ACCESS),
        (leaf(), leaf(af=False), None),
        (leaf(af=False), 0, None),
        (0, leaf(), None),
    ],
)
def test_what_a_leaf_loses(old, new, taken):
    assert loss(old, new, 3) is taken


@pytest.mark.parametrize("old", list(d.Never))
@pytest.mark.parametrize("new", list(d.Never))
def test_who_may_no_longer_execute(old, new):
    levels = {d.Never.NONE: {0, 1}, d.Never.EL1: {0}, d.Never.EL0_EL1: set(), d.Never.EL0: {1}}
    assert loss(leaf(xn=old), leaf(xn=new), 3) is (Loss.EXECUTION if levels[old] - levels[new] else None)


def test_a_table_loses_all_or_nothing():
    assert loss(TABLE, 0, 2) is Loss.MAPPING and loss(TABLE, MOVED_TABLE, 2) is None
