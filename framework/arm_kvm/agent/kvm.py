"""KVM through its ioctls: VMs, memslots, vCPUs (each in a thread of its own, or many in turn in one).

Structures are packed by hand: modern headers have no asm/kvm.h for 32-bit Arm. Source:
Documentation/virt/kvm/api.txt (5.4), include/uapi/linux/kvm.h; numbers are common to both widths.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import signal
import struct
import time
from collections.abc import Callable
from typing import Any

from . import poison
from .device import Device
from .libc import ioctl
from .workers import Worker


def _io(nr: int) -> int:
    return 0xAE00 | nr


def _iow(nr: int, size: int) -> int:
    return 0x4000AE00 | size << 16 | nr


def _ior(nr: int, size: int) -> int:
    return 0x8000AE00 | size << 16 | nr


CREATE_VM = _io(0x01)
GET_VCPU_MMAP_SIZE = _io(0x04)
CREATE_VCPU = _io(0x41)
GET_DIRTY_LOG = _iow(0x42, 16)
SET_USER_MEMORY_REGION = _iow(0x46, 32)
RUN = _io(0x80)
SET_SIGNAL_MASK = _iow(0x8B, 4)
GET_ONE_REG = _iow(0xAB, 16)
SET_ONE_REG = _iow(0xAC, 16)
ARM_VCPU_INIT = _iow(0xAE, 32)
ARM_PREFERRED_TARGET = _ior(0xAF, 32)

# struct kvm_run
_IMMEDIATE_EXIT = 1
_EXIT_REASON = struct.Struct("<8xI")
_MMIO = struct.Struct("<Q8sIB")
_UNION = 32
_NONE_BLOCKED = struct.pack("<IQ", 8, 0)  # struct kvm_signal_mask: bytes of the set, the set
_REG_SIZE_SHIFT, _REG_SIZE_MASK = 52, 0xF

EXIT_NAMES = {
    0: "unknown",
    6: "mmio",
    9: "fail-entry",
    10: "interrupted",
    17: "internal-error",
    24: "system-event",
    28: "no-syndrome",
    31: "dirty-ring-full",
    39: "memory-fault",
}

Exit = dict[str, Any]  #: why KVM_RUN returned, by name, with what belongs to it
_NOTHING = contextlib.nullcontext()


class Vcpu:
    """One vCPU, and the thread that runs it if it runs alone."""

    def __init__(self, vm_fd: int, index: int, features: int, run_size: int, init: bool) -> None:
        self.fd = ioctl("KVM_CREATE_VCPU", vm_fd, CREATE_VCPU, index)
        try:
            self._target = bytearray(32)
            ioctl("KVM_ARM_PREFERRED_TARGET", vm_fd, ARM_PREFERRED_TARGET, self._target)
            struct.pack_into("<I", self._target, 4, features)
            self.run = mmap.mmap(self.fd, run_size)
            ioctl("KVM_SET_SIGNAL_MASK", self.fd, SET_SIGNAL_MASK, _NONE_BLOCKED)
            if init:
                self.init()
        except OSError:
            os.close(self.fd)  # or it would keep the whole VM alive
            raise
        self._worker: Worker[Exit] = Worker("KVM_RUN")

    def init(self) -> None:
        """The state of a CPU that is switched on. The access whose exit was the last is not completed any more."""
        ioctl("KVM_ARM_VCPU_INIT", self.fd, ARM_VCPU_INIT, self._target)
        _EXIT_REASON.pack_into(self.run, 0, 0)

    def run_once(self, around: contextlib.AbstractContextManager[object] = _NOTHING) -> Exit:
        """KVM_RUN until one exit, decoded; the ioctl alone is in the context ``around``."""
        try:
            with around:
                fcntl.ioctl(self.fd, RUN, 0)
        except OSError as e:
            if e.errno == errno.EINTR:
                self.run[_IMMEDIATE_EXIT] = 0
                wanted = poison.wanted()
                return {"exit": "bus-error", "signal": wanted} if wanted else {"exit": "interrupted"}
            return {"exit": "error", "errno": e.errno}
        (reason,) = _EXIT_REASON.unpack_from(self.run)
        name = EXIT_NAMES.get(reason, f"reason-{reason}")
        if name == "mmio":
            address, data, size, is_write = _MMIO.unpack_from(self.run, _UNION)
            value = int.from_bytes(data[:size], "little")
            return {"exit": name, "ipa": address, "size": size, "write": bool(is_write), "value": value}
        first, second = struct.unpack_from("<QQ", self.run, _UNION)
        return {"exit": name, "data": [first, second]}

    def run_on(self) -> Exit:
        """:meth:`run_once`, again and again while the host does not let the guest have what it wants."""
        while (exit_ := self.run_once()) == {"exit": "error", "errno": errno.EFAULT}:
            time.sleep(0.001)
        return exit_

    def start(self, order: Callable[[], Exit] | None = None) -> None:
        self._worker.start(order or self.run_once)

    def run_for(self, seconds: float, run: Callable[[], Exit]) -> Exit | None:
        """The exit if it comes in this time, else None and the vCPU runs on in its own thread.

        A short run stays in the caller's thread: handing it to another and back takes longer than most runs.
        """
        if self._worker.bound or not seconds:
            self.start(run)
            return self.wait(seconds)
        self._worker.require_idle()
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds)  # again, should the first come before the ioctl
        try:
            exit_ = run()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if exit_["exit"] != "interrupted":
            return exit_
        self.start(run)
        return None

    def wait(self, seconds: float) -> Exit | None:
        """The exit of the order under way, or None when it has not come in time."""
        return self._worker.wait(seconds)

    def answer_mmio(self, value: int) -> None:
        """Put the data of an MMIO read where KVM takes it from at the next run."""
        self.run[_UNION + 8 : _UNION + 16] = value.to_bytes(8, "little")

    def kick(self) -> None:
        """Make a running vCPU return to user space with exit "interrupted"."""
        self.run[_IMMEDIATE_EXIT] = 1
        signal.pthread_kill(self._worker.begin().ident or 0, signal.SIGUSR1)

    def pin(self, cpu: int) -> None:
        self._worker.bind(cpu)

    def register(self, reg: int, value: int | None = None) -> int:
        """Get (value None) or set the ONE_REG register with this id."""
        size = 1 << (reg >> _REG_SIZE_SHIFT & _REG_SIZE_MASK)
        buffer = ctypes.create_string_buffer(size)
        request = struct.pack("<QQ", reg, ctypes.addressof(buffer))
        if value is None:
            ioctl("KVM_GET_ONE_REG", self.fd, GET_ONE_REG, request)
            return int.from_bytes(buffer.raw, "little")
        buffer.raw = value.to_bytes(size, "little")
        ioctl("KVM_SET_ONE_REG", self.fd, SET_ONE_REG, request)
        return value

    def close(self) -> None:
        if self._worker.busy:
            self.kick()
            self.wait(1.0)
        self._worker.close()
        self.run.close()
        os.close(self.fd)


class Runner:
    """A thread bound to one CPU that runs vCPUs in turn, each until it rings its doorbell."""

    def __init__(self, cpu: int) -> None:
        self._worker: Worker[tuple[list[tuple[int, Exit]], bytes]] = Worker("KVM_RUN", cpu)

    def start(self, vcpus: list[Vcpu], mailboxes: list[int], doorbell: int, blob: bytes) -> None:
        size = len(blob) // len(vcpus)

        def in_turn() -> tuple[list[tuple[int, Exit]], bytes]:
            odd, out = [], []
            for index, (vcpu, mailbox) in enumerate(zip(vcpus, mailboxes)):  # noqa: B905 (Python 3.9 inside old hosts)
                ctypes.memmove(mailbox, blob[index * size : (index + 1) * size], size)
                exit_ = vcpu.run_once()
                if exit_.get("ipa") != doorbell:
                    odd.append((index, exit_))
                out.append(ctypes.string_at(mailbox, size))
            return odd, b"".join(out)

        self._worker.start(in_turn)

    def wait(self, seconds: float) -> tuple[list[tuple[int, Exit]], bytes] | None:
        return self._worker.wait(seconds)


class Vm:
    """One VM: its file descriptor and its vCPUs by index."""

    def __init__(self, kvm_fd: int, ipa_bits: int) -> None:
        self.fd = ioctl("KVM_CREATE_VM", kvm_fd, CREATE_VM, ipa_bits)
        self.vcpus: dict[int, Vcpu] = {}
        self.vgic: Device | None = None
        self._run_size = ioctl("KVM_GET_VCPU_MMAP_SIZE", kvm_fd, GET_VCPU_MMAP_SIZE)

    @property
    def device(self) -> Device:
        """The VGIC. OSError (ENODEV) when it has none."""
        if self.vgic is None:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), "VGIC")
        return self.vgic

    def add_vcpu(self, index: int, features: int, init: bool) -> None:
        self.vcpus[index] = Vcpu(self.fd, index, features, self._run_size, init)

    def set_memslot(self, slot: int, ipa: int, size: int, hva: int, flags: int) -> None:
        region = struct.pack("<IIQQQ", slot, flags, ipa, size, hva)
        ioctl("KVM_SET_USER_MEMORY_REGION", self.fd, SET_USER_MEMORY_REGION, region)

    def dirty_log(self, slot: int, pages: int) -> bytes:
        """The slot's dirty bitmap since the last call: little-endian u64 words, one bit a page."""
        bitmap = ctypes.create_string_buffer((pages + 63) // 64 * 8)
        request = struct.pack("<IIQ", slot, 0, ctypes.addressof(bitmap))
        ioctl("KVM_GET_DIRTY_LOG", self.fd, GET_DIRTY_LOG, request)
        return bitmap.raw

    def close_part(self, what: str) -> None:
        if what == "run":
            self.vcpus[0].run.close()
        elif what == "vgic":
            self.device.close()
        else:
            os.close(self.fd if what == "vm" else self.vcpus[0].fd)

    def close(self) -> None:
        for vcpu in self.vcpus.values():
            vcpu.close()
        if self.vgic:
            self.vgic.close()
        os.close(self.fd)


def measure_mmio(vcpu: Vcpu, exits: int) -> dict[str, float]:
    """Seconds per MMIO exit round trip: the payload rings its doorbell ``exits`` times, orders empty."""
    start = time.perf_counter()
    for _ in range(exits):
        fcntl.ioctl(vcpu.fd, RUN, 0)
    return {"seconds": (time.perf_counter() - start) / exits}
