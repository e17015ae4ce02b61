"""Where events go: logging, JSON lines, a callable.

A sink that raises never stops training: it is reported once and then left out.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from .events import Event

logger = logging.getLogger("seedtriton")


class Sink(Protocol):
    """Anything that takes an event."""

    def __call__(self, event: Event, /) -> None:
        """Take one event; it may be kept, not changed."""


class LogSink:
    """One line per event to a logger, "seedtriton" unless told, at level INFO."""

    def __init__(self, target: logging.Logger | None = None, level: int = logging.INFO) -> None:
        """Take the logger and the level."""
        self._logger = target or logger
        self._level = level

    def __call__(self, event: Event) -> None:
        """Log the event as ``event key=value ...``."""
        rest = " ".join(f"{key}={value}" for key, value in event.items() if key not in ("event", "checks"))
        self._logger.log(self._level, "%s %s", event["event"], rest)


class JsonLinesSink:
    """One JSON object per line, appended to a file; lines are complete as soon as they are written."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Make the folder and open the file for appending."""
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - closed by close()

    def __call__(self, event: Event) -> None:
        """Write the event; NaN and infinities, which JSON does not have, become null."""
        self._file.write(json.dumps(_without_nan(event), allow_nan=False) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Telemetry:
    """Hands every event to every sink."""

    def __init__(self, sinks: Iterable[Sink | Callable[[Event], None]] = ()) -> None:
        """Take the sinks."""
        self.sinks = list(sinks)

    def emit(self, event: Event) -> None:
        """Hand on one event; a sink that raises is reported once and left out from then on."""
        for sink in list(self.sinks):
            try:
                sink(event)
            except Exception:
                self.sinks.remove(sink)
                logger.exception("telemetry sink %r failed and gets no more events; training goes on", sink)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
