"""16-bit VMIDs (FEAT_VMID16): VTCR.VS is set, and a 256th VM does not begin a new generation."""

import pytest
from arm_kvm.vocabulary import Fleet

DATA = 0x8000_0000
pytestmark = [pytest.mark.needs("vmid16"), pytest.mark.native]


def test_beyond_255_without_rollover(make_vms, record, vmid, stage2):
    """300 VMs, two rounds: each gets a number of its own, and some of the numbers need more than 8 bits."""
    with record() as run:
        fleet = Fleet(make_vms(300))
        fleet.add_memory(DATA, 0x1000)
        fleet.fill(DATA)
        assert fleet.mismatches(DATA) == []
    assert len(set(run.first_runs)) == 300
    assert max(run.first_runs) > 255
    assert run.rollovers == 0
    assert vmid(fleet.vms[-1]) == run.vmids(fleet.vms[-1])[-1]
    assert stage2(fleet.vms[0]).regime.vmid_bits == 16


@pytest.mark.slow
def test_rollover_after_65535(make_vms, record, vmid):
    """More VMs than 16 bits can number, 500 at a time; 20 VMs live through it all."""
    with record() as run:
        lasting = Fleet(make_vms(20))
        lasting.add_memory(DATA, 0x1000)
        lasting.fill(DATA)
        for _ in range(132):
            others = Fleet(make_vms(500))
            others.ping()
            others.destroy()
        assert lasting.mismatches(DATA) == []
    assert run.rollovers == 1
    assert vmid(lasting.vms[0]) == run.vmids(lasting.vms[0])[-1]
