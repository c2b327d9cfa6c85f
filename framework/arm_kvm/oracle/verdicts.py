"""The verdicts: their names, findings, and the diff of expected and found that a violation shows."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum, auto

from arm_kvm.model.kvm.notifier import BreachKind
from arm_kvm.support.judged import Judged

_SHOWN = 8


class Verdict(StrEnum):
    """What can be wrong. The value is the name in reports."""

    #: a leaf maps another frame than the host's own page table maps for that address
    WRONG_FRAME = "wrong-frame"
    #: a leaf is writable though memslot, host mapping or dirty log forbid it; or a device is executable
    EXCESS_PERMISSION = "excess-permission"
    #: a leaf at an IPA where the VM has no memslot
    OUTSIDE_MEMSLOTS = "outside-memslots"
    #: RAM is not mapped as normal write-back inner-shareable memory, or a device is mapped as RAM
    WRONG_MEMORY_TYPE = "wrong-memory-type"
    #: a table page is used twice, or mapped by a guest's leaf
    SHARED_TABLE = "shared-table"
    #: an entry is reserved in the architecture, or points outside the machine's memory
    MALFORMED_ENTRY = "malformed-entry"
    #: after an operation of the host, a leaf still maps a frame that the operation has unmapped
    STALE = "stale"
    #: after an operation of the host, a leaf is still writable that the operation has write-protected
    WRITABLE = "writable"
    #: after an operation of the host, a leaf has changed for no reason that the operation gives
    ALTERED = "altered"
    #: after an operation of the host, there is a new leaf that no guest has asked for
    APPEARED = "appeared"
    #: after an operation of the host, a leaf is gone for which no notifier was called
    LOST = "lost"
    #: up to 6.9: change_pte has not mapped the new frame, though the level 3 table still exists
    NOT_MAPPED = "not-mapped"
    #: the notifier's trace event is missing for a page that stage 2 mapped
    NOT_TOLD = "not-told"
    #: the notifier was called for a page for no reason that an operation gives
    TOLD = "told"
    #: BUG, WARNING, lockdep report or RCU stall in the host's kernel log during the test
    KERNEL_SPLAT = "kernel-splat"

    @classmethod
    def of(cls, breach: BreachKind) -> Verdict:
        """Return the verdict for a breach of the notifier model, which has the same name."""
        return cls[breach.name]


class Reason(Enum):
    """The cause of a finding, where the oracle distinguishes causes."""

    HOST_HAS_NO_PAGE = auto()  #: stage 2 maps an address for which the host's own page table maps nothing


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, with ``size`` bytes of a VM at ``ipa``, or with the kernel as a whole (``ipa`` None)."""

    verdict: Verdict
    expected: str
    found: str
    ipa: int | None = None
    size: int = 0
    reason: Reason | None = None

    def __str__(self) -> str:
        where = "" if self.ipa is None else f"IPA [{self.ipa:#x}, {self.ipa + self.size:#x})"
        return "\n".join(
            (
                f"  {self.verdict.value:18} {where}".rstrip(),
                f"      expected  {self.expected}",
                f"      found     {self.found}",
            )
        )


class Violation(AssertionError, Judged):
    """The kernel has violated the contract. ``findings`` lists all that is wrong, ``str()`` is the diff.

    ``context`` describes what happened before: the last requests, or the kernel's trace.
    """

    def __init__(self, title: str, findings: list[Finding], context: str = "") -> None:
        self.findings = findings
        self.verdicts = frozenset(finding.verdict for finding in findings)
        lines = [title, *map(str, findings[:_SHOWN])]
        if len(findings) > _SHOWN:
            lines.append(f"  ... and {len(findings) - _SHOWN} more")
        if context:
            lines.append(context)
        super().__init__("\n".join(lines))
