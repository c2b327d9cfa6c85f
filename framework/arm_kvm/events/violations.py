"""The names of what can be wrong with a trace."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from arm_kvm.events.trace import Event, Trace, format_event
from arm_kvm.support.judged import Judged


class TraceRule(StrEnum):
    """A rule that was broken. The value is the name a report shows."""

    #: a valid entry became another valid one, and nothing was invalidated in between
    BREAK_BEFORE_MAKE = "break-before-make"
    #: an entry or a permission was taken away, and TLBs may still hold it when the kernel's operation is done
    NOT_INVALIDATED = "not-invalidated"
    #: the VMID of a destroyed VM went to another VM in the same generation
    VMID_REUSED = "vmid-reused"
    #: two VMs that exist have one VMID
    VMID_SHARED = "vmid-shared"
    #: two vCPUs of one VM run under different VMIDs
    VMID_SPLIT = "vmid-split"
    #: a guest was entered with VMID 0, which is the host's
    VMID_ZERO = "vmid-zero"
    #: a guest was entered with the VMID that it had before the rollover
    OLD_GENERATION = "old-generation"
    #: VMIDs began anew without the full invalidation
    ROLLOVER_NOT_INVALIDATED = "rollover-not-invalidated"
    #: VTTBR points at the root of a VM that was destroyed
    STALE_VTTBR = "stale-vttbr"
    #: another vCPU of the VM ran on this CPU last, and its translations are still there
    NO_LOCAL_FLUSH = "no-local-flush"
    #: none of the other rules is broken, but the VMID is not the one that the model's allocator gives
    WRONG_VMID = "wrong-vmid"


@dataclass(frozen=True)
class RuleViolation:
    """One broken rule: at event number ``index`` (from 0) of the trace, and why."""

    rule: TraceRule
    index: int
    event: Event
    why: str

    def __str__(self) -> str:
        return f"  {self.rule.value:24} event {self.index}: {format_event(self.event)}\n      {self.why}"


class ProtocolBroken(AssertionError, Judged):
    """The hypervisor broke the protocol. ``str()`` shows the first violations with the events around them."""

    _SHOWN, _AROUND = 4, 6

    def __init__(self, trace: Trace, violations: list[RuleViolation]) -> None:
        self.violations = violations
        self.verdicts = frozenset(violation.rule for violation in violations)
        lines = ["the hypervisor broke the rules of VMIDs and TLB maintenance:"]
        for violation in violations[: self._SHOWN]:
            lines += [str(violation), *self._context(trace, violation.index)]
        if len(violations) > self._SHOWN:
            lines.append(f"  ... and {len(violations) - self._SHOWN} more")
        super().__init__("\n".join(lines))

    def _context(self, trace: Trace, index: int) -> list[str]:
        first = max(0, index - self._AROUND)
        return [f"        {format_event(event)}" for event in trace.events[first : index + 1]]
