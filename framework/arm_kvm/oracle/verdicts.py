"""The verdicts: one name each, and a diff a kernel developer can act on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum, auto

from arm_kvm.model.kvm.notifier import BreachKind
from arm_kvm.support.judged import Judged

_SHOWN = 8


class Verdict(StrEnum):
    """What can be wrong. The value is the name a report shows."""

    #: a leaf maps another frame than the host's own page table does for that address
    WRONG_FRAME = "wrong-frame"
    #: a leaf allows more than memslot, host mapping or dirty log; or a device can be executed
    EXCESS_PERMISSION = "excess-permission"
    #: a leaf where the VM has no memory
    OUTSIDE_MEMSLOTS = "outside-memslots"
    #: RAM that is not mapped as normal write-back inner-shareable memory, or a device mapped as RAM
    WRONG_MEMORY_TYPE = "wrong-memory-type"
    #: a table page that is used twice, or that a guest can reach
    SHARED_TABLE = "shared-table"
    #: an entry that the architecture gives no meaning
    MALFORMED_ENTRY = "malformed-entry"
    #: after an operation of the host, a leaf still maps the frame that the operation took away
    STALE = "stale"
    #: after an operation of the host, a leaf is still writable and must not be
    WRITABLE = "writable"
    #: after an operation of the host, a leaf has changed and the operation gives no reason
    ALTERED = "altered"
    #: after an operation of the host, there is a new leaf that no guest asked for
    APPEARED = "appeared"
    #: after an operation of the host, a leaf is gone that the notifiers did not name
    LOST = "lost"
    #: up to 6.9: change_pte did not map the new frame, though a level 3 table was left
    NOT_MAPPED = "not-mapped"
    #: the notifier's trace event is missing for a page that stage 2 mapped
    NOT_TOLD = "not-told"
    #: the notifier was called for a page, and no operation gives a reason
    TOLD = "told"
    #: BUG, WARNING, lockdep or RCU stall in the host's kernel log during the test
    KERNEL_SPLAT = "kernel-splat"

    @classmethod
    def of(cls, breach: BreachKind) -> Verdict:
        """The verdict on a breach of the notifier model, which has the same name."""
        return cls[breach.name]


class Reason(Enum):
    """Why a finding is one, where the oracle has to know."""

    HOST_HAS_NO_PAGE = auto()  #: stage 2 maps an address at which the host's own page table maps nothing


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: with ``size`` bytes of one VM at ``ipa``, or with the kernel as a whole (None)."""

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
    """The kernel broke the contract. ``findings`` are all that is wrong, ``str()`` the diff.

    ``context`` is what happened before: the last operations and the kernel's trace.
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
