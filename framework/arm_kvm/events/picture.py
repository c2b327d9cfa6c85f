"""A trace as a picture (SVG): VMs over time, the VMIDs they run under, rollovers and invalidations.

``history`` is what there is to see, in ns of the trace; ``_Sheet`` puts it on paper, in pixels. Instruction cache
maintenance is left out: it follows every flush, and concerns no VMID.
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

from arm_kvm.events.history import History, Moment, Stay, VmLife
from arm_kvm.events.trace import Trace

_WIDTH, _LEFT, _RIGHT, _TOP = 1200, 90, 1160, 118  #: of the paper; of the field that has time in it
_ROWS = 800  #: height that the rows of VMs share
_TALLEST, _LOWEST = 24, 1.5  #: heights of a row
_READABLE = 10  #: height from which a row has room for numbers, and the least distance of labels
_LISTED = 20  #: violations that are spelled out below
_INK, _GREY, _FAINT, _RED, _AMBER = "#222", "#777", "#e4e4e4", "#d00000", "#b04a00"
_GOLDEN = (3 - math.sqrt(5)) / 2  #: of a turn of hue: VMIDs that follow each other look different

#: Kind of moment -> its shape as a path from where it is, fill, stroke. Later ones cover earlier ones.
_SHAPES = {
    "local": ("v4", "none", _GREY),
    "broadcast": ("l-3 5h6z", _AMBER, "none"),
    "destroyed": ("m-3-3l6 6m-6 0l6-6", "none", _GREY),
    "violation": ("m-6 0a6 6 0 1 0 12 0a6 6 0 1 0-12 0", "#ffd0d0", _RED),
}


# -- how it looks --------------------------------------------------------------------------------------------


def _tag(name: str, body: str = "", **attributes: str | float) -> str:
    """An element. Lengths are in pixels, to a tenth; ``body`` is SVG already."""
    values = ((k.replace("_", "-"), v if isinstance(v, str) else f"{round(v, 1):g}") for k, v in attributes.items())
    start = " ".join([name, *(f"{key}={quoteattr(value)}" for key, value in values)])
    return f"<{start}>{body}</{name}>" if body else f"<{start}/>"


def _text(x: float, y: float, words: str, size: float = 10, **attributes: str | float) -> str:
    return _tag("text", escape(words), x=x, y=y, font_size=size, **attributes)


def _line(x: float, y: float, to: str, colour: str, title: str = "", **attributes: str) -> str:
    """``to``: a path from there."""
    return _tag("path", title, d=f"M{x:.1f} {y:.1f}{to}", stroke=colour, **attributes)


def _shape(kind: str, x: float, y: float, words: str) -> str:
    path, fill, stroke = _SHAPES[kind]
    opacity = {"fill_opacity": "0.5", "stroke_width": 2.0} if kind == "violation" else {}
    title = _tag("title", escape(words))
    return _tag("path", title, **{"class": kind}, d=f"M{x:.1f} {y:.1f}{path}", fill=fill, stroke=stroke, **opacity)


def _colour(vmid: int) -> str:
    """Hue by the golden angle. Four lightnesses, for hues that nearly come round again: 1 and 255 meet at rollovers."""
    rgb = hls_to_rgb(vmid * _GOLDEN % 1, 0.42 + 0.07 * (vmid % 4), 0.62)
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)


def _merged(stays: list[Stay], gap: float) -> list[Stay]:
    """Stays of one VM, CPU and VMID that are less than ``gap`` ns apart as one: no eye can tell them apart."""
    last: dict[tuple[VmLife, int, int], Stay] = {}
    out = []
    for stay in stays:
        key = stay.vm, stay.cpu, stay.vmid
        if key in last and stay.start - last[key].end < gap:
            last[key].end = stay.end
        else:
            last[key] = replace(stay)
            out.append(last[key])
    return out


class _Sheet:
    """The field of the picture: x is time, y a row for each VM, below them a strip for each CPU. In pixels."""

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
        """Later elements cover earlier ones."""
        yield from self._axis()
        every = math.ceil(_READABLE / self._height)
        for i, (vm, y) in enumerate(self._rows.items()):
            yield from self._lane("" if i % every else vm.name, y, self._height, vm.stays, "stay")
        for cpu, y in self._strips.items():
            stays = [stay for stay in self._history.stays if stay.cpu == cpu]
            yield from self._lane(f"CPU {cpu}", y, _TALLEST, stays, "strip")
        yield from self._rollovers()
        yield from self._moments()

    def _x(self, time: float) -> float:
        return _LEFT + (time - self._first) * self._scale

    def _axis(self) -> Iterator[str]:
        """A line at each round number of milliseconds, five to ten in all."""
        least = (self._last - self._first or 1) / 1e7
        power = 10.0 ** math.floor(math.log10(least))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= least * 0.999)
        for n in range(math.ceil(self._first / 1e6 / step), math.floor(self._last / 1e6 / step) + 1):
            x = self._x(n * step * 1e6)
            yield _line(x, _TOP, f"V{self.bottom + 4:.1f}", _FAINT)
            yield _text(x, self.bottom + 16, f"{n * step:.9g}", text_anchor="middle")
        yield _text(_LEFT - 8, self.bottom + 16, "time, ms", text_anchor="end")

    def _lane(self, label: str, y: float, height: float, stays: list[Stay], kind: str) -> Iterator[str]:
        """Numbers, below them bars, one for each CPU the VM ran on. A low lane is all bars."""
        readable = height >= _READABLE
        top, size = (y + height * 0.42, height * 0.36) if readable else (y, height)
        if label:
            yield _text(_LEFT - 8, top + size / 2 + 3.5, label, text_anchor="end")
        if readable:
            yield _line(_LEFT, top + size, f"H{_RIGHT}", _FAINT)
        cpus = sorted({stay.cpu for stay in stays})
        size /= len(cpus) or 1
        for stay in _merged(stays, 0.5 / self._scale):
            x, where = self._x(stay.start), top + cpus.index(stay.cpu) * size
            box = {"x": x, "y": where, "width": max(2.0, self._x(stay.end) - x), "height": size}
            yield _tag("rect", _tag("title", escape(str(stay))), **{"class": kind}, **box, fill=_colour(stay.vmid))
        if label:
            yield from self._numbers(stays, top - 1 if readable else y + 2, min(9.5, max(7, height * 0.42)))

    def _numbers(self, stays: list[Stay], y: float, size: float) -> Iterator[str]:
        """The VMID where a run of it begins, if there is room before the next one."""
        runs = [next(run) for _, run in groupby(stays, lambda stay: (stay.vm, stay.vmid))]
        starts = [self._x(stay.start) + 3 for stay in runs]
        for stay, x, end in zip(runs, starts, [*starts[1:], float(_WIDTH)], strict=False):
            if x + len(str(stay.vmid)) * size * 0.62 < end:
                yield _text(x, y, str(stay.vmid), size)

    def _rollovers(self) -> Iterator[str]:
        free = 0.0  # where there is room for the next label
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
        """On the row of the VM, else the strip of the CPU; invalidations below the bar. The axis has what is wrong.

        Low rows have no room for local flushes, which come with every first entry.
        """
        low = self._height < _READABLE
        if moment.vm in self._rows and not (low and moment.kind == "local"):
            y, height = self._rows[moment.vm], self._height
        elif moment.cpu in self._strips:
            y, height = self._strips[moment.cpu], _TALLEST
        else:
            return self.bottom if moment.kind == "violation" else None
        return y + height * (0.8 if moment.kind in ("local", "broadcast") else 0.6)


# -- around it -----------------------------------------------------------------------------------------------


def _header(trace: Trace, history: History) -> Iterator[str]:
    facts = defaultdict(lambda: "unknown", trace.facts)
    kinds = Counter(moment.kind for moment in history.moments)
    counts = {
        "VMs entered": len(history.vms),
        "guest entries": len(history.stays),
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
    """A line of samples."""
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
    """The violations in words."""
    found = history.violations
    lines = [f"event {v.index}: {v.rule.value}: {v.why}" for v in found[:_LISTED]]
    if len(found) > _LISTED:
        lines.append(f"... and {len(found) - _LISTED} more")
    wrapped = [part for line in lines for part in textwrap.wrap(line, 180, subsequent_indent="    ")]
    colour = _RED if found else _INK
    return [_text(12, y + 15 * i, line, 11, fill=colour) for i, line in enumerate(wrapped or ["the rules are kept"])]


def draw(trace: Trace) -> str:
    """The picture of the trace: an SVG document that needs nothing else. White paper, for dark viewers too."""
    history = History(trace)
    sheet = _Sheet(history, max([trace.cpus, *(stay.cpu + 1 for stay in history.stays)]))
    footer = _footer(history, sheet.bottom + 44)
    height = sheet.bottom + 44 + 15 * len(footer)
    paper = _tag("rect", width=_WIDTH, height=height, fill="#fff")
    legend = _tag("g", "\n".join(_legend(84)), id="legend", shape_rendering="auto")
    body = [paper, *_header(trace, history), legend, *sheet.draw(), *footer]
    look = {"viewBox": f"0 0 {_WIDTH} {height:.1f}", "font_family": "sans-serif", "shape_rendering": "crispEdges"}
    return _tag(
        "svg", "\n".join(body), xmlns="http://www.w3.org/2000/svg", width=_WIDTH, height=height, fill=_INK, **look
    )
