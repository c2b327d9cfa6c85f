"""Progress of what takes longer than a second: a bar on a terminal, a line every 20 s elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

_LINE_EVERY = 20.0


def _console() -> Console:
    return Console(file=sys.stderr, highlight=False)


def note(text: str) -> None:
    """Print one line on stderr. A stderr that cannot be written is ignored."""
    with suppress(OSError):
        _console().print(f"arm-kvm: {text}", soft_wrap=True, markup=False)


class Task:
    """A running task; call it with the amount done since the last call and, if it helps, what is being done now."""

    def __init__(self, title: str, total: int | None, unit: str, bar: Progress | None) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._done = 0
        self._noted = time.monotonic()
        self._row = (bar, bar.add_task(title, total=total)) if bar else None

    def __call__(self, amount: int = 1, detail: str = "") -> None:
        self._done += amount
        if self._row is not None:
            bar, row = self._row
            bar.update(row, advance=amount, description=f"{self._title} {detail}".strip())
        elif time.monotonic() - self._noted > _LINE_EVERY:
            self._noted = time.monotonic()
            of = f" of {self._total}" if self._total else ""
            note(f"{self._title}: {self._done}{of} {self._unit}")


@contextmanager
def task(title: str, total: int | None = None, unit: str = "steps") -> Iterator[Task]:
    """Show that ``title`` is in progress. ``total`` is in ``unit``, None if it is not known."""
    console = _console()
    if not console.is_terminal:
        note(f"{title} ...")
        started = time.monotonic()
        yield Task(title, total, unit, None)
        note(f"{title}: done in {time.monotonic() - started:.0f} s")
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield Task(title, total, unit, bar)
