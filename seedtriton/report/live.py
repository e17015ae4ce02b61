"""A table that stays where it is in a terminal and follows the training; in a pipe, a file or a notebook it is off."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from types import TracebackType
from typing import Any, TextIO

from .summary import Summary

logger = logging.getLogger("seedtriton")

PERIOD = 0.25  # seconds between two drawings, at least


class LiveTable:
    """Draws what ``read`` says, again and again, while a ``with`` block runs.

    Args:
        read: makes the table; it must not wait for a device.
        file: where to draw, the standard output unless told. Nothing is drawn where that is no terminal, or where rich
            is not installed.
    """

    def __init__(self, read: Callable[[], Summary], file: TextIO | None = None) -> None:
        """Look at the file; nothing is drawn yet."""
        self._read, self._file = read, file or sys.stdout
        self._live: Any = None
        self._drawn = -PERIOD

    def __enter__(self) -> LiveTable:
        """Begin to draw, where somebody looks."""
        if self._file.isatty():
            try:
                from rich.console import Console
                from rich.live import Live
            except ImportError:
                return self
            with self._guarded():
                self._live = Live(self._read(), console=Console(file=self._file), auto_refresh=False)
                self._live.start()
        return self

    @property
    def draws(self) -> bool:
        """Whether there is something to see."""
        return self._live is not None

    def refresh(self) -> None:
        """Something may have changed; draws at most four times a second."""
        if self.draws and monotonic() - self._drawn >= PERIOD:
            self._draw()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Draw what there is at the end, and leave it there."""
        if self.draws:
            self._draw()
        if self.draws:
            with self._guarded():
                self._live.stop()
        self._live = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LiveTable:
        """A copy does not draw: there is one place in the terminal, and a lock that cannot be copied."""
        twin: LiveTable = LiveTable.__new__(LiveTable)
        memo[id(self)] = twin
        twin._live = None
        return twin

    def _draw(self) -> None:
        self._drawn = monotonic()
        with self._guarded():
            self._live.update(self._read(), refresh=True)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """A terminal that has gone, or a table that cannot be made, ends the drawing and not the training."""
        try:
            yield
        except Exception:
            table, self._live = self._live, None
            with suppress(Exception):  # before the log speaks: until then what is printed goes through the table
                table.stop()
            logger.exception("growth.live() cannot draw, and has ended; training goes on")
