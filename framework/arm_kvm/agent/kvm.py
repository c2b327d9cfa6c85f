"""KVM through its ioctls: VMs, memslots, vCPUs (each in a thread of its own, or many in turn in one).

Structures are packed by hand: modern headers have no asm/kvm.h for 32-bit Arm. Source:
Documentation/virt/kvm/api.txt (5.4), include/uapi/linux/kvm.h; numbers are common to both widths.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import queue
import signal
import struct
import threading
import time

from . import placement, poison
from .libc import ioctl


def _io(nr):
    return 0xAE00 | nr


def _iow(nr, size):
    return 0x4000AE00 | size << 16 | nr


def _ior(nr, size):
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
    39: "memory-fault",
}


_NOTHING = contextlib.nullcontext()


class Worker:
    """A thread that waits for work; what comes of it waits for a taker. It begins with its first work."""

    def __init__(self, name, setup=lambda: None):
        self._name, self._setup = name, setup
        self._orders = queue.SimpleQueue()
        self._results = queue.SimpleQueue()
        self._thread = None
        self.busy = False
        self.bound = False  #: to a CPU

    def _work(self):
        self._setup()
        while (order := self._orders.get()) is not None:
            self._results.put(order())

    def begin(self):
        """The thread, begun."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            with placement.anywhere():
                self._thread.start()
        return self._thread

    def require_idle(self):
        if self.busy:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), "KVM_RUN")

    def start(self, order):
        self.require_idle()
        self.busy = True
        self.begin()
        self._orders.put(order)

    def wait(self, seconds):
        """The result of the work under way, or None when it has not come in time."""
        try:
            result = self._results.get(timeout=seconds)
        except queue.Empty:
            return None
        self.busy = False
        return result

    def close(self):
        if self._thread is not None:
            self._orders.put(None)
            self._thread.join(1.0)


class Vcpu:
    """One vCPU, and the thread that runs it if it runs alone."""

    def __init__(self, vm_fd, index, features, run_size):
        self.fd = ioctl("KVM_CREATE_VCPU", vm_fd, CREATE_VCPU, index)
        try:
            self._target = bytearray(32)
            ioctl("KVM_ARM_PREFERRED_TARGET", vm_fd, ARM_PREFERRED_TARGET, self._target)
            struct.pack_into("<I", self._target, 4, features)
            self.run = mmap.mmap(self.fd, run_size)
            ioctl("KVM_SET_SIGNAL_MASK", self.fd, SET_SIGNAL_MASK, _NONE_BLOCKED)
            self.init()
        except OSError:
            os.close(self.fd)  # or it would keep the whole VM alive
            raise
        self._worker = Worker(f"vcpu{index}")

    def init(self):
        """The state of a CPU that is switched on. The access whose exit was the last is not completed any more."""
        ioctl("KVM_ARM_VCPU_INIT", self.fd, ARM_VCPU_INIT, self._target)
        _EXIT_REASON.pack_into(self.run, 0, 0)

    def run_once(self, around=_NOTHING):
        """KVM_RUN until one exit, decoded; the ioctl alone is in the context ``around``."""
        try:
            with around:
                fcntl.ioctl(self.fd, RUN, 0)
        except OSError as e:
            if e.errno == errno.EINTR:
                self.run[_IMMEDIATE_EXIT] = 0
                return {"exit": "bus-error" if poison.wanted() else "interrupted"}
            return {"exit": "error", "errno": e.errno}
        (reason,) = _EXIT_REASON.unpack_from(self.run)
        name = EXIT_NAMES.get(reason, f"reason-{reason}")
        if name == "mmio":
            address, data, size, is_write = _MMIO.unpack_from(self.run, _UNION)
            value = int.from_bytes(data[:size], "little")
            return {"exit": name, "ipa": address, "size": size, "write": bool(is_write), "value": value}
        first, second = struct.unpack_from("<QQ", self.run, _UNION)
        return {"exit": name, "data": [first, second]}

    def run_on(self):
        """:meth:`run_once`, again and again while the host does not let the guest have what it wants."""
        while (exit_ := self.run_once()) == {"exit": "error", "errno": errno.EFAULT}:
            time.sleep(0.001)
        return exit_

    def start(self, order=None):
        self._worker.start(order or self.run_once)

    def run_for(self, seconds, run):
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

    def wait(self, seconds):
        """The exit of the order under way, or None when it has not come in time."""
        return self._worker.wait(seconds)

    def answer_mmio(self, value):
        """Put the data of an MMIO read where KVM takes it from at the next run."""
        self.run[_UNION + 8 : _UNION + 16] = value.to_bytes(8, "little")

    def kick(self):
        """Make a running vCPU return to user space with exit "interrupted"."""
        self.run[_IMMEDIATE_EXIT] = 1
        signal.pthread_kill(self._worker.begin().ident, signal.SIGUSR1)

    def pin(self, cpu):
        os.sched_setaffinity(self._worker.begin().native_id, {cpu})
        self._worker.bound = True

    def register(self, reg, value=None):
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

    def close(self):
        if self._worker.busy:
            self.kick()
            self.wait(1.0)
        self._worker.close()
        self.run.close()
        os.close(self.fd)


class Runner:
    """A thread bound to one CPU that runs vCPUs in turn, each until it rings its doorbell."""

    def __init__(self, cpu):
        self._worker = Worker(f"cpu{cpu}", lambda: os.sched_setaffinity(0, {cpu}))

    def start(self, vcpus, mailboxes, doorbell, blob):
        size = len(blob) // len(vcpus)

        def in_turn():
            odd, out = [], []
            for index, (vcpu, mailbox) in enumerate(zip(vcpus, mailboxes)):  # noqa: B905 (Python 3.9 inside old hosts)
                ctypes.memmove(mailbox, blob[index * size : (index + 1) * size], size)
                exit_ = vcpu.run_once()
                if exit_.get("ipa") != doorbell:
                    odd.append([index, exit_])
                out.append(ctypes.string_at(mailbox, size))
            return odd, b"".join(out)

        self._worker.start(in_turn)

    def wait(self, seconds):
        return self._worker.wait(seconds)


class Vm:
    """One VM: its file descriptor and its vCPUs by index."""

    def __init__(self, kvm_fd, ipa_bits):
        self.fd = ioctl("KVM_CREATE_VM", kvm_fd, CREATE_VM, ipa_bits)
        self.vcpus = {}
        self.vgic = None
        self._run_size = ioctl("KVM_GET_VCPU_MMAP_SIZE", kvm_fd, GET_VCPU_MMAP_SIZE)

    def add_vcpu(self, index, features):
        self.vcpus[index] = Vcpu(self.fd, index, features, self._run_size)

    def set_memslot(self, slot, ipa, size, hva, flags):
        region = struct.pack("<IIQQQ", slot, flags, ipa, size, hva)
        ioctl("KVM_SET_USER_MEMORY_REGION", self.fd, SET_USER_MEMORY_REGION, region)

    def dirty_log(self, slot, pages):
        """The slot's dirty bitmap since the last call: little-endian u64 words, one bit a page."""
        bitmap = ctypes.create_string_buffer((pages + 63) // 64 * 8)
        request = struct.pack("<IIQ", slot, 0, ctypes.addressof(bitmap))
        ioctl("KVM_GET_DIRTY_LOG", self.fd, GET_DIRTY_LOG, request)
        return bitmap.raw

    def close_part(self, what):
        if what == "run":
            self.vcpus[0].run.close()
        elif what == "vgic":
            self.vgic.close()
        else:
            os.close(self.fd if what == "vm" else self.vcpus[0].fd)

    def close(self):
        for vcpu in self.vcpus.values():
            vcpu.close()
        if self.vgic:
            self.vgic.close()
        os.close(self.fd)


def measure_mmio(vcpu, exits):
    """Seconds per MMIO exit round trip: the payload rings its doorbell ``exits`` times, orders empty."""
    start = time.perf_counter()
    for _ in range(exits):
        fcntl.ioctl(vcpu.fd, RUN, 0)
    return {"seconds": (time.perf_counter() - start) / exits}
