"""ftrace events of one test, in an instance of their own, and the kernel log as it grows."""

from __future__ import annotations

import os

_ROOTS = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")


class Tracer:
    """One ftrace instance; nothing is enabled until :meth:`start`.

    Events stay enabled, and unrecorded, until others are wanted: switching them patches the kernel's code.
    """

    def __init__(self) -> None:
        """Make the instance if there is none yet. That takes a while, and so it is done before anybody waits for it."""
        self._events: list[str] | None = None
        homes = (f"{root}/instances" for root in _ROOTS)
        home = next(filter(os.path.isdir, homes), None)
        self._dir = f"{home}/arm-kvm" if home else ""
        if home and not os.path.isdir(self._dir):
            os.mkdir(self._dir)
            self._write("tracing_on", "0")
            self._write("buffer_size_kb", "4096")

    def _write(self, name: str, text: str) -> None:
        with open(f"{self._dir}/{name}", "w") as f:
            f.write(text)

    def start(self, events: list[str]) -> None:
        """Record ``events`` (names like ``kvm:kvm_guest_fault``) from now on."""
        if not self._dir:
            raise OSError(2, "No such file or directory", "tracefs")
        if self._events is None:
            self.stop()  # another agent may have left some
        if events != self._events:
            self._write("set_event", "\n".join(events))
            self._events = events
        self._write("tracing_on", "1")

    def stop(self) -> bytes:
        """Stop recording; the text of the trace.

        What is read is gone from the buffer. (To read ``trace``, or to empty it, waits for a grace period of RCU.)
        """
        self._write("tracing_on", "0")
        parts = []
        with open(f"{self._dir}/trace_pipe", "rb", buffering=0, opener=_without_waiting) as pipe:
            while part := pipe.read(1 << 16):  # None: there is no more
                parts.append(part)
        return b"".join(parts)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


class KernelLog:
    """Records of /dev/kmsg since this object was made or last read."""

    def __init__(self) -> None:
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self._fd, 0, os.SEEK_END)

    def read(self) -> bytes:
        records = []
        while True:
            try:
                records.append(os.read(self._fd, 8192))
            except BlockingIOError:
                return b"".join(records)
            except BrokenPipeError:  # the ring overtook us: go on with the oldest that is left
                records.append(b"4,0,0,-;(arm-kvm: kernel log records were lost)\n")
