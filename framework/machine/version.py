"""Which QEMU this machine has."""

from __future__ import annotations

import re
import subprocess
from functools import cache


@cache
def of(program: str) -> str:
    """``QEMU 7.2.22`` as the program says it, or a word on why it does not."""
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return f"{program} (not installed)"
    match = re.search(r"version (\S+)", said)
    return f"QEMU {match[1]}" if match else program
