"""Forked children of the VMM: they share its memory copy on write, and hold its file descriptors, until they exit."""

from __future__ import annotations

import contextlib
import os

from . import libc, placement

_END = b"."  # not the end of the pipe: younger children hold it, too


class Child:
    """A child that waits, writes to its memory or reads it when it is told to, and exits."""

    def __init__(self) -> None:
        told, self._tell = os.pipe()
        self._answers, answer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._tell)
            self._serve(told, answer)
        os.close(told)
        os.close(answer)

    @staticmethod
    def _serve(told: int, answer: int) -> None:
        """Until the parent lets go. Nothing here needs another thread: there is none any more."""
        try:
            os.sched_setaffinity(0, placement.CPUS)
            while (order := os.read(told, 64)) != _END:
                verb, hva, data = order.split(b" ", 2)
                if verb == b"write":
                    libc.write_memory(int(hva), data)
                    os.write(answer, b".")
                else:
                    os.write(answer, libc.read_memory(int(hva), int(data)))
        finally:
            os._exit(0)

    def write(self, hva: int, data: bytes) -> None:
        os.write(self._tell, b"write %d %s" % (hva, data))
        self._answer(1)

    def read(self, hva: int, size: int) -> bytes:
        os.write(self._tell, b"read %d %d" % (hva, size))
        return self._answer(size)

    def _answer(self, size: int) -> bytes:
        """This many bytes of the child's."""
        answer = b""
        while len(answer) < size:
            if not (part := os.read(self._answers, size - len(answer))):
                raise OSError(10, "No child processes", "child")
            answer += part
        return answer

    def end(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it may have ended by itself
            os.write(self._tell, _END)
        os.close(self._tell)
        os.close(self._answers)
        os.waitpid(self.pid, 0)
