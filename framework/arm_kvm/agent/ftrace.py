"""The ftrace events of one test, in an ftrace instance of their own, and new records of the kernel log."""

from __future__ import annotations

import os

_ROOTS = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")


class Tracer:
    """One ftrace instance; no event is enabled until :meth:`start`.

    :meth:`stop` only turns recording off: the events stay enabled until others are requested, because enabling and
    disabling events patches the kernel's code.
    """

    def __init__(self) -> None:
        """Create the instance if it does not exist. This is slow, so it is done here, at the start of the agent."""
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
        """Start to record ``events`` (names like ``kvm:kvm_guest_fault``). OSError (ENOENT) without tracefs."""
        if not self._dir:
            raise OSError(2, "No such file or directory", "tracefs")
        if self._events is None:
            self.stop()  # discards what another agent has recorded
        if events != self._events:
            self._write("set_event", "\n".join(events))
            self._events = events
        self._write("tracing_on", "1")

    def stop(self) -> bytes:
        """Stop recording and return the text of the trace.

        Reading trace_pipe also empties the buffer. (Reading or clearing ``trace`` waits for an RCU grace period.)
        """
        self._write("tracing_on", "0")
        parts = []
        with open(f"{self._dir}/trace_pipe", "rb", buffering=0, opener=_without_waiting) as pipe:
            while part := pipe.read(1 << 16):  # None at the end
                parts.append(part)
        return b"".join(parts)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


class KernelLog:
    """The records of /dev/kmsg since the last :meth:`read`, or since this object was created."""

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
            except BrokenPipeError:  # records were overwritten; the next read returns the oldest one left
                records.append(b"4,0,0,-;(arm-kvm: kernel log records were lost)\n")
