"""Run the automata over a trace."""

from __future__ import annotations

from collections.abc import Iterable

from arm_kvm.events import automata
from arm_kvm.events.allocation import Allocation, begin_of
from arm_kvm.events.trace import Trace
from arm_kvm.events.violations import RuleViolation
from arm_kvm.events.world import TraceState


def automata_for(trace: Trace) -> list[automata.Automaton]:
    """All automata; that of the model's allocator only if the trace says which allocator the kernel has."""
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


def violations(trace: Trace, rules: Iterable[automata.Automaton] | None = None) -> list[RuleViolation]:
    """Find all violations, in the order of the trace; [] for a hypervisor that kept the rules."""
    rules = automata_for(trace) if rules is None else list(rules)
    world = TraceState()
    found = []
    for index, event in enumerate(trace.events):
        for rule in rules:
            found += [RuleViolation(broken, index, event, why) for broken, why in rule.see(event, world)]
        world.after(event)
    return found
