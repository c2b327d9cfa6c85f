"""The agent's request server: one request at a time, an answer for every one."""

from __future__ import annotations

import resource
import signal
import sys

from . import operations, placement, poison, streams, wire

#: A VM with one vCPU is two open files, and a test may want a thousand.
_FILES = 65536


def main(name: str = "") -> None:
    """Serve the lab on the virtio serial port of this name, or on standard input and output."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES, _FILES))
    for interruption in (signal.SIGUSR1, signal.SIGALRM):  # of KVM_RUN
        signal.signal(interruption, lambda *_: None)
    poison.keep_out()
    placement.stay_home()
    stream = streams.Port(name) if name else streams.Pipes()
    agent = operations.Operations()
    while True:
        try:
            request, blob = wire.decode(stream.read)
        except EOFError:
            return
        stream.write(wire.encode(*operations.carry_out(agent, request, blob)))


if __name__ == "__main__":
    main(*sys.argv[1:])
