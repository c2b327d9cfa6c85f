"""TLB and instruction cache maintenance operations: which translations they reach, and on which CPUs.

Sources: ARM DDI 0406C.d, B3.10 and B4.2.2 (c7, c8, executed in Hyp mode); ARM DDI 0487, D8.16 (TLB maintenance) and
C5.5 (TLBI operands).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Reach(Enum):
    """Which translations of the EL1&0 regime an operation invalidates."""

    ALL_VMS = "every VMID"
    VM = "stages 1 and 2 under the VMID in VTTBR"
    STAGE1 = "stage 1, and what combines it with stage 2, under the VMID in VTTBR"
    STAGE2_IPA = "stage 2 of one IPA under the VMID in VTTBR"
    STAGE2_RANGE = "stage 2 of a range of IPAs under the VMID in VTTBR"
    INSTRUCTIONS = "instruction caches, no translations"


_TG_SHIFT = {1: 12, 2: 14, 3: 16}
_PAGE_SHIFT = 12
_NOTHING = 0  #: instead of a granule: the operand reaches no entry


@dataclass(frozen=True)
class Operation:
    """An instruction: the translations it reaches, and whether on all CPUs or only its own.

    ``last_level``: it reaches only leaves of stage 2, no tables.
    """

    reach: Reach
    broadcast: bool
    last_level: bool = False

    @property
    def has_operand(self) -> bool:
        return self.reach in (Reach.STAGE2_IPA, Reach.STAGE2_RANGE)


def _armv7() -> dict[str, Operation]:
    """In Hyp mode TLBIALL reaches both stages of the current VMID; stage 2 has no finer operation."""
    return {
        "tlbiall": Operation(Reach.VM, False),
        "tlbiallis": Operation(Reach.VM, True),
        "tlbiallnsnh": Operation(Reach.ALL_VMS, False),
        "tlbiallnsnhis": Operation(Reach.ALL_VMS, True),
        "iciallu": Operation(Reach.INSTRUCTIONS, False),
        "icialluis": Operation(Reach.INSTRUCTIONS, True),
    }


def _armv8() -> dict[str, Operation]:
    out = {"iallu": Operation(Reach.INSTRUCTIONS, False), "ialluis": Operation(Reach.INSTRUCTIONS, True)}
    for suffix, broadcast in (("", False), ("is", True), ("os", True)):
        out |= {
            f"alle1{suffix}": Operation(Reach.ALL_VMS, broadcast),
            # VMALLE1, executed at EL2 with TGE clear, reaches the current VMID; entries of stage 2 survive it.
            f"vmalle1{suffix}": Operation(Reach.STAGE1, broadcast),
            f"vmalls12e1{suffix}": Operation(Reach.VM, broadcast),
            f"ipas2e1{suffix}": Operation(Reach.STAGE2_IPA, broadcast),
            f"ipas2le1{suffix}": Operation(Reach.STAGE2_IPA, broadcast, last_level=True),
            f"ripas2e1{suffix}": Operation(Reach.STAGE2_RANGE, broadcast),
            f"ripas2le1{suffix}": Operation(Reach.STAGE2_RANGE, broadcast, last_level=True),
        }
    return out


OPERATIONS: dict[str, Operation] = _armv7() | _armv8()


@dataclass(frozen=True)
class Span:
    """The IPAs ``[start, end)`` of an operand; ``level`` of the leaf if the operand has a level hint, else 0."""

    start: int
    end: int
    level: int = 0
    granule: int = _PAGE_SHIFT

    def reaches(self, ipa: int, size: int, level: int, table: bool) -> bool:
        """Whether the operation must invalidate an entry of 4 KiB tables for ``[ipa, ipa + size)``.

        With a level hint only leaves of that level are reached, and no tables; with another granule, nothing is.
        """
        if self.granule != _PAGE_SHIFT or (self.level and (self.level != level or table)):
            return False
        return self.start < ipa + size and ipa < self.end


def span(op: str, operand: int) -> Span:
    """Decode the operand of a TLBI by IPA. Raises ValueError for an operation without one."""
    reach = OPERATIONS[op].reach
    if reach is Reach.STAGE2_IPA:
        return _one(operand)
    if reach is Reach.STAGE2_RANGE:
        return _range(operand)
    raise ValueError(f"{op} has no operand")


def _one(operand: int) -> Span:
    """IPA[47:12] in [35:0], TTL in [47:44] (FEAT_TTL: granule in the upper half, level in the lower)."""
    start = (operand & ((1 << 36) - 1)) << _PAGE_SHIFT
    shift = _TG_SHIFT.get(operand >> 46 & 3)
    level = operand >> 44 & 3 if shift else 0
    return Span(start, start + (1 << (shift or _PAGE_SHIFT)), level, shift or _PAGE_SHIFT)


def _range(operand: int) -> Span:
    """BaseADDR [36:0] in granules, TTL [38:37] (0: any), NUM [43:39], SCALE [45:44], TG [47:46].

    With a level hint BaseADDR must be aligned to the size of a leaf of that level, or nothing need be invalidated.
    """
    shift = _TG_SHIFT.get(operand >> 46 & 3, _PAGE_SHIFT)
    pages = ((operand >> 39 & 0x1F) + 1) << (5 * (operand >> 44 & 3) + 1)
    start, level = (operand & ((1 << 37) - 1)) << shift, operand >> 37 & 3
    aligned = not level or start % (1 << shift + (shift - 3) * (3 - level)) == 0
    return Span(start, start + (pages << shift), level, shift if aligned else _NOTHING)
