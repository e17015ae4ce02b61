"""Where every slot is, as a table in text, in a terminal and in a notebook, and a verdict in plain words."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.advice import ADVICE
from ..core.verdict import Check, Verdict

WIDTH = 120  # of a table that goes into a text


class Summary:
    """Rows of one table, by the name of the column; shows itself wherever it is looked at.

    ``print`` writes a table by rich where rich is installed, else plain text; a notebook shows HTML, and rich's own
    console takes it as it is.

    Attributes:
        title: above the table.
        rows: one mapping per row, all with the same keys: plain values, None for what is not known.
    """

    def __init__(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep title and rows."""
        self.title = title
        self.rows = tuple(dict(row) for row in rows)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns; empty without a row."""
        return tuple(self.rows[0]) if self.rows else ()

    def cells(self) -> list[list[str]]:
        """The rows in words."""
        return [[_cell(row[column]) for column in self.columns] for row in self.rows]

    def plain(self) -> str:
        """The table in plain text, without rich."""
        lines = [list(self.columns), *self.cells()]
        widths = [max(len(line[place]) for line in lines) for place in range(len(self.columns))]
        rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
        return "\n".join([self.title, *rows])

    def __str__(self) -> str:
        """The table as text."""
        try:
            from rich.console import Console
        except ImportError:
            return self.plain()
        text = io.StringIO()
        Console(file=text, width=WIDTH, color_system=None).print(self)
        return text.getvalue().rstrip("\n")

    __repr__ = __str__

    def __rich__(self) -> Any:
        """The table for rich's console."""
        from rich.table import Table
        from rich.text import Text

        # Names of slots and reasons are text: "[0]" in them is no markup.
        table = Table(title=Text(self.title), title_justify="left")
        for column in self.columns:
            table.add_column(Text(column))
        for row in self.cells():
            table.add_row(*map(Text, row))
        return table

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(column)}</th>" for column in self.columns)
        rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in self.cells()]
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        caption = f"<caption>{html.escape(self.title)}</caption>"
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def verdict_in_short(verdict: Verdict) -> str:
    """A verdict in a cell of a table: the gate, its answer, and the names of what was refused."""
    refused = ", ".join(check.name for check in verdict.failed)
    return f"{verdict.gate} passed" if verdict.passed else f"{verdict.gate} refused: {refused}"


def explained(verdict: Verdict) -> str:
    """A verdict in plain words: for each refusal and each warning what was found, why that is, and what to do."""
    if verdict.passed:
        head = f"{verdict.gate} let the seed in {verdict.seed!r} pass for {verdict.target}."
    else:
        reasons = "this" if len(verdict.failed) == 1 else f"these {len(verdict.failed)} reasons"
        head = f"{verdict.gate} refused the seed in {verdict.seed!r} for {verdict.target}, for {reasons}:"
    # What was never measured fails several questions, in the same words.
    found = dict.fromkeys(map(_explained, (*verdict.failed, *verdict.warnings)))
    return "\n".join([head, *found])


def _explained(check: Check) -> str:
    lines = [f"- {check.label}: {check.reason}."]
    advice = ADVICE.get(check.name)
    if advice is not None:
        lines += [f"    {advice.cause}", f"    What to do: {advice.cure}"]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
