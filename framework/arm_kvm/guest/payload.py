"""Assemble the payload. The layout of mailbox and orders, and the gadgets, are generated here for driver and payload.

IPAs: CODE holds the payload and its vectors, MAILBOX one page for each vCPU. At DOORBELL there is no memslot, so that a
store there exits with KVM_EXIT_MMIO: all orders are done.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from arm_kvm.guest.isa import ISAS, Isa, Status
from arm_kvm.support.binutils import binutils, equates
from arm_kvm.support.errors import SetupError

CODE = 0x0800_0000
CODE_SIZE = 0x1_0000
MAILBOX = 0x0900_0000
MAILBOX_SIZE = 0x1000
DOORBELL = 0x0A00_0000

# Mailbox page: a header, then orders of eight u64.
PENDING, DONE, SPINNING, STOP, ORDERS = 0, 4, 8, 12, 64
ORDER_SIZE = 64
REGISTERS = MAILBOX_SIZE - 256  #: the general registers at the last exception: 31 u64 (A64), 13 u32 (A32)
MAX_ORDERS = (REGISTERS - ORDERS) // ORDER_SIZE
#: Offsets in an order. An exception overwrites STRIDE with its pc.
FIELDS = {"OP": 0, "ADDR": 8, "VALUE": 16, "COUNT": 24, "STRIDE": 32, "STATUS": 40, "SYNDROME": 48, "FAR": 56}
#: Operation codes: positions in the payload's branch table.
_OPS = "nop access execute hypercall spin fill check mmu flush hammer interrupt"
OPS = {name: code for code, name in enumerate(_OPS.split())}


def _layout() -> str:
    names = {
        "PENDING": PENDING,
        "DONE": DONE,
        "SPINNING": SPINNING,
        "STOP": STOP,
        "ORDERS": ORDERS,
        "REGISTERS": REGISTERS,
    }
    names |= FIELDS | {"PC": FIELDS["STRIDE"], "DOORBELL": DOORBELL}
    names |= {f"STATUS_{status.name}": status.value for status in Status}
    return equates(names)


def _gadgets(isa: Isa) -> str:
    lines = []
    for access in isa.accesses:
        shape = isa.store_gadget if access.write else isa.load_gadget
        for r in range(isa.registers):
            insn = access.template.format(r=r, r2=r + 1 if r + 1 < isa.registers else 0)
            lines.append(".balign 16; " + shape.format(insn=insn, r=r))
    return "\n".join(lines).replace("; ", "\n    ") + "\n"


@cache
def assemble(name: str) -> bytes:
    """Assemble the payload for ISA ``name``, linked at CODE with its entry at the first byte. Raises SetupError."""
    isa = ISAS[name]
    source = Path(__file__).with_name(isa.source)
    with binutils(isa.tools, f"{isa.name} guest payload") as tools:
        (tools.folder / "layout.inc").write_text(_layout())
        (tools.folder / "gadgets.inc").write_text(_gadgets(isa))
        tools.run("as", "-o", "payload.o", str(source))
        tools.run("ld", f"-Ttext={CODE:#x}", "-o", "payload.elf", "payload.o")
        tools.run("objcopy", "-O", "binary", "-j", ".text", "payload.elf", "payload.bin")
        image = (tools.folder / "payload.bin").read_bytes()
    if len(image) > CODE_SIZE:
        raise SetupError(f"the {name} payload has {len(image)} bytes, more than the {CODE_SIZE} bytes reserved for it")
    return image
