"""Numbers of the system calls that are made by number, by the agent itself or for a test case.

Sources: arch/arm/tools/syscall.tbl (5.4, 6.12) for 32-bit Arm, include/uapi/asm-generic/unistd.h for arm64.
"""

from __future__ import annotations

#: Name -> (32-bit Arm, arm64).
NUMBERS = {
    "madvise": (220, 233),
    "mlock2": (390, 284),
    "pipe2": (359, 59),
    "prctl": (172, 167),
    "process_madvise": (440, 440),
    "read": (3, 63),
    "userfaultfd": (388, 282),
    "vmsplice": (343, 75),
}


def number(name: str, bits: int) -> int:
    """Return the system call's number on a host of 32 or 64 ``bits``. Raises KeyError, which lists the names."""
    if name not in NUMBERS:
        raise KeyError(f"no number is known of {name}(2): {', '.join(NUMBERS)}")
    return NUMBERS[name][bits == 64]
