"""An open file of the VMM, for any ioctl and for mmap. The test case packs the structures."""

from __future__ import annotations

from arm_kvm.agent.ioctls import Ioctl
from arm_kvm.vmm.client import Agent, op


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
