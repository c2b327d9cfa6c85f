"""The vocabulary: one step is one thing that a guest, the host's memory management or the VMM does.

A sequence is a text file with one step per line; ``#`` begins a comment. Pages are numbered within the memory that
both memslots map: memslot 1 and its alias, memslot 2. Each memslot moves between two IPAs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from itertools import product
from pathlib import Path

from arm_kvm.support.errors import ConfigError
from arm_kvm.support.paths import plain_file

PAGES = 16  #: pages of the memory
SLOTS = (1, 2)  #: the memslots that map it
VCPUS = 2


class StepKind(Enum):
    """The kinds of steps. The value is a step's text, with its arguments in braces."""

    GUEST_WRITES = "guest {vcpu} writes page {page} through memslot {slot}"
    GUEST_READS = "guest {vcpu} reads page {page} through memslot {slot}"
    HOST_WRITES = "host writes page {page}"
    HOST_READS = "host reads page {page}"
    DONTNEED = "madvise DONTNEED pages {page} to {last}"
    FREE = "madvise FREE pages {page} to {last}"
    REPLACE = "mmap new memory over pages {page} to {last}"
    MUNMAP = "munmap pages {page} to {last}"
    MREMAP = "mremap page {page} over page {to}"
    PROTECT_NONE = "mprotect none pages {page} to {last}"
    PROTECT_READ = "mprotect read pages {page} to {last}"
    PROTECT_WRITE = "mprotect write pages {page} to {last}"
    FORK = "fork"
    CHILD_WRITES = "child writes page {page}"
    CHILD_EXITS = "child exits"
    AGE = "the host ages pages {page} to {last}"
    PAGE_OUT = "the host pages out pages {page} to {last}"
    SLOT_DELETE = "memslot {slot} is deleted"
    SLOT_CREATE = "memslot {slot} is created"
    SLOT_READONLY = "memslot {slot} is created read-only"
    SLOT_MOVE = "memslot {slot} moves"
    LOG_ON = "memslot {slot} logs dirty pages"
    LOG_OFF = "memslot {slot} stops logging"
    DIRTY_LOG = "the dirty log of memslot {slot} is read"
    NEW_VM = "the VM is destroyed and made again"


_ARGUMENT = re.compile(r"\{(\w+)\}")
_PATTERNS = {kind: re.compile(_ARGUMENT.sub(r"(?P<\1>\\d+)", kind.value) + r"$") for kind in StepKind}


@dataclass(frozen=True)
class Step:
    """One step. ``last`` is the last page of a range, inclusive; ``to`` the page that ``mremap`` moves ``page`` onto.

    Raises ValueError for a page, memslot or vCPU that does not exist.
    """

    kind: StepKind
    page: int = 0
    last: int = 0
    to: int = 0
    vcpu: int = 0
    slot: int = 1

    def __post_init__(self) -> None:
        if max(self.page, self.last, self.to) >= PAGES or self.slot not in SLOTS or self.vcpu >= VCPUS:
            raise ValueError(f"there are pages 0 to {PAGES - 1}, memslots 1 and 2, guests 0 and 1: {self}")
        if "{last}" in self.kind.value and self.last < self.page:
            raise ValueError(f"the range ends before it begins: {self}")

    def __str__(self) -> str:
        return self.kind.value.format(page=self.page, last=self.last, to=self.to, vcpu=self.vcpu, slot=self.slot)


def every(kind: StepKind) -> list[Step]:
    """List all steps of this kind, the simplest first."""
    choices = {"vcpu": range(VCPUS), "slot": SLOTS, "page": range(PAGES), "last": range(PAGES), "to": range(PAGES)}
    names = [name for name in choices if f"{{{name}}}" in kind.value]
    arguments = (dict(zip(names, values, strict=True)) for values in product(*(choices[name] for name in names)))
    return [Step(kind, **what) for what in arguments if what.get("page", 0) <= what.get("last", PAGES)]


def parse(line: str) -> Step | None:
    """Parse a line into a step; None for a comment or an empty line. Raises ValueError for anything else."""
    words = line.partition("#")[0].strip()
    if not words:
        return None
    for kind, pattern in _PATTERNS.items():
        if match := pattern.match(words):
            return Step(kind, **{name: int(value) for name, value in match.groupdict().items()})
    raise ValueError(f"not a step: {words!r}")


def load(path: Path) -> list[Step]:
    """Read the steps of a file. Raises ConfigError with the number of the line that is wrong."""
    try:
        lines = plain_file(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not text"
        raise ConfigError(f"cannot read the sequence {path}: {reason}") from e
    steps: list[Step] = []
    for number, line in enumerate(lines, 1):
        try:
            steps += [step] if (step := parse(line)) else []
        except ValueError as e:
            words = "; ".join(kind.value for kind in StepKind)
            raise ConfigError(f"{path}:{number}: {e}", remedy=f"a line is one of: {words}") from e
    if not steps:
        raise ConfigError(f"{path} has no step in it", remedy="give a sequence that a run has saved")
    return steps
