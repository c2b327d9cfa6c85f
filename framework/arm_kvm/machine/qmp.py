"""QMP of one machine, and what is said on it in a file."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from contextlib import suppress
from pathlib import Path

from qemu.qmp import QMPError
from qemu.qmp.legacy import QEMUMonitorProtocol

#: What QMP raises when the machine refuses, or is gone.
FAILURES = (QMPError, OSError, EOFError)


class _Log(logging.FileHandler):
    """What cannot be written down is not: whoever collects the logs of a full disk says so."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class Qmp:
    """Connected while it exists; it keeps ``log`` of its own under the machine's name.

    Commands of several threads take turns: the protocol's event loop runs one at a time.
    """

    def __init__(self, sock: socket.socket, name: str, log: Path, timeout: float) -> None:
        """Raises one of :data:`FAILURES` when QEMU does not say hello within ``timeout`` seconds."""
        self._handler = _Log(log, mode="w")
        self._loggers = [logging.getLogger(f"qemu.qmp.{part}.{name}") for part in ("protocol", "qmp_client")]
        for logger in self._loggers:
            logger.setLevel(logging.DEBUG)
            logger.propagate = False
            logger.addFilter(self._divert)  # not addHandler: pytest adds its own to loggers that do not propagate
        # The protocol takes its thread's event loop. One of its own lets a machine be started in one thread while
        # another is ended in another.
        self._loop = asyncio.new_event_loop()
        self._turn, self._closed = threading.RLock(), False
        asyncio.set_event_loop(self._loop)
        self._protocol = QEMUMonitorProtocol(sock, nickname=name)
        self._protocol.settimeout(timeout)
        try:
            self._protocol.connect()
        except BaseException:
            self.close()
            raise

    def __call__(self, command: str, **arguments: object) -> object:
        """Execute a command and return its result. Raises one of :data:`FAILURES`."""
        with self._turn:
            if self._closed:  # while this thread waited for its turn
                raise EOFError("the connection is closed")
            return self._protocol.cmd(command, **arguments)

    def give(self, fd: int, name: str) -> None:
        """Let QEMU have a copy of a descriptor under this name. Raises one of :data:`FAILURES`."""
        with self._turn:
            self._protocol.send_fd_scm(fd)
            self("getfd", fdname=name)

    def drain(self) -> None:
        """Read the events that have come, and forget them. Raises one of :data:`FAILURES`.

        They are read with the next command otherwise, however many: after some 95,000 stops that took 20 s.
        """
        with self._turn:
            self("query-status")
            self._protocol.clear_events()

    def close(self) -> None:
        with self._turn:
            # The peer may be gone, which is what is wanted; and what Ctrl-C has interrupted may not be closed at all.
            self._loop.set_exception_handler(lambda loop, context: None)
            with suppress(*FAILURES, RuntimeError):
                self._protocol.close()
            self._loop.close()
            self._closed = True
        self._handler.close()

    def _divert(self, record: logging.LogRecord) -> bool:
        """Write the record to the file, and keep it from every handler."""
        self._handler.handle(record)
        return False
