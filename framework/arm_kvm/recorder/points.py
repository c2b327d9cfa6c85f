"""The instructions to watch, found in the host's RAM: VTTBR writes, TLB and cache maintenance, the world switch.

The kernel's text is scanned for their encodings. VTTBR writes and stage-2 maintenance are KVM's anywhere; operations
that the kernel also uses for its own translations are watched in KVM's functions only, which kallsyms names. (That
excludes the instruction cache operations of the exception vectors, a mitigation that does not concern VMs.)

Encodings: ARM DDI 0406C.d, B3.18 (MCRR p15, 6, ..., c2; c7, c8); ARM DDI 0487, C5.5 (TLBI, IC) and D19.2 (VTTBR_EL2).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from arm_kvm.events.operations import OPERATIONS, Reach
from arm_kvm.machine.gdb import Gdb
from arm_kvm.machine.ram import Ram
from arm_kvm.model.arch import sweep
from arm_kvm.model.arch.descriptors import UXN
from arm_kvm.model.arch.regime import HCR_E2H, Architecture, Regime, stage1_armv7, stage1_armv8
from arm_kvm.support.errors import MachineError

INSN = 4


class What(Enum):
    """The kind of event that an instruction stands for."""

    VTTBR = "vttbr"
    VTCR = "vtcr"  #: gives the root's level and size for the next VTTBR; it is not in the trace
    INVALIDATE = "inv"
    ENTER = "enter"
    EXIT = "exit"


@dataclass(frozen=True)
class Point:
    """An instruction to watch: where the CPU executes it (``va``), where it is in memory (``pa``), and its meaning.

    ``registers`` are the numbers of the general registers that hold its operand, low half first. An ENTER is the first
    instruction of a function, whose argument is the operand. ``function`` is the kernel's symbol.
    """

    va: int
    pa: int
    what: What
    op: str = ""
    registers: tuple[int, ...] = ()
    function: str = ""

    @property
    def all_vms(self) -> bool:
        """Whether it invalidates every VM's translations."""
        return self.what is What.INVALIDATE and OPERATIONS[self.op].reach is Reach.ALL_VMS


# -- encodings -------------------------------------------------------------------------------------------------

_ZERO_REGISTER = 31


@dataclass(frozen=True)
class _Pattern:
    """The instructions that equal ``word`` under ``mask``. ``register_at``: bit positions of the register numbers."""

    mask: int
    word: int
    what: What
    op: str = ""
    register_at: tuple[int, ...] = ()

    def registers(self, word: int, width: int) -> tuple[int, ...]:
        return tuple(word >> at & ((1 << width) - 1) for at in self.register_at)


def _mcr(op1: int, crn: int, crm: int, op2: int) -> int:
    return 0x0E000F10 | op1 << 21 | crn << 16 | op2 << 5 | crm


def _sys(op1: int, crn: int, crm: int, op2: int) -> int:
    return 0xD5080000 | op1 << 16 | crn << 12 | crm << 8 | op2 << 5


_A32 = [_Pattern(0x0FF00FFF, 0x0C400F62, What.VTTBR, register_at=(12, 16))]
_A32 += [
    _Pattern(0x0FFF0FFF, _mcr(*key), What.INVALIDATE, op)
    for op, key in {
        "tlbiall": (0, 8, 7, 0),
        "tlbiallis": (0, 8, 3, 0),
        "tlbiallnsnh": (4, 8, 7, 4),
        "tlbiallnsnhis": (4, 8, 3, 4),
        "iciallu": (0, 7, 5, 0),
        "icialluis": (0, 7, 1, 0),
    }.items()
]

_A64_KEYS = {
    "iallu": (0, 7, 5, 0),
    "ialluis": (0, 7, 1, 0),
    "ipas2e1": (4, 8, 4, 1),
    "ipas2e1is": (4, 8, 0, 1),
    "ipas2e1os": (4, 8, 4, 0),
    "ipas2le1": (4, 8, 4, 5),
    "ipas2le1is": (4, 8, 0, 5),
    "ipas2le1os": (4, 8, 4, 4),
    "ripas2e1": (4, 8, 4, 2),
    "ripas2e1is": (4, 8, 0, 2),
    "ripas2e1os": (4, 8, 4, 3),
    "ripas2le1": (4, 8, 4, 6),
    "ripas2le1is": (4, 8, 0, 6),
    "ripas2le1os": (4, 8, 4, 7),
}
for _suffix, _crm in (("", 7), ("is", 3), ("os", 1)):
    _A64_KEYS |= {
        f"alle1{_suffix}": (4, 8, _crm, 4),
        f"vmalls12e1{_suffix}": (4, 8, _crm, 6),
        f"vmalle1{_suffix}": (0, 8, _crm, 0),
    }
_A64 = [
    _Pattern(0xFFFFFFE0, 0xD51C2100, What.VTTBR, register_at=(0,)),
    _Pattern(0xFFFFFFE0, 0xD51C2140, What.VTCR, register_at=(0,)),
]
_A64 += [
    _Pattern(0xFFFFFFE0, _sys(*key), What.INVALIDATE, op, (0,) if OPERATIONS[op].has_operand else ())
    for op, key in _A64_KEYS.items()
]


def instead(arch: str, word: int, op: str, other: str) -> int:
    """Encode the operation ``other`` with the register of the instruction ``word``, which is the operation ``op``."""
    patterns = {pattern.op: pattern for pattern in (_A32 if arch == "armv7" else _A64)}
    return (word & ~patterns[op].mask) | patterns[other].word


#: Operations that a kernel also uses for its own translations.
_COMMON = {op for op, o in OPERATIONS.items() if o.reach in (Reach.STAGE1, Reach.INSTRUCTIONS)}
_COMMON |= {"tlbiall", "tlbiallis"}
_KVMS_OWN = re.compile(r"^(__kvm_nvhe_)?(__)?kvm_(tlb_)?flush_")


# -- the kernel's map --------------------------------------------------------------------------------------------

#: Shell command for the host: prints the symbols of interest, each with the next symbol, and the place of the kernel.
ASK = (
    "grep -E -A1 'kvm_|__guest_e|tlb_switch|vmid|flush_context|stage2|_s2|vgic|gfn_to_|mem_abort|mark_page_dirty|"
    "memory_cache|[ _]_text$|_stext$|_etext$' /proc/kallsyms;"
    " echo ==; grep 'Kernel code' /proc/iomem"
)


class KernelMap:
    """The symbols of a running kernel and their physical addresses, from the output of :data:`ASK`."""

    _HUGE = 0x20_0000
    _LONGEST = 0x1000  #: bytes; no function of interest is longer

    def __init__(self, answer: str) -> None:
        symbols, _, iomem = answer.partition("==\n")
        rows = [line.split() for line in symbols.splitlines() if line != "--"]
        known = [(int(row[0], 16), row[2]) for row in rows if len(row) == 3]  # a fourth column is a module's
        self.symbols = {name: va for va, name in reversed(known)}
        self._functions = sorted({va for va, _ in known})
        self._names = {va: name for va, name in reversed(known)}
        self._offset = self._find_offset(iomem)

    def _find_offset(self, iomem: str) -> int:
        """VA minus PA, a multiple of 2 MiB. "Kernel code" in /proc/iomem starts at _text or _stext, by version."""
        found = re.search(r"([0-9a-f]+)-[0-9a-f]+ : Kernel code", iomem)
        if not found or "_stext" not in self.symbols:
            raise MachineError("the kernel's symbols or place are not known", remedy="does it have CONFIG_KALLSYMS?")
        pa, stext = int(found[1], 16), self.symbols["_stext"]
        for start in (self.symbols.get("_text", stext), stext, stext & -self._HUGE):
            if (start - pa) % self._HUGE == 0:
                return start - pa
        raise MachineError(f"the kernel's text at {stext:#x} and PA {pa:#x} do not fit: no offset of 2 MiB multiples")

    def pa(self, va: int) -> int:
        """Return the physical address of a byte of the kernel's image."""
        return va - self._offset

    def va(self, pa: int) -> int:
        """Return the kernel's virtual address of a byte of its image."""
        return pa + self._offset

    @property
    def text(self) -> tuple[int, int]:
        """Physical addresses of the kernel's text, ``(start, end)``."""
        return self.pa(self.symbols.get("_text", self.symbols["_stext"])), self.pa(self.symbols["_etext"])

    def function_at(self, pa: int) -> str:
        """Return the symbol at or before this address among those that ASK prints, or "" if there is none near it."""
        va = self.va(pa)
        at = int(np.searchsorted(self._functions, va, side="right")) - 1
        return self._names[self._functions[at]] if at >= 0 and va - self._functions[at] < self._LONGEST else ""

    def body(self, name: str) -> range:
        """Physical addresses of a function's instructions, up to the next symbol that ASK prints. Raises KeyError."""
        va = self.symbols[name]
        after = int(np.searchsorted(self._functions, va, side="right"))
        end = self._functions[after] if after < len(self._functions) else va
        return range(self.pa(va), self.pa(min(end, va + 4 * self._LONGEST)), INSN)

    def copies_of(self, name: str) -> list[int]:
        """Virtual addresses of a function of the hypervisor: VHE's, and nVHE's if kallsyms has it."""
        return [self.symbols[n] for n in (name, f"__kvm_nvhe_{name}") if n in self.symbols]


# -- where the hypervisor executes -----------------------------------------------------------------------------------


def _hyp_space(gdb: Gdb, arch: Architecture) -> Regime | None:
    """Return the hypervisor's own stage 1, None if the kernel itself runs at EL2 (VHE)."""
    if arch.name == "armv7":
        httbr, htcr = gdb.read(0, "HTTBR", "TCR_EL2")  # QEMU's name for HTCR
        return stage1_armv7(httbr, 1 << 31 | htcr & 7)
    ttbr, tcr, hcr = gdb.read(0, "TTBR0_EL2", "TCR_EL2", "HCR_EL2")
    if hcr & HCR_E2H:
        return None
    return stage1_armv8(ttbr, tcr & 0xFFFF | (tcr >> 16 & 7) << 32)  # TCR_EL2 has PS where TCR_EL1 has TG1


def _aliases(space: Regime, ram: Ram) -> list[tuple[int, int, int]]:
    """(PA, VA, size in bytes) of all memory that the hypervisor may execute."""
    leaves = sweep.sweep(space, ram).leaves
    code = leaves[UXN.of(leaves.desc) == 0]  # at this position EL2's stage 1 has its only XN bit
    return list(zip(code.pa.tolist(), code.ia.tolist(), code.size.tolist(), strict=True))


class _Addresses:
    """The virtual addresses at which the hypervisor executes physical memory."""

    def __init__(self, gdb: Gdb, arch: Architecture, ram: Ram, kernel: KernelMap) -> None:
        space = _hyp_space(gdb, arch)
        self.vhe = space is None
        self._aliases = [] if space is None else _aliases(space, ram)
        self._kernel = kernel

    def of(self, pa: int) -> list[int]:
        """Virtual addresses of ``pa`` in the hypervisor; [] if only the kernel, which is not at EL2, executes it."""
        if self.vhe:
            return [self._kernel.va(pa)]
        return [va + pa - start for start, va, size in self._aliases if start <= pa < start + size]


# -- the search --------------------------------------------------------------------------------------------------------


def _scan(words: NDArray[np.uint32], arch: Architecture) -> Iterator[tuple[int, _Pattern, int]]:
    """Find the instructions that match a pattern: (index, pattern, word)."""
    for pattern in _A32 if arch.name == "armv7" else _A64:
        for index in np.flatnonzero(words & np.uint32(pattern.mask) == pattern.word):
            yield int(index), pattern, int(words[index])


class _Text:
    """The kernel's text as instruction words."""

    def __init__(self, ram: Ram, arch: Architecture, kernel: KernelMap, addresses: _Addresses) -> None:
        self._start, end = kernel.text
        self._words = np.frombuffer(ram.read(self._start, (end - self._start) & -INSN), dtype="<u4")
        self._arch, self._kernel, self._addresses = arch, kernel, addresses

    def maintenance(self) -> Iterator[Point]:
        """Find KVM's VTTBR and VTCR writes, and its TLB and cache maintenance."""
        width = 4 if self._arch.name == "armv7" else 5
        for index, pattern, word in _scan(self._words, self._arch):
            pa = self._start + index * INSN
            if pattern.op not in _COMMON or self._is_kvms(pa):
                function = self._kernel.function_at(pa)
                yield Point(0, pa, pattern.what, pattern.op, pattern.registers(word, width), function)

    def _is_kvms(self, pa: int) -> bool:
        """Whether only KVM executes this. nVHE's text is all KVM's; 5.10 does not list it in kallsyms."""
        nvhe = self._arch.name == "armv8" and not self._addresses.vhe
        return bool(_KVMS_OWN.match(self._kernel.function_at(pa)) or (nvhe and self._addresses.of(pa)))

    def world_switch(self) -> Iterator[Point]:
        """Find __guest_enter(vcpu, ...) and __guest_exit of entry.S, VHE's copies and nVHE's."""
        for name, what, registers in (("__guest_enter", What.ENTER, (0,)), ("__guest_exit", What.EXIT, ())):
            if name in self._kernel.symbols:
                for pa in self._copies(self._kernel.pa(self._kernel.symbols[name])):
                    yield Point(0, pa, what, "", registers, name)

    def _copies(self, pa: int) -> list[int]:
        """Find copies of a function: equal instructions, except those that compute addresses and per-CPU offsets."""
        at = (pa - self._start) // INSN
        body = self._words[at : at + _SIGNATURE]
        fixed = [i for i, word in enumerate(body) if not any(word & m == v for m, v in _POSITION)]
        where = np.flatnonzero(self._words == body[fixed[0]]) - fixed[0]
        where = where[(where >= 0) & (where + _SIGNATURE <= len(self._words))]
        same = (self._words[where[:, None] + fixed] == body[fixed]).all(axis=1)
        return [self._start + int(index) * INSN for index in where[same]]


#: The number of instructions that identify a function, and those of them that may differ between its copies: ADR, ADRP,
#: ADD (immediate), MRS, and NOP and MSR (immediate), which alternatives patch in.
_SIGNATURE = 16
_POSITION = ((0x1F000000, 0x10000000), (0xFF800000, 0x91000000), (0xFFF00000, 0xD5300000), (0xFFF80000, 0xD5000000))


def find(gdb: Gdb, arch: Architecture, ram: Ram, kernel: KernelMap) -> list[Point]:
    """Find all points, one for each address at which the hypervisor executes an instruction. The machine is stopped.

    Raises MachineError when the kernel's text has no VTTBR write, no invalidation or no world switch.
    """
    addresses = _Addresses(gdb, arch, ram, kernel)
    text = _Text(ram, arch, kernel, addresses)
    raw = [*text.maintenance(), *text.world_switch()]
    points = [replace(point, va=va) for point in raw for va in addresses.of(point.pa)]
    missing = {What.VTTBR, What.ENTER, What.EXIT, What.INVALIDATE} - {point.what for point in points}
    if missing:
        names = ", ".join(sorted(what.value for what in missing))
        raise MachineError(f"nothing to record: this kernel's text has no {names}", remedy="has it KVM?")
    return sorted(points, key=lambda point: point.va)
