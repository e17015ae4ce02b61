"""Charts as SVG in a page: small, without a library, in the colours of the page."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 760, 56, 12, 12, 24


class Series(NamedTuple):
    """One curve.

    Attributes:
        name: in the title of the curve, which a browser shows where the pointer rests.
        colour: a name of a class of the page.
        points: (x, y), finite.
        dashed: drawn as a dashed line.
    """

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


class Mark(NamedTuple):
    """A short horizontal line at a limit, from x to x, with its words in its title."""

    begin: float
    end: float
    y: float
    colour: str
    words: str


class Scale:
    """From values to places on a page, linear or by the logarithm; every value has a place within the borders."""

    def __init__(self, low: float, high: float, begin: float, end: float, *, log: bool = False) -> None:
        """Take the values at both ends and their places."""
        self.log = log
        if log:
            low, high = float(math.floor(math.log10(low))), float(math.ceil(math.log10(high)))
        if high <= low:
            low, high = low - 1, high + 1
        self.low, self.high, self._begin, self._end = low, high, begin, end

    def at(self, value: float) -> float:
        """The place of a value."""
        share = ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)
        return self._begin + min(1.0, max(0.0, share)) * (self._end - self._begin)

    def ticks(self) -> list[float]:
        """Round values between the ends, about five."""
        if self.log:
            apart = max(1, math.ceil((self.high - self.low) / 5))
            return [10.0**power for power in range(int(self.low), int(self.high) + 1, apart)]
        rough = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        return [step * count for count in range(math.ceil(self.low / step), math.floor(self.high / step + 1e-9) + 1)]


def chart(label: str, series: Sequence[Series], last: float, marks: Sequence[Mark] = (), *, log: bool = False) -> str:
    """Curves over the epochs as an ``<svg>``; empty when there is nothing to draw.

    Args:
        label: what is drawn, for people who hear the page.
        series: the curves.
        last: the last epoch.
        marks: limits.
        log: logarithmic; then what is not above 0 is left out.
    """
    known = [[(x, y) for x, y in one.points if math.isfinite(y) and (y > 0 or not log)] for one in series]
    shown = [mark for mark in marks if mark.y > 0 or not log]
    values = [y for points in known for _, y in points]
    if not values:
        return ""
    values += [mark.y for mark in shown]
    height = 170
    x = Scale(0, max(1.0, last), LEFT, WIDTH - RIGHT)
    y = Scale(min(values), max(values), height - BOTTOM, TOP, log=log)
    parts = [_line(LEFT, y.at(tick), WIDTH - RIGHT, y.at(tick), "grid") for tick in y.ticks()]
    parts += [_text(LEFT - 6, y.at(tick) + 4, f"{tick:g}", "end") for tick in y.ticks()]
    parts += [_text(x.at(tick), height - 8, f"{tick:g}", "middle") for tick in x.ticks()]
    for mark in shown:
        place = y.at(mark.y)
        line = _line(x.at(mark.begin), place, x.at(mark.end), place, f"limit {mark.colour}", mark.words)
        parts.append(line)
    for one, points in zip(series, known):
        if points:
            places = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in points)
            kind = f"curve {one.colour}{' dashed' if one.dashed else ''}"
            title = f"<title>{html.escape(one.name)}</title>"
            parts.append(f'<polyline class="{kind}" points="{places}">{title}</polyline>')
    return _svg(label, height, parts)


def bands(label: str, rows: Sequence[tuple[str, str, Sequence[tuple[str, float, float]]]], last: float) -> str:
    """Rows of coloured stretches as an ``<svg>``.

    Args:
        label: what is drawn.
        rows: name, class of its colour, and (class and words of a stretch, from, to).
        last: the last epoch.
    """
    left, high = 120, 30
    x = Scale(0, max(1.0, last), left, WIDTH - RIGHT)
    parts = []
    for number, (name, colour, stretches) in enumerate(rows):
        top = TOP + number * high
        parts.append(_text(left - 8, top + 16, name, "end", colour))
        for words, begin, end in stretches:
            a, b = x.at(begin), x.at(end)
            title = f"<title>{html.escape(words)}, epochs {begin:g} to {end:g}</title>"
            place = f'x="{a:.1f}" y="{top}" width="{max(1.0, b - a):.1f}" height="22"'
            parts.append(f'<rect class="{words.lower()}" {place}>{title}</rect>')
            if b - a > 7 * len(words):
                parts.append(_text((a + b) / 2, top + 15, words, "middle", "inside"))
    height = TOP + len(rows) * high + BOTTOM
    parts += [_text(x.at(tick), height - 8, f"{tick:g}", "middle") for tick in x.ticks()]
    return _svg(label, height, parts)


def _svg(label: str, height: float, parts: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{html.escape(label)}">'
    return head + "".join(parts) + "</svg>"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str, words: str = "") -> str:
    title = f"<title>{html.escape(words)}</title>" if words else ""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}">{title}</line>'


def _text(x: float, y: float, words: str, anchor: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'
