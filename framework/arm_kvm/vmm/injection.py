"""Allocation failures (fault injection, fail-nth): make the n-th allocation of a single call fail.

This needs a host whose kernel has fail-nth (``can: [fail-nth]``). The kernel counts the calling thread's allocations,
except those from high memory. Each function carries out one call.
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
    """The outcome of a call whose n-th allocation was to fail."""

    injected: bool  #: whether there was an n-th allocation
    errno: int  #: of the call; 0 if it succeeded, perhaps with a fallback
    result: object = None  #: of a call that succeeded


def _attempt(agent: Agent, n: int, wanted: Request[Any]) -> Attempt:
    return Attempt(*agent(op.fail_nth, n=n, op=wanted.name, args=wanted.args))


def create_vm(agent: Agent, n: int) -> Attempt:
    """KVM_CREATE_VM. If it succeeds, the VM is closed again."""
    attempt = _attempt(agent, n, request(op.vm_create))
    if attempt.errno == 0 and isinstance(attempt.result, int):
        agent(op.vm_destroy, vm=attempt.result)
    return attempt


def set_memslot(vm: Vm, slot: Memslot, n: int) -> Attempt:
    """KVM_SET_USER_MEMORY_REGION. If it succeeds, the memslot is deleted again."""
    attempt = _attempt(vm.agent, n, vm.memslot_request(slot))
    if attempt.errno == 0:
        vm.set_memslot(replace(slot, size=0, flags=SlotFlags.NONE))
    return attempt


def store(vm: Vm, index: int, ipa: int, n: int) -> Attempt:
    """KVM_RUN of vCPU ``index``, whose guest stores the word ``ipa`` to ``ipa``. Only KVM_RUN's allocations count.

    After a failure the vCPU is set to the payload's entry.
    """
    vcpu, guest = vm.vcpus[index], vm.guests[index]
    vcpu.write_mailbox(0, guest.issue([Order("fill", ipa, 0, 1, _PAGE, wrote=(ipa, 4))]))
    attempt = _attempt(vm.agent, n, request(op.vcpu_run, vm=vm.id, vcpu=index))
    guest.running = False
    if attempt.errno:
        vcpu.restart()  # else it would repeat the store
    return attempt


def every_failure(attempt: Callable[[int], Attempt], most: int = 200) -> list[int]:
    """Repeat a call and make its first allocation fail, then its second, and so on up to its last.

    Returns the errnos of these calls. Raises AssertionError when the call makes more than ``most`` allocations, or
    fails although none of its allocations did.
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
