"""One optimizer step, one sample: which measurements belong to the same step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..core.errors import ConfigurationError
from ..core.evidence import NEVER_MEASURED, SeedEvidence
from .loss_scale import table_of
from .optimizers import capturing
from .progress import StepCounter
from .row import APPEND, REPLACE, REPLACE_USABLE

# Measurements without a step of a known optimizer after which nobody waits for it any more, and every call is a sample
# again: more than people accumulate micro-batches, and so many times what was the most so far.
PATIENCE, TIMES = 64, 4
TAGS_KEPT = 8  # of other losses, to name them


def nothing() -> None:
    """What happens when a round begins, unless somebody is told."""


def check_every(every: int) -> None:
    """ConfigurationError unless a measurement in so many steps is possible."""
    if type(every) is not int or every < 1:
        raise ConfigurationError(f"every must be a whole number of optimizer steps of at least 1, got {every!r}")


class Rounds:
    """A round is what is measured between two steps of the known optimizers; in a compiled graph every call is one.

    In a CUDA graph that is captured, one begins with the first measurement: what was measured before the capture, so
    that the graph knows its addresses, is no part of the steps that the graph will be replayed for.

    Args:
        steps: knows the optimizers; without any, every call is a round.

    Attributes:
        begun: called when a round begins, whoever measures.
    """

    def __init__(self, steps: StepCounter) -> None:
        self._steps = steps
        self._scaler_states: Any = None  # of the GradScaler at the last measurement; another after its update()
        self._calls = 0  # measurements in this round
        self._most = 0  # in any round that ended with a step
        self._turns = 0  # rounds that ``due`` was asked about
        self._others: list[str | None] = []  # tags of calls for another loss
        self._captured = False  # whether this round is of a CUDA graph
        self.begun: Callable[[], None] = nothing

    @property
    def known(self) -> bool:
        """Whether there are optimizers to tell rounds apart by."""
        return bool(self._steps.optimizers())

    @property
    def open(self) -> bool:
        """Whether something was measured that waits for the step."""
        return self._calls > 0 and self.known and self._calls < max(PATIENCE, TIMES * self._most)

    def due(self, every: int) -> bool:
        """Whether this round is to be measured, the first of ``every``."""
        if every > 1 and (torch.compiler.is_compiling() or capturing()):
            raise ConfigurationError(
                "a measurement that is compiled, or captured in a CUDA graph, cannot count optimizer steps: leave "
                f"every={every} out, and call it, or replay its graph, every so often"
            )
        if torch.compiler.is_compiling():
            return True
        if not self.open:
            self._turns += 1
        due = (self._turns - 1) % every == 0
        if not due:
            self.pass_over()
        return due

    def note_other(self, tag: str | None) -> None:
        """A call for another loss, of which nothing is measured; to be named where that was every call."""
        if tag not in self._others and not torch.compiler.is_compiling():
            self._others = [*self._others, tag][:TAGS_KEPT]

    def others(self, known: SeedEvidence, own: str | None) -> str | None:
        """What to say of a seed that was never measured, if there were calls for other losses."""
        if known.status != NEVER_MEASURED or not self._others:
            return None
        return f"measure() was called with the tags {self._others}, and {own!r} counts here"

    def pass_over(self) -> None:
        """Count a call that is not measured: it waits for its step as well."""
        if not self.open:
            self.begun()
        self._calls += 1

    def enter(self, scaler: torch.amp.GradScaler | None) -> int:
        """Count a measurement; what it does to the newest row: APPEND, REPLACE or REPLACE_USABLE."""
        if torch.compiler.is_compiling():
            self.begun()
            return APPEND  # what a graph counted would be a constant in it
        states = table_of(scaler)
        if self._captured != capturing():
            self._captured, self._calls = not self._captured, 0
        if not self.open:
            if not self._captured:  # nothing steps while a graph is captured
                self.begun()
            replace = APPEND
        elif states is None or self._scaler_states is None:
            # Nobody says whether a step was skipped in between; a row that is not finite tells.
            replace = REPLACE_USABLE
        else:
            replace = REPLACE if states is self._scaler_states else APPEND
        self._scaler_states = states
        self._calls += 1
        return replace

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_scaler_states": None}  # no part of a copy

    def close(self) -> None:
        """An optimizer has stepped, or the window has changed."""
        self._most, self._calls = max(self._most, self._calls), 0
