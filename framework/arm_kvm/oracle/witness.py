"""An operation of the host, witnessed: stage 2 before it and after it, and what the kernel traced of its notifiers.

The reference model (framework/arm_kvm/model/kvm/notifier.py) says what the operation owes; this holds the kernel to it.
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
    """The notifier calls among trace events, with the HVA range ``[start, end)`` that each names."""
    calls = {call.value: call for call in Call}
    found = []
    for event in events:
        if event.name in calls:
            start, *end = (int(word, 16) for word in _ADDRESS.findall(event.text))
            found.append((calls[event.name], (start, end[0] if end else start + _PAGE)))
    return found


@dataclass
class Testimony:
    """What was seen of one operation: stage 2 of each VM before and after, and the notifier calls in order."""

    before: dict[int, Stage2] = field(default_factory=dict)
    after: dict[int, Stage2] = field(default_factory=dict)
    calls: list[tuple[Call, Span]] = field(default_factory=list)
    done: list[tuple[Operation, Memory, int, int]] = field(default_factory=list)  #: to which bytes of which memory

    def also(self, operation: Operation, memory: Memory, offset: int = 0, size: int | None = None) -> None:
        """The block did this, too: what became of some pages may be known only when it has."""
        self.done.append((operation, memory, offset, memory.size - offset if size is None else size))

    def count(self, call: Call) -> int:
        return sum(c is call for c, _ in self.calls)


class Witness:
    """Witnesses operations on one host."""

    def __init__(self, oracle: Oracle, host: Host) -> None:
        self._oracle = oracle
        self._host = host
        self._kernel = host.kernel_version

    @contextmanager
    def __call__(
        self, operation: Operation, memory: Memory, offset: int = 0, size: int | None = None, *, exact: bool = True
    ) -> Iterator[Testimony]:
        """Within the block the host does this to ``[offset, offset + size)`` of the memory, and no guest runs.

        Afterwards every VM that has run is compared with what the model demands and allows. Raises Violation. With
        guests running (``exact`` false), which map again what they use, safety is judged, that the kernel told of
        what it owed to tell, and that nothing is gone which it did not tell of. (What is gone for an instant only has
        been replaced: 5.4 does that entry by entry, break before make.)
        """
        seen = Testimony()
        seen.also(operation, memory, offset, size)
        notices = self._notices(*seen.done[0])  # of mappings that may be gone afterwards
        vms = [vm for vm in self._host.vms if vm.alive and vm.entered]
        calls = [call for call in Call if call is not Call.SET or self._kernel < CHANGE_PTE_GONE]
        with trace.traced(self._host.agent, [f"kvm:{call.value}" for call in calls]) as traced:
            seen.before = self._look(vms)
            yield seen
            seen.after = self._look(vms)  # traced: the host may do something to guest memory at any time
            later = seen.after if exact else self._look_again(vms)
        seen.calls = calls_in(traced.events)
        notices += [notice for more in seen.done[1:] for notice in self._notices(*more)]
        findings = [f for vm in vms for f in self._compare(vm, notices, seen, later, exact)]
        if findings:
            raise Violation(f"{operation.value}: the notifiers did not do what they owe", findings)

    def _look_again(self, vms: list[Vm]) -> dict[int, Stage2]:
        time.sleep(_BETWEEN_LOOKS)
        return self._look(vms)

    def _look(self, vms: list[Vm]) -> dict[int, Stage2]:
        """Stage 2 of each VM; safety is judged here. Raises Violation."""
        looks = self._oracle.examine(*vms) if vms else []
        if findings := [f for _, found in looks for f in found]:
            raise Violation("stage 2 breaks the contract", findings)
        return {vm.id: stage2 for vm, (stage2, _) in zip(vms, looks, strict=True)}

    def _notices(self, operation: Operation, memory: Memory, offset: int, size: int) -> list[Notice]:
        """What is announced. A fork tells of every private mapping of the process."""
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
    """A table as the model compares it."""
    leaves = stage2.leaves
    rows = zip(leaves.ia.tolist(), leaves.level.tolist(), leaves.desc.tolist(), strict=True)
    return {ipa: (level, desc) for ipa, level, desc in rows}


def _findings(broken: Iterable[notifier.Breach], before: Stage2, after: Stage2) -> Iterator[Finding]:
    for violation in broken:
        was, now = before.leaf(violation.ipa), after.leaf(violation.ipa)
        expected = f"not this: {violation.kind.value} (before: {was or 'nothing mapped'})"
        yield Finding(Verdict.of(violation.kind), expected, str(now or "nothing mapped"), violation.ipa, _PAGE)
