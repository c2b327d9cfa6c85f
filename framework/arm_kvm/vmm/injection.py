"""Allocation failures of single calls (fault injection, fail-nth): the n-th allocation that a call makes fails.

For hosts whose kernel has it (``can: [fail-nth]``). The kernel counts what the calling thread allocates, but not from
high memory. Each function carries out one call, and returns what came of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from arm_kvm.guest.driver import Order
from arm_kvm.model.kvm.memslots import Memslot, SlotFlags
from arm_kvm.vmm.client import Agent, Request, op, request
from arm_kvm.vmm.vm import Vm

_PAGE = 0x1000


@dataclass(frozen=True)
class Attempt:
    """What came of a call whose n-th allocation was to fail."""

    injected: bool  #: whether there was an n-th allocation
    errno: int  #: what the call answered; 0: it succeeded, perhaps with a fallback
    result: object = None  #: of a call that succeeded


def _attempt(agent: Agent, n: int, wanted: Request[Any]) -> Attempt:
    return Attempt(*agent(op.fail_nth, n=n, op=wanted.name, args=wanted.args))


def create_vm(agent: Agent, n: int) -> Attempt:
    """KVM_CREATE_VM; the VM that comes of it is closed again."""
    attempt = _attempt(agent, n, request(op.vm_create))
    if attempt.errno == 0 and isinstance(attempt.result, int):
        agent(op.vm_destroy, vm=attempt.result)
    return attempt


def set_memslot(vm: Vm, slot: Memslot, n: int) -> Attempt:
    """KVM_SET_USER_MEMORY_REGION; the memslot that comes of it is deleted again."""
    attempt = _attempt(vm.agent, n, vm.memslot_request(slot))
    if attempt.errno == 0:
        vm.set_memslot(replace(slot, size=0, flags=SlotFlags.NONE))
    return attempt


def store(vm: Vm, index: int, ipa: int, n: int) -> Attempt:
    """KVM_RUN of vCPU ``index``, whose guest stores the word ``ipa`` at ``ipa``; only KVM_RUN's allocations count.

    After a failure the vCPU is at the payload's entry again.
    """
    vcpu, guest = vm.vcpus[index], vm.guests[index]
    vcpu.write_mailbox(0, guest.issue([Order("fill", ipa, 0, 1, _PAGE, wrote=(ipa, 4))]))
    attempt = _attempt(vm.agent, n, request(op.vcpu_run, vm=vm.id, vcpu=index))
    guest.running = False
    if attempt.errno:
        vcpu.restart()  # or it would go on where it failed
    return attempt


def every_failure(attempt: Callable[[int], Attempt], most: int = 200) -> list[int]:
    """The errnos of a call whose first allocation fails, then its second, ... until it makes no more: all but the last.

    Raises AssertionError for a call that makes more than ``most`` allocations, or fails without a failed allocation.
    """
    answers: list[int] = []
    for n in range(1, most + 1):
        made = attempt(n)
        if not made.injected:
            if made.errno:
                raise AssertionError(f"errno {made.errno} though none of {n - 1} allocations failed")
            return answers
        answers.append(made.errno)
    raise AssertionError(f"more than {most} allocations")
