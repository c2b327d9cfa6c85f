"""Recognises a function of any kernel by a checksum of its instructions, relative addresses left out.

A word of the catalogue is replaced only in a function whose checksum the catalogue names. Point releases move
functions, which changes the offsets of branches and the addresses of data, so the checksum does not cover those.

Encodings: ARM DDI 0487, C4.1 (branches, PC-relative addressing, add and load with an unsigned immediate);
ARM DDI 0406C.d, A5.5 (branch), A8.8.102 and A8.8.106 (MOV immediate, MOVT).
"""

from __future__ import annotations

from hashlib import blake2s

import numpy as np

#: PC-relative instructions: (mask, value, the bits that do not depend on the instruction's address).
_RELATIVE = {
    "armv8": (
        (0x7C00_0000, 0x1400_0000, 0xFC00_0000),  # B, BL
        (0xFF00_0010, 0x5400_0000, 0xFF00_001F),  # B.cond
        (0x7E00_0000, 0x3400_0000, 0xFF00_001F),  # CBZ, CBNZ
        (0x7E00_0000, 0x3600_0000, 0xFFF8_001F),  # TBZ, TBNZ
        (0x1F00_0000, 0x1000_0000, 0x9F00_001F),  # ADR, ADRP
    ),
    "armv7": (
        (0x0E00_0000, 0x0A00_0000, 0xFF00_0000),  # B, BL, BLX
        (0x0FB0_0000, 0x0300_0000, 0xFFF0_F000),  # MOVW, MOVT: half of an address
    ),
}
_ADRP, _ADRP_MASK = 0x9000_0000, 0x9F00_0000
#: If based on the register of an ADRP, these carry the low 12 bits of the address.
_LOW_12 = ((0x7F80_0000, 0x1100_0000), (0x3B00_0000, 0x3900_0000))  # ADD; LDR and STR, unsigned immediate
_IMM12 = 0xFFF << 10


def without_offset(arch: str, word: int) -> int:
    """Clear the PC-relative offset of an instruction, if it has one. ``arch`` is armv7 or armv8."""
    return word & kept(arch, word)


def kept(arch: str, word: int) -> int:
    """Mask of the instruction's bits that do not depend on its address."""
    for mask, value, bits in _RELATIVE[arch]:
        if word & mask == value:
            return bits
    return 0xFFFF_FFFF


def fingerprint(arch: str, text: bytes) -> str:
    """Compute the checksum of a function: eight hexadecimal digits. ``text`` is its instructions, little-endian."""
    words: list[int] = []
    pages: set[int] = set()  # registers that an ADRP has written
    for word in np.frombuffer(text, dtype="<u4").tolist():
        if arch == "armv8":
            if word >> 5 & 31 in pages and any(word & mask == value for mask, value in _LOW_12):
                word &= ~_IMM12
            if word & _ADRP_MASK == _ADRP:
                pages.add(word & 31)
        words.append(without_offset(arch, word))
    return blake2s(np.array(words, dtype="<u4").tobytes(), digest_size=4).hexdigest()
