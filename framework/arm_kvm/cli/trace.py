"""``trace check``, ``trace draw``: checks and draws recorded traces of events."""

from __future__ import annotations

import argparse
from pathlib import Path

from arm_kvm.cli.arguments import Commands
from arm_kvm.support.errors import ProtocolViolation, SetupError, TraceError


def add_commands(commands: Commands) -> None:
    actions = commands.add_group("trace", "check and draw recorded traces", "Recorded traces of events.")
    check = actions.add("check", cmd_trace_check, "check traces against the rules of VMIDs and TLB maintenance")
    check.add_argument("file", type=Path, nargs="+", metavar="FILE")
    draw = actions.add("draw", cmd_trace_draw, "draw VMs over time, their VMIDs, rollovers and invalidations")
    draw.add_argument("file", type=Path, metavar="FILE")
    draw.add_argument("-o", "--output", type=Path, metavar="OUT.svg", help="default: FILE with the suffix .svg")


def cmd_trace_check(args: argparse.Namespace) -> int:
    """Check every file against the rules of VMIDs and TLB maintenance. Raises ProtocolViolation after the last."""
    broken = [str(file) for file in args.file if not _keeps_the_rules(file)]
    if broken:
        raise ProtocolViolation(
            f"{len(broken)} of {len(args.file)} traces break the rules of VMIDs and TLB maintenance: {' '.join(broken)}"
        )
    return 0


def _keeps_the_rules(file: Path) -> bool:
    from arm_kvm.events import checker
    from arm_kvm.events.trace import Enter, Invalidate, Trace
    from arm_kvm.events.world import full

    trace = Trace.load(file)
    if not trace.events:
        raise TraceError(f"{file} has no event in it: there is nothing to check")
    found = checker.violations(trace)
    entries = len(list(trace.of(Enter)))
    rollovers = sum(full(event.op) for event in trace.events if isinstance(event, Invalidate))
    verdict = f"{len(found)} violations" if found else "the rules are kept"
    print(f"{file}: {len(trace.events)} events, {entries} guest entries, {rollovers} rollovers: {verdict}")
    for violation in found:
        print(violation)
    return not found


def cmd_trace_draw(args: argparse.Namespace) -> int:
    """Draw a recorded trace, into a file beside it or where -o says."""
    from arm_kvm.events import picture
    from arm_kvm.events.trace import Trace

    drawing = picture.draw(Trace.load(args.file))
    output = args.output or args.file.with_suffix(".svg")
    if output.resolve() == args.file.resolve():
        raise SetupError(f"the picture would overwrite the trace {output}", remedy="name another file with -o")
    try:
        output.write_text(drawing, encoding="utf-8")
    except OSError as e:
        raise SetupError(f"cannot write the picture {output}: {e.strerror}", remedy="name another file with -o") from e
    print(output)
    return 0
