"""A vCPU in the host. The payload that runs on it is :class:`~arm_kvm.guest.driver.Guest`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from arm_kvm.guest.driver import RUN_DEADLINE, Guest
from arm_kvm.guest.exits import Exit, Mmio, decode_exit
from arm_kvm.guest.isa import A32, Isa
from arm_kvm.guest.payload import CODE, DOORBELL, MAILBOX, MAILBOX_SIZE
from arm_kvm.support.errors import AgentTimeout
from arm_kvm.vmm.client import Agent, Request, op, request
from arm_kvm.vmm.descriptor import Descriptor
from arm_kvm.vmm.memory import Memory
from arm_kvm.vmm.memslots import MemslotRecord

_MMIO_EXITS = 2000  #: most MMIO exits of one order; the payload never makes so many
_WAIT_SLICE = 0.25
_EL1_32BIT = 1 << 1


@dataclass
class Devices:
    """Device emulation: MMIO reads and writes access ``values``, by IPA, 0 at first. ``exits`` lists them in order."""

    values: dict[int, int] = field(default_factory=dict)
    exits: list[Mmio] = field(default_factory=list)


class Vcpu:
    """One vCPU. It runs inside the agent, from :meth:`start` until an exit; longer runs have a thread of their own."""

    def __init__(
        self, agent: Agent, vm: int, index: int, isa: Isa, mailboxes: Memory, memslots: MemslotRecord, devices: Devices
    ) -> None:
        self.index = index
        self.isa = isa
        self.mailbox = MAILBOX + index * MAILBOX_SIZE  #: IPA of its mailbox
        self.guest = Guest(self)
        self._agent = agent
        self._vm = vm
        self._host_bits = agent.bits
        self._mailboxes = mailboxes
        self._memslots = memslots
        self._devices = devices

    # -- creation and reset ----------------------------------------------------------------------

    def creation(self) -> list[Request[Any]]:
        """Return the requests that create the vCPU and set it to the payload's entry."""
        return [self._create(init=True), *self._to_entry()]

    def _create(self, init: bool) -> Request[Any]:
        features = _EL1_32BIT if self.isa is A32 and self._host_bits == 64 else 0
        return request(op.vcpu_create, vm=self._vm, vcpu=self.index, features=features, init=init)

    def create(self, *, init: bool = True) -> None:
        """KVM_CREATE_VCPU, for a VM that was created without vCPUs (``make_vm(create_vcpus=False)``).

        Without ``init``, KVM_ARM_VCPU_INIT is left to :meth:`reset`; until then KVM_RUN fails with ENOEXEC.
        """
        self._agent.batch(self.creation() if init else [self._create(init=False)])

    def _to_entry(self) -> list[Request[Any]]:
        base, word = (0x4020_0000_0010_0000, 1) if self._host_bits == 32 else (0x6030_0000_0010_0000, 2)
        pc, pstate = (15, 16) if self._host_bits == 32 else (64, 66)
        values = {
            base + 0 * word: self.mailbox,
            base + pc: CODE,
            base + pstate: 0x1D3 if self.isa is A32 else 0x3C5,
        }
        return [
            request(op.vcpu_register, vm=self._vm, vcpu=self.index, reg=reg, value=value)
            for reg, value in values.items()
        ]

    def restart(self) -> None:
        """Set pc to the payload's entry, r0 or x0 to the mailbox, and mask exceptions. Keeps system registers."""
        self._agent.batch(self._to_entry())

    def reset(self) -> None:
        """KVM_ARM_VCPU_INIT, again if need be, as for a guest's reboot, and then :meth:`restart`."""
        self._agent.batch([request(op.vcpu_init, vm=self._vm, vcpu=self.index), *self._to_entry()])

    @property
    def descriptor(self) -> Descriptor:
        """The vCPU's file descriptor, for ioctls that have no method here, and to map its dirty ring."""
        return Descriptor(self._agent, self._agent(op.vcpu_fd, vm=self._vm, vcpu=self.index))

    def get_register(self, reg: int) -> int:
        """KVM_GET_ONE_REG; ``reg`` is the full 64-bit id."""
        return self._agent(op.vcpu_register, vm=self._vm, vcpu=self.index, reg=reg)

    def set_register(self, reg: int, value: int) -> None:
        """KVM_SET_ONE_REG."""
        self._agent(op.vcpu_register, vm=self._vm, vcpu=self.index, reg=reg, value=value)

    # -- running ---------------------------------------------------------------------------------

    def pin(self, cpu: int) -> None:
        """Bind the vCPU's thread to a CPU of the host."""
        self._agent(op.vcpu_pin, vm=self._vm, vcpu=self.index, cpu=cpu)

    def kick(self) -> None:
        """Force the running vCPU to exit, with exit ``interrupted``."""
        self._agent(op.vcpu_kick, vm=self._vm, vcpu=self.index)

    def start(self, *, answer: int | None = None, seconds: float = 0.0) -> Exit | None:
        """Run the vCPU. Returns the exit if it comes within ``seconds``, else None: the vCPU runs on.

        ``answer`` completes a pending MMIO read.
        """
        raw = self._agent(op.vcpu_run, vm=self._vm, vcpu=self.index, answer=answer, seconds=seconds)
        return decode_exit(raw) if isinstance(raw, dict) else None

    def begin_orders(
        self, mailbox: bytes, seconds: float = 0.0, persistent: bool = False
    ) -> Callable[[], tuple[Exit | None, bytes]]:
        """Store ``mailbox`` and run the vCPU. Returns a function that waits for the exit and the mailbox's new content.

        The exit is None when it does not come within ``seconds``: the vCPU runs on. ``persistent`` repeats a KVM_RUN
        that fails with EFAULT.
        """
        answer = self._agent.begin(
            request(
                op.vcpu_run,
                vm=self._vm,
                vcpu=self.index,
                orders=self._mailboxes.hva + self.index * MAILBOX_SIZE,
                seconds=seconds,
                persistent=persistent,
                blob=mailbox,
            )
        )

        def result() -> tuple[Exit | None, bytes]:
            raw = answer(RUN_DEADLINE)
            return (decode_exit(raw[0]), raw[1]) if isinstance(raw, (tuple, list)) else (None, b"")

        return result

    def wait(self, deadline: float = RUN_DEADLINE) -> Exit:
        """Wait for the exit of the run under way and return it. Raises AgentTimeout after ``deadline`` seconds."""
        for _ in range(max(1, round(deadline / _WAIT_SLICE))):
            if raw := self._agent(op.vcpu_wait, vm=self._vm, vcpu=self.index, seconds=_WAIT_SLICE):
                return decode_exit(raw)
        self.kick()
        self._agent(op.vcpu_wait, vm=self._vm, vcpu=self.index, seconds=1.0)
        raise AgentTimeout(f"vCPU {self.index} did not exit within {deadline:.0f} s", remedy="does the guest loop?")

    def run(self, *, answer: int | None = None) -> Exit:
        """Run until an exit and return it; ``answer`` completes a pending MMIO read. Raises AgentTimeout."""
        return self.start(answer=answer, seconds=_WAIT_SLICE) or self.wait()

    def serve(self, exit_: Exit) -> Exit:
        """Serve MMIO exits from the VM's ``device`` and run on, until the doorbell or an exit that is not MMIO.

        Returns that exit. Raises AgentTimeout when there are too many MMIO exits: the guest makes no progress.
        """
        served = 0
        while isinstance(exit_, Mmio) and exit_.ipa != DOORBELL:
            if (served := served + 1) > _MMIO_EXITS:
                raise AgentTimeout(f"{served} MMIO exits of one order, the last at IPA {exit_.ipa:#x}: no progress")
            self._devices.exits.append(exit_)
            if exit_.write:
                self._devices.values[exit_.ipa] = exit_.value
                exit_ = self.run()
            else:
                exit_ = self.run(answer=self._devices.values.get(exit_.ipa, 0) & ((1 << 8 * exit_.size) - 1))
        return exit_

    def measure_mmio(self, exits: int) -> float:
        """Measure the seconds that one MMIO exit takes, as the mean of ``exits`` doorbells. Raises AgentTimeout."""
        measured = self._agent.ask(request(op.vcpu_measure_mmio, vm=self._vm, vcpu=self.index, exits=exits), 120.0)
        if measured is None:
            raise AgentTimeout(f"{exits} MMIO exits took longer than a minute", remedy="measure fewer")
        return measured["seconds"]

    # -- for the payload's driver ------------------------------------------------------------------------

    def read_mailbox(self, offset: int, size: int) -> bytes:
        """Load from the mailbox."""
        return self._mailboxes.read(self.index * MAILBOX_SIZE + offset, size)

    def write_mailbox(self, offset: int, data: bytes) -> None:
        """Store to the mailbox, also while the guest runs."""
        self._mailboxes.write(self.index * MAILBOX_SIZE + offset, data)

    def record_store(self, ipa: int, size: int) -> None:
        """Record that the guest is ordered to store there, for the dirty-log model."""
        self._memslots.record_store(ipa, size)
