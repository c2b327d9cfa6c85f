"""A world: the registers and tables of a guest, and the probes to make. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from arm_kvm.conform import layout
from arm_kvm.model.arch import regime, stage1
from arm_kvm.model.arch.faults import Access, Direction
from arm_kvm.model.arch.regime import SCTLR_M, Features, Regime
from arm_kvm.model.arch.stage1 import Stage1Regime
from arm_kvm.model.arch.walk import El10


@dataclass(frozen=True)
class Silicon:
    """The CPU and its board, as far as the model depends on them."""

    armv7: bool
    features: Features
    ram_end: int
    qemu: str = ""  #: the emulator's program
    version: tuple[int, ...] = ()  #: of the emulator

    @property
    def wfi(self) -> int:
        """The WFI instruction."""
        return 0xE320_F003 if self.armv7 else 0xD503_207F

    def mark(self, pa: int) -> int:
        """The instruction before a frame's WFI, which moves 16 bits of the frame's address into register 1."""
        number = frame_number(pa)
        if self.armv7:
            return 0xE300_1000 | (number >> 12) << 16 | number & 0xFFF  # movw r1, #number
        return 0x5280_0001 | number << 5  # movz w1, #number


@dataclass(frozen=True)
class Registers:
    """The registers that the program loads before probing, by the names of AArch64 (in Armv7 the counterparts)."""

    hcr: int
    vtcr: int
    vttbr: int
    sctlr: int
    tcr: int = 0
    ttbr0: int = 0
    ttbr1: int = 0
    mair: int = 0
    vbar: int = 0

    def __str__(self) -> str:
        return "  ".join(f"{name.upper()} {value:#x}" for name, value in vars(self).items())


_DIRECTIONS = (Direction.READ, Direction.WRITE)


@dataclass(frozen=True)
class Probe:
    """A single translation: an AT instruction (``op`` below 4), or an access that a guest executes.

    The guest runs gadget number ``gadget``, or (None: a fetch) is started at ``va``. ``user``: it runs at EL0, else at
    EL1 even if the access has EL0's rights (LDTR).
    """

    op: int
    va: int
    access: Access
    gadget: int | None = None
    value: int = 0  #: that a store writes
    user: bool = False

    @classmethod
    def at(cls, op: int, va: int) -> Probe:
        """AT S12E1R, S12E1W, S12E0R, S12E0W: ``op`` 0 to 3."""
        return cls(op, va, Access(_DIRECTIONS[op & 1], el0=op >= 2))

    @property
    def runs(self) -> bool:
        """Whether a guest executes it."""
        return self.op == layout.OPS.index("RUN")

    def __str__(self) -> str:
        how = "fetch" if self.access.fetch else f"gadget {self.gadget}"
        return f"{layout.OPS[self.op] if not self.runs else how} ({self.access}) at {self.va:#x}"


@dataclass(frozen=True)
class TableWorld:
    """Registers, tables and probes. ``words``: table entries by physical address (the rest of the arena is 0).

    ``harness``: VA of the harness page, ``harness_ipa`` its IPA.
    """

    silicon: Silicon
    registers: Registers
    words: dict[int, int] = field(default_factory=dict)
    harness: int = 0
    harness_ipa: int = 0
    probes: tuple[Probe, ...] = ()

    @property
    def upper_table(self) -> int:
        """The only entry of the upper range's table: the harness's block, read-only and executable at EL1 and EL0."""
        return stage1.leaf(self.harness_ipa & -layout.UPPER_BLOCK, 2, ap=0b11)

    def stage2(self) -> Regime:
        """Stage 2. Raises ImpossibleRegime."""
        r = self.registers
        if self.silicon.armv7:
            return regime.stage2_armv7(r.vttbr, r.vtcr, r.hcr, self.silicon.features)
        return regime.stage2_armv8(r.vttbr, r.vtcr, r.hcr, self.silicon.features)

    def stage1(self) -> Stage1Regime | None:
        """Stage 1; None if it is off. Raises ImpossibleRegime."""
        return self.enabled_stage1() if self.registers.sctlr & SCTLR_M else None

    def enabled_stage1(self) -> Stage1Regime:
        """Stage 1, whether it is on or not. Raises ImpossibleRegime."""
        r = self.registers
        if self.silicon.armv7:
            upper = regime.stage1_armv7(r.ttbr0, r.tcr)
        else:
            upper = regime.stage1_armv8(r.ttbr0, r.tcr, self.silicon.features)
        return Stage1Regime(upper, r.mair, r.sctlr)

    def el10(self) -> El10:
        """The guest's EL1&0 regime. Raises ImpossibleRegime."""
        return El10(self.stage1(), self.stage2(), self.silicon.features.pa_bits)


class Unknowable(Exception):
    """The model cannot predict a probe: its outcome is not defined, or depends on unknown memory."""


_NOWHERE_END, _HIGH_DEVICES_END = (
    0x40_0000_0000,
    0x100_0000_0000,
)  #: hw/arm/virt.c: the high PCIe windows are between them


@dataclass
class TableMemory:
    """Physical memory in a world; implements :class:`arm_kvm.model.arch.walk.Words`."""

    world: TableWorld
    stored: dict[int, int] = field(default_factory=dict)  #: words of frames that guests have written

    def load(self, pa: int) -> int | None:
        """The word at a physical address; None if there is no memory. Raises Unknowable."""
        if layout.ARENA <= pa < layout.ARENA + layout.ARENA_SIZE:
            return self.world.words.get(pa, 0)
        if in_frames(pa):
            return self.load_frame(pa)
        if self.world.silicon.ram_end <= pa < _NOWHERE_END or pa >= _HIGH_DEVICES_END:
            return None
        raise Unknowable(f"PA {pa:#x}")

    def load_frame(self, pa: int) -> int:
        """The word at a physical address in the frames."""
        return self.stored.get(pa, frame_word(pa, self.world.silicon))


def frame_number(pa: int) -> int:
    """The value in register 1 after a fetch from a frame."""
    return pa >> 12 & 0xFFFF


def in_frames(pa: int, size: int = 1) -> bool:
    return pa >= layout.FRAMES and pa + size <= layout.FRAMES + layout.FRAMES_SIZE


def frame_word(pa: int, silicon: Silicon) -> int:
    """The initial word of a frame: in each chunk two instructions, then the chunk's physical address."""
    return pa & ~0xF if pa & 8 else silicon.wfi << 32 | silicon.mark(pa)
