"""Stage 1 of the EL1&0 (PL1&0) regime, as far as stage 2 depends on it: permissions, MAIR, a guest's tables.

Sources: ARM DDI 0406C.d, B3.6.3, B3.7, B4.1.104 (MAIR), B4.1.130 (SCTLR); ARM DDI 0487, D8.3.1, D8.4, MAIR_EL1,
SCTLR_EL1.

Only long descriptors and the range of TTBR0. Not modelled: PAN, HPD, TBI, E0PD, hardware update of stage-1 entries.
"""

from __future__ import annotations

from dataclasses import dataclass

from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch.attributes import Attributes
from arm_kvm.model.arch.faults import Access
from arm_kvm.model.arch.granule import LAST_LEVEL
from arm_kvm.model.arch.regime import SCTLR_UWXN, SCTLR_WXN, Regime


@dataclass(frozen=True)
class Stage1Regime:
    """An enabled stage 1: its regime, MAIR (eight bytes) and SCTLR."""

    regime: Regime
    mair: int
    sctlr: int

    def attributes(self, desc: int) -> Attributes:
        """Memory type and shareability of a leaf."""
        return Attributes(self.mair >> 8 * d.ATTRINDX.of(desc) & 0xFF, d.SH.of(desc))

    def allows(self, desc: int, inherited: int, access: Access) -> bool:
        """Whether a leaf grants this access under the limits of the tables above it."""
        read, write = self._data(desc, inherited, access.el0)
        if access.fetch:
            return self._executable(desc, inherited, access.el0, read, write)
        return write if access.write else read

    def _data(self, desc: int, inherited: int, el0: bool) -> tuple[bool, bool]:
        """(readable, writable). AP[1]: EL0 too; AP[2]: read-only. APTable[0]: not EL0; APTable[1]: read-only."""
        ap, limit = d.AP.of(desc), d.AP_TABLE.of(inherited)
        if el0 and (not ap & 1 or limit & 1):
            return False, False
        return True, not (ap | limit) & 2

    def _executable(self, desc: int, inherited: int, el0: bool, read: bool, write: bool) -> bool:
        never = bool(d.UXN.of(desc) | d.XN_TABLE.of(inherited))
        _, el0_write = self._data(desc, inherited, el0=True)
        if self.regime.armv7:
            # XN is for PL0 and PL1, PXN for PL1 in addition; instruction fetches need read permission.
            if not el0:
                never |= bool(d.PXN.of(desc) | d.PXN_TABLE.of(inherited))
                never |= bool(self.sctlr & SCTLR_UWXN) and el0_write
            never = never or not read
        elif not el0:
            never = bool(d.PXN.of(desc) | d.PXN_TABLE.of(inherited)) or el0_write
        return not (never or (self.sctlr & SCTLR_WXN and write))


# -- entries of a guest's own tables ------------------------------------------------------------------


def leaf(ipa: int, level: int, *, attrindx: int = 0, ap: int = 0) -> int:
    """A block or page at ``ipa``: inner shareable, access flag set, executable. ``ap`` 0: read and write at EL1."""
    word = ipa | d.VALID.mask | d.TYPE.put(level == LAST_LEVEL) | d.ATTRINDX.put(attrindx)
    return word | d.AP.put(ap) | d.SH.put(d.Shareability.INNER) | d.AF.mask


def table(ipa: int) -> int:
    """A pointer to the next level's table at ``ipa``."""
    return ipa | d.VALID.mask | d.TYPE.mask
