"""The catalogue: each ``configs/mutants/AREA.yaml`` maps the names of mutants to their descriptions.

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
      look: [notifier/test_ageing.py]    # cases that are expected to notice: run first
      dies: why the host itself goes down
      survives: why no case can notice

Exactly one of ``return``, ``drop``, ``localise``, ``words`` and ``source`` says how the mutant is put in: ``source``
changes the tree that a host's kernel is built from, the others the text of the running kernel. Where a kernel has none
of the functions, or the text to be replaced is not in them, the mutant is not applicable.

A word is replaced only in a function with one of the ``sums`` (:mod:`arm_kvm.mutants.fingerprint`), in any kernel;
elsewhere the same word may mean something else. There are several sums where the kernel patches the function for its
CPU. ``kernel`` says which kernel the word was read in.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
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
    """The catalogue has instructions for this kernel version, but this build of it has different functions."""


@dataclass(frozen=True)
class Word:
    """Replaces the ``nth`` instruction ``find`` in a function with one of the ``sums`` by ``new``.

    Offsets are ignored when branches are compared. ``kernel`` is the kernel the word was read in, such as
    ``armv8-6.1``.
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
    """Replaces the text ``find`` by ``new`` wherever it is in a function of a source file."""

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
    operations: tuple[str, ...] = ()  #: invalidations that are left out ...
    functions: tuple[str, ...] = ()  #: ... in these functions, or ...
    local: bool = False  #: ... if True, reach only the CPU that executes them
    words: tuple[Word, ...] = ()
    edits: tuple[Edit, ...] = ()
    dies: str = ""
    survives: str = ""

    def require(self, host: HostConfig) -> None:
        """Check that the host has the capabilities without which the fault cannot show. Raises NotApplicable."""
        if lacking := self.needs - host.can:
            raise NotApplicable(f"{host.name} lacks {', '.join(sorted(lacking))}")


def load(path: Path = HOME) -> list[Mutant]:
    """Load all mutants of a folder, or of one file. Raises ConfigError with file and line."""
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
    mutant = Mutant(
        name,
        area,
        fault=node.text("fault"),
        origin=node.text("origin"),
        look=tuple(node.names("look")),
        needs=frozenset(node.names("needs")),
        dies=node.text("dies") if "dies" in node.values else "",
        survives=node.text("survives") if "survives" in node.values else "",
    )
    return _put_in_by(how[0], node, mutant)


def _put_in_by(how: str, node: Node, mutant: Mutant) -> Mutant:
    """Add to a mutant how it is put in."""
    if not node.values[how]:
        raise node.wrong(how, f"{how} is empty: nothing would be broken")
    if how == "return":
        value = node.integer("value", 0, 0xFFFF) if "value" in node.values else None
        return replace(mutant, returns=tuple(node.names("return")), value=value)
    if how in ("drop", "localise"):
        what = node.child(how, how)
        what.check_keys(("op", "in"), ("op", "in"))
        if how == "localise" and (already := [op for op in what.names("op") if not op.endswith("is")]):
            raise what.wrong("op", f"op: {already[0]!r} is local already")
        if not what.names("op") or not what.names("in"):
            raise what.wrong("op", f"{how} is empty: nothing would be broken")
        operations, functions = tuple(what.names("op")), tuple(what.names("in"))
        return replace(mutant, operations=operations, functions=functions, local=how == "localise")
    if how == "source":
        return replace(mutant, edits=tuple(_edit(edit) for edit in node.children(how, "an edit")))
    return replace(mutant, words=tuple(_word(word) for word in node.children("words", "a word")))


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
