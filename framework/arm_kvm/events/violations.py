"""The rules that a trace can break, and the report of violations."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from arm_kvm.events.trace import Event, Trace, format_event
from arm_kvm.support.judged import Judged


class TraceRule(StrEnum):
    """A rule that was broken. The value is its name in reports."""

    #: a valid entry became another valid one, and nothing was invalidated in between
    BREAK_BEFORE_MAKE = "break-before-make"
    #: an entry or a permission was removed, and TLBs may still hold it when the kernel's operation is complete
    NOT_INVALIDATED = "not-invalidated"
    #: another VM got the VMID of a destroyed VM in the same generation
    VMID_REUSED = "vmid-reused"
    #: two existing VMs have the same VMID
    VMID_SHARED = "vmid-shared"
    #: two vCPUs of one VM run under different VMIDs
    VMID_SPLIT = "vmid-split"
    #: a guest was entered with VMID 0, which is the host's
    VMID_ZERO = "vmid-zero"
    #: a guest was entered with its VMID from before the rollover
    OLD_GENERATION = "old-generation"
    #: a new generation of VMIDs began without the full invalidation
    ROLLOVER_NOT_INVALIDATED = "rollover-not-invalidated"
    #: VTTBR holds the root of a destroyed VM
    STALE_VTTBR = "stale-vttbr"
    #: another vCPU of the VM ran on this CPU last, and its translations were not invalidated
    NO_LOCAL_FLUSH = "no-local-flush"
    #: the VMID is not the one that the model's allocator gives, though no other rule is broken
    WRONG_VMID = "wrong-vmid"


@dataclass(frozen=True)
class RuleViolation:
    """A broken rule: at event number ``index`` (from 0) of the trace, and why."""

    rule: TraceRule
    index: int
    event: Event
    why: str

    def __str__(self) -> str:
        return f"  {self.rule.value:24} event {self.index}: {format_event(self.event)}\n      {self.why}"


class ProtocolBroken(AssertionError, Judged):
    """The hypervisor broke the rules. ``str()`` shows the first violations with the events that led to them."""

    _SHOWN, _BEFORE = 4, 6

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
        first = max(0, index - self._BEFORE)
        return [f"        {format_event(event)}" for event in trace.events[first : index + 1]]
