"""The guest as test cases use it: read, write, execute, spin, without assembly or knowledge of the mailbox.

An order that fails raises :class:`~arm_kvm.guest.isa.GuestException` when the guest took an exception, and
:class:`RunFailed` when KVM_RUN returned for another reason than the end of the order.
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
#: Data register of accesses when the test names none.
_REGISTER = 3
#: Seconds that the agent waits for the end of an order before it answers that the vCPU still runs.
_WAIT = 0.25
RUN_DEADLINE = 20.0  #: seconds that a vCPU may stay in the guest without an exit
_A_FAULT = 0.03  #: seconds that the faults of one page may take on a loaded machine


class RunFailed(Exception):
    """KVM_RUN returned before the guest finished its orders. ``exit`` says why, ``errno`` if the ioctl failed."""

    def __init__(self, exit_: Exit) -> None:
        name = errno_names.errorcode.get(exit_.errno, "")
        super().__init__(f"KVM_RUN: {exit_.kind} {name} {' '.join(map(hex, exit_.data))}".rstrip())
        self.exit = exit_
        self.errno = exit_.errno


@dataclass(frozen=True)
class Order:
    """One order for the payload: an operation and four 64-bit arguments, whose meanings are in a32.S and a64.S."""

    op: str
    addr: int = 0
    value: int = 0
    count: int = 0
    stride: int = 0
    wrote: tuple[int, int] | None = None  #: IPA and size in bytes of what it stores to, for the dirty-log model

    def encode(self) -> bytes:
        words = (p.OPS[self.op], self.addr, self.value, self.count, self.stride)
        return _ORDER.pack(*(word & _U64 for word in words), 0, 0, 0)


@dataclass
class Hammer:
    """The number of rounds of :meth:`Guest.hammering`, set at the end of its block."""

    rounds: int = 0


class OrderResult:
    """What the payload wrote back into an order: a value, a status, and for an exception where and why."""

    def __init__(self, raw: bytes) -> None:
        self.value: int
        self.pc: int
        self.syndrome: int
        self.address: int
        _, _, self.value, _, self.pc, status, self.syndrome, self.address = _ORDER.unpack(raw)
        self.status = Status(status)


class VcpuPort(Protocol):
    """What the driver needs of a vCPU: to run orders, to access the mailbox, to serve MMIO, to record stores."""

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

    The dirty-log model takes the address of a store for an IPA: do not log dirty pages of memory that the guest's own
    stage 1 maps at another address.
    """

    def __init__(self, vcpu: VcpuPort) -> None:
        self._vcpu = vcpu
        self._isa = vcpu.isa
        self._first_exit: Exit | None = None
        self._answer = b""
        self.entered = False  #: whether the vCPU was given an order
        self.running = False  #: whether an order is under way

    # -- single orders ------------------------------------------------------------------------------

    def read(self, ipa: int, size: int = 4, *, signed: bool = False, insn: str = "", reg: int = _REGISTER) -> int:
        """Load ``size`` bytes, or with instruction ``insn``, into data register ``reg`` and return its value.

        The value of a signed load may be negative. Raises GuestException, RunFailed.
        """
        access = self._isa.access(insn) if insn else self._isa.default_access(size, False, signed)
        value = self._do(self._access(access, ipa, 0, reg)).value
        value &= (1 << access.bits) - 1
        return value - (1 << access.bits) if access.signed and value >> (access.bits - 1) else value

    def write(self, ipa: int, value: int, size: int = 4, *, insn: str = "", reg: int = _REGISTER) -> None:
        """Store the low ``size`` bytes of ``value`` from ``reg``, or with instruction ``insn``."""
        access = self._isa.access(insn) if insn else self._isa.default_access(size, True)
        self._do(self._access(access, ipa, value, reg))

    def _access(self, access: Access, ipa: int, value: int, reg: int) -> Order:
        wrote = (ipa, access.size) if access.write else None
        return Order("access", ipa, value, self._isa.gadget(access, reg), wrote=wrote)

    def execute(self, ipa: int) -> None:
        """Branch with link to ``ipa``, where a return instruction must be (:attr:`ret` is its encoding)."""
        self._do(Order("execute", ipa))

    @property
    def ret(self) -> bytes:
        """The return instruction of this guest's ISA, to be stored where :meth:`execute` branches to."""
        return self._isa.ret

    def hypercall(self, function: int, *arguments: int) -> int:
        """HVC with an SMCCC function id and up to three arguments. Returns the first result register."""
        first, second, third, *_ = (*arguments, 0, 0, 0)
        bits = self._isa.pointer_bits
        return self._do(Order("hypercall", function, first, second, third)).value & ((1 << bits) - 1)

    def fill(self, ipa: int, count: int, stride: int = 0x1000, seed: int = 0) -> None:
        """Store address ^ ``seed``, a 32-bit word, to each of ``count`` addresses ``stride`` bytes apart."""
        self._do(Order("fill", ipa, seed, count, stride, wrote=(ipa, (count - 1) * stride + 4)))

    def check(self, ipa: int, count: int, stride: int = 0x1000, seed: int = 0) -> list[int]:
        """Compare with what :meth:`fill` stored: [] when all words match, else [mismatches, address of the first]."""
        result = self._do(Order("check", ipa, seed, count, stride))
        return [result.value, result.address] if result.value else []

    def enable_mmu(self, stage1: GuestStage1) -> None:
        """Enable the MMU with these tables, which must have been written to guest memory (GuestStage1.encode)."""
        regs = stage1.registers(self._isa)
        self._do(Order("mmu", regs.ttbr0, regs.tcr, regs.mair, regs.sctlr))

    def flush_tlb(self) -> None:
        """Invalidate this vCPU's stage-1 TLB entries, after a change of the guest's own tables."""
        self._do(Order("flush"))

    def ping(self) -> None:
        """Enter the guest and return: an order without effect."""
        self._do(Order("nop"))

    # -- batches and concurrency ------------------------------------------------------------------------

    def batch(self, orders: list[Order]) -> list[OrderResult]:
        """Run up to 59 orders in one guest entry. Returns a result for each; an exception is a result, too."""
        self._begin(orders)
        return self._end(len(orders))

    def start_fill(self, ipa: int, count: int, stride: int = 0x1000, seed: int = 0) -> None:
        """Start a :meth:`fill` and do not wait, so that vCPUs can race; :meth:`finish` waits."""
        self._begin([Order("fill", ipa, seed, count, stride, wrote=(ipa, (count - 1) * stride + 4))], wait=0.0)

    def finish(self) -> None:
        """Wait for the end of :meth:`start_fill`. Raises GuestException, RunFailed."""
        self.checked(self._end(1)[0])

    @contextmanager
    def hammering(self, ipa: int, count: int, stride: int = 0x1000) -> Iterator[Hammer]:
        """Within the block, the vCPU adds 1 to each of ``count`` words, in rounds; the last round is completed.

        An access that the host's own mapping does not permit (KVM_RUN: EFAULT) is repeated until it succeeds.
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
        """Start what :meth:`hammering` does, without an end, for a VM that will be destroyed or killed meanwhile."""
        wrote = (ipa, (count - 1) * stride + 4)
        self._begin([Order("hammer", ipa, 0, count, stride, wrote=wrote)], wait=0.0, persistent=True)

    def await_interrupt(self, gicc: int) -> None:
        """Make the guest wait for an interrupt, and return at once; :meth:`interrupt_taken` waits for the guest.

        ``gicc`` is the IPA of the GICv2 CPU interface, through which the guest acknowledges and ends the interrupt.
        """
        self._begin([Order("interrupt", gicc)], wait=0.0)

    def interrupt_taken(self) -> int:
        """Wait for the end of :meth:`await_interrupt` and return the value that the guest read from GICC_IAR."""
        return self.checked(self._end(1)[0]).value

    @contextmanager
    def spinning(self) -> Iterator[None]:
        """Within the block, the vCPU stays in the guest."""
        self._begin([Order("spin")], wait=0.0)
        try:
            yield
        finally:
            self._vcpu.write_mailbox(p.STOP, _STOP)
            self._end(1)

    @contextmanager
    def spinning_for(self, rounds: int) -> Iterator[None]:
        """Within the block, the vCPU enters the guest and executes a short loop this many times.

        This is faster than :meth:`spinning`, because a short run needs no thread, but the agent accepts no other
        request within the block.
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
        """Encode the orders for the mailbox, record their stores, and mark the vCPU as running."""
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
        """Set the vCPU to the payload's entry: from where it is, it would repeat the instruction that failed."""
        try:
            self._vcpu.restart()
        except HostOsError as e:
            if e.errno != errno_names.EIO:  # a VM whose GIC cannot be mapped is dead for newer kernels (kvm_vm_dead)
                raise
            self.entered = False

    @staticmethod
    def results(raw: bytes) -> list[OrderResult]:
        """Decode the orders of a mailbox, ``raw``, after the payload has carried them out."""
        return [OrderResult(raw[i : i + p.ORDER_SIZE]) for i in range(0, len(raw), p.ORDER_SIZE)]

    def _do(self, order: Order) -> OrderResult:
        self._begin([order])
        return self.checked(self._end(1)[0])

    def checked(self, result: OrderResult) -> OrderResult:
        """Return the result. Raises GuestException if the order ended with an exception."""
        if result.status is not Status.OK:
            how = (result.syndrome, result.address, result.pc)
            raise self._isa.exception(result.status, *how, self._registers())
        return result

    def _registers(self) -> tuple[int, ...]:
        """The general registers that the payload's vectors saved at the last exception."""
        count, width = self._isa.general_registers, self._isa.pointer_bits // 8
        raw = self._vcpu.read_mailbox(p.REGISTERS, count * width)
        return tuple(int.from_bytes(raw[at : at + width], "little") for at in range(0, count * width, width))
