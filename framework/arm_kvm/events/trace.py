"""A trace: what the hypervisor did to the translation of guests, in order; and its text form, one line per event.

::

    arm-kvm-trace 1
    host=a15 kernel=5.4.302 cpus=2 vmid-bits=8 allocator=consecutive
    0.000000 - created root=0x812a4000 vm=1
    0.001250 0 vttbr 0x00010000812a4000
    0.001263 0 enter vcpu=0xc4a30000
    0.001391 0 exit
    0.001397 0 vttbr 0x0000000000000000
    0.001920 - entry root=0x812a4000 ipa=0x8000000 level=3 old=0x0 new=0x4008123507ff
    0.002001 1 inv tlbiallis
    0.002002 1 inv ipas2e1is 0x0000000000080000
    0.002100 - destroyed root=0x812a4000
    0.002200 - mark memory_advise

A line has the time in seconds of the lab's machine since the recording began, which the checker ignores; the CPU of
the host (``-``: none); and the event. A ``#`` begins a comment. Lines are in the order of the events: a ``vttbr`` or
``inv`` line follows its instruction; ``enter`` is the last step of the world switch before the guest, which may still
be aborted because of a pending interrupt (no ``exit`` follows); ``entry`` lines precede the first event after the
change was in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar

from arm_kvm.events.operations import OPERATIONS
from arm_kvm.support.errors import TraceError
from arm_kvm.support.paths import plain_file

MAGIC = "arm-kvm-trace 1"
VMID_SHIFT = 48
_ROOT = ((1 << VMID_SHIFT) - 1) & ~1  # VTTBR bit 0 is CnP


def vmid_of(vttbr: int) -> int:
    """VTTBR.VMID, 8 or 16 bits."""
    return vttbr >> VMID_SHIFT


def root_of(vttbr: int) -> int:
    """VTTBR.BADDR: the physical address of the stage-2 root; 0: no VM."""
    return vttbr & _ROOT


@dataclass(frozen=True, slots=True)
class Event:
    """``time`` in ns since the recording began; ``cpu`` of the host, -1 if the event belongs to none."""

    time: int
    cpu: int

    word: ClassVar[str] = ""


@dataclass(frozen=True, slots=True)
class Vttbr(Event):
    """VTTBR was written."""

    value: int
    word: ClassVar[str] = "vttbr"


@dataclass(frozen=True, slots=True)
class Enter(Event):
    """The world switch enters a guest under the VTTBR last written. ``vcpu``: address of its struct kvm_vcpu."""

    vcpu: int
    word: ClassVar[str] = "enter"


@dataclass(frozen=True, slots=True)
class Exit(Event):
    """The CPU returned from the guest."""

    word: ClassVar[str] = "exit"


@dataclass(frozen=True, slots=True)
class Invalidate(Event):
    """A TLB or instruction cache operation of :data:`OPERATIONS`; ``operand`` is 0 if it has none."""

    op: str
    operand: int = 0
    word: ClassVar[str] = "inv"


@dataclass(frozen=True, slots=True)
class EntryChange(Event):
    """A stage-2 entry at ``level`` for ``ipa`` changed in memory: the descriptors before and after."""

    root: int
    ipa: int
    level: int
    old: int
    new: int
    word: ClassVar[str] = "entry"


@dataclass(frozen=True, slots=True)
class Created(Event):
    """A VM was created with this root; ``vm`` is its number in the lab."""

    root: int
    vm: int
    word: ClassVar[str] = "created"


@dataclass(frozen=True, slots=True)
class Destroyed(Event):
    """The VM with this root was destroyed: close(2) of its last file descriptor returned."""

    root: int
    word: ClassVar[str] = "destroyed"


@dataclass(frozen=True, slots=True)
class Mark(Event):
    """An operation of the lab on the host is complete, and with it all maintenance that it requires."""

    text: str = ""
    word: ClassVar[str] = "mark"


_COUNT = "events"  #: fact of a saved trace: the number of its events, so that a truncated file is detected


@dataclass
class Trace:
    """Events in order, and ``facts`` about the host: host, kernel, cpus, vmid-bits, allocator."""

    facts: dict[str, str] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    def of(self, *kinds: type[Event]) -> Iterator[Event]:
        """The events of these kinds."""
        return (event for event in self.events if isinstance(event, kinds))

    @property
    def cpus(self) -> int:
        return int(self.facts.get("cpus", "1"))

    @property
    def vmid_bits(self) -> int:
        return int(self.facts.get("vmid-bits", "8"))

    # -- text ------------------------------------------------------------------------------------

    def lines(self) -> Iterator[str]:
        yield MAGIC
        yield " ".join(f"{key}={value}" for key, value in self.facts.items())
        yield from map(format_event, self.events)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        counted = Trace({**self.facts, _COUNT: str(len(self.events))}, self.events)
        with path.open("w", encoding="ascii") as f:
            f.writelines(f"{line}\n" for line in counted.lines())

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read a saved trace. Raises TraceError for a file that cannot be read, and for an invalid line (by number)."""
        try:
            return cls.parse(plain_file(path).read_text(encoding="ascii").splitlines(), str(path))
        except (OSError, UnicodeDecodeError) as e:
            reason = e.strerror if isinstance(e, OSError) else "it is not text"
            raise TraceError(f"cannot read the trace {path}: {reason}") from e

    @classmethod
    def parse(cls, lines: Iterable[str], name: str = "trace") -> Trace:
        """Parse a trace. Raises TraceError."""
        numbered = [(n, line) for n, raw in enumerate(lines, 1) if (line := raw.partition("#")[0].strip())]
        if not numbered or numbered[0][1] != MAGIC:
            raise TraceError(f"{name} is no trace: its first line is not {MAGIC!r}")
        has_facts = len(numbered) > 1 and "=" in numbered[1][1].split()[0]
        facts = _facts(numbered[1], name) if has_facts else {}
        events = []
        for number, line in numbered[1 + has_facts :]:
            try:
                events.append(parse_event(line))
            except (ValueError, KeyError, TypeError, OverflowError) as e:
                raise TraceError(f"{name}, line {number}: {line!r} is no event ({e})") from e
        if (said := facts.pop(_COUNT, None)) is not None and int(said) != len(events):
            raise TraceError(f"{name} is not whole: {len(events)} of {said} events")
        return cls(facts, events)


def _facts(numbered: tuple[int, str], name: str) -> dict[str, str]:
    """Parse the second line: key=value pairs. Raises TraceError."""
    number, line = numbered
    try:
        facts = dict(pair.split("=", 1) for pair in line.split())
        for key in {"cpus", "vmid-bits", _COUNT} & facts.keys():
            int(facts[key])
    except ValueError as e:
        raise TraceError(f"{name}, line {number}: {line!r} is not a line of facts ({e})") from e
    return facts


# -- lines ---------------------------------------------------------------------------------------------

_KINDS: dict[str, type[Event]] = {kind.word: kind for kind in Event.__subclasses__()}


def format_event(event: Event) -> str:
    """Format an event as a line."""
    cpu = "-" if event.cpu < 0 else event.cpu
    return f"{event.time / 1e9:.6f} {cpu} {event.word} {_operands(event)}".rstrip()


def _operands(event: Event) -> str:
    match event:
        case Vttbr(value=value):
            return f"{value:#018x}"
        case Invalidate(op=op, operand=operand):
            return f"{op} {operand:#018x}" if OPERATIONS[op].has_operand else op
        case Mark(text=text):
            return text
    names = [f.name for f in fields(event)[2:]]
    return " ".join(f"{name}={getattr(event, name):{'d' if name in ('level', 'vm') else '#x'}}" for name in names)


def parse_event(line: str) -> Event:
    """Parse a line. Raises ValueError, KeyError, TypeError or OverflowError."""
    time, cpu, word, *more = line.split(None, 3)
    rest = more[0] if more else ""
    kind = _KINDS[word]
    where = (round(float(time) * 1e9), -1 if cpu == "-" else int(cpu))
    if kind is Vttbr:
        return Vttbr(*where, _unsigned(rest))
    if kind is Mark:
        return Mark(*where, rest)
    if kind is Invalidate:
        op, _, operand = rest.partition(" ")
        if OPERATIONS[op].has_operand != bool(operand):
            raise ValueError(f"{op} {'needs an' if not operand else 'has no'} operand")
        return Invalidate(*where, op, _unsigned(operand or "0"))
    return kind(*where, **{key: _unsigned(value) for key, value in (pair.split("=") for pair in rest.split())})


def _unsigned(text: str) -> int:
    if (value := int(text, 0)) < 0:
        raise ValueError(f"{text} is negative")
    return value
