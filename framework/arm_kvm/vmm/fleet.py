"""Many VMs that run in turn on one CPU. The turns are taken inside the agent: no network between two guests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from arm_kvm.guest import payload as p
from arm_kvm.guest.driver import Order, OrderResult, RunFailed
from arm_kvm.guest.exits import decode_exit
from arm_kvm.support.errors import AgentTimeout
from arm_kvm.vmm.client import op
from arm_kvm.vmm.vm import Vm, add_memory, destroy

_EACH = 0.5  #: seconds of patience a turn
_PATIENCE = 20.0
_SLICE = 5.0


class Fleet:
    """``vms`` in the order of their turns, on ``cpu`` of the host. vCPU 0 of each runs, until its orders are done."""

    def __init__(self, vms: Sequence[Vm], cpu: int = 0) -> None:
        self.vms = list(vms)
        self.cpu = cpu
        self._agent = vms[0].agent

    def start(self, orders: Callable[[Vm], list[Order]]) -> None:
        """Begin a round: every VM once, with its own orders, equally many. :meth:`finish` takes the results."""
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
        """The results of the round, in order of the VMs. Raises RunFailed, GuestException of the first that failed."""
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
        """A round, begun and finished."""
        self.start(orders)
        return self.finish()

    # -- what test cases say ------------------------------------------------------------------------------------

    def ping(self) -> None:
        """Every VM enters its guest once and comes back."""
        self.round(lambda vm: [Order("nop")])

    def fill(self, ipa: int, count: int = 1) -> None:
        """Every guest stores to ``count`` pages from ``ipa`` what no other does."""
        self.round(lambda vm: [Order("fill", ipa, _seed(vm), count, 0x1000, wrote=(ipa, count * 0x1000))])

    def mismatches(self, ipa: int, count: int = 1) -> list[Vm]:
        """The VMs whose guests do not find there what they stored, after every guest has looked."""
        self.start_check(ipa, count)
        return self.finish_check()

    def start_check(self, ipa: int, count: int = 1) -> None:
        """Like :meth:`mismatches`, without waiting; :meth:`finish_check` answers. For fleets on several CPUs."""
        self.start(lambda vm: [Order("check", ipa, _seed(vm), count, 0x1000)])

    def finish_check(self) -> list[Vm]:
        """Wait for what :meth:`start_check` began."""
        return [vm for vm, result in zip(self.vms, self.finish(), strict=True) if result[0].value]

    # -- all of them at once, in a few requests --------------------------------------------------------------------

    def add_memory(self, ipa: int, size: int) -> None:
        """A new memslot at ``ipa`` for each, with memory of its own."""
        add_memory(self.vms, ipa, size)

    def destroy(self) -> None:
        """Destroy them all."""
        destroy(self.vms)


def _seed(vm: Vm) -> int:
    return vm.id * 0x0001_0001
