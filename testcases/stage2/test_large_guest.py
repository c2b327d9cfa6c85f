"""A guest that touches 256 MiB: 65,536 pages, 128 last-level tables, and every leaf is checked.

Native guests only: A32 guests of a 64-bit host take the same path in the kernel, and 65,536 faults take long.
"""

import numpy as np
import pytest
from arm_kvm.vocabulary import PAGE

IPA = 0x8000_0000
SIZE = 256 << 20
PAGES = SIZE // PAGE
PART = PAGES // 8  #: pages that one order fills: an order must end within 20 s even on a slow machine


@pytest.mark.native
def test_guest_touches_256_mib(vm, stage2):
    vm.add_memory(IPA, SIZE)
    parts = range(IPA, IPA + SIZE, PART * PAGE)
    for ipa in parts:
        vm.guest.fill(ipa, PART)
    leaves = stage2(vm).within(IPA, SIZE)
    assert len(leaves) == PAGES
    assert (leaves.ia == IPA + np.arange(PAGES, dtype=np.uint64) * np.uint64(PAGE)).all()
    assert len(np.unique(leaves.pa)) == PAGES, "pages share a frame"
    assert [vm.guest.check(ipa, PART) for ipa in parts] == [[]] * 8
