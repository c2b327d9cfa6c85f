"""Why KVM_RUN returned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Signal:
    """A signal's siginfo. ``lsb``: the lowest bit of ``address`` that counts (si_addr_lsb), of a failed page 12."""

    number: int
    code: int
    address: int
    lsb: int


@dataclass(frozen=True)
class Exit:
    """Why KVM_RUN returned. ``kind`` is the KVM exit's name, ``error`` when the ioctl itself failed with ``errno``.

    ``data`` are the first two u64 of the exit's part of struct kvm_run. ``signal`` is what ended a run that a signal
    ended (kind ``bus-error``).
    """

    kind: str
    errno: int = 0
    data: tuple[int, ...] = ()
    signal: Signal | None = None


@dataclass(frozen=True)
class Mmio(Exit):
    """KVM_EXIT_MMIO: ``size`` bytes at guest-physical ``ipa``; ``value`` is what was written (0 for a read)."""

    kind: str = "mmio"
    ipa: int = 0
    size: int = 0
    write: bool = False
    value: int = 0


def decode_exit(raw: dict[str, Any]) -> Exit:
    """The exit that the agent describes."""
    if raw["exit"] == "mmio":
        value = raw["value"] if raw["write"] else 0  # of a read, KVM leaves what was there before
        return Mmio(ipa=raw["ipa"], size=raw["size"], write=raw["write"], value=value)
    signal = Signal(*raw["signal"]) if "signal" in raw else None
    return Exit(raw["exit"], raw.get("errno", 0), tuple(raw.get("data", ())), signal)
