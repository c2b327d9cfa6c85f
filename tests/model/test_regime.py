"""Regimes: registers give the right shape, impossible ones are refused with the reason."""

from dataclasses import replace

import pytest
from arm_kvm.model.arch import regime
from arm_kvm.model.arch.granule import KIB4, KIB16, KIB64
from arm_kvm.model.arch.regime import Features, ImpossibleRegime
from hypothesis import given
from hypothesis import strategies as st

BASE = 0x4000_0000
PAGE = 0x1000
A15_VTCR = 0x80003558  # what Linux 5.4 writes on the A15 board
A57_VTCR = 0x80023558  # what Linux 6.1 writes on the arm64 board
NARROW = Features(
    40,
    (KIB4, KIB64),
    (KIB4, KIB64),
    small_tables=False,
    vmid16=False,
    fwb=False,
    xnx=False,
    haf=False,
    hafdbs=False,
)


def test_a15_regime_is_kvms_40_bit_space():
    r = regime.stage2_armv7(BASE | 5 << 48, A15_VTCR)
    assert (r.input_bits, r.start_level, r.entries, r.root_pages) == (40, 1, 1024, 2)
    assert (r.vmid, r.vmid_bits, r.output_bits, r.first_fault_level) == (5, 8, 40, 1)


def test_arm64_regime():
    r = regime.stage2_armv8(BASE | 7 << 48 | 1, A57_VTCR)
    assert (r.input_bits, r.start_level, r.root_pages, r.root) == (40, 1, 2, BASE)
    assert (r.vmid, r.vmid_bits, r.output_bits, r.first_fault_level) == (7, 8, 40, 0)
    wide = regime.stage2_armv8(BASE | 300 << 48, A57_VTCR | 1 << 19)
    assert (wide.vmid, wide.vmid_bits) == (300, 16)


@pytest.mark.parametrize(
    ("tg0", "granule", "sl0", "t0sz", "level", "tables"),
    [
        (0, KIB4, 0, 64 - 34, 2, 16),
        (0, KIB4, 1, 64 - 43, 1, 16),
        (0, KIB4, 2, 64 - 48, 0, 1),
        (0, KIB4, 3, 64 - 25, 3, 16),
        (2, KIB16, 1, 64 - 40, 2, 16),
        (2, KIB16, 2, 64 - 47, 1, 1),
        (1, KIB64, 1, 64 - 42, 2, 1),
        (1, KIB64, 2, 64 - 48, 1, 1),
        (1, KIB64, 0, 64 - 33, 3, 16),
    ],
)
def test_granules_start_levels_and_concatenation(tg0, granule, sl0, t0sz, level, tables):
    r = regime.stage2_armv8(0, 5 << 16 | tg0 << 14 | sl0 << 6 | t0sz)
    assert (r.granule, r.start_level, r.root_pages) == (granule, level, tables)


def test_features_switch_fields_on():
    vtcr = A57_VTCR | 3 << 21 | 1 << 19
    hcr = regime.HCR_FWB | regime.HCR_PTW
    all_of_it = regime.stage2_armv8(BASE, vtcr, hcr)
    assert all_of_it.format.fwb and all_of_it.format.xnx and all_of_it.hardware_af and all_of_it.hardware_dirty
    assert all_of_it.protect_walks and all_of_it.vmid_bits == 16
    none = regime.stage2_armv8(BASE, vtcr, hcr, NARROW)
    assert not (none.format.fwb or none.format.xnx or none.hardware_af or none.hardware_dirty)
    assert none.vmid_bits == 8
    assert not regime.stage2_armv8(BASE, A57_VTCR | 1 << 22).hardware_dirty  # HD without HA


def test_features_from_id_registers():
    """Cortex-A57 and Cortex-A76 as QEMU 7.2 has them (target/arm/cpu64.c), and a CPU with everything."""
    a57 = Features.from_id_registers(0x1124, 0, 0)
    assert a57 == replace(NARROW, pa_bits=44)
    a76 = Features.from_id_registers(0x101122, 0x10212122, 0x1011)
    assert a76 == Features(40, small_tables=False, fwb=False)
    assert Features.from_id_registers(0x1124, 1, 0) == replace(NARROW, pa_bits=44, haf=True)
    everything = Features.from_id_registers(0x2220_0000_0006 | 2 << 20, 0x10000022, 1 << 40 | 1 << 28)
    assert everything == Features(52)
    assert Features.from_id_registers(0x1F00_0000 | 0xF << 28, 0, 0).granules == ()


def test_stage1_regimes():
    arm = regime.stage1_armv7(BASE, 1 << 31)
    assert (arm.input_bits, arm.start_level, arm.entries) == (32, 1, 4)
    arm64 = regime.stage1_armv8(BASE | 9 << 48, 5 << 32 | 16)
    assert (arm64.input_bits, arm64.start_level, arm64.entries, arm64.root) == (48, 0, 512, BASE)
    assert arm64.output_bits == 48 and regime.stage1_armv8(BASE, 16).output_bits == 32
    assert regime.stage1_armv8(0, 1 << 14 | 22).start_level == 2  # 64 KiB, 42 bits


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: regime.stage2_armv7(BASE, A15_VTCR & ~0x10), "S does not repeat"),
        (lambda: regime.stage2_armv7(BASE, A15_VTCR | 0x80), "SL0"),
        (lambda: regime.stage2_armv7(BASE + PAGE, A15_VTCR), "not aligned"),
        (lambda: regime.stage2_armv7(1 << 40, A15_VTCR), "beyond the 40-bit"),
        (lambda: regime.stage2_armv8(BASE, A57_VTCR | 3 << 14), "TG0 3 is reserved"),
        (lambda: regime.stage2_armv8(BASE, A57_VTCR | 2 << 14, 0, NARROW), "16 KiB: not implemented"),
        (lambda: regime.stage2_armv8(BASE, A57_VTCR | 7 << 16), "PS 7"),
        (lambda: regime.stage2_armv8(BASE, A57_VTCR | 1 << 32), "VTCR_EL2.DS is set"),
        (lambda: regime.stage2_armv8(BASE, A57_VTCR | 1 << 14, 0, Features(52)), "FEAT_LPA"),
        (lambda: regime.stage1_armv8(BASE, 1 << 7 | 16), "TCR_EL1.EPD0 is set"),
        (lambda: regime.stage2_armv8(BASE, A57_VTCR & ~0xC0), "concatenated"),
        (lambda: regime.stage2_armv8(BASE, (A57_VTCR & ~0x3F) | 40), "does not reach"),
        (lambda: regime.stage2_armv8(BASE, (A57_VTCR & ~0x3F) | 15), "not between 16 and 48"),
        (lambda: regime.stage2_armv8(BASE, (A57_VTCR & ~0x3F) | 40, 0, NARROW), "not between 16 and 39"),
        (lambda: regime.stage2_armv8(BASE, A57_VTCR | 0xC0, 0, NARROW), "SL0 3 is reserved"),
        (lambda: regime.stage2_armv8(BASE, A57_VTCR | 1 << 14 | 0xC0), "SL0 3 is reserved"),
        (lambda: regime.stage2_armv8(BASE, 2 << 6 | 24, 0, NARROW), "does not start at level 0 with 40-bit"),
        (lambda: regime.stage2_armv8(BASE, 1 << 6 | 22, 0, NARROW), "42-bit IPAs are wider"),
        (
            lambda: regime.stage2_armv8(BASE, A57_VTCR, regime.HCR_RW, replace(NARROW, pa_bits=36)),
            "40-bit IPAs are wider",
        ),
        (lambda: regime.stage2_armv8(BASE + 32, 3 << 6 | 48), "not aligned"),
        (lambda: regime.stage1_armv7(BASE, 0), "EAE"),
        (lambda: regime.stage1_armv8(BASE, 3 << 14 | 16), "TG0"),
    ],
)
def test_impossible_registers_are_refused_with_the_reason(make, reason):
    with pytest.raises(ImpossibleRegime, match=reason):
        make()


def test_a_32_bit_guest_has_40_bit_ipas_however_small_physical_memory_is():
    assert regime.stage2_armv8(BASE, A57_VTCR, 0, replace(NARROW, pa_bits=36)).input_bits == 40


def test_physical_sizes_are_clipped():
    assert regime.stage2_armv8(BASE, A57_VTCR & ~(7 << 16) | 5 << 16, 0, replace(NARROW, pa_bits=40)).output_bits == 40
    assert regime.stage2_armv8(BASE, A57_VTCR & ~(7 << 16) | 6 << 16, 0, Features(52)).output_bits == 48


def test_what_the_hosts_cpu_has():
    assert regime.ARMV7.features() == Features(pa_bits=40)
    assert regime.ARMV8.features(0x1124, 0, 0).pa_bits == 44


def test_contradictions_with_a_defined_outcome_say_so():
    with pytest.raises(ImpossibleRegime) as reserved_start:
        regime.stage2_armv8(BASE, A57_VTCR & ~0xC0)
    with pytest.raises(ImpossibleRegime) as left_open:
        regime.stage2_armv8(BASE, A57_VTCR | 3 << 14)
    with pytest.raises(ImpossibleRegime) as unpredictable:
        regime.stage2_armv7(BASE, A15_VTCR & ~0x40)
    assert reserved_start.value.level0 and not left_open.value.level0 and not unpredictable.value.level0


@given(st.integers(0, 255), st.integers(25, 40), st.integers(0, 1))
def test_every_possible_armv7_regime_covers_its_space(vmid, input_bits, sl0):
    vtcr = sl0 << 6 | (32 - input_bits) & 0x1F
    try:
        r = regime.stage2_armv7(vmid << 48, vtcr)
    except ImpossibleRegime:
        assert input_bits not in (range(31, 41) if sl0 else range(25, 35))
        return
    assert r.entries << r.granule.level_shift(r.start_level) == r.input_size == 1 << input_bits
    assert r.vmid == vmid and r.index(r.input_size - 1, r.start_level) == r.entries - 1


def test_a_regime_reads_like_one():
    r = regime.stage2_armv7(BASE | 5 << 48, A15_VTCR)
    assert "2 page(s) of 4 KiB), start level 1, 40-bit input, 40-bit output, VMID 5" in str(r)
    assert "VMID" not in str(regime.stage1_armv7(BASE, 1 << 31))
