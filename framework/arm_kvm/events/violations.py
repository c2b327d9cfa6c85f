"""The names of what can be wrong with a trace."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from arm_kvm.events.trace import Event, Trace, format_event
from arm_kvm.support.judged import Judged


class TraceRule(StrEnum):
    """A rule that was broken. The value is the name a report shows."""

    BREAK_BEFORE_MAKE = "break-before-make"  #: a valid entry became another valid one, nothing invalidated between
    NOT_INVALIDATED = "not-invalidated"  #: an entry or a permission was taken away, and TLBs may still hold it
    VMID_REUSED = "vmid-reused"  #: the number of a destroyed VM went to another in the same generation
    VMID_SHARED = "vmid-shared"  #: two VMs that exist have one number
    VMID_SPLIT = "vmid-split"  #: two vCPUs of one VM run under different numbers
    VMID_ZERO = "vmid-zero"  #: a guest was entered with the host's number
    OLD_GENERATION = "old-generation"  #: a guest was entered with the number it had before the rollover
    ROLLOVER_NOT_INVALIDATED = "rollover-not-invalidated"  #: numbers began anew without the full invalidation
    STALE_VTTBR = "stale-vttbr"  #: VTTBR points at the root of a VM that was destroyed
    NO_LOCAL_FLUSH = "no-local-flush"  #: another vCPU of the VM ran on this CPU, and its translations are still there
    WRONG_VMID = "wrong-vmid"  #: none of the above, but not the number the reference allocator gives


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
