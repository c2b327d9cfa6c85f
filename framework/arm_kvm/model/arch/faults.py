"""Accesses, and the faults that a translation can end in.

Sources: ARM DDI 0406C.d, B3.12 (faults), B3.13.3 (long-descriptor fault status); ARM DDI 0487, D8.15 (MMU faults),
ESR_EL2 (DFSC, IFSC).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum


class Direction(Enum):
    READ = "read"
    WRITE = "write"
    FETCH = "fetch"


@dataclass(frozen=True)
class Access:
    """The access to translate; ``el0``: with the rights of EL0 (PL0), even if it is executed at EL1."""

    direction: Direction
    el0: bool = False

    @property
    def write(self) -> bool:
        return self.direction is Direction.WRITE

    @property
    def fetch(self) -> bool:
        return self.direction is Direction.FETCH

    def __str__(self) -> str:
        return f"{'EL0' if self.el0 else 'EL1'} {self.direction.value}"


#: The access by which a stage-1 walk reads its tables through stage 2.
TABLE_READ = Access(Direction.READ)


class FaultType(Enum):
    """The value is the long-descriptor fault status of level 0; the level is added to it."""

    ADDRESS_SIZE = 0b000000
    TRANSLATION = 0b000100
    ACCESS_FLAG = 0b001000
    PERMISSION = 0b001100
    EXTERNAL_ON_WALK = 0b010100  #: synchronous external abort: no memory where a table should be


@dataclass(frozen=True)
class Fault:
    """The fault that ended a translation. ``ipa`` is the input address of stage 2; None for a fault of stage 1 itself.

    ``s1ptw``: a stage-2 fault on reading a stage-1 table entry of level ``walk_level``. ``protected``: a fault because
    of HCR.PTW, as the table is in device memory.
    """

    type: FaultType
    level: int
    stage: int
    s1ptw: bool = False
    ipa: int | None = None
    walk_level: int | None = None
    protected: bool = False

    @property
    def status(self) -> int:
        """DFSC, IFSC, or STATUS of a long-descriptor FSR (six bits)."""
        return self.type.value + self.level

    def on_table_walk(self, ipa: int, level: int) -> Fault:
        """This stage-2 fault as reported for a stage-1 walk that read its entry of ``level`` at ``ipa``."""
        return replace(self, s1ptw=True, ipa=ipa, walk_level=level)

    def __str__(self) -> str:
        where = f" on a stage 1 walk, IPA {self.ipa:#x}" if self.s1ptw else ""
        return f"stage {self.stage} {self.type.name.lower().replace('_', ' ')} fault, level {self.level}{where}"
