"""A kernel that checks itself: that its checks are on. The proof is the whole suite passing on it without a splat.

``arm-kvm`` fails every test during which the kernel complains (arm_kvm.oracle.splats); with these options it
complains of a sleeping allocation under kvm->mmu_lock, of lock order, of a freed page that is written.
"""

import pytest
from arm_kvm.host import selfchecks

WANTED = ["PROVE_LOCKING", "DEBUG_ATOMIC_SLEEP", "DEBUG_VM", "SLUB_DEBUG_ON", "PAGE_POISONING"]
pytestmark = pytest.mark.needs("debug")


def test_the_checks_are_compiled_in(host):
    config = selfchecks.configuration(host)
    assert [name for name in WANTED if f"CONFIG_{name}=y" not in config] == []


def test_the_checks_are_switched_on(host):
    assert "page_poison=1" in selfchecks.command_line(host)
    assert selfchecks.unchecked_caches(host) == []
    assert selfchecks.lock_checking(host)
