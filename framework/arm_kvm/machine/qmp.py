"""The QMP connection of one machine, with a log of its own."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from qemu.qmp import QMPError
from qemu.qmp.legacy import QEMUMonitorProtocol

#: What QMP raises when QEMU rejects a command or is gone.
FAILURES = (QMPError, OSError, EOFError)


class _Log(logging.FileHandler):
    """Ignores errors of writing; a full disk is reported when the logs are collected."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class Qmp:
    """A connected QMP session, logged to ``log`` through loggers named after the machine.

    Threads take turns: the protocol's event loop runs one command at a time.
    """

    def __init__(self, sock: socket.socket, name: str, log: Path, timeout: float) -> None:
        """Connect. Raises one of :data:`FAILURES` when QEMU sends no greeting within ``timeout`` seconds."""
        self._handler = _Log(log, mode="w")
        self._loggers = [logging.getLogger(f"qemu.qmp.{part}.{name}") for part in ("protocol", "qmp_client")]
        for logger in self._loggers:
            logger.setLevel(logging.DEBUG)
            logger.propagate = False
            logger.addFilter(self._divert)  # not addHandler: pytest adds its own to loggers that do not propagate
        # The protocol uses its thread's event loop. With a loop for each connection, one thread can start a machine
        # while another ends one.
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

    def __call__(self, command: str, **arguments: object) -> Any:
        """Execute a command and return its result, decoded JSON. Raises one of :data:`FAILURES`."""
        with self._turn:
            if self._closed:  # while this thread waited for its turn
                raise EOFError("the connection is closed")
            return self._protocol.cmd(command, **arguments)

    def give(self, fd: int, name: str) -> None:
        """Pass QEMU a duplicate of the descriptor under this name. Raises one of :data:`FAILURES`."""
        with self._turn:
            self._protocol.send_fd_scm(fd)
            self("getfd", fdname=name)

    def drain(self) -> None:
        """Read the pending events and discard them. Raises one of :data:`FAILURES`.

        Otherwise the next command reads them all, which took 20 s after some 95,000 stops.
        """
        with self._turn:
            self("query-status")
            self._protocol.clear_events()

    def close(self) -> None:
        """Close the connection and the log."""
        with self._turn:
            # QEMU is usually gone by now, and a connection that Ctrl-C interrupted may not close cleanly.
            self._loop.set_exception_handler(lambda loop, context: None)
            with suppress(*FAILURES, RuntimeError):
                self._protocol.close()
            self._loop.close()
            self._closed = True
        self._handler.close()

    def _divert(self, record: logging.LogRecord) -> bool:
        """Write the record to the log file, and keep it from all handlers."""
        self._handler.handle(record)
        return False
