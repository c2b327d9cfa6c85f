"""Any ioctl on any descriptor of the VMM. The test case packs the structures.

Request numbers are composed as in include/uapi/asm-generic/ioctl.h, of direction, size of the structure, type (0xAE
for KVM) and number.
"""

from __future__ import annotations

from dataclasses import dataclass

from arm_kvm.vmm.client import Agent, op

_KVM = 0xAE
_WRITE, _READ = 1, 2


@dataclass(frozen=True)
class Ioctl:
    """An ioctl: its request number, and its name for errors."""

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


#: Documentation/virt/kvm/api.rst (6.12) gives the structures.
KVM_CHECK_EXTENSION = Ioctl.none("KVM_CHECK_EXTENSION", 0x03)
KVM_ENABLE_CAP = Ioctl.writes("KVM_ENABLE_CAP", 0xA3, 104)
KVM_GET_VCPU_EVENTS = Ioctl.reads("KVM_GET_VCPU_EVENTS", 0x9F, 64)
KVM_SET_VCPU_EVENTS = Ioctl.writes("KVM_SET_VCPU_EVENTS", 0xA0, 64)
KVM_RESET_DIRTY_RINGS = Ioctl.none("KVM_RESET_DIRTY_RINGS", 0xC7)
PAGEMAP_SCAN = Ioctl.both("PAGEMAP_SCAN", 16, 96, ord("f"))  #: on /proc/self/pagemap (6.7)
UFFDIO_API = Ioctl.both("UFFDIO_API", 0x3F, 24, 0xAA)
UFFDIO_REGISTER = Ioctl.both("UFFDIO_REGISTER", 0x00, 32, 0xAA)
UFFDIO_WRITEPROTECT = Ioctl.both("UFFDIO_WRITEPROTECT", 0x06, 24, 0xAA)


class Descriptor:
    """A file descriptor of the VMM: of /dev/kvm, a VM, a vCPU, a device, or any other."""

    def __init__(self, agent: Agent, number: int) -> None:
        self._agent = agent
        self.number = number

    def ioctl(self, which: Ioctl, argument: int = 0) -> int:
        """ioctl(2) with a number, or the HVA of a structure in the VMM's memory. Returns its result.

        Raises HostOsError, which names the ioctl.
        """
        result, _ = self._agent(op.ioctl, fd=self.number, name=which.name, request=which.number, argument=argument)
        return result

    def exchange(self, which: Ioctl, structure: bytes) -> bytes:
        """ioctl(2) with a pointer to this structure. Returns the structure's new content. Raises HostOsError."""
        _, after = self._agent(op.ioctl, fd=self.number, name=which.name, request=which.number, blob=structure)
        return after
