"""VMID allocation: who gets which number, when numbers run out, and what must be invalidated then.

Two allocators, written from the kernel. Both are told when a vCPU enters a guest on a CPU, and answer with the VMID
that must then stand in VTTBR and what must have been invalidated before it does.

Sources: Linux 5.4 virt/kvm/arm/arm.c (update_vmid, kvm_arch_vcpu_load; arm and arm64 alike, the latter up to 5.17 in
arch/arm64/kvm/arm.c); Linux 6.1 and 6.12 arch/arm64/kvm/vmid.c (since 5.18). VMID 0 belongs to the host in both.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from enum import Enum


class Invalidation(Enum):
    """What the hypervisor invalidates before a guest is entered."""

    #: Every VM's stage 1 and 2 translations, on all CPUs (TLBIALLNSNHIS; TLBI ALLE1IS): a new generation begins.
    #: __kvm_flush_vm_context; with the instruction caches on 32 bits (ICIALLUIS), on arm64 up to 6.x only where they
    #: are tagged by VMID (VPIPT).
    ALL_VMS_ALL_CPUS = "all VMs, all CPUs"
    #: This VM's translations on this CPU alone (TLBIALL; TLBI VMALLE1): another vCPU of the VM ran here last.
    #: __kvm_flush_cpu_context, with this CPU's instruction cache; early 5.4.y: __kvm_tlb_flush_local_vmid, without.
    THIS_VM_THIS_CPU = "this VM, this CPU"


@dataclass(frozen=True)
class GuestEntry:
    """A guest entry: the VMID in VTTBR, its generation, and what was invalidated for it."""

    vmid: int
    generation: int
    invalidations: tuple[Invalidation, ...] = ()


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 16:
        raise ValueError(f"VMIDs have 8 or 16 bits (fewer for the sake of argument), not {bits}")


class Consecutive:
    """1, 2, 3, ... in the order in which VMs first run in a generation; at the end, a new generation for everybody.

    32-bit KVM from the first patch (2012) to 5.6, arm64 up to 5.17. A VM keeps its number until the generation ends; a
    VM that never runs costs none. The very first entry finds no number left (kvm_next_vmid is 0) and begins generation
    2, with the full invalidation of every new generation; all guests are first forced out of all CPUs (force_vm_exit).
    """

    def __init__(self, bits: int = 8, first: int = 0) -> None:
        """``first``: the next number of an allocator that is in use already; 0, as booted: a new generation."""
        _check_bits(bits)
        self._bits = bits
        self._generation = 1
        self._next = first
        self._held: dict[Hashable, GuestEntry] = {}

    @property
    def generation(self) -> int:
        return self._generation

    def _current(self, vm: Hashable) -> GuestEntry | None:
        held = self._held.get(vm)
        return held if held is not None and held.generation == self._generation else None

    def rolls_over(self, vm: Hashable) -> bool:
        """Whether a new generation begins when ``vm`` enters next."""
        return self._current(vm) is None and self._next == 0

    def peek(self, vm: Hashable) -> int:
        """The VMID ``vm`` gets when it enters next, where no new generation begins."""
        held = self._current(vm)
        return held.vmid if held else self._next

    def enter(self, vm: Hashable, cpu: int) -> GuestEntry:
        """A vCPU of ``vm`` enters the guest on ``cpu``."""
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
        """The vCPU that ran on ``cpu`` is scheduled out: nothing depends on it."""

    def forget(self, vm: Hashable) -> None:
        """``vm`` is destroyed. Its number is not given back before the next generation."""
        self._held.pop(vm, None)

    def has(self, vm: Hashable) -> bool:
        """Whether ``vm`` has a number of the present generation."""
        return self._current(vm) is not None

    def give(self, vm: Hashable, vmid: int) -> None:
        """``vm`` turns out to be who took this number."""
        self._held[vm] = GuestEntry(vmid, self._generation)


class Bitmap:
    """A bitmap of numbers taken; at the end of a generation the VMs that are on a CPU keep theirs. arm64 since 5.18.

    A VM of an old generation gets its old number again when it is reserved for it, or free. Numbers are searched
    upwards from the last one given, and from 1 after a rollover. The first generation begins without an invalidation.
    Which VM is on a CPU is the active VMID of that CPU; it ends when the vCPU is scheduled out, so that no number is
    kept for a CPU without a guest.
    """

    _IDLE = -1  #: VMID_ACTIVE_INVALID: no guest on this CPU, and no rollover since

    def __init__(self, bits: int, cpus: int, first: int = 1) -> None:
        """``first``: the next number of an allocator that is in use already; those below are taken."""
        _check_bits(bits)
        if not 0 < cpus < (1 << bits) - 1:
            raise ValueError(f"{cpus} CPUs need more VMIDs than {bits} bits give")
        self.size = 1 << bits  #: one past the largest number
        self._generation = 1
        self._taken: set[int] = set(range(1, first))
        self._cursor = first
        self._held: dict[Hashable, tuple[int, int]] = {}  # (generation, VMID)
        self._active: list[tuple[int, int] | int] = [0] * cpus  # 0: rolled over since the last entry
        self._reserved: list[tuple[int, int] | int] = [0] * cpus

    @property
    def generation(self) -> int:
        return self._generation

    def rolls_over(self, vm: Hashable) -> bool:
        """Whether a new generation begins when ``vm`` enters next."""
        return self._kept(vm) is None and self._free(self._cursor) is None

    def peek(self, vm: Hashable) -> int:
        """The VMID ``vm`` gets when it enters next, where no new generation begins."""
        kept = self._kept(vm)
        return self._free(self._cursor) if kept is None else kept

    def _kept(self, vm: Hashable) -> int | None:
        """The number that ``vm`` has, or has had and gets again."""
        held = self._held.get(vm)
        if held is None or held[0] == self._generation or held in self._reserved or held[1] not in self._taken:
            return held and held[1]
        return None

    def enter(self, vm: Hashable, cpu: int) -> GuestEntry:
        """A vCPU of ``vm`` enters the guest on ``cpu``."""
        invalidations: tuple[Invalidation, ...] = ()
        held = self._held.get(vm)
        if held is None or held[0] != self._generation:
            invalidations = self._allocate(vm, held)
        self._active[cpu] = self._held[vm]
        generation, vmid = self._held[vm]
        return GuestEntry(vmid, generation, invalidations)

    def skip(self, vmid: int) -> None:
        """Numbers below ``vmid`` that were not given yet are in use, by VMs from before (or ``1 << bits``: all)."""
        self._taken.update(range(self._cursor, vmid))

    def leave(self, cpu: int) -> None:
        """The vCPU that ran on ``cpu`` is scheduled out."""
        self._active[cpu] = self._IDLE

    def forget(self, vm: Hashable) -> None:
        """``vm`` is destroyed. Its number is not given back before the next generation."""
        self._held.pop(vm, None)

    def has(self, vm: Hashable) -> bool:
        """Whether ``vm`` has a number of the present generation."""
        return vm in self._held and self._held[vm][0] == self._generation

    def formerly(self, vmid: int) -> set[Hashable]:
        """The VMs that had this number in an older generation, and ask for it again."""
        return {vm for vm, held in self._held.items() if held[0] != self._generation and held[1] == vmid}

    def give(self, vm: Hashable, vmid: int) -> None:
        """``vm`` turns out to be who took this number."""
        self._taken.add(vmid)
        self._held[vm] = self._generation, vmid

    def _allocate(self, vm: Hashable, held: tuple[int, int] | None) -> tuple[Invalidation, ...]:
        """new_vmid()"""
        if held is not None and self._keep(held):
            self._held[vm] = self._generation, held[1]
            return ()
        invalidations: tuple[Invalidation, ...] = ()
        vmid = self._free(self._cursor)
        if vmid is None:
            self._generation += 1
            self._roll_over()
            invalidations = (Invalidation.ALL_VMS_ALL_CPUS,)
            vmid = self._free(1)
        self._taken.add(vmid)
        self._cursor = vmid
        self._held[vm] = self._generation, vmid
        return invalidations

    def _keep(self, held: tuple[int, int]) -> bool:
        """Whether an old number goes on: it is reserved (the reservation moves to this generation), or still free."""
        reserved = [cpu for cpu, vmid in enumerate(self._reserved) if vmid == held]
        for cpu in reserved:
            self._reserved[cpu] = self._generation, held[1]
        if reserved:
            return True
        free = held[1] not in self._taken
        self._taken.add(held[1])
        return free

    def _roll_over(self) -> None:
        """flush_context(): only what is on a CPU, or was reserved for one, stays taken."""
        self._taken.clear()
        for cpu, active in enumerate(self._active):
            kept = self._reserved[cpu] if active == 0 else active
            self._active[cpu] = 0
            self._reserved[cpu] = kept
            if isinstance(kept, tuple):
                self._taken.add(kept[1])

    def _free(self, start: int) -> int | None:
        return next((vmid for vmid in range(start, self.size) if vmid not in self._taken), None)


class VcpuLoads:
    """Whose translations a CPU's TLB and I-cache hold of each VM: one vCPU's, for before another they are invalidated.

    Two vCPUs of a VM may give one virtual address two meanings under one ASID and one VMID. KVM does it when the vCPU
    is loaded, before its VMID is looked at, so under the VMID of the VM's last run, or 0.

    Sources: Linux 94d0e5980d67; 5.4 virt/kvm/arm/arm.c kvm_arch_vcpu_load (last_vcpu_ran); I-cache: 01dc9262ff57.
    """

    def __init__(self) -> None:
        self._last: dict[Hashable, dict[int, int]] = {}  # VM -> CPU -> vCPU

    def last(self, vm: Hashable, cpu: int) -> int | None:
        """The vCPU of ``vm`` whose translations ``cpu`` may hold."""
        return self._last.get(vm, {}).get(cpu)

    def load(self, vm: Hashable, vcpu: int, cpu: int) -> tuple[Invalidation, ...]:
        """``vcpu`` (any number that is its own within the VM) is loaded on ``cpu``; what is invalidated before it runs.

        KVM, which knows no more than who was last, does so at the very first load, too.
        """
        last, self._last.setdefault(vm, {})[cpu] = self.last(vm, cpu), vcpu
        return () if last == vcpu else (Invalidation.THIS_VM_THIS_CPU,)

    def invalidated(self, vm: Hashable | None = None, cpu: int | None = None) -> None:
        """The translations of ``vm`` (None: of all) on ``cpu`` (None: on all) are gone."""
        for one in list(self._last) if vm is None else [vm]:
            if cpu is None:
                self._last.pop(one, None)
            else:
                self._last.get(one, {}).pop(cpu, None)
