"""Why KVM_RUN returned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Signal:
    """A signal's siginfo. ``lsb`` is si_addr_lsb, the lowest valid bit of ``address``: 12 for a 4 KiB page."""

    number: int
    code: int
    address: int
    lsb: int


@dataclass(frozen=True)
class Exit:
    """Why KVM_RUN returned. ``kind`` is the KVM exit's name, ``error`` when the ioctl itself failed with ``errno``.

    ``data`` holds the first two u64 of the exit's union in struct kvm_run. ``signal`` is set for the kind
    ``bus-error``, a run that SIGBUS ended.
    """

    kind: str
    errno: int = 0
    data: tuple[int, ...] = ()
    signal: Signal | None = None


@dataclass(frozen=True)
class Mmio(Exit):
    """KVM_EXIT_MMIO: an access of ``size`` bytes at ``ipa``. ``value`` is what the guest wrote, 0 for a read."""

    kind: str = "mmio"
    ipa: int = 0
    size: int = 0
    write: bool = False
    value: int = 0


def decode_exit(raw: dict[str, Any]) -> Exit:
    """Decode the agent's description of an exit."""
    if raw["exit"] == "mmio":
        value = raw["value"] if raw["write"] else 0  # for a read, KVM leaves the data of an earlier exit
        return Mmio(ipa=raw["ipa"], size=raw["size"], write=raw["write"], value=value)
    signal = Signal(*raw["signal"]) if "signal" in raw else None
    return Exit(raw["exit"], raw.get("errno", 0), tuple(raw.get("data", ())), signal)
