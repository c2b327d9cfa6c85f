"""The verdicts: one name each, and a diff a kernel developer can act on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

_SHOWN = 8


class Verdict(Enum):
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


@dataclass(frozen=True)
class Finding:
    """One wrong range of one VM. ``ipa`` and ``size`` in bytes."""

    kind: Verdict
    ipa: int
    size: int
    expected: str
    found: str

    def __str__(self) -> str:
        return (
            f"  {self.kind.value:18} IPA [{self.ipa:#x}, {self.ipa + self.size:#x})\n"
            f"      expected  {self.expected}\n"
            f"      found     {self.found}"
        )


class Violation(AssertionError):
    """The kernel broke the contract. ``findings`` are all that is wrong, ``str()`` the diff.

    ``context`` is what happened before: the last operations and the kernel's trace.
    """

    def __init__(self, title: str, findings: list[Finding], context: str = "") -> None:
        self.findings = findings
        lines = [title, *map(str, findings[:_SHOWN])]
        if len(findings) > _SHOWN:
            lines.append(f"  ... and {len(findings) - _SHOWN} more")
        if context:
            lines.append(context)
        super().__init__("\n".join(lines))

    @property
    def kinds(self) -> set[Verdict]:
        return {finding.kind for finding in self.findings}
