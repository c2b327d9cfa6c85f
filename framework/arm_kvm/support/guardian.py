"""Guardians: one line of shell that runs when this process ends, however it ends.

A guardian is a small process that holds the read end of a pipe; the write end closes when the lab is
gone, by a clean exit, an exception or ``kill -9`` alike.
"""

from __future__ import annotations

import os
import subprocess
from typing import Any

#: A guarded child waits here until its guardian exists; if the lab dies first, it ends.
_WAIT = 'read -r go && exec "$@" </dev/null'


class Guardian:
    """Runs ``script`` with ``arguments`` ($1, $2, ...) once the lab has ended or :meth:`fire` is called."""

    def __init__(self, script: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            ["sh", "-c", f'read -r order; [ -n "$order" ] || {{ {script}; }}', "arm-kvm-guardian", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is not for it
        )

    def fire(self) -> None:
        """Run the script now and wait for it."""
        self._end(b"")

    def cancel(self) -> None:
        """Send the guardian home."""
        self._end(b"home\n")

    def _end(self, order: bytes) -> None:
        if self._process.poll() is None:
            self._process.communicate(order, timeout=30)


def spawn(argv: list[str], *left: str, **how: Any) -> tuple[subprocess.Popen, Guardian]:
    """Start ``argv`` in a process group of its own that ends with the lab; then the folders ``left`` are removed."""
    process = subprocess.Popen(
        ["sh", "-c", _WAIT, "arm-kvm", *argv], stdin=subprocess.PIPE, start_new_session=True, **how
    )
    guardian = Guardian('kill -s KILL -- "-$1"; shift; rm -rf -- "$@"', str(process.pid), *left)
    os.write(process.stdin.fileno(), b"go\n")
    process.stdin.close()
    return process, guardian
