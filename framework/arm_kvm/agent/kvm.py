"""KVM through its ioctls: VMs, memslots and vCPUs, each in a thread of its own, or many in turn in one thread.

Structures are packed by hand, because recent kernel headers have no asm/kvm.h for 32-bit Arm. Sources:
Documentation/virt/kvm/api.txt (5.4), include/uapi/linux/kvm.h. The ioctl numbers are the same for 32 and 64 bits.
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

from . import ioctls, poison
from .device import Device
from .libc import ioctl
from .workers import Worker

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

Exit = dict[str, Any]  #: why KVM_RUN returned: "exit", the name of the reason, and values that depend on it
_NOTHING = contextlib.nullcontext()


class Vcpu:
    """One vCPU, and the thread in which it runs unless the run is short or a :class:`Runner`'s."""

    def __init__(self, vm_fd: int, index: int, features: int, run_size: int, init: bool) -> None:
        self.fd = ioctl(ioctls.KVM_CREATE_VCPU, vm_fd, index)
        try:
            self._target = bytearray(32)
            ioctl(ioctls.KVM_ARM_PREFERRED_TARGET, vm_fd, self._target)
            struct.pack_into("<I", self._target, 4, features)
            self.run = mmap.mmap(self.fd, run_size)
            ioctl(ioctls.KVM_SET_SIGNAL_MASK, self.fd, _NONE_BLOCKED)
            if init:
                self.init()
        except OSError:
            os.close(self.fd)  # or it would keep the whole VM alive
            raise
        self._worker: Worker[Exit] = Worker("KVM_RUN")

    def init(self) -> None:
        """KVM_ARM_VCPU_INIT: the state of a CPU after power-on. A pending MMIO access is not completed."""
        ioctl(ioctls.KVM_ARM_VCPU_INIT, self.fd, self._target)
        _EXIT_REASON.pack_into(self.run, 0, 0)

    def run_once(self, around: contextlib.AbstractContextManager[object] = _NOTHING) -> Exit:
        """KVM_RUN once and decode the exit; only the ioctl is within the context ``around``."""
        try:
            with around:
                fcntl.ioctl(self.fd, ioctls.KVM_RUN.number, 0)
        except OSError as e:
            if e.errno == errno.EINTR:
                self.run[_IMMEDIATE_EXIT] = 0
                info = poison.of_guest()
                return {"exit": "bus-error", "signal": info} if info else {"exit": "interrupted"}
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
        """:meth:`run_once`, repeated while it fails with EFAULT: the host's mapping does not permit an access."""
        while (exit_ := self.run_once()) == {"exit": "error", "errno": errno.EFAULT}:
            time.sleep(0.001)
        return exit_

    def start(self, order: Callable[[], Exit] | None = None) -> None:
        self._worker.start(order or self.run_once)

    def run_for(self, seconds: float, run: Callable[[], Exit]) -> Exit | None:
        """Return the exit if it comes within ``seconds``, else None: the vCPU runs on in its own thread.

        A run starts in the caller's thread, because to pass it to another thread and back takes longer than most runs.
        """
        if self._worker.bound or not seconds:
            self.start(run)
            return self.wait(seconds)
        self._worker.require_idle()
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds)  # periodic: the first may come before the ioctl
        try:
            exit_ = run()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if exit_["exit"] != "interrupted":
            return exit_
        self.start(run)
        return None

    def wait(self, seconds: float) -> Exit | None:
        """Return the exit of the run under way, or None if it takes longer than ``seconds``."""
        return self._worker.wait(seconds)

    def answer_mmio(self, value: int) -> None:
        """Store the data of an MMIO read in struct kvm_run, for the next KVM_RUN."""
        self.run[_UNION + 8 : _UNION + 16] = value.to_bytes(8, "little")

    def kick(self) -> None:
        """Force a running vCPU to return to user space, with exit "interrupted"."""
        self.run[_IMMEDIATE_EXIT] = 1
        signal.pthread_kill(self._worker.begin().ident or 0, signal.SIGUSR1)

    def pin(self, cpu: int) -> None:
        self._worker.bind(cpu)

    def register(self, reg: int, value: int | None = None) -> int:
        """Get (``value`` None) or set the register with this KVM_GET_ONE_REG id."""
        size = 1 << (reg >> _REG_SIZE_SHIFT & _REG_SIZE_MASK)
        buffer = ctypes.create_string_buffer(size)
        request = struct.pack("<QQ", reg, ctypes.addressof(buffer))
        if value is None:
            ioctl(ioctls.KVM_GET_ONE_REG, self.fd, request)
            return int.from_bytes(buffer.raw, "little")
        buffer.raw = value.to_bytes(size, "little")
        ioctl(ioctls.KVM_SET_ONE_REG, self.fd, request)
        return value

    def close(self) -> None:
        if self._worker.busy:
            self.kick()
            self.wait(1.0)
        self._worker.close()
        self.run.close()
        os.close(self.fd)


class Runner:
    """A thread bound to one CPU that runs vCPUs in turn, each until its next exit, normally the doorbell."""

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
    """One VM: its file descriptor, its vCPUs by index, and its VGIC."""

    def __init__(self, kvm_fd: int, ipa_bits: int) -> None:
        self.fd = ioctl(ioctls.KVM_CREATE_VM, kvm_fd, ipa_bits)
        self.vcpus: dict[int, Vcpu] = {}
        self.vgic: Device | None = None
        self._run_size = ioctl(ioctls.KVM_GET_VCPU_MMAP_SIZE, kvm_fd)

    @property
    def device(self) -> Device:
        """The VGIC. OSError (ENODEV) when the VM has none."""
        if self.vgic is None:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), "VGIC")
        return self.vgic

    def add_vcpu(self, index: int, features: int, init: bool) -> None:
        self.vcpus[index] = Vcpu(self.fd, index, features, self._run_size, init)

    def set_memslot(self, slot: int, ipa: int, size: int, hva: int, flags: int) -> None:
        region = struct.pack("<IIQQQ", slot, flags, ipa, size, hva)
        ioctl(ioctls.KVM_SET_USER_MEMORY_REGION, self.fd, region)

    def dirty_log(self, slot: int, pages: int) -> bytes:
        """Return the slot's dirty bitmap since the last call: little-endian u64 words, one bit per page."""
        bitmap = ctypes.create_string_buffer((pages + 63) // 64 * 8)
        request = struct.pack("<IIQ", slot, 0, ctypes.addressof(bitmap))
        ioctl(ioctls.KVM_GET_DIRTY_LOG, self.fd, request)
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
    """Measure the seconds per MMIO exit: the payload, without orders, writes to its doorbell ``exits`` times."""
    start = time.perf_counter()
    for _ in range(exits):
        fcntl.ioctl(vcpu.fd, ioctls.KVM_RUN.number, 0)
    return {"seconds": (time.perf_counter() - start) / exits}
