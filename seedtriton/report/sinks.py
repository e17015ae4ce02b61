"""Where events go: logging, JSON lines, CSV, a callable; loggers.py has TensorBoard, wandb and MLflow.

A sink that raises never stops training and costs the others nothing: it is reported when it begins to fail and when
it works again, with the number of events that it lost in between.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import logging
import os
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import monotonic
from typing import Any, Protocol
from uuid import uuid4

from ..core.errors import ConfigurationError
from ..core.state import plain
from .events import Event, local_numbers, step_of
from .events import numbers as numbers
from .history import History
from .loggers import MlflowSink as MlflowSink
from .loggers import TensorBoardSink as TensorBoardSink
from .loggers import WandbSink as WandbSink

logger = logging.getLogger("seedtriton")

# A sink whose failure takes longer than this (a server that is waited for), in seconds, is then left alone for so many
# times as long: at most a tenth of the time is lost to it. All others are tried again with the next event.
SLOW, REST = 0.1, 10.0
# Events that a script without logging sees as well: the watch acts, and a seed may be gone without a verdict.
LOUD = frozenset({"harm"})
# What is not for a line in a log: long, or the same in all of them.
QUIET = ("event", "checks", "tensors", "run")


class Sink(Protocol):
    """Anything that takes an event."""

    def __call__(self, event: Event, /) -> None:
        """Take one event; it may be kept, not changed."""


class LogSink:
    """One line per event to a logger, "seedtriton" unless told, at level INFO; harm at WARNING, which scripts see."""

    def __init__(self, target: logging.Logger | None = None, level: int = logging.INFO) -> None:
        """Take the logger, ``target``, and the ``level``."""
        self._logger = target or logger
        self._level = level

    def __call__(self, event: Event) -> None:
        """Log the event as ``event key=value ...``."""
        rest = " ".join(f"{key}={value}" for key, value in event.items() if key not in QUIET)
        level = max(self._level, logging.WARNING) if event["event"] in LOUD else self._level
        self._logger.log(level, "%s %s", event["event"], rest)


class CallableSink:
    """Hands the numbers of every event that has some, and its step, to a function: ``function(values, step)``.

    For loggers of a framework, ``CallableSink(lambda values, step: accelerator.log(values, step=step))``. A function
    that wants whole events is a sink itself.
    """

    def __init__(self, function: Callable[[dict[str, float], int], object]) -> None:
        """Take the function."""
        self._function = function

    def __call__(self, event: Event) -> None:
        """Call it with ``numbers(event)``."""
        values = numbers(event)
        if values:
            self._function(values, step_of(event))


class JsonLinesSink:
    """One JSON object per line, appended to a file; lines are complete as soon as they are written.

    An event that cannot be written, to a disk that is full, leaves nothing in the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Make the folder of ``path`` and open that file for appending."""
        self._lines = _Lines(path)

    def __call__(self, event: Event) -> None:
        """Write the event; NaN and infinities, which JSON does not have, become null."""
        self._lines.append(json.dumps(plain(event), allow_nan=False) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


class CsvSink:
    """One row per number, appended to a file: event, seed, epoch, step, stage, name, value.

    Names are those of ``numbers`` without ``growth/<slot>/``. Columns never change, whatever the gates ask, and nothing
    in a row is a time. All rows of an event are written, or none.
    """

    COLUMNS = ("event", "seed", "epoch", "step", "stage", "name", "value")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Make the folder of ``path`` and open that file for appending.

        Raises:
            ConfigurationError: it has something in it that does not begin with these columns.
        """
        self._lines = _Lines(path)
        head = _row(self.COLUMNS)
        if self._lines.begins(len(head)) not in ("", head):
            self._lines.close()
            raise ConfigurationError(f"{os.fspath(path)} has other columns than {', '.join(self.COLUMNS)}: use another")

    def __call__(self, event: Event) -> None:
        """Write its numbers; an empty field is a None."""
        where = [event.get(column) for column in self.COLUMNS[:5]]
        rows = [_row((*where, name, repr(value))) for name, value in local_numbers(event).items()]
        if rows:
            head = [] if self._lines.size() else [_row(self.COLUMNS)]
            self._lines.append("".join(head + rows))

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


# These take a line or the numbers of an event: lists in it would be read from the device for nobody.
IN_PART = (LogSink, CallableSink, CsvSink, TensorBoardSink, WandbSink, MlflowSink)


class Telemetry:
    """Hands every event to every sink, each time, whatever became of the one before.

    Attributes:
        sinks: who takes the events.
        history: the newest of them as records, also where nobody takes them.
        run: a name for this run; in every event of a controller, so that two runs in one file can be told apart.
        lost: events that a sink did not take, counted over all sinks.
    """

    def __init__(self, sinks: Iterable[Sink | Callable[[Event], None]] = ()) -> None:
        """Take the sinks."""
        self.sinks = list(sinks)
        self.history = History()
        self.run = uuid4().hex[:12]
        self.lost = 0
        self._known: list[_Trouble] = []

    @property
    def kept(self) -> bool:
        """Whether somebody takes whole events, and not only their numbers or a line in a log."""
        return any(not isinstance(sink, IN_PART) for sink in self.sinks)

    def __deepcopy__(self, memo: dict[int, Any]) -> Telemetry:
        """A run of its own, with copies of the sinks; those of files append to the same file."""
        twin = memo[id(self)] = Telemetry(copy.deepcopy(self.sinks, memo))
        twin.history, twin.lost, twin._known = copy.deepcopy((self.history, self.lost, self._known), memo)
        return twin

    def emit(self, event: Event) -> None:
        """Hand on one event; a sink that raises is reported, once, and is tried again with the next event."""
        self.history.take(event)
        for sink in list(self.sinks):
            trouble = next((known for known in self._known if known.sink is sink), None)
            begun = monotonic()
            if trouble is not None and begun < trouble.rests_until:
                self._lose(trouble)
                continue
            try:
                sink(event)
            except Exception:
                if trouble is None:
                    trouble = _Trouble(sink)
                    self._known.append(trouble)
                if trouble.begins():
                    logger.exception(
                        "telemetry sink %r failed; it is tried again with later events, and training goes on", sink
                    )
                took = monotonic() - begun
                trouble.rests_until = begun + took + REST * took if took > SLOW else 0.0
                self._lose(trouble)
            else:
                if trouble is not None and trouble.ends():
                    logger.warning("telemetry sink %r works again; it lost %d events", sink, trouble.lost)

    def _lose(self, trouble: _Trouble) -> None:
        trouble.lost += 1
        self.lost += 1


@dataclass
class _Trouble:
    """A sink that has failed, and how often that was said.

    It works again once it has taken ``needed`` events in a row: one, and after each relapse twice as many. One that
    fails at every second event is so not reported at every second event.
    """

    sink: object
    failing: bool = False
    lost: int = 0
    taken: int = 0
    needed: int = 0
    rests_until: float = 0.0

    def begins(self) -> bool:
        """It has failed; whether that has to be said."""
        new, self.failing, self.taken = not self.failing, True, 0
        if new:
            self.lost, self.needed = 0, 2 * self.needed or 1
        return new

    def ends(self) -> bool:
        """It has taken an event; whether it is to be said that it works again."""
        self.taken += 1
        over = self.failing and self.taken >= self.needed
        self.failing = self.failing and not over
        return over


class _Lines:
    """A file to which whole lines are appended: all of what is handed over, or nothing.

    Nothing is held back in a buffer, where a line that failed would wait for the next one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.path.abspath(path)
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - closed by close(), or when nobody holds the sink
        self.close = weakref.finalize(self, self._file.close)
        # Whoever wrote here before may have been ended in the middle of a line.
        self._torn = self.size() > 0 and self._read(-1, 1) != b"\n"

    def __deepcopy__(self, memo: dict[int, Any]) -> _Lines:
        """The same file once more: whole lines from several sides do not mix, and each side closes its own."""
        twin = memo[id(self)] = type(self)(self._path)
        if not self.close.alive:
            twin.close()
        return twin

    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def begins(self, length: int) -> str:
        return self._read(0, length).decode("utf-8", "replace") if self.size() else ""

    def append(self, lines: str) -> None:
        data = (b"\n" if self._torn else b"") + lines.encode("utf-8")
        begin, done = self.size(), 0
        try:
            while done < len(data):
                # Less than the whole where the disk becomes full on the way; the next write then raises.
                done += self._file.write(data[done:]) or 0
        except BaseException:
            if done and not self._cut(begin, done):
                self._torn = True
            raise
        self._torn = False

    def _cut(self, begin: int, done: int) -> bool:
        """Take back what was written of a line, unless somebody else has appended behind it."""
        try:
            if self.size() != begin + done:
                return False
            self._file.truncate(begin)
        except OSError:
            return False
        return True

    def _read(self, begin: int, length: int) -> bytes:
        with open(self._path, "rb") as file:
            file.seek(begin, os.SEEK_SET if begin >= 0 else os.SEEK_END)
            return file.read(length)


def _row(values: Iterable[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()
