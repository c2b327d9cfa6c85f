"""The agent's end of the connection to the lab: a virtio serial port, or standard input and output."""

from __future__ import annotations

import os
import sys


def _content(path: str) -> str:
    with open(path) as f:
        return f.read().strip()


class Pipes:
    """Standard input and output, for an agent started over ssh."""

    def read(self, size: int) -> bytes:
        data = sys.stdin.buffer.read(size)
        if len(data) < size:
            raise EOFError
        return data

    def write(self, data: bytes) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


class Port:
    """A virtio serial port, found by its name (drivers/char/virtio_console.c)."""

    def __init__(self, name: str) -> None:
        home = "/sys/class/virtio-ports"
        (found,) = [port for port in os.listdir(home) if _content(f"{home}/{port}/name") == name]
        self._fd = os.open(f"/dev/{found}", os.O_RDWR)
        self._buffer = bytearray()

    def read(self, size: int) -> bytes:
        while len(self._buffer) < size:
            data = os.read(self._fd, 1 << 16)
            if not data:
                raise EOFError
            self._buffer += data
        out = bytes(self._buffer[:size])
        del self._buffer[:size]
        return out

    def write(self, data: bytes) -> None:
        left = memoryview(data)
        while len(left):
            left = left[os.write(self._fd, left) :]
