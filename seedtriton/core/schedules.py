"""How numbers change over time: alpha along a curve, a threshold with the progress of training.

Functions of a step or of progress, and the controller that walks alpha from one target to the next; who
ticks, and when, is decided elsewhere.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from .errors import ConfigurationError, StateDictError
from .state import PlainState, check_state

SIGMOID = "sigmoid"
STEEPNESS = 12.0  # of the sigmoid, unless told
FLATTEST = 1e-4  # below it the sigmoid is the line to 1e-10, and the difference of its ends loses its digits
STEEPEST_EXPONENT = 700.0  # exp() of more than 709 is no float; here the logistic is 0 to 1e-304


def linear(t: float) -> float:
    """``t``."""
    return t


def cosine(t: float) -> float:
    """``(1 - cos(pi t)) / 2``."""
    return (1.0 - math.cos(math.pi * t)) / 2.0


def sigmoid(t: float, steepness: float = STEEPNESS) -> float:
    """A logistic curve, shifted and stretched so that it begins at 0 and ends at 1.

    Its slope in the middle is about ``steepness / 4``: the line for a very small one, a jump for a very large one.
    """
    if steepness < FLATTEST:
        return t

    def logistic(x: float) -> float:
        return 1.0 / (1.0 + math.exp(min(-x, STEEPEST_EXPONENT)))

    low = logistic(-steepness / 2.0)
    high = logistic(steepness / 2.0)
    return (logistic(steepness * (t - 0.5)) - low) / (high - low)


CURVES: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {"linear": linear, "cosine": cosine, SIGMOID: sigmoid}
)


@dataclass(frozen=True, kw_only=True)
class AlphaSchedule(PlainState):
    """Alpha from ``start`` to ``target`` in ``steps`` steps along ``curve``.

    ``schedule(step)`` is exactly ``start`` at step 0 and exactly ``target`` from ``steps`` on; 0 steps is
    a jump. Monotone in between. ``steepness`` is that of the sigmoid, the only curve that has one.

    Raises:
        ConfigurationError: unknown curve, steps below 0, start or target outside [0, 1], a steepness that is not
            finite and above 0, or one other than the default for another curve, which would not follow it.
    """

    target: float = 1.0
    start: float = 0.0
    steps: int = 200
    curve: str = "cosine"
    steepness: float = STEEPNESS

    # A release without the field had this one sigmoid.
    LATER: ClassVar[Mapping[str, Any]] = MappingProxyType({"steepness": STEEPNESS})

    def __post_init__(self) -> None:
        if not isinstance(self.curve, str) or self.curve not in CURVES:
            raise ConfigurationError(f"unknown curve {self.curve!r}; known curves: {sorted(CURVES)}")
        if type(self.steps) is not int or self.steps < 0:
            raise ConfigurationError(f"steps must be a whole number of at least 0, got {self.steps!r}")
        for name in ("start", "target"):
            _require_share(name, getattr(self, name))
        if not _is_number(self.steepness) or not 0.0 < self.steepness <= sys.float_info.max:
            raise ConfigurationError(f"steepness must be a finite number above 0, got {self.steepness!r}")
        if self.curve != SIGMOID and self.steepness != STEEPNESS:
            raise ConfigurationError(
                f"curve {self.curve!r} has no steepness, got {self.steepness!r}; curve={SIGMOID!r} has one"
            )

    def __call__(self, step: int) -> float:
        """Alpha after ``step`` steps.

        Raises:
            ConfigurationError: ``step`` is negative.
        """
        if not step >= 0:
            raise ConfigurationError(f"step must be at least 0, got {step}")
        if step >= self.steps:
            return self.target
        if step == 0:
            return self.start
        t = step / self.steps
        share = sigmoid(t, self.steepness) if self.curve == SIGMOID else CURVES[self.curve](t)
        alpha = self.start + (self.target - self.start) * share
        # The last bit of a curve may step over an end; alpha never leaves the interval it moves in.
        low, high = sorted((self.start, self.target))
        return min(max(alpha, low), high)


HOLD, UP, DOWN = "HOLD", "UP", "DOWN"  # modes of an AlphaController


class AlphaController:
    """Walks alpha to a target and holds it there, until it is given the next one.

    Its whole state is the path it is on and how far it has come; alpha follows from these, so the two cannot
    disagree.

    Args:
        alpha: where it begins, holding.

    Raises:
        ConfigurationError: ``alpha`` outside [0, 1] or NaN.
    """

    VERSION = 1

    def __init__(self, alpha: float = 0.0) -> None:
        """Begin in HOLD."""
        self._path = _standing(alpha)
        self.steps_done = 0

    @property
    def alpha(self) -> float:
        """Alpha now; exactly ``target`` in HOLD."""
        return float(self._path(self.steps_done))

    @property
    def start(self) -> float:
        """Where the present path began."""
        return float(self._path.start)

    @property
    def target(self) -> float:
        """Where it leads."""
        return float(self._path.target)

    @property
    def curve(self) -> str:
        """Along which curve."""
        return self._path.curve

    @property
    def steepness(self) -> float:
        """How steep, if that is a sigmoid."""
        return self._path.steepness

    @property
    def steps_total(self) -> int:
        """In how many steps."""
        return self._path.steps

    @property
    def mode(self) -> str:
        """"HOLD" when it has arrived; before that "UP" or "DOWN"."""
        if self.steps_done >= self.steps_total:
            return HOLD
        return UP if self.target > self.start else DOWN

    def retarget(self, target: float, steps: int, curve: str = "cosine", steepness: float = STEEPNESS) -> None:
        """Set out for ``target`` from where alpha is, in ``steps`` steps along ``curve``; 0 steps is a jump.

        ``steepness`` is that of a sigmoid, as in ``AlphaSchedule``.

        Raises:
            ConfigurationError: it is still on its way, or a value that ``AlphaSchedule`` refuses; nothing has changed.
        """
        if self.mode != HOLD:
            raise ConfigurationError(
                f"alpha is on its way {self.mode} to {self.target:.3g}, {self.steps_done} of {self.steps_total} steps; "
                "wait until it holds, or halt() it where it is"
            )
        path = AlphaSchedule(start=self.alpha, target=target, steps=steps, curve=curve, steepness=steepness)
        self._path = _standing(target) if target == self.alpha else path
        self.steps_done = 0

    def halt(self) -> None:
        """Hold where alpha is now; that is the target then."""
        self._path = _standing(self.alpha)
        self.steps_done = 0

    def step(self) -> float:
        """One step along the path, none in HOLD; the last one is exactly the target. Returns alpha."""
        if self.mode != HOLD:
            self.steps_done += 1
        return self.alpha

    def state_dict(self) -> dict[str, object]:
        """Plain, JSON-safe values."""
        return {"version": self.VERSION, "path": self._path.state_dict(), "steps_done": self.steps_done}

    @classmethod
    def from_state_dict(cls, state: object) -> AlphaController:
        """The controller saved by ``state_dict``; StateDictError, or ConfigurationError for bad values."""
        values = check_state(state, "AlphaController", cls.VERSION, ("path", "steps_done"))
        path, done = AlphaSchedule.from_state_dict(values["path"]), values["steps_done"]
        if type(done) is not int or not 0 <= done <= path.steps:
            raise StateDictError(f"AlphaController: steps_done must lie in [0, {path.steps}], got {done!r}")
        restored = cls()
        restored._path, restored.steps_done = path, done
        return restored


def _standing(alpha: float) -> AlphaSchedule:
    return AlphaSchedule(start=alpha, target=alpha, steps=0)


@dataclass(frozen=True, kw_only=True)
class ProgressThreshold(PlainState):
    """A threshold by the phase of training; ``threshold(progress)`` is the one at a share that is done, in [0, 1].

    Attributes:
        early: from the beginning.
        mid: from ``mid_from`` on, a share of the training.
        late: from ``late_from`` on.
        mid_from: in [0, ``late_from``].
        late_from: in [``mid_from``, 1].

    Raises:
        ConfigurationError: a negative or non-finite threshold, phases out of order or outside [0, 1].
    """

    early: float
    mid: float
    late: float
    mid_from: float = 1 / 3
    late_from: float = 2 / 3

    def __post_init__(self) -> None:
        for name in ("early", "mid", "late"):
            value = getattr(self, name)
            if not _is_number(value) or not 0.0 <= value < math.inf:
                raise ConfigurationError(f"{name} must be a finite number of at least 0, got {value!r}")
        for name in ("mid_from", "late_from"):
            _require_share(name, getattr(self, name))
        if self.mid_from > self.late_from:
            raise ConfigurationError(
                f"mid_from ({self.mid_from}) must not come after late_from ({self.late_from})"
            )

    def __call__(self, progress: float) -> float:
        """The threshold at ``progress``; ConfigurationError when that is outside [0, 1]."""
        _require_share("progress", progress)
        if progress >= self.late_from:
            return self.late
        return self.mid if progress >= self.mid_from else self.early


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _require_share(name: str, value: object) -> None:
    if not _is_number(value) or not 0.0 <= value <= 1.0:  # type: ignore[operator]
        raise ConfigurationError(f"{name} must lie in [0, 1], got {value!r}")
