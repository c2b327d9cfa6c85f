"""What kernels have that others lack: found out by asking a live host, once for all restored from one snapshot."""

from __future__ import annotations

from collections.abc import Callable

from arm_kvm.host.host import Host
from arm_kvm.host.origin import Once
from arm_kvm.vmm.client import op
from arm_kvm.vmm.memory import Advice


class Feature:
    """``since``: the release that brought it, for the words of a skip; whether a host has it is asked of the host."""

    def __init__(self, since: str, ask: Callable[[Host], bool]) -> None:
        self.since = since
        self.on: Once[Host, bool] = Once(ask)


def _takes(advice: Advice) -> Callable[[Host], bool]:
    return lambda host: host.agent(op.memory_takes, advice=int(advice))


#: By the name that the mark ``feature`` of a case takes.
FEATURES = {
    "MADV_COLD": Feature("5.4", _takes(Advice.COLD)),
    "MADV_PAGEOUT": Feature("5.4", _takes(Advice.PAGEOUT)),
    "MADV_COLLAPSE": Feature("6.1", _takes(Advice.COLLAPSE)),
}


def has(host: Host, name: str) -> bool:
    """Whether this host's kernel has the feature of this name."""
    return FEATURES[name].on(host)


def lacking(host: Host, name: str) -> str:
    """Which kernel lacks what, in words; "" when it does not."""
    return "" if has(host, name) else f"Linux {host.release} has no {name} (since {FEATURES[name].since})"
