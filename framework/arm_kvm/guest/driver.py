"""The guest as a test author commands it: read, write, execute, spin; no assembly, no mailbox.

An order that the guest cannot carry out raises what happened: :class:`GuestException` when the guest
took an exception, :class:`RunFailed` when KVM_RUN itself failed.
"""

from __future__ import annotations

import errno as errno_names
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from arm_kvm.guest import payload as p
from arm_kvm.guest.exits import Exit
from arm_kvm.guest.isa import Access, Isa, Status
from arm_kvm.guest.stage1 import GuestStage1
from arm_kvm.support.errors import HostOsError

_ORDER = struct.Struct("<8Q")
_HEADER = struct.Struct("<4I")
_U64 = (1 << 64) - 1
_STOP = struct.pack("<I", 1)
#: Register that accesses use when a test does not name one.
_REGISTER = 3
#: Seconds that the agent waits for the end of an order before it answers that it goes on.
_WAIT = 0.25
RUN_DEADLINE = 20.0  #: seconds that a vCPU may stay in the guest without an exit
_A_FAULT = 0.03  #: seconds that the faults of one page may take, on a machine with much else to do


class RunFailed(Exception):
    """KVM_RUN returned without the guest having finished: the exit says how, ``errno`` if the ioctl failed."""

    def __init__(self, exit_: Exit) -> None:
        name = errno_names.errorcode.get(exit_.errno, "")
        super().__init__(f"KVM_RUN: {exit_.kind} {name} {' '.join(map(hex, exit_.data))}".rstrip())
        self.exit = exit_
        self.errno = exit_.errno


@dataclass(frozen=True)
class Order:
    """One order for the payload: its operation and four 64-bit arguments; see a32.S and a64.S."""

    op: str
    addr: int = 0
    value: int = 0
    count: int = 0
    stride: int = 0
    wrote: tuple[int, int] | None = None  #: IPA and bytes it stores to, for the dirty-log model

    def encode(self) -> bytes:
        words = (p.OPS[self.op], self.addr, self.value, self.count, self.stride)
        return _ORDER.pack(*(word & _U64 for word in words), 0, 0, 0)


@dataclass
class Hammer:
    """How often :meth:`Guest.hammering` went round; known when its block is over."""

    rounds: int = 0


class OrderResult:
    """What the payload wrote back into an order."""

    def __init__(self, raw: bytes) -> None:
        _, _, self.value, _, self.pc, status, self.syndrome, self.address = _ORDER.unpack(raw)
        self.status = Status(status)


class VcpuPort(Protocol):
    """What the driver needs of a vCPU: run orders, read and write the mailbox, have MMIO served, record a store."""

    @property
    def isa(self) -> Isa: ...

    def begin_orders(
        self, mailbox: bytes, seconds: float, persistent: bool = False
    ) -> Callable[[], tuple[Exit | None, bytes]]: ...

    def wait(self, deadline: float) -> Exit: ...

    def serve(self, exit_: Exit) -> Exit: ...

    def restart(self) -> None: ...

    def read_mailbox(self, offset: int, size: int) -> bytes: ...

    def write_mailbox(self, offset: int, data: bytes) -> None: ...

    def record_store(self, ipa: int, size: int) -> None: ...


class Guest:
    """The payload on one vCPU. Addresses are IPAs until :meth:`enable_mmu`, then guest-virtual.

    (What was written is remembered by the address given: do not log dirty pages through a moved mapping.)
    """

    def __init__(self, vcpu: VcpuPort) -> None:
        self._vcpu = vcpu
        self._isa = vcpu.isa
        self._first_exit: Exit | None = None
        self._answer = b""
        self.entered = False  #: an order was given: the vCPU has run
        self.running = False  #: an order is under way

    # -- single orders ------------------------------------------------------------------------------

    def read(self, ipa: int, size: int = 4, *, signed: bool = False, insn: str = "", reg: int = _REGISTER) -> int:
        """Load ``size`` bytes (or with the named instruction) into data register ``reg``; its value.

        A signed load gives a negative number as the register holds it. Raises GuestException, RunFailed.
        """
        access = self._isa.access(insn) if insn else self._isa.default_access(size, False, signed)
        value = self._do(self._access(access, ipa, 0, reg)).value
        value &= (1 << access.bits) - 1
        return value - (1 << access.bits) if access.signed and value >> (access.bits - 1) else value

    def write(self, ipa: int, value: int, size: int = 4, *, insn: str = "", reg: int = _REGISTER) -> None:
        """Store the low ``size`` bytes of ``value`` (or with the named instruction) from ``reg``."""
        access = self._isa.access(insn) if insn else self._isa.default_access(size, True)
        self._do(self._access(access, ipa, value, reg))

    def _access(self, access: Access, ipa: int, value: int, reg: int) -> Order:
        wrote = (ipa, access.size) if access.write else None
        return Order("access", ipa, value, self._isa.gadget(access, reg), wrote=wrote)

    def execute(self, ipa: int) -> None:
        """Call ``ipa``; the page must hold a return instruction (:meth:`ret` is its encoding)."""
        self._do(Order("execute", ipa))

    @property
    def ret(self) -> bytes:
        """The return instruction of this guest's ISA, for the host to put where the guest will execute."""
        return self._isa.ret

    def hypercall(self, function: int, *arguments: int) -> int:
        """HVC with an SMC-convention function id and up to three arguments; the result register."""
        args = (*arguments, 0, 0, 0)
        bits = self._isa.pointer_bits
        return self._do(Order("hypercall", function, *args[:3])).value & ((1 << bits) - 1)

    def fill(self, ipa: int, count: int, stride: int = 0x1000, seed: int = 0) -> None:
        """Store one word to each of ``count`` addresses ``stride`` bytes apart: address ^ ``seed``."""
        self._do(Order("fill", ipa, seed, count, stride, wrote=(ipa, (count - 1) * stride + 4)))

    def check(self, ipa: int, count: int, stride: int = 0x1000, seed: int = 0) -> list[int]:
        """The reverse of :meth:`fill`: [] when all words are as filled, else [mismatches, first address]."""
        result = self._do(Order("check", ipa, seed, count, stride))
        return [result.value, result.address] if result.value else []

    def enable_mmu(self, stage1: GuestStage1) -> None:
        """Turn stage 1 on with a :class:`arm_kvm.guest.stage1.GuestStage1` that lies in guest memory."""
        regs = stage1.registers(self._isa)
        self._do(Order("mmu", regs.ttbr0, regs.tcr, regs.mair, regs.sctlr))

    def flush_tlb(self) -> None:
        """Invalidate this guest's own stage-1 TLB entries, after its tables were changed."""
        self._do(Order("flush"))

    def ping(self) -> None:
        """An order without effect: the vCPU enters the guest and comes back."""
        self._do(Order("nop"))

    # -- batches and concurrency ------------------------------------------------------------------------

    def batch(self, orders: list[Order]) -> list[OrderResult]:
        """Run up to 59 orders in one entry; a result each, exceptions included."""
        self._begin(orders)
        return self._end(len(orders))

    def start_fill(self, ipa: int, count: int, stride: int = 0x1000, seed: int = 0) -> None:
        """Like :meth:`fill`, without waiting; :meth:`finish` waits. For vCPUs that race."""
        self._begin([Order("fill", ipa, seed, count, stride, wrote=(ipa, (count - 1) * stride + 4))], wait=0.0)

    def finish(self) -> None:
        """Wait for what :meth:`start_fill` began."""
        self.checked(self._end(1)[0])

    @contextmanager
    def hammering(self, ipa: int, count: int, stride: int = 0x1000) -> Iterator[Hammer]:
        """Within the block the vCPU adds 1 to each of ``count`` words again and again; whole rounds.

        An access that the host's own mapping forbids (KVM_RUN: EFAULT) is tried again until it is allowed.
        """
        hammer = Hammer()
        self.start_hammer(ipa, count, stride)
        try:
            yield hammer
        finally:
            self._vcpu.write_mailbox(p.STOP, _STOP)
            (result,) = self._end(1, RUN_DEADLINE + _A_FAULT * count)
        hammer.rounds = self.checked(result).value

    def start_hammer(self, ipa: int, count: int, stride: int = 0x1000) -> None:
        """Begin what :meth:`hammering` does, for a VM that will not live to see its end."""
        wrote = (ipa, (count - 1) * stride + 4)
        self._begin([Order("hammer", ipa, 0, count, stride, wrote=wrote)], wait=0.0, persistent=True)

    def await_interrupt(self, gicc: int) -> None:
        """Wait for an interrupt, without waiting for the guest; :meth:`interrupt_taken` says which came.

        ``gicc``: the IPA of the GICv2's CPU interface, where the guest acknowledges and ends it.
        """
        self._begin([Order("interrupt", gicc)], wait=0.0)

    def interrupt_taken(self) -> int:
        """The interrupt that ended :meth:`await_interrupt`, as GICC_IAR gave it."""
        return self.checked(self._end(1)[0]).value

    @contextmanager
    def spinning(self) -> Iterator[None]:
        """Within the block the vCPU stays inside the guest."""
        self._begin([Order("spin")], wait=0.0)
        try:
            yield
        finally:
            self._vcpu.write_mailbox(p.STOP, _STOP)
            self._end(1)

    @contextmanager
    def spinning_for(self, rounds: int) -> Iterator[None]:
        """Within the block the vCPU enters the guest and stays for this many rounds of a short loop.

        Faster than :meth:`spinning`: a short run needs no thread. The agent answers nobody else until the block's end.
        """
        result = self._vcpu.begin_orders(self.issue([Order("spin", count=rounds)]), _WAIT)
        try:
            yield
        finally:
            self._first_exit, self._answer = result()
            self._end(1)

    # -- the mailbox -------------------------------------------------------------------------------------

    def _begin(self, orders: list[Order], wait: float = _WAIT, persistent: bool = False) -> None:
        if not 0 < len(orders) <= p.MAX_ORDERS:
            raise ValueError(f"a batch has 1 to {p.MAX_ORDERS} orders, not {len(orders)}")
        self._first_exit, self._answer = self._vcpu.begin_orders(self.issue(orders), wait, persistent)()

    def issue(self, orders: list[Order]) -> bytes:
        """Encode the orders for the mailbox and mark the vCPU as running."""
        for order in orders:
            if order.wrote:
                self._vcpu.record_store(*order.wrote)
        self.entered = self.running = True
        header = _HEADER.pack(len(orders), 0, 0, 0).ljust(p.ORDERS, b"\0")
        return header + b"".join(order.encode() for order in orders)

    def _end(self, count: int, deadline: float = RUN_DEADLINE) -> list[OrderResult]:
        try:
            exit_ = self._vcpu.serve(self._first_exit or self._vcpu.wait(deadline))
        finally:
            self.running = False
        if getattr(exit_, "ipa", None) != p.DOORBELL:
            self._restart()
            raise RunFailed(exit_)
        if exit_ is self._first_exit:
            return self.results(self._answer[p.ORDERS :])
        return self.results(self._vcpu.read_mailbox(p.ORDERS, count * p.ORDER_SIZE))

    def _restart(self) -> None:
        """The failed instruction would only fail again."""
        try:
            self._vcpu.restart()
        except HostOsError as e:
            if e.errno != errno_names.EIO:  # a VM whose GIC cannot be mapped is dead for newer kernels (kvm_vm_dead)
                raise
            self.entered = False

    @staticmethod
    def results(raw: bytes) -> list[OrderResult]:
        """The orders of a mailbox, carried out."""
        return [OrderResult(raw[i : i + p.ORDER_SIZE]) for i in range(0, len(raw), p.ORDER_SIZE)]

    def _do(self, order: Order) -> OrderResult:
        self._begin([order])
        return self.checked(self._end(1)[0])

    def checked(self, result: OrderResult) -> OrderResult:
        """The result of an order that was carried out. Raises GuestException of one that was not."""
        if result.status is not Status.OK:
            how = (result.syndrome, result.address, result.pc)
            raise self._isa.exception(result.status, *how, self._registers())
        return result

    def _registers(self) -> tuple[int, ...]:
        """The general registers that the vectors kept at the last exception."""
        count, width = self._isa.general_registers, self._isa.pointer_bits // 8
        raw = self._vcpu.read_mailbox(p.REGISTERS, count * width)
        return tuple(int.from_bytes(raw[at : at + width], "little") for at in range(0, count * width, width))
