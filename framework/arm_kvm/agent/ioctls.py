"""ioctls by name and request number, for the agent and for test cases.

Request numbers are composed as in include/uapi/asm-generic/ioctl.h, of direction, size of the structure, type (0xAE
for KVM) and number; they are the same on 32 and 64 bits. Documentation/virt/kvm/api.rst (6.12) has KVM's structures.
"""

from __future__ import annotations

from typing import NamedTuple

_KVM, _RANDOM, _PROC, _UFFD = 0xAE, ord("R"), ord("f"), 0xAA
_WRITE, _READ = 1, 2


class Ioctl(NamedTuple):
    """An ioctl: its name, which a failure is reported with, and its request number."""

    name: str
    number: int

    @classmethod
    def none(cls, name: str, nr: int, kind: int = _KVM) -> Ioctl:
        """``_IO(kind, nr)``: the argument is a number."""
        return cls(name, kind << 8 | nr)

    @classmethod
    def writes(cls, name: str, nr: int, size: int, kind: int = _KVM) -> Ioctl:
        """``_IOW``: the kernel reads a structure of ``size`` bytes."""
        return cls(name, _WRITE << 30 | size << 16 | kind << 8 | nr)

    @classmethod
    def reads(cls, name: str, nr: int, size: int, kind: int = _KVM) -> Ioctl:
        """``_IOR``: the kernel fills a structure of ``size`` bytes."""
        return cls(name, _READ << 30 | size << 16 | kind << 8 | nr)

    @classmethod
    def both(cls, name: str, nr: int, size: int, kind: int = _KVM) -> Ioctl:
        """``_IOWR``: the kernel reads and fills a structure of ``size`` bytes."""
        return cls(name, (_READ | _WRITE) << 30 | size << 16 | kind << 8 | nr)


# -- KVM: the system, VMs, vCPUs, devices (include/uapi/linux/kvm.h)
KVM_CREATE_VM = Ioctl.none("KVM_CREATE_VM", 0x01)
KVM_CHECK_EXTENSION = Ioctl.none("KVM_CHECK_EXTENSION", 0x03)
KVM_GET_VCPU_MMAP_SIZE = Ioctl.none("KVM_GET_VCPU_MMAP_SIZE", 0x04)
KVM_CREATE_VCPU = Ioctl.none("KVM_CREATE_VCPU", 0x41)
KVM_GET_DIRTY_LOG = Ioctl.writes("KVM_GET_DIRTY_LOG", 0x42, 16)
KVM_SET_USER_MEMORY_REGION = Ioctl.writes("KVM_SET_USER_MEMORY_REGION", 0x46, 32)
KVM_IRQ_LINE = Ioctl.writes("KVM_IRQ_LINE", 0x61, 8)
KVM_RUN = Ioctl.none("KVM_RUN", 0x80)
KVM_SET_SIGNAL_MASK = Ioctl.writes("KVM_SET_SIGNAL_MASK", 0x8B, 4)
KVM_GET_VCPU_EVENTS = Ioctl.reads("KVM_GET_VCPU_EVENTS", 0x9F, 64)
KVM_SET_VCPU_EVENTS = Ioctl.writes("KVM_SET_VCPU_EVENTS", 0xA0, 64)
KVM_ENABLE_CAP = Ioctl.writes("KVM_ENABLE_CAP", 0xA3, 104)
KVM_GET_ONE_REG = Ioctl.writes("KVM_GET_ONE_REG", 0xAB, 16)
KVM_SET_ONE_REG = Ioctl.writes("KVM_SET_ONE_REG", 0xAC, 16)
KVM_ARM_VCPU_INIT = Ioctl.writes("KVM_ARM_VCPU_INIT", 0xAE, 32)
KVM_ARM_PREFERRED_TARGET = Ioctl.reads("KVM_ARM_PREFERRED_TARGET", 0xAF, 32)
KVM_RESET_DIRTY_RINGS = Ioctl.none("KVM_RESET_DIRTY_RINGS", 0xC7)
KVM_CREATE_DEVICE = Ioctl.both("KVM_CREATE_DEVICE", 0xE0, 12)
KVM_SET_DEVICE_ATTR = Ioctl.writes("KVM_SET_DEVICE_ATTR", 0xE1, 24)
KVM_GET_DEVICE_ATTR = Ioctl.writes("KVM_GET_DEVICE_ATTR", 0xE2, 24)

# -- userfaultfd (include/uapi/linux/userfaultfd.h), pagemap (linux/fs.h, 6.7), /dev/urandom (linux/random.h)
UFFDIO_REGISTER = Ioctl.both("UFFDIO_REGISTER", 0x00, 32, _UFFD)
UFFDIO_COPY = Ioctl.both("UFFDIO_COPY", 0x03, 40, _UFFD)
UFFDIO_WRITEPROTECT = Ioctl.both("UFFDIO_WRITEPROTECT", 0x06, 24, _UFFD)
UFFDIO_API = Ioctl.both("UFFDIO_API", 0x3F, 24, _UFFD)
PAGEMAP_SCAN = Ioctl.both("PAGEMAP_SCAN", 16, 96, _PROC)
RNDADDENTROPY = Ioctl.writes("RNDADDENTROPY", 0x03, 8, _RANDOM)
RNDRESEEDCRNG = Ioctl.none("RNDRESEEDCRNG", 0x07, _RANDOM)
