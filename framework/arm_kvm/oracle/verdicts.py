"""The verdicts: one name each, and a diff a kernel developer can act on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum, auto

from arm_kvm.model.kvm.notifier import BreachKind
from arm_kvm.support.judged import Judged

_SHOWN = 8


class Verdict(StrEnum):
    """What can be wrong. The value is the name a report shows."""

    WRONG_FRAME = "wrong-frame"  #: a leaf differs from the host's frame for that address
    EXCESS_PERMISSION = "excess-permission"  #: more than memslot, host mapping or dirty log allow
    OUTSIDE_MEMSLOTS = "outside-memslots"  #: a leaf where the VM has no memory
    WRONG_MEMORY_TYPE = "wrong-memory-type"  #: RAM not mapped as normal memory, or a device mapped as such
    SHARED_TABLE = "shared-table"  #: a table page used twice, or reachable by a guest
    MALFORMED_ENTRY = "malformed-entry"  #: an entry the architecture gives no meaning
    STALE = "stale"  #: after an operation of the host, a leaf still maps the frame it took away
    WRITABLE = "writable"  #: ... is still writable
    ALTERED = "altered"  #: ... was changed though nobody was told
    APPEARED = "appeared"  #: ... is there though no guest had asked
    LOST = "lost"  #: ... is gone beyond what the notifiers may take
    NOT_MAPPED = "not-mapped"  #: change_pte did not map the new frame
    NOT_TOLD = "not-told"  #: the notifier was not called for a mapped page
    TOLD = "told"  #: the notifier was called where nothing is owed
    KERNEL_SPLAT = "kernel-splat"  #: BUG, WARNING, lockdep, RCU stall in the host's kernel log

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
