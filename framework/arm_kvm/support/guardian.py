"""Guardians: a line of shell that runs when this process ends, however it ends.

A guardian is a small process that reads from a pipe whose write end the lab holds. The kernel closes it when the lab
ends, by a clean exit, an exception or ``kill -9`` alike.
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
            start_new_session=True,  # Ctrl-C must not reach it
        )

    def fire(self) -> None:
        """Run the script now and wait for it."""
        self._end(b"")

    def cancel(self) -> None:
        """End the guardian without running the script."""
        self._end(b"home\n")

    def _end(self, order: bytes) -> None:
        if self._process.poll() is None:
            self._process.communicate(order, timeout=30)


def spawn(argv: list[str], *folders: str, **options: Any) -> tuple[subprocess.Popen[bytes], Guardian]:
    """Start ``argv`` in a process group of its own, killed when the lab ends; ``folders`` are removed then.

    ``options`` are keyword arguments of :class:`subprocess.Popen`; its pipes are binary.
    """
    process = subprocess.Popen(
        ["sh", "-c", _WAIT, "arm-kvm", *argv], stdin=subprocess.PIPE, start_new_session=True, **options
    )
    guardian = Guardian('kill -s KILL -- "-$1"; shift; rm -rf -- "$@"', str(process.pid), *folders)
    assert process.stdin is not None, "a pipe, see above"
    os.write(process.stdin.fileno(), b"go\n")
    process.stdin.close()
    return process, guardian
