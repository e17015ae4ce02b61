"""Events as they lie in a file, and the runs in it: a file that several runs have appended to holds each of them."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import ConfigurationError
from ..core.lifecycle import Stage
from .events import Event


def read_events(path: str | os.PathLike[str]) -> list[Event]:
    """The events of a file of JSON lines, as ``JsonLinesSink`` writes it.

    Args:
        path: of the file, UTF-8.

    Raises:
        ConfigurationError: a line that is no event, by its number, or a file that is no text.
        OSError: there is no such file, or it cannot be read.
    """
    events: list[Event] = []
    name = os.fspath(path)
    with open(path, encoding="utf-8") as file:
        try:
            lines = file.read().splitlines()
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"{name} is no file of events, but of something else: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            torn = number == len(lines) and line.lstrip().startswith("{")
            way = "; the run was ended while it wrote its last line, which may be deleted" if torn else ""
            raise ConfigurationError(f"{name}, line {number}, is no event: {error}{way}") from error
        if not isinstance(event, dict):
            raise ConfigurationError(f"{name}, line {number}, is no event: {line[:60]}")
        events.append(event)
    return events


def runs_of(events: Sequence[Event]) -> list[list[Event]]:
    """The runs in a sequence of events, oldest first.

    Events belong together by the ``run`` that they name, also where two controllers told at once; one that names none
    goes with the event before it. A run ends where its epochs go back. What goes on behind its first epoch is no new
    run, but resumes the one of its name, or else the one before, which ends where the first epoch of what goes on ends;
    one that is told of meanwhile is not ended, but stays beside what has branched off. A baseline belongs to the run
    that it follows, or to the first.

    Raises:
        ConfigurationError: an event without a name or an epoch.
    """
    for number, event in enumerate(events, start=1):
        if type(event.get("event")) is not str or type(event.get("epoch")) is not int:
            raise ConfigurationError(f"event {number} has no name or no epoch: no controller has emitted {event}")
    ahead = list(itertools.takewhile(_is_baseline, events))
    runs: list[_Part] = []
    for part in _parts(events[len(ahead) :]):
        before = next((run for run in reversed(runs) if run.name == part.name), runs[-1] if runs else None)
        if before is not None and part.first_epoch > 1:
            again = set(map(_what, part.events))  # told between the checkpoint and the end of the run before, and again
            part.events[:0] = [
                event
                for event in before.events
                if _is_baseline(event) or (event["epoch"] < part.first_epoch and _what(event) not in again)
            ]
            if before.end < part.begin:
                runs.remove(before)
        runs.append(part)
    found = [run.events for run in runs] or ([[]] if ahead else [])
    if ahead:
        found[0][:0] = ahead
    return found


@dataclass(eq=False)
class _Part:
    """What one controller told, one epoch after another.

    Attributes:
        name: of the run.
        begin: place of the first of its events in the file.
        end: place of the last.
        epoch: of the last that is no baseline.
        events: in the order of the file.
    """

    name: str | None
    begin: int
    end: int = 0
    epoch: int = 0
    events: list[Event] = field(default_factory=list)

    @property
    def first_epoch(self) -> int:
        """The first epoch that ends in it: what a script does before that still bears the number of the one before."""
        ended = (event["epoch"] for event in self.events if event["event"] == "epoch")
        return int(next(ended, self.events[0]["epoch"] + 1))


def _what(event: Event) -> tuple[Any, ...]:
    return tuple(event.get(key) for key in ("event", "seed", "epoch", "step"))


def _parts(events: Sequence[Event]) -> list[_Part]:
    parts: list[_Part] = []
    latest: dict[str | None, _Part] = {}
    name: str | None = None
    for place, event in enumerate(events):
        name = name if event.get("run") is None else str(event["run"])
        part = latest.get(name)
        if part is None or (event["epoch"] < part.epoch and not _is_baseline(event)):
            part = latest[name] = _Part(name, place)
            parts.append(part)
        part.events.append(event)
        part.end = place
        if not _is_baseline(event):
            part.epoch = event["epoch"]
    return parts


def _is_baseline(event: Event) -> bool:
    return bool(event["event"] == "baseline")


def stage_bands(events: Sequence[Event], last_epoch: int) -> dict[str, list[tuple[Stage, int, int]]]:
    """For every seed its stages as (stage, from epoch, to epoch), in order."""
    moves: dict[str, list[tuple[Stage, int]]] = {}
    for event in events:
        if event["event"] == "stage" and event.get("target") in Stage.__members__:
            moves.setdefault(str(event["seed"]), []).append((Stage[event["target"]], event["epoch"]))
    bands = {}
    for seed, entries in moves.items():
        ends = [begin for _, begin in entries[1:]] + [last_epoch]
        bands[seed] = [(stage, begin, end) for (stage, begin), end in zip(entries, ends)]
    return bands


def points(events: Sequence[Event], seed: str | None, field: str) -> list[tuple[int, float]]:
    """A curve: (epoch, value) of the "epoch" events of a seed, or of none; what is not known is left out."""
    own = (event for event in events if event["event"] == "epoch" and event.get("seed") == seed)
    return numbers_in(own, field)


def numbers_in(events: Any, field: str) -> list[tuple[int, float]]:
    """(epoch, value) of these events where the field is a number."""
    return [(event["epoch"], float(event[field])) for event in events if type(event.get(field)) in (int, float)]


def limits(events: Sequence[Event], seed: str, question: str) -> list[tuple[int, float, str]]:
    """The limits that gates held one question of a seed against, as (epoch, limit, gate), in the order of verdicts.

    They are those of the verdicts themselves: where the validation loss was probed, less is asked of the blend gain.
    """
    found = []
    for event in events:
        if event["event"] == "gate" and event.get("seed") == seed:
            for check in event.get("checks") or ():
                asked = check["question"] == question and check["passed"] is not None
                if asked and type(check["limit"]) in (int, float):
                    found.append((event["epoch"], float(check["limit"]), str(event["gate"])))
    return found


def passes(events: Sequence[Event], seed: str) -> list[Mapping[str, Any]]:
    """The verdicts with which a seed was let through a gate, after G1."""
    gates = [event for event in events if event["event"] == "gate" and event.get("seed") == seed]
    return [event for event in gates if event.get("passed") and event.get("gate") not in ("G0", "G1")]
