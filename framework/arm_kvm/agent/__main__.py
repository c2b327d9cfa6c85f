"""The agent's request server: answers every request, one at a time."""

from __future__ import annotations

import resource
import signal
import sys

from . import operations, placement, poison, replies, streams, wire

#: A VM with one vCPU takes two open files, and a test may create a thousand VMs.
_FILES = 65536


def main(name: str = "") -> None:
    """Serve the lab on the virtio serial port called ``name``, or on standard input and output."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES, _FILES))
    for interruption in (signal.SIGUSR1, signal.SIGALRM):  # of KVM_RUN
        signal.signal(interruption, lambda *_: None)
    poison.block()
    placement.move_home()
    stream = streams.Port(name) if name else streams.Pipes()
    agent = operations.Operations()
    while True:
        try:
            request, blob = wire.decode(stream.read)
        except EOFError:
            return
        stream.write(wire.encode(*replies.carry_out(agent, request, blob)))


if __name__ == "__main__":
    main(*sys.argv[1:])
