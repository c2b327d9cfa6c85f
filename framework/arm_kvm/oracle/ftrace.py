"""ftrace's text as events: what the kernel says it did during one test."""

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
    """One trace event. ``time`` in seconds of the host's trace clock; ``fields`` by the event's own names."""

    name: str
    cpu: int
    time: float
    text: str
    fields: dict[str, int] = field(default_factory=dict)


def parse(text: str) -> list[FtraceEvent]:
    """The events of a trace file (Documentation/trace/ftrace.rst), in order."""
    events = []
    for match in filter(None, map(_LINE.match, text.splitlines())):
        fields = {key: int(value, 16 if value[:2] == "0x" else 10) for key, value in _FIELD.findall(match["text"])}
        events.append(FtraceEvent(match["name"], int(match["cpu"]), float(match["time"]), match["text"], fields))
    return events


@dataclass
class Traced:
    """What was traced, as text and as events; full after its block."""

    text: str = ""
    events: list[FtraceEvent] = field(default_factory=list)


@contextmanager
def traced(agent: Agent, names: Sequence[str]) -> Iterator[Traced]:
    """Record these events (``kvm:kvm_guest_fault``) of the agent's host within the block.

    Raises TraceError after a block that ended well: the kernel had no room for some.
    """
    seen = Traced()
    agent(op.trace_start, events=list(names))
    try:
        yield seen
    finally:
        seen.text = agent(op.trace_stop).decode()
        seen.events += parse(seen.text)
    if lost := _LOST.search(seen.text):
        raise TraceError(f"the kernel's trace lacks events: {lost[0]}", remedy="trace less at a time")
