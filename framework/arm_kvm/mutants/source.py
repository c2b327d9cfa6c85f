"""Puts a mutant into the source of a kernel, by a patch of the tree that the host's kernel is built from."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from arm_kvm.host.config import HostConfig
from arm_kvm.host.kernel import Kernel
from arm_kvm.host.kernel.sources import tree_of, with_patch
from arm_kvm.host.kernel.tree import check_tree
from arm_kvm.mutants.catalogue import Edit, Mutant, NotApplicable

_AS_IS = "surrogateescape"  # some files of old kernels are not UTF-8


def broken_kernel(mutant: Mutant, config: HostConfig, override: str | None, folder: Path) -> Kernel:
    """Build the host's kernel with the mutant's edits, or take it from the cache. The patch is left in ``folder``.

    Raises NotApplicable, and what a build raises.
    """
    mutant.require(config)
    if (tree := tree_of(config, override)) is None:
        raise NotApplicable(f"the kernel is not built from a tree: --kernel {config.name}=PATH gives one")
    check_tree(tree)
    folder.mkdir(parents=True, exist_ok=True)
    patch = folder / f"{mutant.name}.patch"
    patch.write_bytes(as_patch(mutant, tree).encode(errors=_AS_IS))
    return with_patch(config, override, patch)


def as_patch(mutant: Mutant, tree: Path) -> str:
    """Return a unified diff of those edits that fit this tree. Raises NotApplicable where none does."""
    before: dict[str, str] = {}
    after: dict[str, str] = {}
    for edit in mutant.edits:
        text = after.get(edit.file) or _read(tree / edit.file)
        if (edited := _edited(text, edit)) is not None:
            before.setdefault(edit.file, text)
            after[edit.file] = edited
    if not after:
        where = ", ".join(dict.fromkeys(f"{edit.function} of {edit.file}" for edit in mutant.edits))
        raise NotApplicable(f"nothing to edit in {where} of this tree")
    return "".join(_diff(name, before[name], after[name]) for name in after)


def _read(path: Path) -> str:
    return path.read_bytes().decode(errors=_AS_IS) if path.is_file() else ""


def _edited(text: str, edit: Edit) -> str | None:
    """Replace every ``find`` in the body of the function; None where there is none."""
    definition = rf"^\w[^;{{}}]*\b{re.escape(edit.function)}\([^;{{}}]*\)\s*^\{{\n.*?^\}}"
    for found in re.finditer(definition, text, re.M | re.S):
        if edit.find in found[0]:
            return text[: found.start()] + found[0].replace(edit.find, edit.new) + text[found.end() :]
    return None


def _diff(name: str, before: str, after: str) -> str:
    return "".join(difflib.unified_diff(_lines(before), _lines(after), f"a/{name}", f"b/{name}"))


def _lines(text: str) -> list[str]:
    """Split at newlines alone: ``str.splitlines`` also splits at form feeds, which kernel sources contain."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)
