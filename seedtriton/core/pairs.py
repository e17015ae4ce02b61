"""What two seeds do to the validation loss, each alone and both together."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ConfigurationError
from .state import PlainState


@dataclass(frozen=True, kw_only=True)
class PairProbe(PlainState):
    """Validation loss with two seeds blended in, each alone and both, against the loss without either.

    A change is a mean loss minus ``loss``: below 0 it helps; NaN or infinite where the loss was. Its error is the
    standard error of that mean over the samples of the validation set (paired); None when only means are known.

    Attributes:
        seeds: their names.
        alphas: the blend factor of each.
        loss: mean loss with both at alpha 0.
        alone: change with the first alone, and with the second alone.
        together: change with both.
        interaction: ``together`` minus the sum of ``alone``: below 0 they help each other, above 0 one does the other's
            work.
        alone_errors: errors of both changes in ``alone``.
        together_error: error of ``together``.
        interaction_error: error of ``interaction``, paired over all four losses.

    Raises:
        ConfigurationError: not two of a kind, or the same seed twice.
    """

    seeds: tuple[str, str]
    alphas: tuple[float, float]
    loss: float
    alone: tuple[float, float]
    together: float
    interaction: float
    alone_errors: tuple[float, float] | None = None
    together_error: float | None = None
    interaction_error: float | None = None

    def __post_init__(self) -> None:
        for name in ("seeds", "alphas", "alone", "alone_errors"):
            value = getattr(self, name)
            if value is None and name == "alone_errors":
                continue
            object.__setattr__(self, name, tuple(value))
            if len(getattr(self, name)) != 2:
                raise ConfigurationError(f"a pair has two {name}, got {value!r}")
        if self.seeds[0] == self.seeds[1]:
            raise ConfigurationError(f"a pair is two different seeds, got {self.seeds[0]!r} twice")
