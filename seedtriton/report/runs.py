"""Events as they lie in a file, and the runs in it: a file that several runs have appended to holds each of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
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

    A run ends where the ``run`` that the events name is another one, or, without such names, where the epochs go back.
    What goes on behind its first epoch is no new run, but resumes the one before, which ends where it begins.

    Raises:
        ConfigurationError: an event without a name or an epoch.
    """
    for number, event in enumerate(events, start=1):
        if type(event.get("event")) is not str or type(event.get("epoch")) is not int:
            raise ConfigurationError(f"event {number} has no name or no epoch: no controller has emitted {event}")
    runs: list[list[Event]] = []
    for part in _parts([event for event in events if event["event"] != "baseline"]):
        first = part[0]["epoch"]
        if runs and first > 1:
            runs[-1] = [event for event in runs[-1] if event["epoch"] < first] + part
        else:
            runs.append(part)
    baseline = [event for event in events if event["event"] == "baseline"]
    if baseline:
        runs[-1:] = [[*(runs[-1] if runs else []), *baseline]]
    return runs


def _parts(events: Sequence[Event]) -> list[list[Event]]:
    parts: list[list[Event]] = []
    for event in events:
        last = parts[-1][-1] if parts else None
        if last is None or event.get("run", last.get("run")) != last.get("run") or event["epoch"] < last["epoch"]:
            parts.append([])
        parts[-1].append(event)
    return parts


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
