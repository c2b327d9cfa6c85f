"""What the registers must hold after a translation: PAR, ESR (HSR), FAR (HDFAR, HIFAR), HPFAR.

Sources: ARM DDI 0406C.d, B3.13.6 (HSR), B4.1.112 (PAR), B4.1.67 (HPFAR); ARM DDI 0487, registers PAR_EL1, ESR_EL2,
HPFAR_EL2, FAR_EL2, and Arm's v9.4 pseudocode EncodePAR, FaultSyndrome, IPAValid, LSInstructionSyndrome.
"""

from __future__ import annotations

from dataclasses import dataclass

from .faults import Access, Fault, FaultType
from .walk import Translation

EC_FETCH_LOWER, EC_FETCH_SAME, EC_DATA_LOWER, EC_DATA_SAME = 0x20, 0x21, 0x24, 0x25

_IL = 1 << 25
_ISV = 1 << 24
_S1PTW = 1 << 7
_WNR = 1 << 6
_PAGE = 0xFFF


@dataclass(frozen=True)
class Instruction:
    """A load or store of one general register without writeback, as ISS describes it to the hypervisor."""

    size: int  #: log2 of the bytes
    register: int
    signed: bool = False
    wide: bool = False  #: SF: a 64-bit register (A64)

    @property
    def iss(self) -> int:
        """ISV, SAS, SSE, SRT, SF."""
        return _ISV | self.size << 22 | self.signed << 21 | self.register << 16 | self.wide << 15


@dataclass(frozen=True)
class Abort:
    """An exception taken for a fault: to EL2 (Hyp mode) or EL1. None: the register's value is UNKNOWN."""

    el: int
    esr: int
    far: int
    hpfar: int | None = None


# -- address translation instructions -------------------------------------------------------------------

_PAR_RES1 = 1 << 11


@dataclass(frozen=True)
class Par:
    """PAR_EL1 (64-bit PAR): ``value`` holds in the bits of ``known``.

    The others are UNKNOWN or implementation defined.
    """

    value: int
    known: int

    def matches(self, register: int) -> bool:
        return (register ^ self.value) & self.known == 0


def par(outcome: Translation | Fault) -> Par:
    """PAR after AT S12E1x, S12E0x (ATS12NSOxx) from Non-secure EL2."""
    if isinstance(outcome, Fault):
        value = 1 | outcome.status << 1 | outcome.s1ptw << 8 | (outcome.stage == 2) << 9 | _PAR_RES1
        return Par(value, (1 << 48) - 1)
    attr, sh = outcome.memory
    known = 0x0000_FFFF_FFFF_F000 | _PAR_RES1 | 0x7F  # NS (bit 9) is UNKNOWN, bit 10 implementation defined
    value = outcome.pa & ~_PAGE | _PAR_RES1
    if attr is not None:
        value, known = value | attr << 56, known | 0xFF << 56
    if sh is not None:
        value, known = value | sh << 7, known | 0b11 << 7
    return Par(value, known)


def walk_abort(fault: Fault, va: int, *, armv7: bool) -> Abort:
    """The data abort an AT instruction of EL2 takes when its walk meets an external abort: CM and WnR are set."""
    iss = fault.status | 1 << 8 | _WNR | (_S1PTW if fault.s1ptw else 0)
    return Abort(2, _esr(EC_DATA_SAME, iss, armv7), va)


# -- accesses ---------------------------------------------------------------------------------------------


def hpfar(fault: Fault) -> int | None:
    """HPFAR: IPA[47:12] from bit 4 up. UNKNOWN after a permission fault that is not on a stage-1 walk."""
    if fault.type is FaultType.EXTERNAL_ON_WALK or (fault.type is FaultType.PERMISSION and not fault.s1ptw):
        return None
    return fault.ipa >> 12 << 4


def _esr(ec: int, iss: int, armv7: bool) -> int:
    """IL is 1 where ISS does not describe an instruction; there Armv7's HSR has it UNK/SBZP, given here as 0."""
    return ec << 26 | (0 if armv7 and not iss & _ISV else _IL) | iss


def abort(
    fault: Fault, access: Access, va: int, *, at_el0: bool, armv7: bool, instruction: Instruction | None = None
) -> Abort:
    """The abort that a guest's access takes. ``at_el0``: executed at EL0 (an unprivileged access of EL1 is not).

    ``instruction`` None: one whose syndrome is not valid (two registers, writeback, a fetch).
    """
    s1ptw = _S1PTW if fault.s1ptw else 0
    to_el2 = fault.stage == 2
    lower = to_el2 or at_el0
    ec = (EC_FETCH_SAME if access.fetch else EC_DATA_SAME) - lower
    iss = fault.status | s1ptw | (_WNR if access.write else 0)
    if to_el2 and not fault.s1ptw and instruction is not None:
        iss |= instruction.iss
    return Abort(2 if to_el2 else 1, _esr(ec, iss, armv7), va, hpfar(fault) if to_el2 else None)


def fsr_armv7(fault: Fault, access: Access) -> int:
    """DFSR or IFSR of a stage-1 fault taken to PL1, long-descriptor format: LPAE (bit 9), WnR (bit 11), STATUS."""
    return fault.status | 1 << 9 | (1 << 11 if access.write else 0)
