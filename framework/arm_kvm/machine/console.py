"""The serial console: logs every line and recognises those that mean the host is lost.

The lab only reads it, and talks to the host over ssh and the agent's port; a person may type here (``arm-kvm boot``).
"""

from __future__ import annotations

import re
import socket
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pexpect
from pexpect.fdpexpect import fdspawn

from arm_kvm.machine.pump import Pump
from arm_kvm.support.errors import HostError, HostLockup, HostOops, HostPanic, LabError
from arm_kvm.support.limits import lab_error

#: Console line -> error and meaning, in the order they are tried. Linux 3.9 to 6.12 print them from
#: kernel/panic.c, arch/arm*/kernel/traps.c, kernel/watchdog.c, kernel/hung_task.c, kernel/rcu/.
FATAL: tuple[tuple[re.Pattern[str], type[HostError], str], ...] = (
    (re.compile(r"Kernel panic - not syncing"), HostPanic, "the host's kernel panicked"),
    (re.compile(r"soft lockup - CPU|hard LOCKUP"), HostLockup, "a CPU of the host is locked up"),
    (re.compile(r"INFO: task .* blocked for more than"), HostLockup, "a task of the host hangs"),
    (
        re.compile(r"rcu.*(detected (expedited )?stalls|self-detected stall)"),
        HostLockup,
        "a CPU of the host stalls RCU",
    ),
    (re.compile(r"Internal error: "), HostOops, "the host's kernel oopsed"),
    (re.compile(r"Unable to handle kernel "), HostOops, "the host's kernel oopsed"),
    (re.compile(r"kernel BUG at "), HostOops, "the host's kernel hit a BUG"),
    (re.compile(r"HYP panic"), HostPanic, "the hypervisor panicked"),
)
_TAIL_LINES = 40
#: Seconds to read on after the first fatal line, for the register dump and backtrace.
_AFTERMATH = 0.3


class Console:
    """The host's console. Its output goes to ``log`` as it arrives; errors show :meth:`tail`."""

    def __init__(self, sock: socket.socket, log: Path) -> None:
        self._pump = Pump(sock, log)
        self._sock = sock = self._pump.end
        self._spawn = fdspawn(sock, encoding="utf-8", codec_errors="replace", timeout=0)
        self._lines: deque[str] = deque(maxlen=_TAIL_LINES)
        self._polled: deque[str] = deque(maxlen=_TAIL_LINES)  # read by poll(), not yet yielded by lines()
        self.log = log
        self.lines_seen = 0
        self.ended = False
        self.failure: LabError | None = (
            None  #: why the machine is unusable: the host crashed, or the log's disk is full
        )

    def _read_line(self, timeout: float) -> str | None:
        """Read and classify one line; None when none arrived in time, or the console has ended."""
        try:
            self._spawn.expect_exact("\n", timeout=max(timeout, 0))
        except pexpect.TIMEOUT:
            return None
        except (pexpect.EOF, OSError):
            self.ended = True
            return None
        line = (self._spawn.before or "").rstrip("\r")
        self._lines.append(line)
        self.lines_seen += 1
        self._classify(line)
        return line

    def _next_line(self, timeout: float) -> str | None:
        """Like :meth:`_read_line`; after the first fatal line, also read what the kernel prints next."""
        if self._pump.refusal is not None and self.failure is None:
            self.failure = lab_error(self._pump.refusal, self.log)
        if self.ended or self.failure is not None:
            return None
        line = self._read_line(timeout)
        if self.failure is not None:
            deadline = time.monotonic() + _AFTERMATH
            while (left := deadline - time.monotonic()) > 0 and not self.ended:
                self._read_line(left)
        return line

    def _classify(self, line: str) -> None:
        for pattern, error, meaning in FATAL:
            if pattern.search(line):
                worse = error is HostPanic and not isinstance(self.failure, HostPanic)
                if self.failure is None or worse:
                    self.failure = error(f"{meaning}: {line.strip()}")
                return

    def lines(self, timeout: float) -> Iterator[str]:
        """Yield lines as they arrive, until none came for ``timeout`` seconds or the host is lost.

        Lines that :meth:`poll` has read come first: a boot polls the machine while it waits for a line.
        """
        while self._polled:
            yield self._polled.popleft()
        while (line := self._next_line(timeout)) is not None:
            yield line

    def poll(self) -> None:
        """Read what has arrived, without waiting. Sets :attr:`failure`."""
        while (line := self._next_line(0)) is not None:
            self._polled.append(line)

    def take_over(self) -> socket.socket:
        """Return the console's socket for a person to use; the lab must not read from it afterwards."""
        return self._sock

    def tail(self) -> str:
        """The last lines, and what has arrived of the next."""
        rest = self._spawn.buffer if isinstance(self._spawn.buffer, str) else ""
        return "\n".join([*self._lines, *([rest] if rest.strip() else [])])

    def close(self) -> None:
        self._sock.close()
