"""Runs the automata over a trace."""

from __future__ import annotations

from collections.abc import Iterable

from . import automata
from .allocation import Allocation, begin_of
from .trace import Trace
from .violations import Violation
from .world import World


def automata_for(trace: Trace) -> list[automata.Automaton]:
    """Every rule; equality with the model's allocator where the trace says which one the kernel has."""
    rules: list[automata.Automaton] = [
        automata.Invalidations(),
        automata.Zero(),
        automata.Owners(trace.vmid_bits),
        automata.OneVmidPerVm(),
        automata.Stale(),
        automata.LocalFlush(),
    ]
    begin = begin_of(trace)
    return [*rules, Allocation(begin, trace.cpus)] if begin else rules


def violations(trace: Trace, rules: Iterable[automata.Automaton] | None = None) -> list[Violation]:
    """All that is wrong with the trace, in its order. [] for a hypervisor that kept the rules."""
    rules = automata_for(trace) if rules is None else list(rules)
    world = World()
    found = []
    for index, event in enumerate(trace.events):
        for rule in rules:
            found += [Violation(kind, index, event, why) for kind, why in rule.see(event, world)]
        world.after(event)
    return found
