"""Single calls on a VM for what KVM makes of them: a VM that is closed in parts, a vCPU that comes too late."""

from __future__ import annotations

from enum import Enum

from arm_kvm.vmm.client import op
from arm_kvm.vmm.vm import Vm


class Part(Enum):
    """What keeps a VM in KVM, which frees it with the last of these."""

    VM = "vm"  #: its descriptor
    VCPU = "vcpu"  #: vCPU 0's descriptor
    RUN = "run"  #: the mapping of vCPU 0's run page
    VGIC = "vgic"  #: the VGIC's descriptor


def close_part(vm: Vm, part: Part) -> None:
    """Close one part of the VM. Set ``vm.alive`` to False before the last: it cannot be judged then."""
    vm.agent(op.vm_close, vm=vm.id, what=part.value)


def close(vm: Vm) -> None:
    """Close all descriptors of the VM, and leave its memory mapped."""
    vm.alive = False
    vm.agent(op.vm_destroy, vm=vm.id)


def close_in_another_thread(vm: Vm) -> None:
    """Close all descriptors of the VM in a thread of the VMM that has never used them."""
    vm.alive = False
    vm.agent(op.vm_destroy_elsewhere, vm=vm.id)


def create_vcpu(vm: Vm, index: int) -> None:
    """KVM_CREATE_VCPU and KVM_ARM_VCPU_INIT. No guest of the lab runs on this vCPU. Raises HostOsError."""
    vm.agent(op.vcpu_create, vm=vm.id, vcpu=index, features=0)
