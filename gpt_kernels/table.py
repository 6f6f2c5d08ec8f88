"""Tables for people."""

from __future__ import annotations

import sys
from collections.abc import Container, Sequence


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size or unit == "µs":
            return f"{seconds / size:.3g} {unit}"
    raise AssertionError


def aligned(rows: Sequence[Sequence[str]], right: Container[int] = ()) -> list[str]:
    """A line a row, columns two spaces apart; those in `right`, by number, end where others begin."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    edges = ["rjust" if i in right else "ljust" for i in range(len(widths))]
    cells = ([getattr(c, edge)(w) for c, edge, w in zip(row, edges, widths, strict=True)] for row in rows)
    return ["  ".join(row).rstrip() for row in cells]


def print_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str = "",
    right: Container[int] = (),
    caption: str = "",
    width: int = 160,
) -> None:
    """With rich where it is installed, else in aligned columns. width: where there is no terminal, of a line."""
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        print("\n" + "\n".join([title, *aligned([header, *rows] if any(header) else rows, right)]))
        if caption:
            print(caption)
        return
    table = Table(title=escape(title) or None, caption=escape(caption) or None, show_header=any(header), title_justify="left")
    for i, name in enumerate(header):
        table.add_column(escape(name), justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    # a pipe has no width: wide enough that no cell is folded
    Console(width=None if sys.stdout.isatty() else width).print(table)
