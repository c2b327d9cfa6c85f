"""Where things are in the board's RAM. Physical addresses, bytes; the assembly gets the same numbers."""

from __future__ import annotations

PROGRAM = 0x4100_0000
CONTROL = 0x4110_0000
PROBES = CONTROL + 0x1000
RESULTS = CONTROL + 0x8_0000
RECORD = 64  #: bytes of a probe, and of a result

#: The page that is mapped into every guest: EL1 vectors, access gadgets, the table of the upper VA range.
HARNESS = 0x4120_0000
GADGETS = 0x800  #: offset in the harness
GADGET_SIZE = 8
UPPER_TABLE = 0xF00  #: offset of the upper range's table, which has one block:
UPPER_BLOCK = 2 << 20

#: Translation tables are made here.
ARENA = 0x4200_0000
ARENA_SIZE = 0x0100_0000

#: What guests read, write and execute: 16-byte chunks, two instructions and eight bytes that hold the chunk's address.
FRAMES = 0x4400_0000
FRAMES_SIZE = 0x0040_0000

#: The control block: a request and an answer (sequence numbers), the number of probes, the registers to load; what
#: the CPU says of itself, and the exception level (mode) that the program was started at.
_CONTROL = ("REQUEST", "ANSWER", "COUNT", "HCR", "VTCR", "VTTBR", "SCTLR", "TCR", "TTBR0", "TTBR1", "MAIR", "VBAR")
_IDENTITY = ("MMFR0", "MMFR1", "MMFR2", "LEVEL")
CONTROL_FIELDS = {name: 8 * i for i, name in enumerate((*_CONTROL, *_IDENTITY))}
PROBE_FIELDS = {name: 8 * i for i, name in enumerate(("OP", "ADDRESS", "VALUE", "PC", "PSTATE"))}
_RESULT = ("R_KIND", "R_VALUE", "R_ESR", "R_FAR", "R_HPFAR", "R_ELR", "R_ESR1", "R_FAR1")
RESULT_FIELDS = {name: 8 * i for i, name in enumerate(_RESULT)}
#: OP: the four address translation instructions, then anything a guest executes.
OPS = ("AT_R1", "AT_W1", "AT_R0", "AT_W0", "RUN")
#: R_KIND: how control came back to the program.
PAR, TRAPPED, ABORTED = 0, 1, 2
#: Immediate of the HVC behind a gadget; below it are the numbers of the guest's own exception vectors.
HVC_DONE = 0x100


def equates() -> dict[str, int]:
    """All names the assembly uses."""
    own = {"CONTROL": CONTROL, "PROBES": PROBES, "RESULTS": RESULTS, "RECORD": RECORD, "GADGETS": GADGETS}
    kinds = {"PAR": PAR, "TRAPPED": TRAPPED, "ABORTED": ABORTED, "HVC_DONE": HVC_DONE}
    return own | kinds | CONTROL_FIELDS | PROBE_FIELDS | RESULT_FIELDS
