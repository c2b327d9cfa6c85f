"""Find splats in the kernel's log: BUG, WARNING, lockdep reports, RCU stalls."""

from __future__ import annotations

import re

from arm_kvm.oracle.verdicts import Finding, Verdict

#: Linux 3.9 to 6.12: include/asm-generic/bug.h, kernel/locking/lockdep.c, kernel/rcu, mm/, lib/.
SPLAT = re.compile(
    r"WARNING: |BUG: |\bBUG \S+ \(|UBSAN: |kernel BUG at|Kernel panic|Internal error|Unable to handle kernel"
    r"|possible recursive locking|possible circular locking|inconsistent lock state|suspicious RCU usage"
    r"|detected (expedited )?stalls|self-detected stall|soft lockup|scheduling while atomic"
    r"|sleeping function called from invalid context|Bad page (state|map)|Poison overwritten"
    r"|refcount_t: |list_(add|del) corruption|pagealloc: (memory corruption|single bit error)"
    r"|trying to register non-static key"
)
_FOLLOWING = 12


def messages(kmsg: bytes) -> list[str]:
    """Return the texts of /dev/kmsg records (Documentation/ABI/testing/dev-kmsg)."""
    lines = kmsg.decode(errors="replace").splitlines()
    return [line.partition(";")[2] for line in lines if ";" in line and not line.startswith(" ")]


def find(kmsg: bytes) -> list[Finding]:
    """Make a finding for each splat in these /dev/kmsg records, with the lines that follow it."""
    texts = messages(kmsg)
    found, skip_to = [], 0
    for i, text in enumerate(texts):
        if i >= skip_to and SPLAT.search(text):
            skip_to = i + _FOLLOWING
            found.append(Finding(Verdict.KERNEL_SPLAT, "a quiet kernel log", "\n        ".join(texts[i:skip_to])))
    return found
