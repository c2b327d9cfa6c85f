"""ftrace events of one test, in an instance of their own, and the kernel log as it grows."""

import os

_ROOTS = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")


class Tracer:
    """One ftrace instance; nothing is enabled until :meth:`start`.

    Events stay enabled, and unrecorded, until others are wanted: switching them patches the kernel's code.
    """

    def __init__(self):
        root = next((r for r in _ROOTS if os.path.isdir(f"{r}/instances")), None)
        if root is None:
            raise OSError(2, "No such file or directory", "tracefs")
        self._dir = f"{root}/instances/arm-kvm"
        os.makedirs(self._dir, exist_ok=True)
        self._write("tracing_on", "0")
        self._write("buffer_size_kb", "4096")
        self._events = []

    def _write(self, name, text):
        with open(f"{self._dir}/{name}", "w") as f:
            f.write(text)

    def start(self, events):
        """Drop what is in the buffer and record ``events`` (names like ``kvm:kvm_guest_fault``)."""
        self._write("tracing_on", "0")
        if events != self._events:
            self._write("set_event", "\n".join(events))
            self._events = events
        self._write("trace", "")
        self._write("tracing_on", "1")

    def stop(self):
        """Stop recording; the text of the trace."""
        self._write("tracing_on", "0")
        with open(f"{self._dir}/trace", "rb") as f:
            return f.read()


class KernelLog:
    """Records of /dev/kmsg since this object was made or last read."""

    def __init__(self):
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self._fd, 0, os.SEEK_END)

    def read(self):
        records = []
        while True:
            try:
                records.append(os.read(self._fd, 8192))
            except BlockingIOError:
                return b"".join(records)
            except BrokenPipeError:  # the ring overtook us: go on with the oldest that is left
                records.append(b"4,0,0,-;(arm-kvm: kernel log records were lost)\n")
