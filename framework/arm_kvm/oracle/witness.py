"""Judge an operation of the host by stage 2 before and after it, and by the traced calls of the MMU notifiers.

The reference model (framework/arm_kvm/model/kvm/notifier.py) says what the operation must do to stage 2.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from arm_kvm.host.host import Host
from arm_kvm.model.kvm import notifier
from arm_kvm.model.kvm.notifier import CHANGE_PTE_GONE, Call, Leaves, Notice, Notified, Operation, Span
from arm_kvm.oracle import ftrace as trace
from arm_kvm.oracle.oracle import Oracle
from arm_kvm.oracle.stage2 import Stage2
from arm_kvm.oracle.verdicts import Finding, Verdict, Violation
from arm_kvm.vmm.memory import Memory, mappings
from arm_kvm.vmm.vm import Vm

_PAGE = 0x1000
_BETWEEN_LOOKS = 0.01  #: seconds
_ADDRESS = re.compile(r"0x[0-9a-f]+")


def calls_in(events: Iterable[trace.FtraceEvent]) -> list[tuple[Call, Span]]:
    """Find the notifier calls among trace events, with the HVA range ``[start, end)`` of each."""
    calls = {call.value: call for call in Call}
    found = []
    for event in events:
        if event.name in calls:
            start, *end = (int(word, 16) for word in _ADDRESS.findall(event.text))
            found.append((calls[event.name], (start, end[0] if end else start + _PAGE)))
    return found


@dataclass
class Testimony:
    """What was observed of an operation: each VM's stage 2 before and after, by VM number, and the notifier calls."""

    before: dict[int, Stage2] = field(default_factory=dict)
    after: dict[int, Stage2] = field(default_factory=dict)
    calls: list[tuple[Call, Span]] = field(default_factory=list)
    done: list[tuple[Operation, Memory, int, int]] = field(default_factory=list)  #: with memory, offset and size

    def also(self, operation: Operation, memory: Memory, offset: int = 0, size: int | None = None) -> None:
        """Add a further operation of the block, for example one whose pages are known only afterwards."""
        self.done.append((operation, memory, offset, memory.size - offset if size is None else size))

    def count(self, call: Call) -> int:
        """Return the number of calls of this notifier."""
        return sum(c is call for c, _ in self.calls)


class Witness:
    """Judges operations on one host's memory."""

    def __init__(self, oracle: Oracle, host: Host) -> None:
        self._oracle = oracle
        self._host = host
        self._kernel = host.kernel_version

    @contextmanager
    def __call__(
        self, operation: Operation, memory: Memory, offset: int = 0, size: int | None = None, *, exact: bool = True
    ) -> Iterator[Testimony]:
        """Within the block, the host carries out the operation on ``[offset, offset + size)``, and no guest runs.

        Afterwards the stage 2 of every VM that has run is compared with what the model requires and permits. Raises
        Violation.

        If guests run (``exact`` false), they map again the pages that they access. Then three things are judged:
        safety; that the notifiers were called for all pages for which the operation requires that; and that no leaf is
        gone without a notifier call. (A leaf that is missing only for an instant is being replaced: 5.4 does that entry
        by entry, break before make.)
        """
        seen = Testimony()
        seen.also(operation, memory, offset, size)
        notices = self._notices(*seen.done[0])  # now: the mappings may be gone afterwards
        vms = [vm for vm in self._host.vms if vm.alive and vm.entered]
        calls = [call for call in Call if call is not Call.SET or self._kernel < CHANGE_PTE_GONE]
        with trace.traced(self._host.agent, [f"kvm:{call.value}" for call in calls]) as traced:
            seen.before = self._look(vms)
            yield seen
            seen.after = self._look(vms)  # still traced, because the host may change guest memory at any time
            later = seen.after if exact else self._look_again(vms)
        seen.calls = calls_in(traced.events)
        notices += [notice for more in seen.done[1:] for notice in self._notices(*more)]
        findings = [f for vm in vms for f in self._compare(vm, notices, seen, later, exact)]
        if findings:
            raise Violation(f"{operation.value}: KVM mishandled the MMU notifier", findings)

    def _look_again(self, vms: list[Vm]) -> dict[int, Stage2]:
        time.sleep(_BETWEEN_LOOKS)
        return self._look(vms)

    def _look(self, vms: list[Vm]) -> dict[int, Stage2]:
        """Read stage 2 of each VM and judge safety. Raises Violation."""
        looks = self._oracle.examine(*vms) if vms else []
        if findings := [f for _, found in looks for f in found]:
            raise Violation("stage 2 is wrong", findings)
        return {vm.id: stage2 for vm, (stage2, _) in zip(vms, looks, strict=True)}

    def _notices(self, operation: Operation, memory: Memory, offset: int, size: int) -> list[Notice]:
        """Return the notices of the operation: one, or for a fork one for each private mapping of the process."""
        start, end = memory.hva + offset, memory.hva + offset + size
        vmas = mappings(self._host.agent, private=operation is Operation.FORK)
        if notifier.RULES[operation].notified is Notified.VMA:
            return [Notice(operation, *vma, vma, self._kernel) for vma in vmas]
        own = [vma for vma in vmas if vma[0] <= start < vma[1]]
        vma = (min(own[0][0], start), max(own[0][1], end)) if own else (start, end)
        return [Notice(operation, start, end, vma, self._kernel)]

    def _compare(
        self, vm: Vm, notices: list[Notice], seen: Testimony, later: dict[int, Stage2], exact: bool
    ) -> Iterator[Finding]:
        slots = tuple(vm.slots.values())
        before, after = leaves_of(seen.before[vm.id]), leaves_of(seen.after[vm.id])
        broken = notifier.unheard(notices, slots, before, seen.calls)
        if exact:
            broken += notifier.violations(notices, slots, before, after)
        else:
            broken = [b for b in broken if b.kind is not notifier.BreachKind.TOLD]  # guests have their own reasons
        broken += notifier.unasked(slots, before, after | leaves_of(later[vm.id]), seen.calls)
        yield from _findings(broken, seen.before[vm.id], seen.after[vm.id])


def leaves_of(stage2: Stage2) -> Leaves:
    """Convert stage 2 to the form that the model compares: IPA -> (level, descriptor)."""
    leaves = stage2.leaves
    rows = zip(leaves.ia.tolist(), leaves.level.tolist(), leaves.desc.tolist(), strict=True)
    return {ipa: (level, desc) for ipa, level, desc in rows}


#: What the model demands where a page is not so.
_EXPECTED = {
    notifier.BreachKind.STALE: "the old frame unmapped",
    notifier.BreachKind.WRITABLE: "no write permission",
    notifier.BreachKind.ALTERED: "the entry as it was",
    notifier.BreachKind.APPEARED: "nothing mapped: no guest has asked for it",
    notifier.BreachKind.LOST: "the entry as it was",
    notifier.BreachKind.NOT_MAPPED: "the new frame mapped: a level 3 table is left",
    notifier.BreachKind.NOT_TOLD: "a notifier event for this page",
    notifier.BreachKind.TOLD: "no notifier event",
}


def _findings(broken: Iterable[notifier.Breach], before: Stage2, after: Stage2) -> Iterator[Finding]:
    for violation in broken:
        was, now = before.leaf(violation.ipa), after.leaf(violation.ipa)
        expected = f"{_EXPECTED[violation.kind]} (before: {was or 'nothing mapped'})"
        yield Finding(Verdict.of(violation.kind), expected, str(now or "nothing mapped"), violation.ipa, _PAGE)
