"""Drain QEMU's console at once, whether or not the lab is reading it.

The board's serial port sends single bytes, of which a socket buffers some 280. Then QEMU blocks with its lock held,
which stops the whole board (seen when the kernel printed an OOM report while the lab waited for ssh).
"""

from __future__ import annotations

import select
import socket
import threading
from contextlib import suppress
from pathlib import Path

_CHUNK = 1 << 16
_FAREWELL = 1.0  #: seconds for the reader to take what is left when QEMU has closed the console


class Pump(threading.Thread):
    """Copies both ways between ``sock`` and :attr:`end`; the latter may be read at any later time.

    Console output is written to ``log`` at once, so that it survives a kill of this process.
    """

    def __init__(self, sock: socket.socket, log: Path) -> None:
        super().__init__(name="console", daemon=True)
        self._sock = sock
        self._log = log.open("wb", buffering=0)
        self.refusal: OSError | None = None  #: why the log could not be written
        self._inner, self.end = socket.socketpair()
        self._inner.setblocking(False)
        self.start()

    def run(self) -> None:
        with self._sock, self._inner, self._log, suppress(OSError):
            waiting = bytearray()
            while self._turn(waiting):
                pass
            self._inner.settimeout(_FAREWELL)
            self._inner.sendall(waiting)

    def _turn(self, waiting: bytearray) -> bool:
        """Copy what can be copied now; False when either side has closed."""
        readable, writable, _ = select.select([self._sock, self._inner], [self._inner] if waiting else [], [])
        if self._sock in readable:
            if not (data := self._sock.recv(_CHUNK)):
                return False
            waiting += data
            self._keep(data)
        if self._inner in readable:
            if not (data := self._inner.recv(_CHUNK)):
                return False
            self._sock.sendall(data)
        if writable:
            del waiting[: self._inner.send(waiting)]
        return True

    def _keep(self, data: bytes) -> None:
        try:
            self._log.write(data)
        except OSError as e:
            self.refusal = e
