"""KVM devices and their attributes (Documentation/virt/kvm/devices; include/uapi/linux/kvm.h)."""

from __future__ import annotations

import ctypes
import os
import struct

from . import ioctls
from .libc import ioctl


class Device:
    """One KVM device of a VM; its file descriptor keeps the VM alive."""

    def __init__(self, vm_fd: int, kind: int) -> None:
        creation = bytearray(struct.pack("<III", kind, 0, 0))  # struct kvm_create_device: type, fd, flags
        ioctl(ioctls.KVM_CREATE_DEVICE, vm_fd, creation)
        self.fd: int = struct.unpack("<III", creation)[1]

    def set(self, group: int, attribute: int, value: int) -> None:
        """Set an attribute to a 64-bit value."""
        buffer = ctypes.create_string_buffer(struct.pack("<Q", value))
        self._attribute(ioctls.KVM_SET_DEVICE_ATTR, group, attribute, buffer)

    def get(self, group: int, attribute: int, value: int = 0) -> int:
        """Return the attribute's 64-bit value. ``value`` initialises the buffer, for attributes that also read it."""
        buffer = ctypes.create_string_buffer(struct.pack("<Q", value))
        self._attribute(ioctls.KVM_GET_DEVICE_ATTR, group, attribute, buffer)
        return int.from_bytes(buffer.raw[:8], "little")

    def _attribute(self, which: ioctls.Ioctl, group: int, attribute: int, buffer: ctypes.Array[ctypes.c_char]) -> None:
        address = ctypes.addressof(buffer)
        ioctl(which, self.fd, struct.pack("<IIQQ", 0, group, attribute, address))

    def close(self) -> None:
        os.close(self.fd)


def irq_line(vm_fd: int, irq: int, level: int) -> None:
    """KVM_IRQ_LINE; ``irq`` encodes type, vCPU and number (Documentation/virt/kvm/api.txt)."""
    ioctl(ioctls.KVM_IRQ_LINE, vm_fd, struct.pack("<II", irq, level))
