"""The words of test authors: all that a test case may import of this package, beside the fixtures.

What is not in ``__all__`` is private and changes without notice.
"""

from __future__ import annotations

from arm_kvm.guest.driver import Guest, Hammer, Order, OrderResult, RunFailed
from arm_kvm.guest.exits import Exit, Mmio, Signal
from arm_kvm.guest.isa import A32, A64, ISAS, Access, GuestException, Isa
from arm_kvm.guest.payload import CODE, MAILBOX, MAILBOX_SIZE
from arm_kvm.guest.stage1 import GIB, GuestStage1
from arm_kvm.host import facilities
from arm_kvm.host.host import Host
from arm_kvm.machine.hold import Hold
from arm_kvm.model.arch import descriptors
from arm_kvm.model.kvm.memslots import Memslot, SlotFlags, Window
from arm_kvm.model.kvm.notifier import CHANGE_PTE_GONE, Call, Operation
from arm_kvm.oracle.stage2 import Leaf, Stage2
from arm_kvm.oracle.verdicts import Finding, Verdict, Violation
from arm_kvm.oracle.witness import Testimony, calls_in
from arm_kvm.support.errors import HostOops, HostOsError, HostPanic, LabError
from arm_kvm.vmm import ioctls
from arm_kvm.vmm.actor import Actor, Job
from arm_kvm.vmm.client import op, request
from arm_kvm.vmm.fleet import Fleet
from arm_kvm.vmm.ioctls import Descriptor, Ioctl
from arm_kvm.vmm.memory import BLOCK, PAGE, Advice, Child, File, Memory, Prot, UserFaults
from arm_kvm.vmm.process import Vmm
from arm_kvm.vmm.vcpu import Vcpu
from arm_kvm.vmm.vgic import Frame, Vgic
from arm_kvm.vmm.vm import Vm

__all__ = [
    "A32",
    "A64",
    "BLOCK",
    "CHANGE_PTE_GONE",
    "CODE",
    "GIB",
    "ISAS",
    "MAILBOX",
    "MAILBOX_SIZE",
    "PAGE",
    "Access",
    "Actor",
    "Advice",
    "Call",
    "Child",
    "Descriptor",
    "Exit",
    "File",
    "Finding",
    "Fleet",
    "Frame",
    "Guest",
    "GuestException",
    "GuestStage1",
    "Hammer",
    "Hold",
    "Host",
    "HostOops",
    "HostOsError",
    "HostPanic",
    "Ioctl",
    "Isa",
    "Job",
    "LabError",
    "Leaf",
    "Memory",
    "Memslot",
    "Mmio",
    "Operation",
    "Order",
    "OrderResult",
    "Prot",
    "RunFailed",
    "Signal",
    "SlotFlags",
    "Stage2",
    "Testimony",
    "UserFaults",
    "Vcpu",
    "Verdict",
    "Vgic",
    "Violation",
    "Vm",
    "Vmm",
    "Window",
    "calls_in",
    "descriptors",
    "facilities",
    "ioctls",
    "op",
    "request",
]
