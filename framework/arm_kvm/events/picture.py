"""A trace as a picture (SVG): VMs over time, the VMIDs they run under, rollovers and invalidations.

``history`` holds the contents, in ns of the trace; ``_Sheet`` lays them out, in pixels. Instruction cache maintenance
is left out, as it follows every flush and has nothing to do with VMIDs.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator
from colorsys import hls_to_rgb
from dataclasses import replace
from itertools import groupby
from xml.sax.saxutils import escape, quoteattr

from arm_kvm.events.history import GuestRun, History, Moment, VmLife
from arm_kvm.events.trace import Trace

_WIDTH, _LEFT, _RIGHT, _TOP = 1200, 90, 1160, 118  #: of the sheet, and of the area that shows time
_ROWS = 800  #: height of all rows of VMs together
_TALLEST, _LOWEST = 24, 1.5  #: heights of a row
_READABLE = 10  #: minimum height of a row with numbers, and minimum distance of labels
_LISTED = 20  #: violations that are described below the picture
_INK, _GREY, _FAINT, _RED, _AMBER = "#222", "#777", "#e4e4e4", "#d00000", "#b04a00"
_GOLDEN = (3 - math.sqrt(5)) / 2  #: part of the colour circle, so that consecutive VMIDs differ in hue

#: Kind of moment -> its shape as a path from its position, fill, stroke. Later kinds are drawn over earlier ones.
_SHAPES = {
    "local": ("v4", "none", _GREY),
    "broadcast": ("l-3 5h6z", _AMBER, "none"),
    "destroyed": ("m-3-3l6 6m-6 0l6-6", "none", _GREY),
    "violation": ("m-6 0a6 6 0 1 0 12 0a6 6 0 1 0-12 0", "#ffd0d0", _RED),
}


# -- SVG elements ---------------------------------------------------------------------------------------------


def _tag(name: str, body: str = "", **attributes: str | float) -> str:
    """An element. Lengths are in pixels, rounded to a tenth; ``body`` is SVG."""
    values = ((k.replace("_", "-"), v if isinstance(v, str) else f"{round(v, 1):g}") for k, v in attributes.items())
    start = " ".join([name, *(f"{key}={quoteattr(value)}" for key, value in values)])
    return f"<{start}>{body}</{name}>" if body else f"<{start}/>"


def _text(x: float, y: float, words: str, size: float = 10, **attributes: str | float) -> str:
    return _tag("text", escape(words), x=x, y=y, font_size=size, **attributes)


def _line(x: float, y: float, to: str, colour: str, title: str = "", **attributes: str) -> str:
    """A path ``to`` from a point."""
    return _tag("path", title, d=f"M{x:.1f} {y:.1f}{to}", stroke=colour, **attributes)


def _shape(kind: str, x: float, y: float, words: str) -> str:
    path, fill, stroke = _SHAPES[kind]
    opacity: dict[str, str | float] = {"fill_opacity": "0.5", "stroke_width": 2.0} if kind == "violation" else {}
    title = _tag("title", escape(words))
    return _tag("path", title, **{"class": kind}, d=f"M{x:.1f} {y:.1f}{path}", fill=fill, stroke=stroke, **opacity)


def _colour(vmid: int) -> str:
    """Hue by the golden angle; four lightnesses, because hues nearly recur: 1 and 255 are neighbours at rollovers."""
    rgb = hls_to_rgb(vmid * _GOLDEN % 1, 0.42 + 0.07 * (vmid % 4), 0.62)
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)


def _merged(runs: list[GuestRun], gap: float) -> list[GuestRun]:
    """Merge runs of one VM, CPU and VMID that are less than ``gap`` ns apart and so cannot be told apart."""
    last: dict[tuple[VmLife, int, int], GuestRun] = {}
    out = []
    for run in runs:
        key = run.vm, run.cpu, run.vmid
        if key in last and run.start - last[key].end < gap:
            last[key].end = run.end
        else:
            last[key] = replace(run)
            out.append(last[key])
    return out


class _Sheet:
    """The area with time on the x axis; on the y axis a row for each VM, and below a strip for each CPU. In pixels."""

    def __init__(self, history: History, cpus: int) -> None:
        self._history = history
        self._first, self._last = history.span
        self._scale = (_RIGHT - _LEFT) / max(self._last - self._first, 1)  # pixels a ns
        self._height = min(_TALLEST, max(_LOWEST, _ROWS / max(len(history.vms), 1)))
        self._rows = {vm: _TOP + i * self._height for i, vm in enumerate(history.vms)}
        end = _TOP + len(history.vms) * self._height + 12
        self._strips = {cpu: end + cpu * _TALLEST for cpu in range(cpus)}
        self.bottom = end + cpus * _TALLEST

    def draw(self) -> Iterator[str]:
        """The elements in drawing order."""
        yield from self._axis()
        every = math.ceil(_READABLE / self._height)
        for i, (vm, y) in enumerate(self._rows.items()):
            yield from self._lane("" if i % every else vm.name, y, self._height, vm.runs, "run")
        for cpu, y in self._strips.items():
            runs = [run for run in self._history.runs if run.cpu == cpu]
            yield from self._lane(f"CPU {cpu}", y, _TALLEST, runs, "strip")
        yield from self._rollovers()
        yield from self._moments()

    def _x(self, time: float) -> float:
        return _LEFT + (time - self._first) * self._scale

    def _axis(self) -> Iterator[str]:
        """Five to ten lines, at round numbers of milliseconds."""
        least = (self._last - self._first or 1) / 1e7
        power = 10.0 ** math.floor(math.log10(least))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= least * 0.999)
        for n in range(math.ceil(self._first / 1e6 / step), math.floor(self._last / 1e6 / step) + 1):
            x = self._x(n * step * 1e6)
            yield _line(x, _TOP, f"V{self.bottom + 4:.1f}", _FAINT)
            yield _text(x, self.bottom + 16, f"{n * step:.9g}", text_anchor="middle")
        yield _text(_LEFT - 8, self.bottom + 16, "time, ms", text_anchor="end")

    def _lane(self, label: str, y: float, height: float, runs: list[GuestRun], kind: str) -> Iterator[str]:
        """VMIDs, and below them bars, in a line for each CPU that the VM ran on. A low lane has only bars."""
        readable = height >= _READABLE
        top, size = (y + height * 0.42, height * 0.36) if readable else (y, height)
        if label:
            yield _text(_LEFT - 8, top + size / 2 + 3.5, label, text_anchor="end")
        if readable:
            yield _line(_LEFT, top + size, f"H{_RIGHT}", _FAINT)
        cpus = sorted({run.cpu for run in runs})
        size /= len(cpus) or 1
        for run in _merged(runs, 0.5 / self._scale):
            x, where = self._x(run.start), top + cpus.index(run.cpu) * size
            box = {"x": x, "y": where, "width": max(2.0, self._x(run.end) - x), "height": size}
            yield _tag("rect", _tag("title", escape(str(run))), **{"class": kind}, **box, fill=_colour(run.vmid))
        if label:
            yield from self._numbers(runs, top - 1 if readable else y + 2, min(9.5, max(7, height * 0.42)))

    def _numbers(self, runs: list[GuestRun], y: float, size: float) -> Iterator[str]:
        """The VMID wherever it changes, if there is room before the next one."""
        first = [next(same) for _, same in groupby(runs, lambda run: (run.vm, run.vmid))]
        starts = [self._x(run.start) + 3 for run in first]
        for run, x, end in zip(first, starts, [*starts[1:], float(_WIDTH)], strict=False):
            if x + len(str(run.vmid)) * size * 0.62 < end:
                yield _text(x, y, str(run.vmid), size)

    def _rollovers(self) -> Iterator[str]:
        free = 0.0  # start of the free space for the next label
        for moment in self._history.moments:
            if moment.kind == "rollover":
                x = self._x(moment.time)
                title = _tag("title", f"rollover: {escape(str(moment))}")
                yield _line(x, _TOP - 4, f"V{self.bottom:.1f}", _RED, title, **{"class": "rollover"})
                if x > free:
                    free = x + 50
                    yield _text(x, _TOP - 8, "rollover", text_anchor="middle", fill=_RED)

    def _moments(self) -> Iterator[str]:
        order = list(_SHAPES)
        shown = [m for m in self._history.moments if m.kind in order and self._first <= m.time <= self._last]
        shapes = []
        for moment in sorted(shown, key=lambda m: order.index(m.kind)):
            if (y := self._level(moment)) is not None:
                shapes.append(_shape(moment.kind, self._x(moment.time), y, str(moment)))
        yield _tag("g", "\n".join(shapes), id="moments", shape_rendering="auto")

    def _level(self, moment: Moment) -> float | None:
        """The y of a moment: in the VM's row, else in the CPU's strip; a violation without either is on the axis.

        Invalidations are below the bar. Low rows have no room for local flushes, which occur at every first entry.
        """
        low = self._height < _READABLE
        if moment.vm in self._rows and not (low and moment.kind == "local"):
            y, height = self._rows[moment.vm], self._height
        elif moment.cpu in self._strips:
            y, height = self._strips[moment.cpu], _TALLEST
        else:
            return self.bottom if moment.kind == "violation" else None
        return y + height * (0.8 if moment.kind in ("local", "broadcast") else 0.6)


# -- header, legend, footer ----------------------------------------------------------------------------------------


def _header(trace: Trace, history: History) -> Iterator[str]:
    facts = defaultdict(lambda: "unknown", trace.facts)
    kinds = Counter(moment.kind for moment in history.moments)
    counts = {
        "VMs entered": len(history.vms),
        "guest entries": len(history.runs),
        "rollovers": kinds["rollover"],
        "invalidations of one VM": kinds["broadcast"],
        "local flushes": kinds["local"],
        "violations": kinds["violation"],
    }
    yield _text(12, 26, "VMs, their VMIDs, rollovers and invalidations", 16, font_weight="bold")
    names = {"host": "host", "kernel": "kernel", "allocator": "allocator", "vmid-bits": "VMID bits"}
    yield _text(12, 46, ",  ".join(f"{name} {facts[key]}" for key, name in names.items()), 11)
    yield _text(12, 63, ",  ".join(f"{what}: {number}" for what, number in counts.items()), 11)


def _legend(y: float) -> Iterator[str]:
    """A line of samples with explanations."""
    for i in range(4):
        yield _tag("rect", x=12 + 7.0 * i, y=y - 8, width=6.0, height=8.0, fill=_colour(i + 1))
    yield _text(45, y, "inside a guest; colour: VMID")
    yield _line(222, y - 10, "v13", _RED)
    yield _text(230, y, "everything invalidated, all CPUs: rollover")
    samples = {
        "broadcast": (465, -6, "a VM invalidated, all CPUs"),
        "local": (632, -5, "flush on one CPU"),
        "destroyed": (750, -3, "VM destroyed"),
        "violation": (850, -3, "a rule is broken"),
    }
    for kind, (x, rise, words) in samples.items():
        yield _shape(kind, x, y + rise, words)
        yield _text(x + 11, y, words)


def _footer(history: History, y: float) -> list[str]:
    """The violations, one per line."""
    found = history.violations
    lines = [f"event {v.index}: {v.rule.value}: {v.why}" for v in found[:_LISTED]]
    if len(found) > _LISTED:
        lines.append(f"... and {len(found) - _LISTED} more")
    wrapped = [part for line in lines for part in textwrap.wrap(line, 180, subsequent_indent="    ")]
    colour = _RED if found else _INK
    return [_text(12, y + 15 * i, line, 11, fill=colour) for i, line in enumerate(wrapped or ["the rules are kept"])]


def draw(trace: Trace) -> str:
    """Draw the trace as a self-contained SVG document, on white for dark viewers, too."""
    history = History(trace)
    sheet = _Sheet(history, max([trace.cpus, *(run.cpu + 1 for run in history.runs)]))
    footer = _footer(history, sheet.bottom + 44)
    height = sheet.bottom + 44 + 15 * len(footer)
    paper = _tag("rect", width=_WIDTH, height=height, fill="#fff")
    legend = _tag("g", "\n".join(_legend(84)), id="legend", shape_rendering="auto")
    body = [paper, *_header(trace, history), legend, *sheet.draw(), *footer]
    look = {"viewBox": f"0 0 {_WIDTH} {height:.1f}", "font_family": "sans-serif", "shape_rendering": "crispEdges"}
    return _tag(
        "svg", "\n".join(body), xmlns="http://www.w3.org/2000/svg", width=_WIDTH, height=height, fill=_INK, **look
    )
