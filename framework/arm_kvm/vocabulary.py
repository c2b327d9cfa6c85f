"""The words of test authors: all that a test case may import of this package, beside the fixtures.

What is not in ``__all__`` is private and changes without notice.
"""

from __future__ import annotations

from arm_kvm.agent.uffd import content_of
from arm_kvm.guest.driver import Guest, Hammer, Order, OrderResult, RunFailed
from arm_kvm.guest.exits import Exit, Mmio, Signal
from arm_kvm.guest.isa import A32, A64, ISAS, Access, GuestException, Isa
from arm_kvm.guest.payload import CODE, MAILBOX, MAILBOX_SIZE
from arm_kvm.guest.stage1 import GIB, GuestStage1
from arm_kvm.host import facilities, huge_pages, selfchecks
from arm_kvm.host.host import Host
from arm_kvm.machine.hold import Hold
from arm_kvm.model.arch import descriptors
from arm_kvm.model.kvm import memcache, tables
from arm_kvm.model.kvm.memslots import Memslot, Memslots, Refused, SlotFlags, Window
from arm_kvm.model.kvm.notifier import CHANGE_PTE_GONE, Call, Operation
from arm_kvm.model.kvm.vmid import Consecutive, VcpuLoads
from arm_kvm.oracle.locator import guests_on_cpus
from arm_kvm.oracle.stage2 import Leaf, Stage2
from arm_kvm.oracle.verdicts import Finding, Verdict, Violation
from arm_kvm.oracle.witness import Testimony, calls_in
from arm_kvm.sequences import player, search
from arm_kvm.support.errors import HostOops, HostOsError, HostPanic, LabError
from arm_kvm.vmm import calls, injection, ioctls, vgic
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
    "A32",  #: the 32-bit instruction set, A32
    "A64",  #: the 64-bit instruction set, A64
    "BLOCK",  #: bytes that a level 2 block maps, with 4 KiB pages
    "CHANGE_PTE_GONE",
    "CODE",  #: IPA of the guest's payload
    "GIB",  #: bytes that a level 1 block maps, with 4 KiB pages
    "ISAS",  #: both instruction sets by name
    "MAILBOX",  #: IPA of vCPU 0's mailbox; the others' follow
    "MAILBOX_SIZE",  #: bytes of one vCPU's mailbox
    "PAGE",  #: bytes of a page
    "Access",
    "Actor",
    "Advice",
    "Call",
    "Child",
    "Consecutive",
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
    "Memslots",
    "Mmio",
    "Operation",
    "Order",
    "OrderResult",
    "Prot",
    "Refused",
    "RunFailed",
    "Signal",
    "SlotFlags",
    "Stage2",
    "Testimony",
    "UserFaults",
    "Vcpu",
    "VcpuLoads",
    "Verdict",
    "Vgic",
    "Violation",
    "Vm",
    "Vmm",
    "Window",
    "calls",
    "calls_in",
    "content_of",
    "descriptors",
    "facilities",
    "guests_on_cpus",
    "huge_pages",
    "injection",
    "ioctls",
    "memcache",
    "op",
    "player",
    "request",
    "search",
    "selfchecks",
    "tables",
    "vgic",
]
