"""A guest that touches 256 MiB: 65,536 pages, 128 last-level tables, every leaf checked.

A32 guests of a 64-bit host take the very same path in the kernel and are left out: it is 65,536 faults.
"""

import numpy as np
import pytest

IPA = 0x8000_0000
SIZE = 256 << 20
PAGES = SIZE // 0x1000
PART = PAGES // 8  #: of one order: an order has 20 s, on the slowest machine


@pytest.mark.native
def test_guest_touches_256_mib(vm, stage2):
    vm.add_memory(IPA, SIZE)
    parts = range(IPA, IPA + SIZE, PART * 0x1000)
    for ipa in parts:
        vm.guest.fill(ipa, PART)
    leaves = stage2(vm).within(IPA, SIZE)
    assert len(leaves) == PAGES
    assert (leaves.ia == IPA + np.arange(PAGES, dtype=np.uint64) * np.uint64(0x1000)).all()
    assert len(np.unique(leaves.pa)) == PAGES, "every page has a frame of its own"
    assert [vm.guest.check(ipa, PART) for ipa in parts] == [[]] * 8
