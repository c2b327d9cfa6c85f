"""Tables and units, as the commands print them."""

from __future__ import annotations

import sys

_WIDE = 400  #: columns of a table that is not printed to a terminal: no line is folded


class Table:
    """A table with a heading; :meth:`show` prints it."""

    def __init__(self, *columns: str) -> None:
        self._columns = columns
        self._rows: list[tuple[str, ...]] = []

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, *cells: str) -> None:
        """Add a row."""
        self._rows.append(cells)

    def show(self) -> None:
        # Imported here, since rich takes as long to load as everything else that `arm-kvm test` loads.
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table as RichTable

        table = RichTable(box=None, pad_edge=False, header_style="bold")
        for column in self._columns:
            table.add_column(column, overflow="fold")
        for cells in self._rows:
            table.add_row(*map(escape, cells))
        Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE).print(table)


def seconds(value: float) -> str:
    """Format a time with three significant digits and its unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"
