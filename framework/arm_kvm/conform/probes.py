"""The strategy for the probes of a world: which addresses are translated, and how."""

from __future__ import annotations

from functools import cache

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from arm_kvm.conform import layout
from arm_kvm.conform.case import Probe, Silicon
from arm_kvm.conform.program import Program
from arm_kvm.conform.registers import UPPER_VA, va_mask
from arm_kvm.model.arch.faults import Access, Direction

_word = st.integers(0, (1 << 64) - 1)
_percent = st.integers(0, 99)

_OFFSETS = (0, 0xFF0, 0xFFF0, 0x10, layout.FRAMES & 0x3FFF_FFFF, 0x1F_FFF0, 0x3FFF_FFF0)


def draw_probes(draw: DrawFn, silicon: Silicon, program: Program, bases: list[int], harness: int) -> list[Probe]:
    """For each address the four AT instructions; loads and stores at EL1, at EL1 with EL0's rights, at EL0; fetches."""
    probes = []
    top = UPPER_VA[True] if silicon.armv7 else 1 << 64
    for base in bases:
        for offset in draw(st.lists(st.sampled_from(_OFFSETS), min_size=1, max_size=3, unique=True)):
            va = base + offset
            if draw(_percent) >= 95:  # outside the range
                va |= 1 << draw(st.sampled_from(_STRAY_BITS))
            if va < top:
                probes += _questions(draw, program, va & va_mask(silicon))
    return probes


#: Bits that move an address out of its range. (Bit 55 would select the upper range.)
_STRAY_BITS = (*range(25, 55), *range(56, 64))


def _questions(draw: DrawFn, program: Program, va: int) -> list[Probe]:
    value, data = draw(_word), va | 8
    run = layout.OPS.index("RUN")
    probes = [Probe.at(op, va) for op in range(4)]
    for write in (True, False):
        direction = Direction.WRITE if write else Direction.READ
        plain, unprivileged = gadgets_of(program, write, False), gadgets_of(program, write, True)
        one, other = plain[value % len(plain)], unprivileged[value % len(unprivileged)]
        probes.append(Probe(run, data, Access(direction), one, value))
        probes.append(Probe(run, data, Access(direction, el0=True), other, value))
        probes.append(Probe(run, data, Access(direction, el0=True), one, value, user=True))
    return probes + [Probe(run, va, Access(Direction.FETCH, el0), user=el0) for el0 in (False, True)]


@cache
def gadgets_of(program: Program, write: bool, el0: bool) -> list[int]:
    """Numbers of the gadgets that load or store with these rights."""
    return [n for n, g in enumerate(program.gadgets) if g.access.write == write and g.el0 == el0]
