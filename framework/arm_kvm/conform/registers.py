"""Values of the control registers that worlds draw: consistent ones at the edges, and contradictory ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from arm_kvm.conform.case import Registers, Silicon, TableWorld
from arm_kvm.model.arch import regime
from arm_kvm.model.arch.granule import KIB4, KIB64, Granule

SLOT = 0x1_0000  #: alignment of the harness and the guest's tables: the largest page
UPPER_VA = {True: 0xFE00_0000, False: 0xFFFF_FFFF_FE00_0000}  #: 25-bit upper ranges, by Armv7

HCR = {True: 1 << 13 | 1, False: 1 << 31 | 1 << 13 | 1}  #: by Armv7: TWI, VM; RW in AArch64
SCTLR = {True: 0x00C5_0078, False: 0x30D5_0800}  #: by Armv7: RES1 bits, nTWI and nTWE
#: VTCR_EL2.PS and TCR_EL1.IPS -> bits; KVM's own value comes first.
PHYSICAL_SIZES = {ps: regime.PHYSICAL_SIZES[ps] for ps in (2, 5, 4, 3, 1, 0)}

_percent = st.integers(0, 99)
_boolean = st.booleans()

# -- the shape of stage 2 ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The fields of VTCR that determine the shape of stage 2."""

    granule: Granule
    sl0: int
    input_bits: int


_TG0 = {granule: number for number, granule in regime.TG0.items()}


def _edges(low: int, high: int) -> list[int]:
    """Widths from ``low`` to ``high``: both ends, the middle, and those where concatenation begins."""
    middle = (low + high) // 2
    return sorted({n for n in (low, low + 1, middle, high - 4, high - 3, high - 1, high) if low <= n <= high})


@cache
def stage2_shapes(silicon: Silicon) -> list[Shape]:
    """All start levels, each with the edges of its input widths. KVM's own shape is first, as failures shrink to it."""
    widths: dict[tuple[Granule, int], list[int]] = {}
    for shape, why in _all_shapes(silicon):
        if why is None:
            widths.setdefault((shape.granule, shape.sl0), []).append(shape.input_bits)
    chosen = [Shape(*start, bits) for start, found in widths.items() for bits in _edges(min(found), max(found))]
    return sorted(chosen, key=lambda s: (s != Shape(KIB4, 1, 40), s.granule.shift, s.sl0, -s.input_bits))


@cache
def impossible_shapes(silicon: Silicon) -> list[Shape]:
    """Contradictory fields of VTCR_EL2 for which the architecture defines the result."""
    return [shape for shape, why in _all_shapes(silicon) if why is not None and why.level0]


def _all_shapes(silicon: Silicon) -> Iterator[tuple[Shape, regime.ImpossibleRegime | None]]:
    """Every combination of the fields, and the reason for which the model refuses it (None: it does not)."""
    granules = (KIB4,) if silicon.armv7 else silicon.features.granules
    for granule, sl0, bits in product(granules, range(4), range(25, 41) if silicon.armv7 else range(16, 49)):
        shape = Shape(granule, sl0, bits)
        try:
            TableWorld(silicon, Registers(0, vtcr(shape, silicon, 0), 0, 0)).stage2()
        except regime.ImpossibleRegime as e:
            yield shape, e
        else:
            yield shape, None


def vtcr(shape: Shape, silicon: Silicon, extra: int) -> int:
    """VTCR for a shape; ``extra``: PS and the other optional fields."""
    if silicon.armv7:
        size = 32 - shape.input_bits & 0x1F
        return 1 << 31 | shape.sl0 << 6 | (size & 0x10) | (size & 0xF) | 3 << 12 | 5 << 8
    return 1 << 31 | (64 - shape.input_bits) | shape.sl0 << 6 | _TG0[shape.granule] << 14 | 3 << 12 | 5 << 8 | extra


# -- HCR, and the optional fields of VTCR_EL2 ----------------------------------------------------------------


def _physical_size(draw: DrawFn, shape: Shape) -> int:
    """Draw VTCR_EL2.PS, mostly at least as wide as the IPA space."""
    if draw(_percent) < 90 and (wide := [ps for ps, bits in PHYSICAL_SIZES.items() if bits >= shape.input_bits]):
        return draw(st.sampled_from(wide))
    return draw(st.sampled_from(tuple(PHYSICAL_SIZES)))


def draw_options(draw: DrawFn, silicon: Silicon, shape: Shape) -> tuple[int, int]:
    """Draw HCR, and the optional fields of VTCR_EL2."""
    hcr = HCR[silicon.armv7] | (regime.HCR_PTW if draw(_percent) >= 80 else 0)
    if silicon.armv7:
        return hcr, 0
    if silicon.features.fwb and draw(_boolean):
        hcr |= regime.HCR_FWB
    extra = _physical_size(draw, shape) << 16
    if silicon.features.hafdbs:
        extra |= draw(st.sampled_from((0, 0, 1, 2, 3, 3))) << 21
    return hcr, extra | silicon.features.vmid16 << 19


# -- stage 1 -------------------------------------------------------------------------------------------------


def va_mask(silicon: Silicon) -> int:
    return (1 << 32) - 1 if silicon.armv7 else (1 << 64) - 1


def va_widths(silicon: Silicon, granule: Granule) -> list[int]:
    """Widths of the lower VA range, with edges."""
    if silicon.armv7:
        return [32, 31, 30, 29, 26, 25]
    least = 64 - ((47 if granule is KIB64 else 48) if silicon.features.small_tables else 39)
    return sorted({48, 39, 36, least, least + 1, 42, 40}, reverse=True)


def stage1_granules(silicon: Silicon) -> list[Granule]:
    """The granules of stage 1 that the model knows on this CPU."""
    wide = silicon.features.pa_bits > 48  # 64 KiB pages then have another format
    return [g for g in silicon.features.stage1_granules if g is not KIB64 or not wide]


def draw_tcr(draw: DrawFn, silicon: Silicon, granule: Granule, va_bits: int, harness: int) -> int:
    """Draw TCR (TTBCR) with an IPS that includes the harness."""
    if silicon.armv7:
        return 1 << 31 | 32 - va_bits | 7 << 16
    enough = sorted((ips for ips, bits in PHYSICAL_SIZES.items() if not (harness + SLOT - 1) >> bits), reverse=True)
    ips = draw(st.sampled_from(enough))
    return 64 - va_bits | _TG0[granule] << 14 | 39 << 16 | 2 << 30 | ips << 32
