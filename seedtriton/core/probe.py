"""What blending a seed in does to the validation loss, and how well that is known: without a unit, without a zero.

A loss may be written times a factor, plus a constant, as a sum or as a mean, and every answer here is the same. So
nothing is a share of the loss: moves are held against their own noise, and against how far the losses of single
samples lie apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from .errors import ConfigurationError
from .series import student
from .state import PlainState

# Standard errors of the validation set that a change of its loss must exceed to count. A fall is looked for at
# several alphas and in many epochs, so luck gets one chance in 700 at each; of a rise the suspicion is enough.
FALL_ERRORS = 3.0
RISE_ERRORS = 1.0
ROUNDING = 1e-6  # of a mean of losses in fp32, as a share of it


@dataclass(frozen=True, kw_only=True)
class BlendProbe(PlainState):
    """Validation loss with the seed blended in at several alphas, against the loss without it.

    Attributes:
        seed: its name.
        loss: mean loss at alpha 0.
        alphas: the blend factors that were tried, above 0.
        changes: for each, mean loss minus ``loss``; NaN or infinite where the loss was.
        errors: for each, the standard error of that mean over the samples of the validation set (paired);
            None when only means are known, and the noise therefore is not.
        spread: standard deviation of the losses of single samples at alpha 0, what a change is large or small beside;
            None when it is not known.
        degrees: independent numbers behind the errors, less one; None: so many that it does not matter.

    Raises:
        ConfigurationError: no alphas, or lists that do not belong together.
    """

    seed: str
    loss: float
    alphas: tuple[float, ...]
    changes: tuple[float, ...]
    errors: tuple[float, ...] | None = None
    spread: float | None = None
    degrees: int | None = None

    LATER: ClassVar[Mapping[str, Any]] = MappingProxyType({"spread": None, "degrees": None})

    def __post_init__(self) -> None:
        for name in ("alphas", "changes", "errors"):
            value = getattr(self, name)
            if value is None and name == "errors":
                continue
            if not isinstance(value, (list, tuple)):
                raise ConfigurationError(f"a probe's {name} are a list of numbers, got {value!r}")
            object.__setattr__(self, name, tuple(value))
            if not self.alphas or len(getattr(self, name)) != len(self.alphas):
                raise ConfigurationError(
                    f"a probe needs one entry of {name} for each alpha, got {value!r} for {self.alphas!r}"
                )

    @property
    def finite(self) -> bool:
        """Whether the loss was finite everywhere."""
        return all(map(math.isfinite, (self.loss, *self.changes)))

    @property
    def precise(self) -> bool:
        """Whether the noise is known, and with it what a change is worth."""
        return self.errors is not None

    @property
    def gain(self) -> float:
        """Largest fall of the loss at any alpha, in ``spread``s.

        Counts only where it is more than ``FALL_ERRORS`` of its noise; 0.0 when there is none. Where the noise is not
        known every fall counts, and where the spread is not, it has no size: ``inf``.
        """
        return self._largest(-1.0, FALL_ERRORS)

    @property
    def harm(self) -> float:
        """Largest rise of the loss at any alpha, counted like ``gain`` but with ``RISE_ERRORS``.

        ``inf`` when the loss was not finite somewhere.
        """
        return self._largest(1.0, RISE_ERRORS) if self.finite else math.inf

    @property
    def certain_harm(self) -> float:
        """The same where it is no luck: beyond ``FALL_ERRORS``, and 0.0 where the noise is not known."""
        if not self.finite:
            return math.inf
        return self._largest(1.0, FALL_ERRORS) if self.precise else 0.0

    @property
    def loss_error(self) -> float:
        """Standard error of a loss, not of a change; ``inf`` where it is not known."""
        if self.errors is None or self.spread is None:
            return math.inf
        return max(self.errors[0], self.spread / math.sqrt(1 + (self.degrees or 0)))

    def noise(self, errors: float, error: float) -> float:
        """What a move must exceed to be more than ``errors`` times its ``error``, of which few losses tell little."""
        return error * (errors if self.degrees is None else student(errors, self.degrees))

    def risen_above(self, loss: float, errors: float) -> float:
        """How far the loss at the first alpha is above another ``loss`` of the same samples, in ``spread``s.

        0.0 where that is within so many standard ``errors``, or the noise is not known.
        """
        rise = self.loss + self.changes[0] - loss
        if not rise > max(self.noise(errors, self.loss_error), ROUNDING * abs(loss)):
            return 0.0
        return rise / self.spread if self.spread else math.inf

    def _largest(self, sign: float, errors: float) -> float:
        if not math.isfinite(self.loss):
            return 0.0
        noise = [self.noise(errors, error) for error in self.errors or (0.0,) * len(self.alphas)]
        moves = [sign * change for change in self.changes]
        beyond = [move for move, limit in zip(moves, noise) if math.isfinite(move) and move > limit]
        largest = max([0.0, *beyond])
        if self.spread:
            return largest / self.spread
        # Where all samples have one loss, and their spread no size, rounding is no move.
        return math.inf if largest > (0.0 if self.spread is None else ROUNDING * abs(self.loss)) else 0.0

    def __str__(self) -> str:
        """Loss and changes in words."""
        errors: Sequence[float | None] = self.errors or (None,) * len(self.alphas)
        tried = [
            f"{change:+.3g}" + ("" if error is None else f" ± {error:.1g}") + f" at alpha {alpha:.3g}"
            for alpha, change, error in zip(self.alphas, self.changes, errors)
        ]
        return f"validation loss {self.loss:.4g}, " + ", ".join(tried)
