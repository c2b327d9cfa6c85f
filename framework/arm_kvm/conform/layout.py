"""The layout of the board's RAM, as physical addresses. The assembly gets the same numbers."""

from __future__ import annotations

PROGRAM = 0x4100_0000
CONTROL = 0x4110_0000
PROBES = CONTROL + 0x1000
RESULTS = CONTROL + 0x8_0000
RECORD = 64  #: bytes of a probe, and of a result

#: The page that is mapped into every guest, with EL1 vectors, access gadgets, and the table of the upper VA range.
HARNESS = 0x4120_0000
GADGETS = 0x800  #: offset in the harness
GADGET_SIZE = 8
UPPER_TABLE = 0xF00  #: offset of the upper range's table, which has a single block of this size:
UPPER_BLOCK = 2 << 20

#: Memory of translation tables.
ARENA = 0x4200_0000
ARENA_SIZE = 0x0100_0000

#: Memory that guests access, in 16-byte chunks of two instructions and eight bytes that hold the chunk's address.
FRAMES = 0x4400_0000
FRAMES_SIZE = 0x0040_0000

#: The control block: request and answer (sequence numbers), the number of probes, the registers to load; ID registers
#: of the CPU, and the exception level (mode) at which the program was started.
_CONTROL = ("REQUEST", "ANSWER", "COUNT", "HCR", "VTCR", "VTTBR", "SCTLR", "TCR", "TTBR0", "TTBR1", "MAIR", "VBAR")
_IDENTITY = ("MMFR0", "MMFR1", "MMFR2", "LEVEL")
CONTROL_FIELDS = {name: 8 * i for i, name in enumerate((*_CONTROL, *_IDENTITY))}
PROBE_FIELDS = {name: 8 * i for i, name in enumerate(("OP", "ADDRESS", "VALUE", "PC", "PSTATE"))}
_RESULT = ("R_KIND", "R_VALUE", "R_ESR", "R_FAR", "R_HPFAR", "R_ELR", "R_ESR1", "R_FAR1")
RESULT_FIELDS = {name: 8 * i for i, name in enumerate(_RESULT)}
#: OP: the four address translation instructions, and an access by a guest.
OPS = ("AT_R1", "AT_W1", "AT_R0", "AT_W0", "RUN")
#: R_KIND: how control returned to the program.
PAR, TRAPPED, ABORTED = 0, 1, 2
#: Immediate of the HVC after a gadget. Lower ones are the numbers of the guest's own exception vectors.
HVC_DONE = 0x100


def equates() -> dict[str, int]:
    """All constants that the assembly uses."""
    own = {"CONTROL": CONTROL, "PROBES": PROBES, "RESULTS": RESULTS, "RECORD": RECORD, "GADGETS": GADGETS}
    kinds = {"PAR": PAR, "TRAPPED": TRAPPED, "ABORTED": ABORTED, "HVC_DONE": HVC_DONE}
    return own | kinds | CONTROL_FIELDS | PROBE_FIELDS | RESULT_FIELDS
