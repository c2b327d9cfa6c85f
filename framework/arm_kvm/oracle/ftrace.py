"""Record ftrace events of the host's kernel and parse their text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from arm_kvm.support.errors import TraceError
from arm_kvm.vmm.client import Agent, op

_LINE = re.compile(
    r"^\s*(?P<task>.+)-(?P<tid>\d+)\s+\[(?P<cpu>\d+)\].*?\s(?P<time>\d+\.\d+): (?P<name>\w+): (?P<text>.*)$"
)
_LOST = re.compile(r"LOST (\d+ )?EVENTS")
_FIELD = re.compile(r"(\w+)[ =:]+(0x[0-9a-fA-F]+|-?\d+)\b")


@dataclass(frozen=True)
class FtraceEvent:
    """One trace event. ``time`` is in seconds of the host's trace clock, ``fields`` has its numbers by name."""

    name: str
    cpu: int
    time: float
    text: str
    fields: dict[str, int] = field(default_factory=dict)


def parse(text: str) -> list[FtraceEvent]:
    """Parse the events of a trace file (Documentation/trace/ftrace.rst), in order."""
    events = []
    for match in filter(None, map(_LINE.match, text.splitlines())):
        fields = {key: int(value, 16 if value[:2] == "0x" else 10) for key, value in _FIELD.findall(match["text"])}
        events.append(FtraceEvent(match["name"], int(match["cpu"]), float(match["time"]), match["text"], fields))
    return events


@dataclass
class Traced:
    """A trace as text and as events, set at the end of its block."""

    text: str = ""
    events: list[FtraceEvent] = field(default_factory=list)


@contextmanager
def traced(agent: Agent, names: Sequence[str]) -> Iterator[Traced]:
    """Within the block, record events of the agent's host, by names like ``kvm:kvm_guest_fault``.

    Raises TraceError at the end of the block, unless it raises, when the kernel's buffer has overflowed.
    """
    seen = Traced()
    agent(op.trace_start, events=list(names))
    try:
        yield seen
    finally:
        seen.text = agent(op.trace_stop).decode()
        seen.events += parse(seen.text)
    if lost := _LOST.search(seen.text):
        raise TraceError(f"the kernel's trace lacks events: {lost[0]}", remedy="trace fewer events, or a shorter time")
