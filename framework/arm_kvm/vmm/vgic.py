"""KVM's GICv2 for a VM: an emulated distributor, and the board's virtual CPU interface, mapped through stage 2.

Sources: Documentation/virt/kvm/devices/arm-vgic.txt; virt/kvm/arm/vgic/vgic-v2.c, vgic_v2_map_resources(), which maps
the CPU interface at the first KVM_RUN (kvm_phys_addr_ioremap()).
"""

from __future__ import annotations

from enum import IntEnum

from arm_kvm.model.kvm.memslots import Window
from arm_kvm.vmm.client import Agent, op
from arm_kvm.vmm.descriptor import Descriptor

_VGIC_V2 = 5
_ADDRESSES, _CONTROL, _INIT = 0, 4, 0
_SPI = 1 << 24


class Frame(IntEnum):
    """A frame of the GICv2 with an IPA: KVM_VGIC_V2_ADDR_TYPE_*. The value is the attribute."""

    DISTRIBUTOR = 0  #: 4 KiB
    CPU_INTERFACE = 1  #: 8 KiB


CPU_INTERFACE_SIZE = 0x2000
#: Offsets of the registers a guest needs (ARM IHI 0048B, 4.1.2 and 4.1.3).
GICD_CTLR, GICD_TYPER, GICD_ISENABLER, GICD_ICFGR = 0x000, 0x004, 0x100, 0xC00
GICC_CTLR, GICC_PMR, GICC_IAR, GICC_EOIR, GICC_IIDR = 0x000, 0x004, 0x00C, 0x010, 0x0FC
NOTHING_PENDING = 1023


class Vgic:
    """A VGICv2 of a VM, to be created before the VM runs. Every call raises HostOsError when KVM refuses it."""

    def __init__(self, agent: Agent, vm: int, gicv: int) -> None:
        """Create it. ``vm`` is the VM's number, ``gicv`` the PA of the board's virtual CPU interface (GICV)."""
        self._agent = agent
        self._vm = vm
        self._gicv = gicv
        agent(op.vgic_create, vm=vm, kind=_VGIC_V2)
        self.windows: list[Window] = []  #: where stage 2 may map registers of the board

    @property
    def descriptor(self) -> Descriptor:
        """The VGIC's file descriptor, for ioctls that have no method here."""
        return Descriptor(self._agent, self._agent(op.vgic_fd, vm=self._vm))

    def place(self, frame: Frame, ipa: int) -> None:
        """Set the IPA of a frame."""
        self.set_attribute(_ADDRESSES, int(frame), ipa)
        if frame is Frame.CPU_INTERFACE:
            self.windows = [Window(ipa, CPU_INTERFACE_SIZE, self._gicv)]

    def place_of(self, frame: Frame) -> int:
        """Return the IPA of a frame, 2^64 - 1 if it is not set."""
        return self.get_attribute(_ADDRESSES, int(frame))

    def set_attribute(self, group: int, attribute: int, value: int = 0) -> None:
        """KVM_SET_DEVICE_ATTR, for attributes that have no method here."""
        self._agent(op.vgic_set, vm=self._vm, group=group, attribute=attribute, value=value)

    def get_attribute(self, group: int, attribute: int, value: int = 0) -> int:
        """KVM_GET_DEVICE_ATTR. ``value`` initialises the 64-bit buffer, for attributes that also read it."""
        return self._agent(op.vgic_get, vm=self._vm, group=group, attribute=attribute, value=value)

    def init(self) -> None:
        """KVM_DEV_ARM_VGIC_CTRL_INIT, after which no vCPU can be created."""
        self.set_attribute(_CONTROL, _INIT)

    def line(self, spi: int, level: int) -> None:
        """Set the level of a shared peripheral interrupt, number 32 and up (KVM_IRQ_LINE)."""
        self._agent(op.vm_irq_line, vm=self._vm, irq=_SPI | spi, level=level)
