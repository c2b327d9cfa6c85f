"""The program's image with its access gadgets."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from arm_kvm.conform import layout
from arm_kvm.guest.isa import A32, A64, Access, Isa
from arm_kvm.model.arch.syndrome import Instruction
from arm_kvm.support.binutils import binutils, equates

_DATA = 1  #: the register that gadgets load and store


@dataclass(frozen=True)
class Gadget:
    """A load or store for guests to execute; ``el0``: with the rights of EL0."""

    access: Access
    el0: bool = False

    @property
    def instruction(self) -> Instruction | None:
        """The instruction as described in a stage-2 abort's syndrome; None if the syndrome is not valid."""
        if not self.access.syndrome:
            return None
        size = self.access.size.bit_length() - 1
        return Instruction(size, _DATA, self.access.signed, self.access.bits == 64)


_A64_EL0 = (
    Access("ldtrb", "ldtrb w{r}, [x16]", 1, False),
    Access("ldtrsw", "ldtrsw x{r}, [x16]", 4, False, signed=True, bits=64),
    Access("ldtr", "ldtr w{r}, [x16]", 4, False),
    Access("ldtr-x", "ldtr x{r}, [x16]", 8, False, bits=64),
    Access("sttrb", "sttrb w{r}, [x16]", 1, True),
    Access("sttrh", "sttrh w{r}, [x16]", 2, True),
    Access("sttr-x", "sttr x{r}, [x16]", 8, True, bits=64),
)
#: A32 has unprivileged accesses only in post-indexed form, so their syndrome is never valid.
_A32_EL0 = (
    Access("ldrt", "ldrt r{r}, [r12]", 4, False, syndrome=False),
    Access("ldrbt", "ldrbt r{r}, [r12]", 1, False, syndrome=False),
    Access("strt", "strt r{r}, [r12]", 4, True, syndrome=False),
    Access("strht", "strht r{r}, [r12]", 2, True, syndrome=False),
)


@dataclass(frozen=True, eq=False)
class Program:
    """The program of an instruction set: an ELF file with the program and the harness at their addresses."""

    isa: Isa
    elf: bytes = field(repr=False)
    gadgets: tuple[Gadget, ...]
    modes: tuple[int, int]  #: initial PSTATE (PSR) of a guest at EL0 and at EL1


def _gadgets(isa: Isa) -> tuple[Gadget, ...]:
    own = _A64_EL0 if isa is A64 else _A32_EL0
    return tuple(Gadget(a) for a in isa.accesses) + tuple(Gadget(a, el0=True) for a in own)


def _text(gadgets: tuple[Gadget, ...]) -> str:
    lines = (g.access.template.format(r=_DATA, r2=_DATA + 1) + "\n    hvc #HVC_DONE" for g in gadgets)
    return "".join(f"    {line}\n" for line in lines)


@cache
def build(name: str) -> Program:
    """Build the program for the instruction set ``name`` (A32 or A64). Raises SetupError."""
    isa = {"A32": A32, "A64": A64}[name]
    gadgets = _gadgets(isa)
    with binutils(isa.tools, f"{name} conformance program") as tools:
        (tools.folder / "layout.inc").write_text(equates(layout.equates()))
        (tools.folder / "gadgets.inc").write_text(_text(gadgets))
        tools.run("as", "-o", "program.o", str(Path(__file__).with_name(isa.source)))
        tools.run(
            "ld",
            f"-Ttext={layout.PROGRAM:#x}",
            f"--section-start=.harness={layout.HARNESS:#x}",
            "-o",
            "elf",
            "program.o",
        )
        elf = (tools.folder / "elf").read_bytes()
    return Program(isa, elf, gadgets, modes=(0x3C0, 0x3C5) if isa is A64 else (0x1D0, 0x1D3))
