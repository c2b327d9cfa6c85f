"""The two guest instruction sets: registers, single-access instructions, exception syndromes.

An :class:`Access` is one load or store instruction that the payload can execute with any of a range of data registers,
so that a test case only names the instruction.

Sources: ARM DDI 0406C.d A8.8, B3.13 (fault status); ARM DDI 0487 C6.2, register ESR_EL1.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Status(Enum):
    """The outcome of an order, as the payload writes it into STATUS."""

    PENDING = 0
    OK = 1
    DATA_ABORT = 2
    PREFETCH_ABORT = 3
    UNDEFINED = 4
    EXCEPTION = 5  #: A64: the syndrome says which
    UNEXPECTED = 6  #: an exception that should not occur: an interrupt, an SError, from another mode


@dataclass(frozen=True)
class Access:
    """One load or store instruction. In ``template``, ``{r}`` is the data register and ``{r2}`` the next one."""

    name: str
    template: str
    size: int  #: bytes at the address
    write: bool
    signed: bool = False
    bits: int = 32  #: width of the data register
    syndrome: bool = True  #: whether an abort reports a valid instruction syndrome (ISV)


@dataclass(eq=False)
class GuestException(Exception):
    """An exception that the guest took while it executed an order, and that its own vectors handled.

    ``kind`` is ``data abort``, ``prefetch abort``, ``undefined`` or ``exception``; ``syndrome`` is
    DFSR/IFSR (A32) or ESR_EL1 (A64); ``address`` is DFAR/IFAR or FAR_EL1; ``pc`` is the address of the instruction.
    """

    kind: str
    syndrome: int
    address: int
    pc: int
    external: bool  #: whether it is a synchronous external abort, which KVM injects where there is no memory
    registers: tuple[int, ...] = ()  #: r0 to r12, or x0 to x30, when the exception was taken

    def __str__(self) -> str:
        return f"guest took a {self.kind} at pc {self.pc:#x}: syndrome {self.syndrome:#x}, address {self.address:#x}"


_A32_ACCESSES = (
    Access("ldrb", "ldrb r{r}, [r12]", 1, False),
    Access("ldrsb", "ldrsb r{r}, [r12]", 1, False, signed=True),
    Access("ldrh", "ldrh r{r}, [r12]", 2, False),
    Access("ldrsh", "ldrsh r{r}, [r12]", 2, False, signed=True),
    Access("ldr", "ldr r{r}, [r12]", 4, False),
    Access("strb", "strb r{r}, [r12]", 1, True),
    Access("strh", "strh r{r}, [r12]", 2, True),
    Access("str", "str r{r}, [r12]", 4, True),
    Access("ldm", "ldm r12, {{r{r}, r{r2}}}", 8, False, syndrome=False),
    Access("stm", "stm r12, {{r{r}, r{r2}}}", 8, True, syndrome=False),
    Access("ldr-post", "ldr r{r}, [r12], #4", 4, False, syndrome=False),
    Access("str-post", "str r{r}, [r12], #4", 4, True, syndrome=False),
)
_A64_ACCESSES = (
    Access("ldrb", "ldrb w{r}, [x16]", 1, False),
    Access("ldrsb", "ldrsb w{r}, [x16]", 1, False, signed=True),
    Access("ldrsb-x", "ldrsb x{r}, [x16]", 1, False, signed=True, bits=64),
    Access("ldrh", "ldrh w{r}, [x16]", 2, False),
    Access("ldrsh", "ldrsh w{r}, [x16]", 2, False, signed=True),
    Access("ldrsh-x", "ldrsh x{r}, [x16]", 2, False, signed=True, bits=64),
    Access("ldr", "ldr w{r}, [x16]", 4, False),
    Access("ldrsw", "ldrsw x{r}, [x16]", 4, False, signed=True, bits=64),
    Access("ldr-x", "ldr x{r}, [x16]", 8, False, bits=64),
    Access("strb", "strb w{r}, [x16]", 1, True),
    Access("strh", "strh w{r}, [x16]", 2, True),
    Access("str", "str w{r}, [x16]", 4, True),
    Access("str-x", "str x{r}, [x16]", 8, True, bits=64),
    Access("ldp", "ldp w{r}, w{r2}, [x16]", 8, False, syndrome=False),
    Access("stp", "stp w{r}, w{r2}, [x16]", 8, True, syndrome=False),
    Access("ldr-post", "ldr w{r}, [x16], #4", 4, False, syndrome=False),
    Access("str-post", "str w{r}, [x16], #4", 4, True, syndrome=False),
)


@dataclass(frozen=True)
class Isa:
    """A guest instruction set: the payload's source, and the accesses that it can make."""

    name: str
    source: str  #: assembly file in this folder
    tools: str  #: prefix of the binutils
    accesses: tuple[Access, ...]
    registers: int  #: number of data registers that an access can use, from r0 or x0 on
    load_gadget: str  #: executes a load into {r} and stores the register into the order
    store_gadget: str  #: loads {r} from the order and executes a store
    ret: bytes  #: the return instruction
    pointer_bits: int
    general_registers: int  #: number of general registers that the payload's vectors save, from r0 or x0 on

    def access(self, name: str) -> Access:
        """Return the access of this name. Raises ValueError, which lists the names."""
        for access in self.accesses:
            if access.name == name:
                return access
        raise ValueError(f"{self.name} has no access {name!r}: {', '.join(a.name for a in self.accesses)}")

    def gadget(self, access: Access, register: int) -> int:
        """Return the number of the payload's gadget for this instruction with this data register."""
        if not 0 <= register < self.registers:
            raise ValueError(f"{self.name} accesses use registers 0 to {self.registers - 1}, not {register}")
        return self.accesses.index(access) * self.registers + register

    def default_access(self, size: int, write: bool, signed: bool = False) -> Access:
        """Return the plain load or store of this size in bytes. Raises ValueError when there is none."""
        widest = [a for a in self.accesses if (a.size, a.write, a.signed, a.syndrome) == (size, write, signed, True)]
        if not widest:
            raise ValueError(f"{self.name} has no {'signed ' if signed else ''}access of {size} bytes")
        return widest[0]

    def exception(
        self, status: Status, syndrome: int, address: int, pc: int, registers: tuple[int, ...]
    ) -> GuestException:
        """Decode the status and registers that the payload's vectors recorded."""
        kind = status.name.lower().replace("_", " ")
        if self.name == "A64":
            ec = syndrome >> 26 & 0x3F
            kind = {0x25: "data abort", 0x21: "prefetch abort", 0x00: "undefined"}.get(ec, kind)
            external = ec in (0x21, 0x25) and syndrome & 0x3F in _EXTERNAL_A64
        else:
            # Long-descriptor status (bit 9 set) is FS[5:0]; short-descriptor status is FS[10],FS[3:0].
            long = syndrome >> 9 & 1
            code = syndrome & 0x3F if long else (syndrome >> 6 & 0x10) | (syndrome & 0xF)
            external = code in (_EXTERNAL_A64 if long else _EXTERNAL_A32_SHORT)
            external = external and status in (Status.DATA_ABORT, Status.PREFETCH_ABORT)
        return GuestException(kind, syndrome, address, pc, bool(external), registers)


_EXTERNAL_A64 = frozenset({0b010000, 0b010100, 0b010101, 0b010110, 0b010111})
_EXTERNAL_A32_SHORT = frozenset({0b01000, 0b01100, 0b01110})

A32 = Isa(
    name="A32",
    source="a32.S",
    tools="arm-linux-gnueabi-",
    accesses=_A32_ACCESSES,
    registers=9,
    load_gadget="{insn}; str r{r}, [r10, #VALUE]; bx lr; nop",
    store_gadget="ldr r{r}, [r10, #VALUE]; {insn}; bx lr; nop",
    ret=bytes.fromhex("1eff2fe1"),  # bx lr
    pointer_bits=32,
    general_registers=13,
)
A64 = Isa(
    name="A64",
    source="a64.S",
    tools="aarch64-linux-gnu-",
    accesses=_A64_ACCESSES,
    registers=15,
    load_gadget="{insn}; str x{r}, [x21, #VALUE]; ret; nop",
    store_gadget="ldr x{r}, [x21, #VALUE]; {insn}; ret; nop",
    ret=bytes.fromhex("c0035fd6"),  # ret
    pointer_bits=64,
    general_registers=31,
)
ISAS = {isa.name: isa for isa in (A32, A64)}
