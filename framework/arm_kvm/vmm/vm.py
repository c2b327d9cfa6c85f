"""Virtual machines on the host, as a test author holds them: memory, vCPUs, exits.

A :class:`Vm` remembers what it was given (memslots, what guests were told to write), because that is
what the oracle holds the kernel against. It trusts nothing it reads back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from arm_kvm.guest.driver import RUN_DEADLINE, Guest
from arm_kvm.guest.isa import A32, Isa
from arm_kvm.guest.payload import CODE, CODE_SIZE, DOORBELL, MAILBOX, MAILBOX_SIZE, assemble
from arm_kvm.model.arch.regime import Regime
from arm_kvm.model.kvm import memslots
from arm_kvm.model.kvm.memslots import Memslot, SlotFlags, Window
from arm_kvm.support.errors import AgentTimeout, ConfigError
from arm_kvm.vmm.client import Agent, Request
from arm_kvm.vmm.memory import PAGE, File, Memory, SharedMemory
from arm_kvm.vmm.vgic import Vgic

_MMIO_EXITS = 2000  #: of one order, at most: no payload asks for so many
_WAIT_SLICE = 0.25
_CODE_SLOT, _MAILBOX_SLOT, _FIRST_FREE_SLOT = 0, 1, 2
_EL1_32BIT = 1 << 1
_CREATION, _CREATION_EACH = 20.0, 0.5  #: seconds of patience for VMs to be made
_PATIENCE, _BATCH = 60.0, 100


def _map(size: int) -> Request:
    return "memory_map", {"size": size}


@dataclass(frozen=True)
class Exit:
    """Why KVM_RUN returned. ``kind`` is the KVM exit's name, ``error`` when the ioctl itself failed."""

    kind: str
    errno: int = 0
    data: tuple[int, ...] = ()


@dataclass(frozen=True)
class Mmio(Exit):
    """KVM_EXIT_MMIO: ``size`` bytes at guest-physical ``ipa``; ``value`` is what was written (0 for a read)."""

    kind: str = "mmio"
    ipa: int = 0
    size: int = 0
    write: bool = False
    value: int = 0


def decode_exit(raw: dict) -> Exit:
    """The agent's words for an exit."""
    if raw["exit"] == "mmio":
        value = raw["value"] if raw["write"] else 0  # of a read, KVM leaves what was there before
        return Mmio(ipa=raw["ipa"], size=raw["size"], write=raw["write"], value=value)
    return Exit(raw["exit"], raw.get("errno", 0), tuple(raw.get("data", ())))


class Vcpu:
    """One vCPU. It runs in a thread of its own inside the agent, from :meth:`start` until an exit."""

    def __init__(self, vm: Vm, index: int, isa: Isa) -> None:
        self.vm = vm
        self.index = index
        self.isa = isa
        self._agent = vm.agent
        self._id = {"vm": vm.id, "vcpu": index}
        self.mailbox = MAILBOX + index * MAILBOX_SIZE

    def creation(self) -> list[Request]:
        """The requests that make it."""
        features = _EL1_32BIT if self.isa is A32 and self.vm.host_bits == 64 else 0
        return [("vcpu_create", {"features": features, **self._id}), *self._to_entry()]

    def _to_entry(self) -> list[Request]:
        base, word = (0x4020_0000_0010_0000, 1) if self.vm.host_bits == 32 else (0x6030_0000_0010_0000, 2)
        pc, pstate = (15, 16) if self.vm.host_bits == 32 else (64, 66)
        values = {
            base + 0 * word: self.mailbox,
            base + pc: CODE,
            base + pstate: 0x1D3 if self.isa is A32 else 0x3C5,
        }
        return [("vcpu_register", {"reg": reg, "value": value, **self._id}) for reg, value in values.items()]

    def restart(self) -> None:
        """To the payload's entry: pc there, first argument the mailbox, exceptions masked. System registers stay."""
        self._agent.batch(self._to_entry())

    def reset(self) -> None:
        """KVM_ARM_VCPU_INIT again, as a VMM does whose guest restarts, and to the payload's entry."""
        self._agent.batch([("vcpu_init", self._id), *self._to_entry()])

    def get_register(self, reg: int) -> int:
        """KVM_GET_ONE_REG; ``reg`` is the full 64-bit id."""
        return self._agent("vcpu_register", reg=reg, **self._id)

    def set_register(self, reg: int, value: int) -> None:
        """KVM_SET_ONE_REG."""
        self._agent("vcpu_register", reg=reg, value=value, **self._id)

    def pin(self, cpu: int) -> None:
        """Bind the vCPU's thread to a CPU of the host."""
        self._agent("vcpu_pin", cpu=cpu, **self._id)

    def kick(self) -> None:
        """Force the running vCPU out of the guest; its exit is then ``interrupted``."""
        self._agent("vcpu_kick", **self._id)

    def start(self, *, answer: int | None = None, seconds: float = 0.0) -> Exit | None:
        """Run; the exit if it comes within ``seconds``, else None and it runs on.

        ``answer`` completes a pending MMIO read.
        """
        raw = self._agent("vcpu_run", answer=answer, seconds=seconds, **self._id)
        return raw and decode_exit(raw)

    def start_orders(self, orders: bytes, seconds: float = 0.0, persistent: bool = False) -> tuple[Exit | None, bytes]:
        """Run with these orders in the mailbox; the exit as of :meth:`start`, and with one what they have become.

        ``persistent``: a run that ends with EFAULT is tried again.
        """
        return self.begin_orders(orders, seconds, persistent)()

    def begin_orders(
        self, orders: bytes, seconds: float = 0.0, persistent: bool = False
    ) -> Callable[[], tuple[Exit | None, bytes]]:
        """Ask for what :meth:`start_orders` does; what is returned waits for its result when it is called."""
        where = self.vm.mailboxes.hva + self.index * MAILBOX_SIZE
        how = {"orders": where, "seconds": seconds, "persistent": persistent}
        answer = self._agent.begin("vcpu_run", blob=orders, **how, **self._id)

        def result() -> tuple[Exit | None, bytes]:
            raw = answer()
            return (None, b"") if raw is None else (decode_exit(raw[0]), raw[1])

        return result

    def wait(self, deadline: float = RUN_DEADLINE) -> Exit:
        """The exit of the run under way. Raises AgentTimeout after ``deadline`` seconds in the guest."""
        for _ in range(max(1, round(deadline / _WAIT_SLICE))):
            if raw := self._agent("vcpu_wait", seconds=_WAIT_SLICE, **self._id):
                return decode_exit(raw)
        self.kick()
        self._agent("vcpu_wait", seconds=1.0, **self._id)
        raise AgentTimeout(f"vCPU {self.index} did not exit within {deadline:.0f} s", remedy="does the guest loop?")

    def run(self, **how) -> Exit:
        """Run until an exit. Same arguments as :meth:`start`."""
        return self.start(seconds=_WAIT_SLICE, **how) or self.wait()


@dataclass
class Written:
    """Where guests were told to write since the last dirty log: ranges of IPA, bytes."""

    ranges: list[tuple[int, int]] = field(default_factory=list)

    def add(self, ipa: int, size: int) -> None:
        self.ranges.append((ipa, ipa + size))

    def forget(self, ipa: int, size: int) -> None:
        """``[ipa, ipa + size)``, bytes, is clean."""
        outside = [((a, min(b, ipa)), (max(a, ipa + size), b)) for a, b in self.ranges]
        self.ranges = [(a, b) for pair in outside for a, b in pair if a < b]

    def pages(self, ipas: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Which of the ranges ``[ipa, ipa + size)`` contain a written byte (bool array)."""
        hit = np.zeros(len(ipas), dtype=bool)
        for start, end in self.ranges:
            hit |= (ipas < np.uint64(end)) & (ipas + sizes > np.uint64(start))
        return hit


class Vm:
    """One VM: its memslots, its vCPUs, and ``guest``, the payload on vCPU 0 that does what it is told.

    ``device`` is what answers MMIO: a dictionary from IPA to the value a read returns (0 elsewhere);
    writes store into it. ``exits`` lists every MMIO exit of the guests, in order, without the doorbell.
    """

    def __init__(
        self, agent: Agent, isa: Isa, number: int, vcpus: int, code: Memory, mailboxes: Memory, ipa_bits: int
    ) -> None:
        """Of a VM that was created; :meth:`create` does that."""
        self.agent = agent
        self.isa = isa
        self.host_bits = 64 if agent.hello["machine"] == "aarch64" else 32
        self.id = number
        self.ipa_bits = ipa_bits  #: 0: KVM's default, 40
        self.mailboxes = mailboxes
        self.slots: dict[int, Memslot] = {}
        self.memories: list[Memory] = [code, mailboxes]
        self.written = Written()
        self.device: dict[int, int] = {}
        self.exits: list[Mmio] = []
        self.regime: Regime | None = None  #: stage 2 as the oracle found it; a VM's root never changes
        self.vgic: Vgic | None = None
        self.alive = True
        self.vcpus = [Vcpu(self, index, isa) for index in range(vcpus)]
        self.guests = [Guest(vcpu) for vcpu in self.vcpus]

    @classmethod
    def create(cls, agent: Agent, isa: Isa, count: int = 1, *, vcpus: int = 1, ipa_bits: int = 0) -> list[Vm]:
        """``count`` VMs with the payload in them. Its code is one piece of host memory for all of them.

        Raises HostOsError when KVM refuses one. Those that were made before it end with the agent.
        """
        if not agent.hello["kvm"]:
            raise ConfigError("this host has no KVM; a test that needs one says so with @pytest.mark.needs('kvm')")
        patience = _CREATION + count * _CREATION_EACH
        size = vcpus * MAILBOX_SIZE
        maps = [_map(CODE_SIZE), _map(count * size)]
        *numbers, code, boxes = agent.batch([("vm_create", {"ipa_bits": ipa_bits})] * count + maps, patience)
        code, boxes = code["hva"], boxes["hva"]
        agent("memory_write", hva=code, blob=assemble(isa.name))
        shared = SharedMemory(agent, code, CODE_SIZE, users=count)
        mailboxes = [Memory(agent, boxes + index * size, size) for index in range(count)]
        vms = [cls(agent, isa, n, vcpus, shared, box, ipa_bits) for n, box in zip(numbers, mailboxes, strict=True)]
        try:
            agent.batch([request for vm in vms for request in vm._furnish()], patience)
        except BaseException:
            for vm in vms:
                vm.destroy()
            raise
        return vms

    def _furnish(self) -> list[Request]:
        """The requests that give a new VM its payload and its vCPUs."""
        code, mailboxes = self.memories
        slots = (
            Memslot(_CODE_SLOT, CODE, code.size, code.hva),
            Memslot(_MAILBOX_SLOT, MAILBOX, mailboxes.size, mailboxes.hva),
        )
        return [self.note(slot) for slot in slots] + [r for vcpu in self.vcpus for r in vcpu.creation()]

    @property
    def name(self) -> str:
        return f"VM {self.id}{self.agent.suffix}"

    @property
    def entered(self) -> bool:
        """Whether any of its guests has run."""
        return any(guest.entered for guest in self.guests)

    @property
    def guest(self) -> Guest:
        """The guest on vCPU 0."""
        return self.guests[0]

    # -- memory ----------------------------------------------------------------------------------

    def memory(
        self, size: int, *, align: int = PAGE, huge: bool = False, shared: bool = False, file: File | None = None
    ) -> Memory:
        """Host memory that belongs to no memslot yet. ``huge``: from the hugetlbfs pool (2 MiB pages)."""
        number = file.number if file else -1
        where = self.agent("memory_map", size=size, align=align, huge=huge, shared=shared, file=number)
        memory = Memory(self.agent, where["hva"], size)
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
        **kind,
    ) -> Memory:
        """A new memslot at ``ipa`` of ``size`` bytes, backed by ``memory`` or by new memory of that ``kind``.

        Raises HostOsError when KVM refuses (EEXIST overlap, EINVAL alignment, EFAULT beyond the IPA space).
        """
        memory = memory or self.memory(size, **kind)
        slot = self.next_slot if slot is None else slot
        self.set_memslot(Memslot(slot, ipa, size, memory.hva, flags))
        return memory

    @property
    def windows(self) -> Sequence[Window]:
        """Where the guest may reach devices of the board itself."""
        return self.vgic.windows if self.vgic else ()

    @property
    def next_slot(self) -> int:
        """The first memslot number above all in use."""
        return max([_FIRST_FREE_SLOT - 1, *self.slots]) + 1

    def set_memslot(self, slot: Memslot) -> None:
        """KVM_SET_USER_MEMORY_REGION: create, move, change flags, or (size 0) delete."""
        op, args = self._memslot(slot)
        self.agent(op, **args)
        self.note(slot)

    def _memslot(self, slot: Memslot) -> Request:
        where = {"ipa": slot.ipa, "size": slot.size, "hva": slot.hva, "flags": int(slot.flags)}
        return "vm_memslot", {"vm": self.id, "slot": slot.slot, **where}

    def note(self, slot: Memslot) -> Request:
        """Remember a memslot that KVM takes, or has taken; the request that gives it one."""
        old = self.slots.pop(slot.slot, None)
        if slot.size:
            self.slots[slot.slot] = slot
        owed = memslots.owed(old, slot)
        for ipa, size in owed.must_go + owed.must_be_read_only:
            self.written.forget(ipa, size)
        return self._memslot(slot)

    def expect_write(self, ipa: int, size: int) -> None:
        """A guest is about to be told to write there; remembered where it matters."""
        if any(slot.logging for slot in self.slots.values()):
            self.written.add(ipa, size)

    def slot_at(self, ipa: int) -> Memslot:
        """The memslot that covers ``ipa``; KeyError when none does."""
        for slot in self.slots.values():
            if slot.ipa <= ipa < slot.end:
                return slot
        raise KeyError(f"no memslot covers IPA {ipa:#x}")

    def delete_slot(self, ipa: int) -> None:
        """Delete the memslot that covers ``ipa``."""
        slot = self.slot_at(ipa)
        self.set_memslot(Memslot(slot.slot, slot.ipa, 0, slot.hva, slot.flags))

    def move_slot(self, ipa: int, to: int) -> None:
        """Move the memslot that covers ``ipa`` to begin at IPA ``to``."""
        slot = self.slot_at(ipa)
        self.set_memslot(Memslot(slot.slot, to, slot.size, slot.hva, slot.flags))

    def set_flags(self, ipa: int, flags: SlotFlags) -> None:
        """Change the flags of the memslot that covers ``ipa``."""
        self.set_memslot(self.slot_at(ipa).with_flags(flags))

    def dirty_pages(self, ipa: int) -> list[int]:
        """KVM_GET_DIRTY_LOG of the slot that covers ``ipa``: IPAs of its dirty pages; they are clean after."""
        slot = self.slot_at(ipa)
        raw = self.agent("vm_dirty_log", vm=self.id, slot=slot.slot, pages=slot.pages)
        self.written.forget(slot.ipa, slot.size)
        bits = np.unpackbits(np.frombuffer(raw, dtype=np.uint8), bitorder="little")
        return [slot.ipa + int(page) * PAGE for page in np.flatnonzero(bits[: slot.pages])]

    def frame_of(self, ipa: int) -> int:
        """The host's frame (physical address of the byte) behind ``ipa``, per pagemap; 0 if none is present."""
        hva = self.slot_at(ipa).hva_of(ipa)
        frame = Memory(self.agent, hva & ~(PAGE - 1), PAGE).frame()
        return frame and frame | (hva & (PAGE - 1))

    # -- running ---------------------------------------------------------------------------------

    def serve(self, vcpu: Vcpu, exit_: Exit) -> Exit:
        """Answer MMIO exits from :attr:`device` and run on, until the doorbell or an exit that is not MMIO.

        Raises AgentTimeout: the guest asks the same again and again.
        """
        served = 0
        while isinstance(exit_, Mmio) and exit_.ipa != DOORBELL:
            if (served := served + 1) > _MMIO_EXITS:
                raise AgentTimeout(f"{served} MMIO exits of one order, the last at IPA {exit_.ipa:#x}: no progress")
            self.exits.append(exit_)
            if exit_.write:
                self.device[exit_.ipa] = exit_.value
                exit_ = vcpu.run()
            else:
                exit_ = vcpu.run(answer=self.device.get(exit_.ipa, 0) & ((1 << 8 * exit_.size) - 1))
        return exit_

    def destroy(self) -> None:
        """Close the VM and give back its memory."""
        destroy([self])


def destroy(vms: Sequence[Vm]) -> None:
    """Close these VMs and give back their memory, in a few requests."""
    alive = [vm for vm in vms if vm.alive]
    for vm in alive:
        vm.alive = False
    for agent in {vm.agent for vm in alive}:
        own = [vm for vm in alive if vm.agent is agent]
        for some in _batches([("vm_destroy", {"vm": vm.id}) for vm in own]):
            agent.batch(some, _PATIENCE)
        gone = [memory.release() for vm in own for memory in vm.memories]
        for some in _batches([request for request in gone if request]):
            agent.batch(some, _PATIENCE)


def add_memory(vms: Sequence[Vm], ipa: int, size: int) -> None:
    """A new memslot at ``ipa`` of ``size`` bytes for each of these VMs, with memory of its own, in two requests."""
    agent = vms[0].agent
    hva = agent.batch([_map(len(vms) * size)])[0]["hva"]
    requests = []
    for index, vm in enumerate(vms):
        memory = Memory(agent, hva + index * size, size)
        vm.memories.append(memory)
        requests.append(vm.note(Memslot(vm.next_slot, ipa, size, memory.hva)))
    agent.batch(requests, _PATIENCE)


def _batches(requests: list[Request]) -> Iterator[list[Request]]:
    """Pieces of a size that is answered in reasonable time."""
    return (requests[i : i + _BATCH] for i in range(0, len(requests), _BATCH))
