"""One run as one HTML page that needs nothing else: lives, verdicts, curves, and the gradient tensors by norm."""

from __future__ import annotations

import html
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..core.advice import ADVICE
from ..core.errors import ConfigurationError
from ..core.lifecycle import Stage
from .events import Event
from .runs import limits, numbers_in, points, read_events, runs_of, stage_bands
from .svg import Mark, Series, bands, chart

COLOURS = 4  # classes s0 to s3 of the page, for the seeds in turn
DRAWN = (Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED)

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1a1a1a; --faint: #6b6b6b; --line: #ddd;
  --s0: #0072b2; --s1: #d55e00; --s2: #b0568d; --s3: #666; }
@media (prefers-color-scheme: dark) { :root { --paper: #0d1117; --ink: #e6edf3; --faint: #8b949e; --line: #30363d;
  --s0: #56b4e9; --s1: #f28e4b; --s2: #cc79a7; --s3: #b0b0b0; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 800px;
  margin: 2em auto; padding: 0 1em; }
h2 { margin-top: 2em; } h3 { margin-bottom: 0; font-size: 1em; }
svg { width: 100%; height: auto; } svg text { fill: var(--faint); font-size: 11px; } svg text.inside { fill: #1a1a1a; }
.grid { stroke: var(--line); } .curve { fill: none; stroke: var(--ink); stroke-width: 2; }
.dashed { stroke-dasharray: 6 4; stroke: var(--faint); } .limit { stroke-width: 2; stroke-dasharray: 2 2; }
.training { fill: #56b4e9; } .blending { fill: #e69f00; } .holding { fill: #f0e442; } .fossilized { fill: #009e73; }
table { border-collapse: collapse; width: 100%; } caption { text-align: left; color: var(--faint); }
th, td { border-bottom: 1px solid var(--line); padding: 4px 8px; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } td.bar { width: 30%; }
td.bar div { background: var(--s0); height: 10px; } .faint { color: var(--faint); }
td.short { white-space: nowrap; } ul { margin: 0; padding-left: 1.2em; }
"""


def write_page(run: str | os.PathLike[str], path: str | os.PathLike[str] | None = None, title: str = "") -> str:
    """Write the page of the last run of a file of events.

    Args:
        run: the file, or a folder with an ``events.jsonl``.
        path: where the page goes; ``report.html`` beside the events unless told.
        title: of the page.

    Returns:
        The path of the page.

    Raises:
        ConfigurationError: the file is none of events, or has none.
        OSError: a file cannot be read or written.
    """
    source = os.fspath(run)
    if os.path.isdir(source):
        source = os.path.join(source, "events.jsonl")
    target = os.path.join(os.path.dirname(source), "report.html") if path is None else os.fspath(path)
    text = page(read_events(source), title or os.fspath(run))
    with open(target, "w", encoding="utf-8") as file:
        file.write(text)
    return target


def page(events: Sequence[Event], title: str) -> str:
    """The last run of these events as a page; ConfigurationError when there is none."""
    runs = runs_of(events)
    if not runs:
        raise ConfigurationError("there are no events to tell of: the run had no epoch, or wrote elsewhere")
    run, last = runs[-1], max(event["epoch"] for event in runs[-1])
    seeds = list(dict.fromkeys(str(event["seed"]) for event in run if event.get("seed") is not None))
    colours = {seed: f"s{number % COLOURS}" for number, seed in enumerate(seeds)}
    steps = max((event.get("step") or 0 for event in run), default=0)
    facts = f"{last} epochs, {steps} optimizer steps, {len(seeds)} seeds"
    if len(runs) > 1:
        facts += f"; the last of {len(runs)} runs in the file"
    style = STYLE + "".join(
        f".s{n} {{ stroke: var(--s{n}); color: var(--s{n}); }} svg text.s{n} {{ fill: var(--s{n}); stroke: none; }}\n"
        for n in range(COLOURS)
    )
    body = [
        f"<h1>{html.escape(title)}</h1>", f'<p class="faint">{facts}</p>', *_lives(run, colours, last),
        *_curves(run, colours, last), *_verdicts(run, seeds), *_tensors(run),
    ]  # fmt: skip
    head = f'<head><meta charset="utf-8"/><title>{html.escape(title)}</title><style>{style}</style></head>'
    return f'<!DOCTYPE html>\n<html lang="en">{head}\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def _lives(run: Sequence[Event], colours: Mapping[str, str], last: int) -> Iterator[str]:
    found = stage_bands(run, last)
    rows = [
        (seed, colours[seed], [(stage.name, begin, end) for stage, begin, end in entries if stage in DRAWN])
        for seed, entries in found.items()
    ]
    yield "<h2>Lives</h2>"
    yield bands("The stages of every seed over the epochs", rows, last) if rows else "<p>No seed has germinated.</p>"
    told = [event for event in run if event["event"] in ("harm", "pruned", "fossilized")]
    if told:
        items = [
            f"epoch {event['epoch']}: {event['seed']}: {event['event']}"
            + (f", {event['reason']}" if event.get("reason") else "")
            for event in told
        ]
        yield "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>"


def _curves(run: Sequence[Event], colours: Mapping[str, str], last: int) -> Iterator[str]:
    yield "<h2>Curves</h2>"
    yield "<p>" + " ".join(f'<b class="{colour}">{html.escape(seed)}</b>' for seed, colour in colours.items()) + "</p>"
    for words, field, question, log in (
        ("t of the blend gain, and what the gates asked for", "blend_gain_t", "blend_gain", False),
        ("Gradient ratio, seed / host", "ratio", "gradient_ratio", True),
        ("Alpha", "alpha", "", False),
    ):
        series = [Series(seed, colour, points(run, seed, field)) for seed, colour in colours.items()]
        marks = [
            Mark(epoch - 0.5, epoch + 0.5, limit, colour, f"{gate} asked {seed} for at least {limit:g}")
            for seed, colour in colours.items()
            for epoch, limit, gate in limits(run, seed, question)
        ]
        yield from _headed(words, chart(words, series, last, marks, log=log))
    baseline = [event for event in run if event["event"] == "baseline"]
    for field in ("accuracy", "loss"):
        curves = [
            Series("grown", "ink", points(run, None, field)),
            Series("same host, no growth", "ink", numbers_in(baseline, field), dashed=True),
        ]
        words = f"Validation {field}" + ("; dashed: the same host without growth" if baseline else "")
        yield from _headed(words, chart(words, curves, last))


def _headed(words: str, drawn: str) -> Iterator[str]:
    if drawn:
        yield f"<h3>{html.escape(words)}</h3>"
        yield drawn


def _verdicts(run: Sequence[Event], seeds: Sequence[str]) -> Iterator[str]:
    """A table for each seed; what a gate says in the same words in epochs in a row is one line."""
    yield "<h2>Verdicts</h2>"
    for seed in seeds:
        rows: list[tuple[list[int], str, str]] = []
        for event in run:
            if event["event"] == "gate" and event.get("seed") == seed and event.get("gate") != "G0":
                said = ("passed" if event.get("passed") else "refused"), _refusals(event)
                answer = f"{event.get('gate')} {said[0]}"
                # Numbers differ from epoch to epoch; the names of what was refused tell the lines apart.
                if rows and rows[-1][1] == answer and _names(rows[-1][2]) == _names(said[1]):
                    rows[-1] = ([rows[-1][0][0], event["epoch"]], answer, said[1])
                else:
                    rows.append(([event["epoch"]], answer, said[1]))
        if rows:
            lines = "".join(
                f"<tr><td class='short'>{' to '.join(map(str, epochs))}</td>"
                f"<td class='short'>{html.escape(answer)}</td><td>{words}</td></tr>"
                for epochs, answer, words in rows
            )
            head = "<thead><tr><th>epoch</th><th>gate</th><th>because</th></tr></thead>"
            yield f"<h3>{html.escape(seed)}</h3><table>{head}<tbody>{lines}</tbody></table>"


def _names(words: str) -> list[str]:
    return [part.partition("</b>")[0] for part in words.split("<b>")[1:]]


def _refusals(event: Event) -> str:
    items = []
    for check in event.get("checks") or ():
        if check.get("passed") is False:
            advice = ADVICE.get(str(check.get("name")))
            cure = "" if advice is None else f'<br/><span class="faint">{html.escape(advice.cure)}</span>'
            name, reason = (html.escape(str(check.get(field))) for field in ("name", "reason"))
            items.append(f"<li><b>{name}</b>: {reason}{cure}</li>")
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _tensors(run: Sequence[Event]) -> Iterator[str]:
    told = [event for event in run if event["event"] == "epoch" and event.get("tensors")]
    if not told:
        return
    entries: list[Any] = sorted(told[-1]["tensors"], key=lambda entry: -(entry[2] or 0.0))
    largest = max((entry[2] or 0.0 for entry in entries), default=0.0) or 1.0
    yield "<h2>Gradient tensors by norm</h2>"
    rows = "".join(
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(' x '.join(map(str, shape)))}</td>"
        f'<td class="number">{_number(norm)}</td>'
        f'<td class="bar"><div style="width: {100 * (norm or 0.0) / largest:.1f}%"></div></td>'
        f'<td class="number">{_number(rms)}</td><td>{html.escape(str(state))}</td></tr>'
        for name, shape, norm, rms, state in entries
    )
    head = "".join(f"<th>{word}</th>" for word in ("tensor", "shape", "norm", "", "RMS", "state"))
    where = f"The largest of the host and of each seed, as last measured by the end of epoch {told[-1]['epoch']}."
    yield f"<table><caption>{where}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
