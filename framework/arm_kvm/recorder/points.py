"""The instructions worth watching, found in the host's RAM: VTTBR writes, TLB and cache maintenance, the world switch.

The kernel's text is scanned for their encodings. Writes of VTTBR and the maintenance of stage 2 mean KVM wherever they
are; the operations that a kernel also executes for itself count inside KVM's functions only, which kallsyms names.
(Instruction cache operations of the exception vectors, a mitigation that has nothing to do with VMs, are none of them.)

Encodings: ARM DDI 0406C.d, B3.18 (MCRR p15, 6, ..., c2; c7, c8); ARM DDI 0487, C5.5 (TLBI, IC) and D19.2 (VTTBR_EL2).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from arm_kvm.events.operations import OPERATIONS, Reach
from arm_kvm.machine.gdb import Gdb
from arm_kvm.machine.ram import Ram
from arm_kvm.model.arch import sweep
from arm_kvm.model.arch.descriptors import UXN
from arm_kvm.model.arch.regime import HCR_E2H, Architecture, Regime, stage1_armv7, stage1_armv8
from arm_kvm.support.errors import MachineError

INSN = 4


class What(Enum):
    """What an instruction means."""

    VTTBR = "vttbr"
    VTCR = "vtcr"  #: how the tables under the next VTTBR are shaped; no event of a trace
    INVALIDATE = "inv"
    ENTER = "enter"
    EXIT = "exit"


@dataclass(frozen=True)
class Point:
    """One instruction: where the CPU executes it (``va``), where it lies (``pa``), what it does.

    ``registers``: numbers of the general registers that hold its operand, low half first; of a block that begins
    at it, for ENTER. ``function``: the kernel's symbol.
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
    """Instruction words ``word`` under ``mask``. ``register_at``: bit positions of the operand's register numbers."""

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
    """The instruction ``word``, which is the operation ``op``, with its register for the operation ``other``."""
    patterns = {pattern.op: pattern for pattern in (_A32 if arch == "armv7" else _A64)}
    return (word & ~patterns[op].mask) | patterns[other].word


#: Operations that a kernel executes for itself too.
_COMMON = {op for op, o in OPERATIONS.items() if o.reach in (Reach.STAGE1, Reach.INSTRUCTIONS)}
_COMMON |= {"tlbiall", "tlbiallis"}
_KVMS_OWN = re.compile(r"^(__kvm_nvhe_)?(__)?kvm_(tlb_)?flush_")


# -- the kernel's map --------------------------------------------------------------------------------------------

#: What to ask the host: the symbols that matter, each with the one after it, and where the kernel's text lies.
ASK = (
    "grep -E -A1 'kvm_|__guest_e|tlb_switch|vmid|flush_context|stage2|_s2|vgic|gfn_to_|mem_abort|mark_page_dirty|"
    "memory_cache|[ _]_text$|_stext$|_etext$' /proc/kallsyms;"
    " echo ==; grep 'Kernel code' /proc/iomem"
)


class KernelMap:
    """Symbols and text of a running kernel: from the host's own answer to :data:`ASK`."""

    _HUGE = 0x20_0000
    _LONGEST = 0x1000  #: no function of interest is longer

    def __init__(self, answer: str) -> None:
        symbols, _, iomem = answer.partition("==\n")
        rows = [line.split() for line in symbols.splitlines() if line != "--"]
        known = [(int(row[0], 16), row[2]) for row in rows if len(row) == 3]  # a fourth column is a module's
        self.symbols = {name: va for va, name in reversed(known)}
        self._functions = sorted({va for va, _ in known})
        self._names = {va: name for va, name in reversed(known)}
        self._offset = self._find_offset(iomem)

    def _find_offset(self, iomem: str) -> int:
        """VA minus PA, huge-aligned. /proc/iomem's "Kernel code" begins at _text or _stext, by version."""
        found = re.search(r"([0-9a-f]+)-[0-9a-f]+ : Kernel code", iomem)
        if not found or "_stext" not in self.symbols:
            raise MachineError("the host does not say where its kernel lies", remedy="does it have CONFIG_KALLSYMS?")
        pa, stext = int(found[1], 16), self.symbols["_stext"]
        for start in (self.symbols.get("_text", stext), stext, stext & -self._HUGE):
            if (start - pa) % self._HUGE == 0:
                return start - pa
        raise MachineError(f"the kernel's text is at {stext:#x}, and at PA {pa:#x}: these do not fit")

    def pa(self, va: int) -> int:
        """Physical address of a byte of the kernel's image."""
        return va - self._offset

    def va(self, pa: int) -> int:
        """The kernel's own address of it."""
        return pa + self._offset

    @property
    def text(self) -> tuple[int, int]:
        """Physical addresses of the kernel's text: first, and one past the last."""
        return self.pa(self.symbols.get("_text", self.symbols["_stext"])), self.pa(self.symbols["_etext"])

    def function_at(self, pa: int) -> str:
        """The symbol at or before this address, if ASK brought it; else ""."""
        va = self.va(pa)
        at = int(np.searchsorted(self._functions, va, side="right")) - 1
        return self._names[self._functions[at]] if at >= 0 and va - self._functions[at] < self._LONGEST else ""

    def body(self, name: str) -> range:
        """Physical addresses of a function's instructions, up to the next symbol that ASK brought; KeyError."""
        va = self.symbols[name]
        after = int(np.searchsorted(self._functions, va, side="right"))
        end = self._functions[after] if after < len(self._functions) else va
        return range(self.pa(va), self.pa(min(end, va + 4 * self._LONGEST)), INSN)

    def copies_of(self, name: str) -> list[int]:
        """Addresses of a function of the hypervisor: the kernel's own, and nVHE's where kallsyms has it."""
        return [self.symbols[n] for n in (name, f"__kvm_nvhe_{name}") if n in self.symbols]


# -- where the hypervisor executes -----------------------------------------------------------------------------------


def _hyp_space(gdb: Gdb, arch: Architecture) -> Regime | None:
    """The hypervisor's own stage 1; None where the kernel itself runs at EL2 (VHE)."""
    if arch.name == "armv7":
        httbr, htcr = gdb.read(0, "HTTBR", "TCR_EL2")  # QEMU's name for HTCR
        return stage1_armv7(httbr, 1 << 31 | htcr & 7)
    ttbr, tcr, hcr = gdb.read(0, "TTBR0_EL2", "TCR_EL2", "HCR_EL2")
    if hcr & HCR_E2H:
        return None
    return stage1_armv8(ttbr, tcr & 0xFFFF | (tcr >> 16 & 7) << 32)  # TCR_EL2 has PS where TCR_EL1 has TG1


def _aliases(space: Regime, ram: Ram) -> list[tuple[int, int, int]]:
    """(PA, VA, bytes) of everything the hypervisor may execute."""
    leaves = sweep.sweep(space, ram).leaves
    code = leaves[UXN.of(leaves.desc) == 0]  # of EL2, whose only XN it is
    return list(zip(code.pa.tolist(), code.ia.tolist(), code.size.tolist(), strict=True))


class _Addresses:
    """From a physical address to the addresses at which the hypervisor executes it."""

    def __init__(self, gdb: Gdb, arch: Architecture, ram: Ram, kernel: KernelMap) -> None:
        space = _hyp_space(gdb, arch)
        self.vhe = space is None
        self._aliases = [] if space is None else _aliases(space, ram)
        self._kernel = kernel

    def of(self, pa: int) -> list[int]:
        """[] for what only the kernel executes, below EL2."""
        if self.vhe:
            return [self._kernel.va(pa)]
        return [va + pa - start for start, va, size in self._aliases if start <= pa < start + size]


# -- all of it ---------------------------------------------------------------------------------------------------------


def _scan(words: np.ndarray, arch: Architecture) -> Iterator[tuple[int, _Pattern, int]]:
    """(index, pattern, word) of every instruction that matches one."""
    for pattern in _A32 if arch.name == "armv7" else _A64:
        for index in np.flatnonzero(words & np.uint32(pattern.mask) == pattern.word):
            yield int(index), pattern, int(words[index])


class _Text:
    """The kernel's text, as instruction words."""

    def __init__(self, ram: Ram, arch: Architecture, kernel: KernelMap, addresses: _Addresses) -> None:
        self._start, end = kernel.text
        self._words = np.frombuffer(ram.read(self._start, (end - self._start) & -INSN), dtype="<u4")
        self._arch, self._kernel, self._addresses = arch, kernel, addresses

    def maintenance(self) -> Iterator[Point]:
        width = 4 if self._arch.name == "armv7" else 5
        for index, pattern, word in _scan(self._words, self._arch):
            pa = self._start + index * INSN
            if pattern.op not in _COMMON or self._is_kvms(pa):
                function = self._kernel.function_at(pa)
                yield Point(0, pa, pattern.what, pattern.op, pattern.registers(word, width), function)

    def _is_kvms(self, pa: int) -> bool:
        """Whether KVM alone executes what is here. nVHE's text holds nothing else; 5.10 keeps it out of kallsyms."""
        nvhe = self._arch.name == "armv8" and not self._addresses.vhe
        return bool(_KVMS_OWN.match(self._kernel.function_at(pa)) or (nvhe and self._addresses.of(pa)))

    def world_switch(self) -> Iterator[Point]:
        """__guest_enter(vcpu, ...) and __guest_exit of entry.S: the kernel's copy, and nVHE's."""
        for name, what, registers in (("__guest_enter", What.ENTER, (0,)), ("__guest_exit", What.EXIT, ())):
            if name in self._kernel.symbols:
                for pa in self._copies(self._kernel.pa(self._kernel.symbols[name])):
                    yield Point(0, pa, what, "", registers, name)

    def _copies(self, pa: int) -> list[int]:
        """Where the same function is: the same instructions, but for those that make addresses and per-CPU offsets."""
        at = (pa - self._start) // INSN
        body = self._words[at : at + _SIGNATURE]
        fixed = [i for i, word in enumerate(body) if not any(word & m == v for m, v in _POSITION)]
        where = np.flatnonzero(self._words == body[fixed[0]]) - fixed[0]
        where = where[(where >= 0) & (where + _SIGNATURE <= len(self._words))]
        same = (self._words[where[:, None] + fixed] == body[fixed]).all(axis=1)
        return [self._start + int(index) * INSN for index in where[same]]


#: Instructions compared to recognise a function, and those of them that differ between its copies: ADR, ADRP,
#: ADD (immediate), MRS, NOP and MSR (immediate), which alternatives put in place.
_SIGNATURE = 16
_POSITION = ((0x1F000000, 0x10000000), (0xFF800000, 0x91000000), (0xFFF00000, 0xD5300000), (0xFFF80000, 0xD5000000))


def find(gdb: Gdb, arch: Architecture, ram: Ram, kernel: KernelMap) -> list[Point]:
    """Every point, once for each address at which the hypervisor executes it. The machine must be stopped.

    Raises MachineError when the kernel shows no VTTBR write or no world switch: then nothing could be recorded.
    """
    addresses = _Addresses(gdb, arch, ram, kernel)
    text = _Text(ram, arch, kernel, addresses)
    raw = [*text.maintenance(), *text.world_switch()]
    points = [replace(point, va=va) for point in raw for va in addresses.of(point.pa)]
    missing = {What.VTTBR, What.ENTER, What.EXIT, What.INVALIDATE} - {point.what for point in points}
    if missing:
        names = ", ".join(sorted(what.value for what in missing))
        raise MachineError(f"nothing to record: this kernel's text shows no {names}", remedy="has it KVM?")
    return sorted(points, key=lambda point: point.va)
