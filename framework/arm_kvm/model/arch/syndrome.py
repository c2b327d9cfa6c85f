"""The registers after a translation: PAR, ESR (HSR), FAR (HDFAR, HIFAR), HPFAR.

Sources: ARM DDI 0406C.d, B3.13.6 (HSR), B4.1.112 (PAR), B4.1.67 (HPFAR); ARM DDI 0487, registers PAR_EL1, ESR_EL2,
HPFAR_EL2, FAR_EL2, and Arm's v9.4 pseudocode EncodePAR, FaultSyndrome, IPAValid, LSInstructionSyndrome.
"""

from __future__ import annotations

from dataclasses import dataclass

from arm_kvm.model.arch.faults import Access, Fault, FaultType
from arm_kvm.model.arch.walk import Translation

EC_FETCH_SAME, EC_DATA_SAME = 0x21, 0x25  #: from a lower exception level: one less

_IL = 1 << 25
_ISV = 1 << 24
_S1PTW = 1 << 7
_WNR = 1 << 6
_PAGE = 0xFFF


@dataclass(frozen=True)
class Instruction:
    """A load or store of one general register without writeback, as ISS describes it."""

    size: int  #: log2 of the bytes
    register: int
    signed: bool = False
    wide: bool = False  #: SF: a 64-bit register (A64)
    ordered: bool = False  #: AR: acquire or release
    short: bool = False  #: a 16-bit instruction (T32): IL is 0

    @property
    def iss(self) -> int:
        """ISV, SAS, SSE, SRT, SF, AR."""
        access = self.size << 22 | self.signed << 21 | self.register << 16
        return _ISV | access | self.wide << 15 | self.ordered << 14


@dataclass(frozen=True)
class Abort:
    """An exception taken for a fault: to EL2 (Hyp mode) or EL1.

    ``esr``: ESR_EL2 (HSR) or ESR_EL1 (Armv7: DFSR, or IFSR of a fetch), valid in the bits of ``esr_known``;
    ``far``: FAR (HDFAR or DFAR, of a fetch HIFAR or IFAR); ``hpfar``: None where its value is UNKNOWN, and for an
    exception to EL1.
    """

    el: int
    esr: int
    far: int
    hpfar: int | None = None
    esr_known: int = (1 << 64) - 1


# -- address translation instructions -------------------------------------------------------------------

_PAR_RES1 = 1 << 11


@dataclass(frozen=True)
class Par:
    """PAR_EL1 (64-bit PAR): ``value`` is valid in the bits of ``known``.

    The others are UNKNOWN or implementation defined.
    """

    value: int
    known: int

    def matches(self, register: int) -> bool:
        return (register ^ self.value) & self.known == 0


def par(outcome: Translation | Fault) -> Par:
    """PAR after AT S12E1x, S12E0x (ATS12NSOxx) from Non-secure EL2.

    Raises ValueError for an external abort on the walk, which is taken as an exception: see :func:`walk_abort`.
    """
    if isinstance(outcome, Fault):
        if outcome.type is FaultType.EXTERNAL_ON_WALK:
            raise ValueError("an external abort on the walk leaves PAR UNKNOWN")
        value = 1 | outcome.status << 1 | outcome.s1ptw << 8 | (outcome.stage == 2) << 9 | _PAR_RES1
        return Par(value, (1 << 48) - 1)
    attr, sh = outcome.combined
    known = 0x00FF_FFFF_FFFF_F000 | _PAR_RES1 | 0x7F  # NS (bit 9) is UNKNOWN, bit 10 implementation defined
    value = outcome.pa & ~_PAGE | _PAR_RES1
    if attr is not None:
        value, known = value | attr << 56, known | 0xFF << 56
    if sh is not None:
        value, known = value | sh << 7, known | 0b11 << 7
    return Par(value, known)


def walk_abort(fault: Fault, va: int, *, armv7: bool) -> Abort:
    """The data abort of an AT instruction at EL2 for an external abort on its walk: CM and WnR are set."""
    iss = fault.status | 1 << 8 | _WNR | (_S1PTW if fault.s1ptw else 0)
    return Abort(2, _esr(EC_DATA_SAME, iss, armv7, short=False), va, esr_known=_known(iss, armv7))


# -- accesses ---------------------------------------------------------------------------------------------


def hpfar(fault: Fault) -> int | None:
    """HPFAR of a stage-2 fault: IPA[47:12] from bit 4 up. None (UNKNOWN) for a permission fault of the access."""
    if fault.type is FaultType.EXTERNAL_ON_WALK or (fault.type is FaultType.PERMISSION and not fault.s1ptw):
        return None
    assert fault.ipa is not None, "every stage-2 fault of a walk has the IPA"
    return fault.ipa >> 12 << 4


def _esr(ec: int, iss: int, armv7: bool, short: bool) -> int:
    """Compose ESR. IL is 1 if ISS does not describe an instruction; in Armv7's HSR it is then UNK/SBZP, here 0."""
    il = not short if iss & _ISV else not armv7
    return ec << 26 | il * _IL | iss


def _known(iss: int, armv7: bool) -> int:
    """The valid bits of ESR: all but an IL that is UNK."""
    return (1 << 64) - 1 & ~(_IL if armv7 and not iss & _ISV else 0)


def abort(
    fault: Fault, access: Access, va: int, *, at_el0: bool, armv7: bool, instruction: Instruction | None = None
) -> Abort:
    """The abort for a guest's access. ``at_el0``: executed at EL0 (not so an unprivileged access from EL1).

    ``instruction`` None: one without a valid syndrome (two registers, writeback, a fetch).
    """
    if fault.stage == 1 and armv7:
        return Abort(1, _fsr_armv7(fault, access), va)
    to_el2 = fault.stage == 2
    ec = (EC_FETCH_SAME if access.fetch else EC_DATA_SAME) - (to_el2 or at_el0)
    iss = fault.status | (_S1PTW if fault.s1ptw else 0) | (_WNR if access.write else 0)
    described = to_el2 and not fault.s1ptw and fault.type is not FaultType.EXTERNAL_ON_WALK
    if described and instruction is not None:
        iss |= instruction.iss
    short = instruction is not None and instruction.short
    esr, known = _esr(ec, iss, armv7, short), _known(iss, armv7)
    return Abort(2 if to_el2 else 1, esr, va, hpfar(fault) if to_el2 else None, known)


def _fsr_armv7(fault: Fault, access: Access) -> int:
    """DFSR or IFSR, long-descriptor format: LPAE (bit 9), WnR (bit 11), STATUS."""
    return fault.status | 1 << 9 | (1 << 11 if access.write else 0)
