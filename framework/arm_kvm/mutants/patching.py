"""Puts a mutant into the text of a running kernel, through the gdbstub."""

from __future__ import annotations

import numpy as np

from arm_kvm.host.host import Host
from arm_kvm.mutants.catalogue import Mutant, NotApplicable, OtherBuild, Word
from arm_kvm.mutants.fingerprint import fingerprint, kept, without_offset
from arm_kvm.recorder.facts import kernel_changed, kernel_map, points
from arm_kvm.recorder.points import INSN, KernelMap, instead

_RETURN = {"armv7": 0xE12F_FF1E, "armv8": 0xD65F_03C0}  # bx lr; ret
_NOP = {"armv7": 0xE320_F000, "armv8": 0xD503_201F}


Patches = dict[int, bytes]  #: physical address -> instructions


def put_in(mutant: Mutant, host: Host) -> None:
    """Break the host's kernel. Raises NotApplicable before anything is changed."""
    mutant.require(host.config)
    kernel = kernel_map(host)
    patches = _returns(mutant, host, kernel) | _drops(mutant, host) | _words(mutant, host, kernel)
    kernel_changed(host)
    with host.machine.gdb.pause() as gdb:
        for pa, code in patches.items():
            gdb.write_memory(pa, code)


def returning(arch: str, value: int | None = None) -> bytes:
    """Encode a function body that returns at once, with this value (below 65,536) if one is given."""
    return (b"" if value is None else _code(_load(arch, value))) + _code(_RETURN[arch])


def _code(word: int) -> bytes:
    return word.to_bytes(INSN, "little")


def _returns(mutant: Mutant, host: Host, kernel: KernelMap) -> Patches:
    if not mutant.returns:
        return {}
    places = [kernel.pa(va) for name in mutant.returns for va in kernel.copies_of(name)]
    if not places:
        raise NotApplicable(f"no {' nor '.join(mutant.returns)} in this kernel")
    return dict.fromkeys(places, returning(host.config.architecture.name, mutant.value))


def _load(arch: str, value: int) -> int:
    """Encode ``movw r0, #value`` or ``movz x0, #value``."""
    if arch == "armv7":
        return 0xE300_0000 | (value >> 12) << 16 | value & 0xFFF
    return 0xD280_0000 | value << 5


def _drops(mutant: Mutant, host: Host) -> Patches:
    if not mutant.operations:
        return {}
    where = {f"{prefix}{name}" for name in mutant.functions for prefix in ("", "__kvm_nvhe_")}
    found = {point.pa: point.op for point in points(host) if point.op in mutant.operations and point.function in where}
    if not found:
        raise NotApplicable(f"no {' nor '.join(mutant.operations)} in {', '.join(mutant.functions)} of this kernel")
    arch = host.config.architecture.name
    if not mutant.local:
        return dict.fromkeys(found, _code(_NOP[arch]))
    old = {pa: int.from_bytes(host.machine.ram.read(pa, INSN), "little") for pa in found}
    return {pa: _code(instead(arch, old[pa], op, op.removesuffix("is"))) for pa, op in found.items()}


def _words(mutant: Mutant, host: Host, kernel: KernelMap) -> Patches:
    """Patch in the words of the first kernel in the catalogue whose functions match this one's."""
    mine = [word for word in mutant.words if word.architecture == host.config.architecture.name]
    reasons: list[str] = []
    for read_in in dict.fromkeys(word.kernel for word in mine):
        words = [word for word in mine if word.kernel == read_in]
        if wrong := next(filter(None, (_difference(word, host, kernel) for word in words)), ""):
            reasons.append(wrong)
        else:
            return {pa: _code(new) for pa, new in (_replaced(word, host, kernel) for word in words)}
    if not mutant.words:
        return {}
    this = "{}-{}.{}".format(host.config.architecture.name, *host.kernel_version)
    known = dict.fromkeys(word.kernel for word in mutant.words)
    if this in known:
        raise OtherBuild("; ".join(reasons))
    raise NotApplicable(f"its instructions are of {' and '.join(known)}, this is {this}")


def _text(word: Word, host: Host, kernel: KernelMap) -> bytes:
    body = kernel.body(word.function)
    return host.machine.ram.read(body.start, len(body) * INSN)


def _difference(word: Word, host: Host, kernel: KernelMap) -> str:
    """Say how this kernel's function differs from the one that the word was read in; "" where it does not."""
    if word.function not in kernel.symbols:
        return f"no {word.function} in this build of {word.kernel}"
    found = fingerprint(word.architecture, _text(word, host, kernel))
    if found in word.sums:
        return ""
    return f"{word.function} is not as in the catalogue's {word.kernel}: its sum is {found}"


def _replaced(word: Word, host: Host, kernel: KernelMap) -> tuple[int, int]:
    """Return the instruction's physical address and its new encoding, with the PC-relative offset it has here."""
    arch = word.architecture
    body = kernel.body(word.function)
    here = np.frombuffer(_text(word, host, kernel), dtype="<u4").tolist()
    same = [n for n, found in enumerate(here) if without_offset(arch, found) == without_offset(arch, word.find)]
    if len(same) < word.nth:
        raise OtherBuild(f"{word.function} has no {word.find:08x} number {word.nth}: correct the catalogue")
    at = same[word.nth - 1]
    offset = ~kept(arch, word.find) & 0xFFFF_FFFF
    if (word.find ^ word.new) & offset == 0 and offset == ~kept(arch, word.new) & 0xFFFF_FFFF:
        return body[at], word.new & ~offset | here[at] & offset
    return body[at], word.new
