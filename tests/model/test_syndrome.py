"""Syndromes: PAR, ESR, FAR and HPFAR as KVM reads them (arch/arm64/include/asm/{esr,kvm_arm}.h)."""

import pytest
from arm_kvm.model.arch import syndrome
from arm_kvm.model.arch.attributes import STAGE1_OFF, Combined
from arm_kvm.model.arch.faults import Access, Direction, Fault, FaultType
from arm_kvm.model.arch.syndrome import Instruction
from arm_kvm.model.arch.walk import Translation

READ, WRITE, FETCH = (Access(direction) for direction in Direction)
VA, IPA = 0x1234_5678, 0x8000_5008
TRANSLATION = Fault(FaultType.TRANSLATION, 3, 2, ipa=IPA)


def test_an_mmio_abort_as_kvm_decodes_it():
    """A 32-bit store of register 5: EC 0x24, ISV, SAS 2, SRT 5, WnR, translation fault level 3."""
    taken = syndrome.abort(TRANSLATION, WRITE, VA, at_el0=False, armv7=False, instruction=Instruction(2, 5))
    assert taken.el == 2 and taken.esr >> 26 == 0x24 and taken.esr & 1 << 25
    assert (taken.esr >> 24 & 1, taken.esr >> 22 & 3, taken.esr >> 16 & 31, taken.esr >> 6 & 1) == (1, 2, 5, 1)
    assert (taken.esr & 0x3F, taken.far, taken.hpfar) == (0b000111, VA, 0x800050)


@pytest.mark.parametrize(
    ("fault", "access", "at_el0", "ec", "el"),
    [
        (TRANSLATION, READ, False, 0x24, 2),
        (TRANSLATION, FETCH, False, 0x20, 2),
        (TRANSLATION, FETCH, True, 0x20, 2),
        (Fault(FaultType.PERMISSION, 3, 1), READ, False, 0x25, 1),
        (Fault(FaultType.PERMISSION, 3, 1), FETCH, False, 0x21, 1),
        (Fault(FaultType.PERMISSION, 3, 1), FETCH, True, 0x20, 1),
    ],
)
def test_exception_classes(fault, access, at_el0, ec, el):
    taken = syndrome.abort(fault, access, VA, at_el0=at_el0, armv7=False)
    assert (taken.esr >> 26, taken.el, taken.hpfar is None) == (ec, el, el == 1)


def test_signed_and_wide_loads():
    assert Instruction(0, 3, signed=True, wide=True).iss == 1 << 24 | 1 << 21 | 3 << 16 | 1 << 15


def test_a_fault_on_a_stage_1_walk_has_no_instruction_syndrome():
    fault = Fault(FaultType.PERMISSION, 3, 2).on_table_walk(IPA, 1)
    taken = syndrome.abort(fault, READ, VA, at_el0=False, armv7=False, instruction=Instruction(2, 5))
    assert taken.esr & 0x1FFFFFF == 1 << 7 | 0b001111 and taken.hpfar == 0x800050


def test_hpfar_is_unknown_after_a_permission_fault():
    assert syndrome.hpfar(Fault(FaultType.PERMISSION, 3, 2, ipa=IPA)) is None
    assert syndrome.hpfar(Fault(FaultType.EXTERNAL_ON_WALK, 3, 2, ipa=IPA)) is None
    assert syndrome.hpfar(Fault(FaultType.ACCESS_FLAG, 3, 2, ipa=IPA)) == 0x800050


def test_armv7_has_no_il_without_isv():
    with_iss = syndrome.abort(TRANSLATION, READ, VA, at_el0=False, armv7=True, instruction=Instruction(2, 5))
    without = syndrome.abort(TRANSLATION, READ, VA, at_el0=False, armv7=True)
    assert with_iss.esr & with_iss.esr_known & 1 << 25
    assert not without.esr & 1 << 25 and not without.esr_known & 1 << 25


@pytest.mark.parametrize(("access", "fsr"), [(WRITE, 0xA06), (READ, 0x206), (FETCH, 0x206)])
def test_armv7_reports_stage_1_faults_in_dfsr_and_ifsr(access, fsr):
    taken = syndrome.abort(Fault(FaultType.TRANSLATION, 2, 1), access, VA, at_el0=True, armv7=True)
    assert (taken.el, taken.esr, taken.far, taken.hpfar) == (1, fsr, VA, None)


def test_short_and_ordered_instructions():
    short = syndrome.abort(TRANSLATION, READ, VA, at_el0=False, armv7=True, instruction=Instruction(2, 5, short=True))
    assert not short.esr & 1 << 25 and short.esr & 1 << 24
    assert Instruction(2, 5, ordered=True).iss & 1 << 14


def test_an_external_abort_has_no_instruction_syndrome_and_no_par():
    fault = Fault(FaultType.EXTERNAL_ON_WALK, 3, 2, ipa=IPA)
    taken = syndrome.abort(fault, READ, VA, at_el0=False, armv7=False, instruction=Instruction(2, 5))
    assert not taken.esr & 1 << 24
    with pytest.raises(ValueError, match="PAR UNKNOWN"):
        syndrome.par(fault)


def test_par_of_a_translation():
    par = syndrome.par(Translation(IPA, 0x4400_0123, STAGE1_OFF, STAGE1_OFF, Combined(0xFF, 3)))
    assert par.value == 0xFF00_0000_4400_0980 and par.matches(par.value | 1 << 9) and not par.matches(par.value | 1)
    unknown = syndrome.par(Translation(IPA, 0x4400_0123, STAGE1_OFF, STAGE1_OFF, Combined(None, None)))
    assert unknown.matches(0x1200_0000_4400_0980) and not unknown.matches(0x1201_0000_4400_0980)


def test_par_of_a_fault():
    fault = Fault(FaultType.TRANSLATION, 2, 2).on_table_walk(IPA, 1)
    assert syndrome.par(fault).value == 1 | 0b000110 << 1 | 1 << 8 | 1 << 9 | 1 << 11
    assert syndrome.par(Fault(FaultType.ACCESS_FLAG, 3, 1)).value == 1 | 0b001011 << 1 | 1 << 11


def test_an_at_instruction_meets_an_external_abort():
    taken = syndrome.walk_abort(Fault(FaultType.EXTERNAL_ON_WALK, 1, 1), VA, armv7=False)
    assert taken.esr == 0x25 << 26 | 1 << 25 | 1 << 8 | 1 << 6 | 0b010101 and taken.far == VA
    on_walk = Fault(FaultType.EXTERNAL_ON_WALK, 1, 2).on_table_walk(IPA, 0)
    assert syndrome.walk_abort(on_walk, VA, armv7=True).esr == 0x25 << 26 | 1 << 8 | 1 << 7 | 1 << 6 | 0b010101


def test_accesses_and_faults_read_like_words():
    assert [str(a) for a in (READ, Access(Direction.FETCH, el0=True))] == ["EL1 read", "EL0 fetch"]
    assert str(TRANSLATION) == "stage 2 translation fault, level 3"
