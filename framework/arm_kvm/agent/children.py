"""Forked children of the VMM: until they exit, they share its memory copy on write and hold its file descriptors."""

from __future__ import annotations

import contextlib
import os

from . import libc, placement

_END = b"."  # not the pipe's end of file: children forked later hold the pipe open, too


class Child:
    """A child that reads and writes its memory on the parent's orders until it is ended."""

    def __init__(self) -> None:
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._orders)
            self._serve(orders, answers)
        os.close(orders)
        os.close(answers)

    @staticmethod
    def _serve(orders: int, answers: int) -> None:
        """Carry out orders until :data:`_END`, and exit. The child has this thread only: the others are not forked."""
        try:
            os.sched_setaffinity(0, placement.CPUS)
            while (order := os.read(orders, 64)) != _END:
                verb, hva, data = order.split(b" ", 2)
                if verb == b"write":
                    libc.write_memory(int(hva), data)
                    os.write(answers, b".")
                else:
                    os.write(answers, libc.read_memory(int(hva), int(data)))
        finally:
            os._exit(0)

    def write(self, hva: int, data: bytes) -> None:
        os.write(self._orders, b"write %d %s" % (hva, data))
        self._answer(1)

    def read(self, hva: int, size: int) -> bytes:
        os.write(self._orders, b"read %d %d" % (hva, size))
        return self._answer(size)

    def _answer(self, size: int) -> bytes:
        """Read ``size`` bytes from the child. OSError (ECHILD) when it has exited."""
        answer = b""
        while len(answer) < size:
            if not (part := os.read(self._answers, size - len(answer))):
                raise OSError(10, "No child processes", "child")
            answer += part
        return answer

    def end(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it may have been killed
            os.write(self._orders, _END)
        os.close(self._orders)
        os.close(self._answers)
        os.waitpid(self.pid, 0)
