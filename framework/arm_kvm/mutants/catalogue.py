"""The catalogue: ``configs/mutants/AREA.yaml``, each a mapping of a mutant's name to what it is.

::

    unmap-ignored:
      fault: what the broken kernel does
      origin: the historical bug, or the requirement that it breaks
      return: [kvm_unmap_hva_range, kvm_unmap_gfn_range]    # these functions return at once, ...
      value: 0                                              # ... with this value
      drop: {op: [tlbiallis], in: [__kvm_tlb_flush_vmid]}   # these operations are not executed there, ...
      localise: {op: [tlbiallis], in: [...]}                # ... or for their own CPU only
      words: [{in: update_vttbr, find: e2833001, with: e2833000, nth: 1, kernel: armv7-5.4, sums: ["0123abcd"]}]
      source: [{file: virt/kvm/arm/mmu.c, in: user_mem_abort, find: text, with: text}]   # text of a function's body
      needs: [idle-tracking]       # capabilities that a host must have
      look: [notifier/test_ageing.py]    # where the suite is expected to notice: run first
      dies: why the host itself goes down under it
      survives: why nobody can notice, here

One of ``return``, ``drop``, ``localise``, ``words`` and ``source`` says how it is put in: the last into the tree that a
host's kernel is built from, all others into the text of the running kernel. A kernel without any of the functions, or
without this text in them, cannot be broken this way: the mutant does not apply to it. An instruction is replaced in a
function that has one of these ``sums`` (:mod:`arm_kvm.mutants.fingerprint`; several, where the kernel patches itself
for its CPU), whatever kernel that is in: elsewhere the same word may be something else. ``kernel`` says where it was
read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from arm_kvm.host.config import HostConfig, Node, document
from arm_kvm.support.errors import ConfigError
from arm_kvm.support.paths import CONFIGS

HOME = CONFIGS / "mutants"
_HOW = ("return", "drop", "localise", "words", "source")
_KEYS = ("fault", "origin", *_HOW, "value", "needs", "look", "dies", "survives")
_KERNEL = re.compile(r"armv[78]-\d+\.\d+")


class NotApplicable(Exception):
    """This kernel cannot be broken this way."""


class OtherBuild(NotApplicable):
    """The catalogue has instructions of this version, and this build of it has other functions."""


@dataclass(frozen=True)
class Word:
    """The ``nth`` instruction ``find`` in a function with one of the ``sums`` becomes ``new``.

    Branches are counted whatever their offset. ``kernel``: the kernel it was read in, like ``armv8-6.1``.
    """

    function: str
    find: int
    new: int
    nth: int
    kernel: str
    sums: tuple[str, ...]

    @property
    def architecture(self) -> str:
        return self.kernel.partition("-")[0]


@dataclass(frozen=True)
class Edit:
    """In a function of a source file, the text ``find`` becomes ``new`` wherever it is."""

    file: str
    function: str
    find: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """One way to break a kernel."""

    name: str
    area: str
    fault: str
    origin: str
    look: tuple[str, ...]
    needs: frozenset[str]
    returns: tuple[str, ...] = ()  #: functions that return at once
    value: int | None = None  #: what they return; None: whatever is in the register
    operations: tuple[str, ...] = ()  #: invalidations that are not executed ...
    functions: tuple[str, ...] = ()  #: ... in these functions, ...
    local: bool = False  #: ... or reach the CPU only that executes them
    words: tuple[Word, ...] = ()
    edits: tuple[Edit, ...] = ()
    dies: str = ""
    survives: str = ""

    def require(self, host: HostConfig) -> None:
        """Raises NotApplicable where the host lacks what the fault needs to show."""
        if lacking := self.needs - host.can:
            raise NotApplicable(f"{host.name} lacks {', '.join(sorted(lacking))}")


def load(path: Path = HOME) -> list[Mutant]:
    """All mutants of a folder, or of one file. Raises ConfigError with file and line."""
    files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
    mutants = [mutant for file in files for mutant in _load(file)]
    names = [mutant.name for mutant in mutants]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"{path}: two mutants are called {sorted(twice)[0]!r}")
    return mutants


def _load(path: Path) -> list[Mutant]:
    top = document(path, "the catalogue")
    return [_mutant(path.stem, name, top.child(name, f"mutant {name!r}")) for name in top.values]


def _mutant(area: str, name: str, node: Node) -> Mutant:
    node.check_keys(_KEYS, ("fault", "origin", "look"))
    how = [key for key in _HOW if key in node.values]
    if len(how) != 1:
        raise node.wrong("fault", f"mutant {name!r} is put in by one of: {', '.join(_HOW)}; here by {how or 'none'}")
    texts = {key: node.text(key) for key in ("fault", "origin", "dies", "survives") if key in node.values}
    about = {"look": tuple(node.names("look")), "needs": frozenset(node.names("needs"))}
    return Mutant(name, area, **texts, **about, **_how(node, how[0]))


def _how(node: Node, how: str) -> dict:
    if not node.values[how]:
        raise node.wrong(how, f"{how} is empty: nothing would be broken")
    if how == "return":
        value = node.integer("value", 0, 0xFFFF) if "value" in node.values else None
        return {"returns": tuple(node.names("return")), "value": value}
    if how in ("drop", "localise"):
        what = node.child(how, how)
        what.check_keys(("op", "in"), ("op", "in"))
        if how == "localise" and (already := [op for op in what.names("op") if not op.endswith("is")]):
            raise what.wrong("op", f"op: {already[0]!r} is local already")
        if not what.names("op") or not what.names("in"):
            raise what.wrong("op", f"{how} is empty: nothing would be broken")
        where = {"operations": tuple(what.names("op")), "functions": tuple(what.names("in"))}
        return where | {"local": how == "localise"}
    if how == "source":
        return {"edits": tuple(_edit(edit) for edit in node.children(how, "an edit"))}
    return {"words": tuple(_word(word) for word in node.children("words", "a word"))}


def _word(node: Node) -> Word:
    node.check_keys(("in", "find", "with", "nth", "kernel", "sums"), ("in", "find", "with", "kernel", "sums"))
    nth = node.integer("nth", 1, 1000) if "nth" in node.values else 1
    kernel = node.text("kernel")
    if not _KERNEL.fullmatch(kernel):
        raise node.wrong("kernel", f"kernel: {kernel!r} is not an architecture and a version, like armv8-6.1")
    sums = tuple(node.names("sums"))
    if not sums or not all(re.fullmatch(r"[0-9a-f]{8}", one) for one in sums):
        raise node.wrong("sums", f"sums: {list(sums)!r} is not a list of eight hexadecimal digits each (quote them)")
    return Word(node.text("in"), _hex(node, "find"), _hex(node, "with"), nth, kernel, sums)


def _edit(node: Node) -> Edit:
    keys = ("file", "in", "find", "with")
    node.check_keys(keys, keys)
    return Edit(*map(node.text, keys))


def _hex(node: Node, key: str) -> int:
    text = str(node.values[key])
    if not re.fullmatch(r"[0-9a-f]{8}", text):
        raise node.wrong(key, f"{key}: {text!r} is not an instruction word of eight hexadecimal digits (quote it)")
    return int(text, 16)
