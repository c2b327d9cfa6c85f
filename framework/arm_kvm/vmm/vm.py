"""Virtual machines in the host as test cases use them: memory, vCPUs, exits.

A :class:`Vm` records its memslots and the stores that its guests were ordered to make, because the oracle compares
KVM's tables with them. Nothing of this record is read back from KVM.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from arm_kvm.guest.driver import Guest
from arm_kvm.guest.exits import Mmio
from arm_kvm.guest.isa import Isa
from arm_kvm.guest.payload import CODE, CODE_SIZE, MAILBOX, MAILBOX_SIZE, assemble
from arm_kvm.model.kvm.memslots import Memslot, SlotFlags, Window
from arm_kvm.support.errors import ConfigError
from arm_kvm.vmm.client import Agent, Request, op, request
from arm_kvm.vmm.descriptor import Descriptor
from arm_kvm.vmm.memory import PAGE, Memory, Prot, SharedMemory
from arm_kvm.vmm.memslots import MemslotRecord, Stores
from arm_kvm.vmm.vcpu import Devices, Vcpu
from arm_kvm.vmm.vgic import Vgic

_CODE_SLOT, _MAILBOX_SLOT = 0, 1
_CREATION, _CREATION_EACH = 20.0, 0.5  #: seconds of patience for the creation of VMs
_PATIENCE, _BATCH = 60.0, 100


class Vm:
    """One VM: its memslots, its vCPUs, and ``guest``, the payload on vCPU 0.

    ``device`` serves MMIO: it maps an IPA to the value that a read returns (0 if missing), and writes store into it.
    ``exits`` lists every MMIO exit of the guests, in order, except doorbells.
    """

    def __init__(
        self, agent: Agent, isa: Isa, number: int, vcpus: int, code: Memory, mailboxes: Memory, ipa_bits: int
    ) -> None:
        """Represent a VM that the agent has created, under this number; use :meth:`create`."""
        self.agent = agent
        self.isa = isa
        self.id = number
        self.ipa_bits = ipa_bits  #: 0 for KVM's default, 40
        self.mailboxes = mailboxes
        self.memslots = MemslotRecord()
        self.memories: list[Memory] = [code, mailboxes]
        self.vgic: Vgic | None = None
        self.alive = True
        devices = Devices()
        self.device: dict[int, int] = devices.values
        self.exits: list[Mmio] = devices.exits
        self.vcpus = [Vcpu(agent, number, n, isa, mailboxes, self.memslots, devices) for n in range(vcpus)]

    @classmethod
    def create(
        cls,
        agent: Agent,
        isa: Isa,
        count: int = 1,
        *,
        vcpus: int = 1,
        ipa_bits: int = 0,
        create_vcpus: bool = True,
    ) -> list[Vm]:
        """Create ``count`` VMs with the payload in them, whose code is in memory that all of them share.

        Without ``create_vcpus`` the vCPUs are left to :meth:`Vcpu.create`, for ioctls that must come before them.
        Raises HostOsError when KVM refuses one; VMs that were created before it are closed with the agent. Raises
        ConfigError when the host has no KVM.
        """
        if not agent.hello["kvm"]:
            raise ConfigError("this host has no KVM; a test that needs one says so with @pytest.mark.needs('kvm')")
        patience = _CREATION + count * _CREATION_EACH
        size = vcpus * MAILBOX_SIZE
        maps = [request(op.memory_map, CODE_SIZE), request(op.memory_map, count * size)]
        creations = [request(op.vm_create, ipa_bits=ipa_bits) for _ in range(count)]
        *numbers, code, boxes = agent.batch([*creations, *maps], patience)
        agent(op.memory_write, hva=code, blob=assemble(isa.name))
        shared = SharedMemory(agent, code, CODE_SIZE, users=count)
        mailboxes = [Memory(agent, boxes + index * size, size) for index in range(count)]
        vms = [cls(agent, isa, n, vcpus, shared, box, ipa_bits) for n, box in zip(numbers, mailboxes, strict=True)]
        try:
            agent.batch([r for vm in vms for r in vm._furnish(create_vcpus)], patience)
        except BaseException:
            for vm in vms:
                vm.destroy()
            raise
        return vms

    def _furnish(self, create_vcpus: bool) -> list[Request[Any]]:
        """Record the payload's memslots and return the requests that set them and create the vCPUs."""
        code, mailboxes = self.memories
        slots = (
            Memslot(_CODE_SLOT, CODE, code.size, code.hva),
            Memslot(_MAILBOX_SLOT, MAILBOX, mailboxes.size, mailboxes.hva),
        )
        vcpus = self.vcpus if create_vcpus else []
        return [self.record_memslot(slot) for slot in slots] + [r for vcpu in vcpus for r in vcpu.creation()]

    @property
    def name(self) -> str:
        """The VM's name in findings."""
        return f"VM {self.id}{self.agent.suffix}"

    @property
    def host_bits(self) -> int:
        """Width of the host's registers, 32 or 64."""
        return self.agent.bits

    @property
    def descriptor(self) -> Descriptor:
        """The VM's file descriptor, for ioctls that have no method here."""
        return Descriptor(self.agent, self.agent(op.vm_fd, vm=self.id))

    @property
    def guests(self) -> list[Guest]:
        """The payload on each vCPU."""
        return [vcpu.guest for vcpu in self.vcpus]

    @property
    def guest(self) -> Guest:
        """The payload on vCPU 0."""
        return self.vcpus[0].guest

    @property
    def entered(self) -> bool:
        """Whether any of its vCPUs was given an order."""
        return any(guest.entered for guest in self.guests)

    def create_vgic(self, gicv: int) -> Vgic:
        """Create an in-kernel GICv2, before the VM runs. ``gicv`` is the PA of the board's virtual CPU interface."""
        self.vgic = Vgic(self.agent, self.id, gicv)
        return self.vgic

    # -- memory ----------------------------------------------------------------------------------

    def memory(
        self,
        size: int,
        *,
        align: int = PAGE,
        huge: bool = False,
        shared: bool = False,
        file: Descriptor | None = None,
        offset: int = 0,
        prot: Prot = Prot.READ_WRITE,
    ) -> Memory:
        """Map memory without a memslot: anonymous, or of an open ``file`` from ``offset`` on. Sizes are in bytes.

        ``huge`` takes it from the hugetlbfs pool (2 MiB pages). It is unmapped with the VM.
        """
        hva = self.agent(
            op.memory_map,
            size=size,
            align=align,
            huge=huge,
            shared=shared,
            file=file.number if file else -1,
            offset=offset,
            prot=int(prot),
        )
        memory = Memory(self.agent, hva, size)
        self.memories.append(memory)
        return memory

    def add_memory(
        self,
        ipa: int,
        size: int,
        *,
        flags: SlotFlags = SlotFlags.NONE,
        slot: int | None = None,
        memory: Memory | None = None,
        **kind: Any,
    ) -> Memory:
        """Set a new memslot of ``size`` bytes at ``ipa``, backed by ``memory`` or by new memory of this ``kind``.

        Returns the memory. Raises HostOsError when KVM refuses the memslot (EEXIST for an overlap, EINVAL for an
        alignment, EFAULT for an IPA beyond the IPA space).
        """
        memory = memory or self.memory(size, **kind)
        slot = self.memslots.next_number if slot is None else slot
        self.set_memslot(Memslot(slot, ipa, size, memory.hva, flags))
        return memory

    @property
    def windows(self) -> Sequence[Window]:
        """The IPA ranges at which stage 2 may map devices of the board."""
        return self.vgic.windows if self.vgic else ()

    @property
    def slots(self) -> dict[int, Memslot]:
        """The memslots, by number."""
        return self.memslots.by_number

    @property
    def next_slot(self) -> int:
        """The first memslot number above all in use."""
        return self.memslots.next_number

    @property
    def stores(self) -> Stores:
        """The stores that its guests were ordered to make since the dirty log was last read."""
        return self.memslots.stores

    def set_memslot(self, slot: Memslot) -> None:
        """KVM_SET_USER_MEMORY_REGION: create or move a memslot, change its flags, or (size 0) delete it."""
        self.agent.ask(self.memslot_request(slot))
        self.memslots.record(slot)

    def memslot_request(self, slot: Memslot) -> Request[None]:
        """Return the request that sets the memslot, without recording it."""
        return request(
            op.vm_memslot,
            vm=self.id,
            slot=slot.slot,
            ipa=slot.ipa,
            size=slot.size,
            hva=slot.hva,
            flags=int(slot.flags),
        )

    def record_memslot(self, slot: Memslot) -> Request[None]:
        """Record the memslot and return the request that sets it."""
        self.memslots.record(slot)
        return self.memslot_request(slot)

    def slot_at(self, ipa: int) -> Memslot:
        """Return the memslot that covers ``ipa``. Raises KeyError when none does."""
        return self.memslots.at(ipa)

    def delete_slot(self, ipa: int) -> None:
        """Delete the memslot that covers ``ipa``."""
        self.set_memslot(self._deleted(ipa))

    def record_deletion(self, ipa: int) -> Request[None]:
        """Record that the memslot which covers ``ipa`` is deleted and return the request that deletes it."""
        return self.record_memslot(self._deleted(ipa))

    def _deleted(self, ipa: int) -> Memslot:
        slot = self.slot_at(ipa)
        return Memslot(slot.slot, slot.ipa, 0, slot.hva, slot.flags)

    def move_slot(self, ipa: int, to: int) -> None:
        """Move the memslot that covers ``ipa`` so that it starts at IPA ``to``."""
        slot = self.slot_at(ipa)
        self.set_memslot(Memslot(slot.slot, to, slot.size, slot.hva, slot.flags))

    def set_flags(self, ipa: int, flags: SlotFlags) -> None:
        """Change the flags of the memslot that covers ``ipa``."""
        self.set_memslot(self.slot_at(ipa).with_flags(flags))

    def dirty_pages(self, ipa: int) -> list[int]:
        """KVM_GET_DIRTY_LOG of the memslot that covers ``ipa``. Returns the IPAs of the pages that were dirty."""
        slot = self.slot_at(ipa)
        raw = self.agent(op.vm_dirty_log, vm=self.id, slot=slot.slot, pages=slot.pages)
        self.stores.forget(slot.ipa, slot.size)
        bits = np.unpackbits(np.frombuffer(raw, dtype=np.uint8), bitorder="little")
        return [slot.ipa + int(page) * PAGE for page in np.flatnonzero(bits[: slot.pages])]

    def frame_of(self, ipa: int) -> int:
        """Return the PA of the byte at ``ipa`` according to the host's pagemap, 0 if no page is present."""
        hva = self.slot_at(ipa).hva_of(ipa)
        frame = Memory(self.agent, hva & ~(PAGE - 1), PAGE).frame()
        return frame and frame | (hva & (PAGE - 1))

    def destroy(self) -> None:
        """Close the VM and unmap its memory."""
        destroy([self])


def destroy(vms: Sequence[Vm]) -> None:
    """Close these VMs and unmap their memory, in a few requests."""
    alive = [vm for vm in vms if vm.alive]
    for vm in alive:
        vm.alive = False
    for agent in {vm.agent for vm in alive}:
        own = [vm for vm in alive if vm.agent is agent]
        for some in _batches([request(op.vm_destroy, vm=vm.id) for vm in own]):
            agent.batch(some, _PATIENCE)
        gone = [memory.release() for vm in own for memory in vm.memories]
        for some in _batches([one for one in gone if one]):
            agent.batch(some, _PATIENCE)


def add_memory(vms: Sequence[Vm], ipa: int, size: int) -> None:
    """Give each of these VMs a memslot of ``size`` bytes at ``ipa``, with memory of its own, in two requests."""
    agent = vms[0].agent
    hva = agent(op.memory_map, size=len(vms) * size)
    requests = []
    for index, vm in enumerate(vms):
        memory = Memory(agent, hva + index * size, size)
        vm.memories.append(memory)
        requests.append(vm.record_memslot(Memslot(vm.memslots.next_number, ipa, size, memory.hva)))
    agent.batch(requests, _PATIENCE)


def _batches(requests: list[Request[None]]) -> Iterator[list[Request[None]]]:
    """Split the requests into batches small enough to be answered within :data:`_PATIENCE`."""
    return (requests[i : i + _BATCH] for i in range(0, len(requests), _BATCH))
