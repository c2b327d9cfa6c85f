"""Many VMs that run in turn on one CPU. The agent runs a whole round of them on one request."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from arm_kvm.guest import payload as p
from arm_kvm.guest.driver import Order, OrderResult, RunFailed
from arm_kvm.guest.exits import decode_exit
from arm_kvm.support.errors import AgentTimeout
from arm_kvm.vmm.client import op
from arm_kvm.vmm.vm import Vm, add_memory, destroy

_EACH = 0.5  #: seconds of patience for each turn
_PATIENCE = 20.0
_SLICE = 5.0


class Fleet:
    """VMs that take turns on ``cpu`` of the host, in this order: vCPU 0 of each runs until its orders are done."""

    def __init__(self, vms: Sequence[Vm], cpu: int = 0) -> None:
        self.vms = list(vms)
        self.cpu = cpu
        self._agent = vms[0].agent

    def start(self, orders: Callable[[Vm], list[Order]]) -> None:
        """Start a round, in which every VM carries out its ``orders``, as many as the others. :meth:`finish` waits."""
        boxes = [vm.guest.issue(orders(vm)) for vm in self.vms]
        self._agent(
            op.turns_start,
            cpu=self.cpu,
            vcpus=[(vm.id, 0) for vm in self.vms],
            mailboxes=[vm.mailboxes.hva for vm in self.vms],
            doorbell=p.DOORBELL,
            blob=b"".join(boxes),
        )

    def finish(self) -> list[list[OrderResult]]:
        """Wait for the round and return the results, in order of the VMs.

        Raises RunFailed or GuestException for the first VM that failed, AgentTimeout.
        """
        for _ in range(round((_PATIENCE + _EACH * len(self.vms)) / _SLICE)):
            if answer := self._agent(op.turns_wait, cpu=self.cpu, seconds=_SLICE):
                break
        else:
            raise AgentTimeout(f"{len(self.vms)} VMs did not finish their turns", remedy="does a guest loop?")
        odd, blob = answer
        for vm in self.vms:
            vm.guest.running = False
        for index, _ in odd:
            self.vms[index].vcpus[0].restart()
        if odd:
            raise RunFailed(decode_exit(odd[0][1]))
        return self._results(blob)

    def _results(self, blob: bytes) -> list[list[OrderResult]]:
        size = len(blob) // len(self.vms)
        boxes = [blob[at + p.ORDERS : at + size] for at in range(0, len(blob), size)]
        guests = [vm.guest for vm in self.vms]
        return [[g.checked(r) for r in g.results(box)] for g, box in zip(guests, boxes, strict=True)]

    def round(self, orders: Callable[[Vm], list[Order]]) -> list[list[OrderResult]]:
        """Start a round and finish it."""
        self.start(orders)
        return self.finish()

    # -- rounds for test cases ----------------------------------------------------------------------------------

    def ping(self) -> None:
        """Enter every guest once and return."""
        self.round(lambda vm: [Order("nop")])

    def fill(self, ipa: int, count: int = 1) -> None:
        """Let every guest store to ``count`` pages from ``ipa`` on, words that differ from those of other guests."""
        self.round(lambda vm: [Order("fill", ipa, _seed(vm), count, 0x1000, wrote=(ipa, count * 0x1000))])

    def mismatches(self, ipa: int, count: int = 1) -> list[Vm]:
        """Let every guest compare these pages with what :meth:`fill` stored. Returns the VMs that find other words."""
        self.start_check(ipa, count)
        return self.finish_check()

    def start_check(self, ipa: int, count: int = 1) -> None:
        """Start :meth:`mismatches` and do not wait, so that fleets on several CPUs run at once."""
        self.start(lambda vm: [Order("check", ipa, _seed(vm), count, 0x1000)])

    def finish_check(self) -> list[Vm]:
        """Wait for the end of :meth:`start_check` and return the VMs that found other words."""
        return [vm for vm, result in zip(self.vms, self.finish(), strict=True) if result[0].value]

    # -- changes to all VMs, in a few requests -----------------------------------------------------------------------

    def add_memory(self, ipa: int, size: int) -> None:
        """Give each VM a memslot of ``size`` bytes at ``ipa``, with memory of its own."""
        add_memory(self.vms, ipa, size)

    def destroy(self) -> None:
        """Destroy all VMs."""
        destroy(self.vms)


def _seed(vm: Vm) -> int:
    return vm.id * 0x0001_0001
