"""How many table pages a VM's stage 2 has: those through which its leaves are reached, and no others.

KVM allocates a table when a fault needs it and frees it with its last entry; the root stays until the VM is destroyed.
A table that maps nothing once an operation is complete is leaked until then.

Sources: Linux 5.4 virt/kvm/arm/mmu.c (stage2_get_pud, stage2_get_pmd, stage2_set_pte; unmap_stage2_ptes,
clear_stage2_pmd_entry: a page whose count falls to one goes at once); 6.1 and 6.12 arch/arm64/kvm/hyp/pgtable.c
(stage2_map_walker, stage2_unmap_walker). Shape of the tree: ARM DDI 0406C.d, B3.6; ARM DDI 0487 M.b, D8.2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from arm_kvm.model.arch.granule import LAST_LEVEL
from arm_kvm.model.arch.regime import Regime


def needed(regime: Regime, ia: NDArray[np.uint64], level: NDArray[np.uint8] | int = LAST_LEVEL) -> int:
    """Count the table pages below the root through which leaves at these input addresses are reached.

    ``level``: of each leaf, or of all. A table covers the range that one entry of the level above maps.
    """
    ia, level = np.asarray(ia, dtype=np.uint64), np.broadcast_to(level, np.shape(ia))
    shifts = {below: np.uint64(regime.granule.level_shift(below - 1)) for below in _levels_below_root(regime)}
    return sum(len(np.unique(ia[level >= below] >> shift)) for below, shift in shifts.items())


def _levels_below_root(regime: Regime) -> range:
    return range(regime.start_level + 1, LAST_LEVEL + 1)


def most_for_one_page(regime: Regime) -> int:
    """Table pages that a page far from all others needs: kvm_mmu_cache_min_pages(), the minimum for a fault."""
    return len(_levels_below_root(regime))
