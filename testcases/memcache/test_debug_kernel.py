"""The debug kernels really do check themselves. What that proves is the whole suite passing on them without a splat.

Every test during which the kernel logs a splat fails (arm_kvm.oracle.splats). With these options the kernel reports a
sleeping allocation under kvm->mmu_lock, a wrong lock order, and a store to a freed page.
"""

import pytest
from arm_kvm.vocabulary import selfchecks

WANTED = ["PROVE_LOCKING", "DEBUG_ATOMIC_SLEEP", "DEBUG_VM", "SLUB_DEBUG_ON", "PAGE_POISONING"]
pytestmark = pytest.mark.needs("debug")


def test_the_checks_are_compiled_in(host):
    config = selfchecks.configuration(host)
    assert [name for name in WANTED if f"CONFIG_{name}=y" not in config] == []


def test_the_checks_are_switched_on(host):
    assert "page_poison=1" in selfchecks.command_line(host)
    assert selfchecks.unchecked_caches(host) == []
    assert selfchecks.lock_checking(host)
