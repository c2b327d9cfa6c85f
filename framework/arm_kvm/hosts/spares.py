"""Hosts that are made before anybody asks for them, and ended when nobody waits, on a CPU that would be idle."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from arm_kvm.host.host import Host
from arm_kvm.support.errors import LabError, SetupError

SPARES = 16  #: hosts at most; each takes some 40 MB of its own, and next to no CPU while it waits
LEAST = 1 << 30  #: bytes of memory that must be left on this machine; with less, none is made ahead
#: Seconds after which a thread that computes lets another: whoever waits for a machine's answer should have it soon.
_TURN = 0.0005


class Spares:
    """Hosts by the name of whoever will want one. They are made one after another."""

    def __init__(self, least: int = LEAST) -> None:
        self._least = least
        self._maker = ThreadPoolExecutor(1, "spares")
        self._coming: dict[str, Future[Host]] = {}

    def expect(self, makes: dict[str, Callable[[], Host]]) -> None:
        """Have these hosts made, the first of them first. Those made for others end."""
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
        """The host made for this one, when it is there; None if there is none, it is dead, or making it failed."""
        if (coming := self._coming.pop(name, None)) is None:
            return None
        with suppress(LabError):  # whoever makes another meets the reason
            if (host := coming.result()).machine.alive:
                return host
            self.end(host)
        return None

    def end(self, host: Host) -> None:
        """End a host that nobody needs any more."""
        self._maker.submit(host.shutdown)

    def close(self) -> None:
        """End all that nobody took, and wait for all that end."""
        self.expect({})
        self._maker.shutdown()


def _memory_left() -> int:
    """Bytes that programs on this machine can still have (MemAvailable: Documentation/filesystems/proc.rst).

    What a container's own limit leaves is not looked at.
    """
    found = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    return int(found[1]) << 10


def _end(coming: Future[Host]) -> None:
    with suppress(Exception):  # it was for nobody
        coming.result().shutdown()
