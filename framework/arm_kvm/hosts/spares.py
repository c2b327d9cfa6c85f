"""Make hosts before the tests that need them, and end hosts after use, in a background thread."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from arm_kvm.host.host import Host
from arm_kvm.support.errors import LabError, SetupError

SPARES = 16  #: hosts at most; each uses some 40 MB of its own, and almost no CPU while it is idle
LEAST = 1 << 30  #: bytes of memory that must be available on this machine for a spare to be made
#: Interpreter switch interval in seconds: the test that waits for a machine's answer must not wait for this thread.
_TURN = 0.0005


class Spares:
    """Hosts by the name of the owner that will need them. They are made one after another."""

    def __init__(self, least: int = LEAST) -> None:
        self._least = least
        self._maker = ThreadPoolExecutor(1, "spares")
        self._coming: dict[str, Future[Host]] = {}

    def expect(self, makes: dict[str, Callable[[], Host]]) -> None:
        """Make these hosts in this order, and end the spares of all other owners."""
        for name in self._coming.keys() - makes.keys():
            if not (coming := self._coming.pop(name)).cancel():
                self._maker.submit(_end, coming)
        for name, make in makes.items():
            if name not in self._coming:
                sys.setswitchinterval(_TURN)
                self._coming[name] = self._maker.submit(self._made, make)

    def _made(self, make: Callable[[], Host]) -> Host:
        if _memory_left() < self._least:
            raise SetupError("this machine is short of memory")
        return make()

    def take(self, name: str) -> Host | None:
        """The host made for this owner, waited for if need be; None if there is none, it died, or making it failed."""
        if (coming := self._coming.pop(name, None)) is None:
            return None
        with suppress(LabError):  # the caller then starts a host itself, and fails with the reason
            if (host := coming.result()).machine.alive:
                return host
            self.end(host)
        return None

    def end(self, host: Host) -> None:
        """End a host that is no longer needed, in the background."""
        self._maker.submit(host.shutdown)

    def close(self) -> None:
        """End the spares that were not taken, and wait until all hosts have ended."""
        self.expect({})
        self._maker.shutdown()


def _memory_left() -> int:
    """Bytes of memory available on this machine (MemAvailable, Documentation/filesystems/proc.rst).

    A container's own limit is not taken into account.
    """
    found = re.findall(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    return int(found[0]) << 10


def _end(coming: Future[Host]) -> None:
    with suppress(Exception):  # its owner no longer needs it
        coming.result().shutdown()
