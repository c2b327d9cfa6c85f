"""The public interface for test authors: all that a test case imports from this package, besides its fixtures.

Everything outside ``__all__`` is private and may change without notice.
"""

from __future__ import annotations

from arm_kvm.agent import ioctls
from arm_kvm.agent.ioctls import Ioctl
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
from arm_kvm.vmm import calls, injection, vgic
from arm_kvm.vmm.actor import Actor, Job
from arm_kvm.vmm.client import op, request
from arm_kvm.vmm.descriptor import Descriptor
from arm_kvm.vmm.fleet import Fleet
from arm_kvm.vmm.memory import BLOCK, PAGE, Advice, Child, File, Memory, Prot, UserFaults
from arm_kvm.vmm.process import Vmm
from arm_kvm.vmm.vcpu import Vcpu
from arm_kvm.vmm.vgic import Frame, Vgic
from arm_kvm.vmm.vm import Vm

#: By subject, which is the order of the documentation.
__all__ = [  # noqa: RUF022
    # -- the host
    "Host",
    "Hold",
    "facilities",
    "huge_pages",
    "selfchecks",
    # -- VMs and their VMMs
    "Vm",
    "Vcpu",
    "Vmm",
    "Fleet",
    "Vgic",
    "vgic",
    "Frame",
    "calls",
    "injection",
    # -- memory
    "PAGE",  #: bytes of a page
    "BLOCK",  #: bytes that a level 2 block maps, with 4 KiB pages
    "GIB",  #: bytes that a level 1 block maps, with 4 KiB pages
    "Memory",
    "File",
    "Advice",
    "Prot",
    "UserFaults",
    "content_of",
    "Child",
    # -- memslots
    "Memslot",
    "SlotFlags",
    "Window",
    "Memslots",
    "Refused",
    # -- guests
    "Guest",
    "Hammer",
    "Order",
    "OrderResult",
    "RunFailed",
    "GuestException",
    "Access",
    "Exit",
    "Mmio",
    "Signal",
    "GuestStage1",
    "Isa",
    "ISAS",  #: both instruction sets by name
    "A32",  #: the 32-bit instruction set, A32
    "A64",  #: the 64-bit instruction set, A64
    "CODE",  #: IPA of the guest's payload
    "MAILBOX",  #: IPA of vCPU 0's mailbox; the others' follow
    "MAILBOX_SIZE",  #: bytes of one vCPU's mailbox
    # -- stage 2 and its judgement
    "Stage2",
    "Leaf",
    "descriptors",
    "tables",
    "memcache",
    "guests_on_cpus",
    "Verdict",
    "Finding",
    "Violation",
    # -- MMU notifiers
    "Operation",
    "Call",
    "CHANGE_PTE_GONE",
    "Testimony",
    "calls_in",
    # -- VMIDs
    "Consecutive",
    "VcpuLoads",
    # -- random sequences
    "player",
    "search",
    # -- requests to the agent, and any ioctl
    "op",
    "request",
    "Actor",
    "Job",
    "ioctls",
    "Ioctl",
    "Descriptor",
    # -- errors
    "LabError",
    "HostOops",
    "HostOsError",
    "HostPanic",
]
