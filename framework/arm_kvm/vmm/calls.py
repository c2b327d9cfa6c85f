"""Calls that a regular VMM does not make: to close a VM's descriptors one by one, or to create a vCPU late."""

from __future__ import annotations

from enum import Enum

from arm_kvm.vmm.client import op
from arm_kvm.vmm.vm import Vm


class Part(Enum):
    """A reference to a VM. KVM frees the VM when the last one is closed."""

    VM = "vm"  #: the VM's descriptor
    VCPU = "vcpu"  #: vCPU 0's descriptor
    RUN = "run"  #: the mapping of vCPU 0's run page
    VGIC = "vgic"  #: the VGIC's descriptor


def close_part(vm: Vm, part: Part) -> None:
    """Close one reference to the VM. Set ``vm.alive`` to False before the last: the VM cannot be judged afterwards."""
    vm.agent(op.vm_close, vm=vm.id, what=part.value)


def close(vm: Vm) -> None:
    """Close all descriptors of the VM and leave its memory mapped."""
    vm.alive = False
    vm.agent(op.vm_destroy, vm=vm.id)


def close_in_another_thread(vm: Vm) -> None:
    """Close all descriptors of the VM in a thread of the VMM that has not used them."""
    vm.alive = False
    vm.agent(op.vm_destroy_elsewhere, vm=vm.id)


def create_vcpu(vm: Vm, index: int) -> None:
    """KVM_CREATE_VCPU and KVM_ARM_VCPU_INIT, for a vCPU that the lab does not run. Raises HostOsError."""
    vm.agent(op.vcpu_create, vm=vm.id, vcpu=index, features=0)
