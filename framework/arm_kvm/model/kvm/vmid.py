"""VMID allocation: which VM gets which VMID, what happens when VMIDs run out, and what must then be invalidated.

Two allocators, written from the kernel. Both are called when a vCPU enters the guest on a CPU, and return the VMID that
VTTBR must then hold and what must be invalidated before the entry.

Sources: Linux 5.4 virt/kvm/arm/arm.c (update_vmid, kvm_arch_vcpu_load; arm and arm64 alike, the latter up to 5.17 in
arch/arm64/kvm/arm.c); Linux 6.1 and 6.12 arch/arm64/kvm/vmid.c (since 5.18). VMID 0 belongs to the host in both.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Generic, TypeVar

Vm = TypeVar("Vm", bound=Hashable)  #: the type that identifies a VM


class Invalidation(Enum):
    """What the hypervisor invalidates before a guest entry."""

    #: Every VM's stage 1 and 2 translations, on all CPUs (TLBIALLNSNHIS; TLBI ALLE1IS), when a generation begins:
    #: __kvm_flush_vm_context. Includes the instruction caches on 32-bit hosts (ICIALLUIS), and on arm64 up to 6.x if
    #: they are tagged by VMID (VPIPT).
    ALL_VMS_ALL_CPUS = "all VMs, all CPUs"
    #: This VM's translations on this CPU (TLBIALL; TLBI VMALLE1), when another vCPU of the VM ran here last:
    #: __kvm_flush_cpu_context, with this CPU's instruction cache; early 5.4.y: __kvm_tlb_flush_local_vmid, without it.
    THIS_VM_THIS_CPU = "this VM, this CPU"


@dataclass(frozen=True)
class GuestEntry:
    """A guest entry: the VMID in VTTBR, its generation, and what was invalidated before."""

    vmid: int
    generation: int
    invalidations: tuple[Invalidation, ...] = ()


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 16:
        raise ValueError(f"VMIDs have 8 or 16 bits (fewer in small models), not {bits}")


class Consecutive(Generic[Vm]):
    """1, 2, 3, ... in the order in which VMs first run in a generation; then a new generation for all VMs.

    32-bit KVM from the first patch (2012) to 5.6, arm64 up to 5.17. A VM keeps its VMID until the generation ends; a
    VM that never runs takes none. The very first entry finds no VMID left (kvm_next_vmid is 0) and begins generation 2,
    with the full invalidation of every new generation, before which all guests are forced to exit (force_vm_exit).
    """

    def __init__(self, bits: int = 8, first: int = 0) -> None:
        """``first``: the next VMID of an allocator that is in use already; 0 after boot: a new generation."""
        _check_bits(bits)
        self._bits = bits
        self._generation = 1
        self._next = first
        self._held: dict[Vm, GuestEntry] = {}

    @property
    def generation(self) -> int:
        return self._generation

    def _current(self, vm: Vm) -> GuestEntry | None:
        held = self._held.get(vm)
        return held if held is not None and held.generation == self._generation else None

    def rolls_over(self, vm: Vm) -> bool:
        """Whether a new generation begins when ``vm`` enters next."""
        return self._current(vm) is None and self._next == 0

    def peek(self, vm: Vm) -> int:
        """The VMID that ``vm`` gets when it enters next; 0 if a new generation begins then."""
        held = self._current(vm)
        return held.vmid if held else self._next

    def enter(self, vm: Vm, cpu: int) -> GuestEntry:
        """Enter the guest with a vCPU of ``vm`` on ``cpu``."""
        if (held := self._current(vm)) is not None:
            return held
        invalidations: tuple[Invalidation, ...] = ()
        if self._next == 0:
            self._generation, self._next = self._generation + 1, 1
            invalidations = (Invalidation.ALL_VMS_ALL_CPUS,)
        self._held[vm] = GuestEntry(self._next, self._generation)
        self._next = (self._next + 1) % (1 << self._bits)
        return replace(self._held[vm], invalidations=invalidations)

    def leave(self, cpu: int) -> None:
        """Schedule out the vCPU that ran on ``cpu``, on which nothing depends here."""

    def forget(self, vm: Vm) -> None:
        """Destroy ``vm``. Its VMID is not free before the next generation."""
        self._held.pop(vm, None)

    def has(self, vm: Vm) -> bool:
        """Whether ``vm`` has a VMID of the current generation."""
        return self._current(vm) is not None

    def give(self, vm: Vm, vmid: int) -> None:
        """Record that ``vm`` is the VM that took this VMID."""
        self._held[vm] = GuestEntry(vmid, self._generation)


class Bitmap(Generic[Vm]):
    """A bitmap of VMIDs; at the end of a generation the VMs that are on a CPU keep theirs. arm64 since 5.18.

    A VM of an old generation gets its old VMID again if that is reserved for it, or free. A free VMID is searched
    upwards from the last one allocated, and from 1 after a rollover. The first generation begins without an
    invalidation. The VM on a CPU is the active VMID of that CPU, which is reset when the vCPU is scheduled out, so that
    no VMID is reserved for a CPU without a guest.
    """

    _IDLE = -1  #: VMID_ACTIVE_INVALID: no guest on this CPU, and no rollover since

    def __init__(self, bits: int, cpus: int, first: int = 1) -> None:
        """``first``: the next VMID of an allocator that is in use already; those below are taken."""
        _check_bits(bits)
        if not 0 < cpus < (1 << bits) - 1:
            raise ValueError(f"{cpus} CPUs need more VMIDs than {bits} bits give")
        self.size = 1 << bits  #: one more than the largest VMID
        self._generation = 1
        self._taken: set[int] = set(range(1, first))
        self._cursor = first
        self._held: dict[Vm, tuple[int, int]] = {}  # (generation, VMID)
        self._active: list[tuple[int, int] | int] = [0] * cpus  # 0: rolled over since the last entry
        self._reserved: list[tuple[int, int] | int] = [0] * cpus

    @property
    def generation(self) -> int:
        return self._generation

    def rolls_over(self, vm: Vm) -> bool:
        """Whether a new generation begins when ``vm`` enters next."""
        return self._kept(vm) is None and not self._free(self._cursor)

    def peek(self, vm: Vm) -> int:
        """The VMID that ``vm`` gets when it enters next; 0 if a new generation begins then."""
        kept = self._kept(vm)
        return self._free(self._cursor) if kept is None else kept

    def _kept(self, vm: Vm) -> int | None:
        """The VMID that ``vm`` has, or had and gets again."""
        held = self._held.get(vm)
        if held is None or held[0] == self._generation or held in self._reserved or held[1] not in self._taken:
            return held and held[1]
        return None

    def enter(self, vm: Vm, cpu: int) -> GuestEntry:
        """Enter the guest with a vCPU of ``vm`` on ``cpu``."""
        invalidations: tuple[Invalidation, ...] = ()
        held = self._held.get(vm)
        if held is None or held[0] != self._generation:
            invalidations = self._allocate(vm, held)
        self._active[cpu] = self._held[vm]
        generation, vmid = self._held[vm]
        return GuestEntry(vmid, generation, invalidations)

    def skip(self, vmid: int) -> None:
        """Mark the free VMIDs from the cursor to below ``vmid`` as taken by VMs from before."""
        self._taken.update(range(self._cursor, vmid))

    def leave(self, cpu: int) -> None:
        """Schedule out the vCPU that ran on ``cpu``."""
        self._active[cpu] = self._IDLE

    def forget(self, vm: Vm) -> None:
        """Destroy ``vm``. Its VMID is not free before the next generation."""
        self._held.pop(vm, None)

    def has(self, vm: Vm) -> bool:
        """Whether ``vm`` has a VMID of the current generation."""
        return vm in self._held and self._held[vm][0] == self._generation

    def formerly(self, vmid: int) -> set[Vm]:
        """The VMs that had this VMID in an older generation, and try to get it again."""
        return {vm for vm, held in self._held.items() if held[0] != self._generation and held[1] == vmid}

    def give(self, vm: Vm, vmid: int) -> None:
        """Record that ``vm`` is the VM that took this VMID."""
        self._taken.add(vmid)
        self._held[vm] = self._generation, vmid

    def _allocate(self, vm: Vm, held: tuple[int, int] | None) -> tuple[Invalidation, ...]:
        """new_vmid()"""
        if held is not None and self._keep(held):
            self._held[vm] = self._generation, held[1]
            return ()
        invalidations: tuple[Invalidation, ...] = ()
        vmid = self._free(self._cursor)
        if not vmid:
            self._generation += 1
            self._roll_over()
            invalidations = (Invalidation.ALL_VMS_ALL_CPUS,)
            vmid = self._free(1)
        self._taken.add(vmid)
        self._cursor = vmid
        self._held[vm] = self._generation, vmid
        return invalidations

    def _keep(self, held: tuple[int, int]) -> bool:
        """Whether an old VMID is kept: it is reserved (the reservation moves to this generation), or still free."""
        reserved = [cpu for cpu, vmid in enumerate(self._reserved) if vmid == held]
        for cpu in reserved:
            self._reserved[cpu] = self._generation, held[1]
        if reserved:
            return True
        free = held[1] not in self._taken
        self._taken.add(held[1])
        return free

    def _roll_over(self) -> None:
        """flush_context(): only VMIDs that are active on a CPU, or were reserved for one, stay taken."""
        self._taken.clear()
        for cpu, active in enumerate(self._active):
            kept = self._reserved[cpu] if active == 0 else active
            self._active[cpu] = 0
            self._reserved[cpu] = kept
            if isinstance(kept, tuple):
                self._taken.add(kept[1])

    def _free(self, start: int) -> int:
        """The first free VMID from ``start`` up; 0 if there is none."""
        return next((vmid for vmid in range(start, self.size) if vmid not in self._taken), 0)


class VcpuLoads(Generic[Vm]):
    """The vCPU of each VM whose translations a CPU's TLB and I-cache may hold.

    Two vCPUs of a VM may map one virtual address to different IPAs under the same ASID and VMID, so KVM invalidates the
    VM's translations on a CPU before another vCPU runs there. It does so when the vCPU is loaded, before its VMID is
    checked, and thus under the VMID of the VM's last run, or 0.

    Sources: Linux 94d0e5980d67; 5.4 virt/kvm/arm/arm.c kvm_arch_vcpu_load (last_vcpu_ran); I-cache: 01dc9262ff57.
    """

    def __init__(self) -> None:
        self._last: dict[Vm, dict[int, int]] = {}  # VM -> CPU -> vCPU

    def last(self, vm: Vm, cpu: int) -> int | None:
        """The vCPU of ``vm`` whose translations ``cpu`` may hold; None if it holds none."""
        return self._last.get(vm, {}).get(cpu)

    def load(self, vm: Vm, vcpu: int, cpu: int) -> tuple[Invalidation, ...]:
        """Load ``vcpu`` (a number unique within the VM) on ``cpu``; return what is invalidated before it runs.

        KVM knows only which vCPU was loaded last, so it invalidates at the very first load, too.
        """
        last, self._last.setdefault(vm, {})[cpu] = self.last(vm, cpu), vcpu
        return () if last == vcpu else (Invalidation.THIS_VM_THIS_CPU,)

    def invalidated(self, vm: Vm | None = None, cpu: int | None = None) -> None:
        """Record that the translations of ``vm`` (None: all VMs) on ``cpu`` (None: all CPUs) were invalidated."""
        for one in list(self._last) if vm is None else [vm]:
            if cpu is None:
                self._last.pop(one, None)
            else:
                self._last.get(one, {}).pop(cpu, None)
