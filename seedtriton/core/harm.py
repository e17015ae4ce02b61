"""Does a seed that is felt do harm? One look an epoch, from BLENDING until it is permanent, and how often in a row."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from .errors import ConfigurationError
from .evidence import SeedEvidence
from .probe import FALL_ERRORS, BlendProbe
from .state import PlainState
from .thresholds import GateThresholds

# Below minus this the t of the blend gain blames the seed for what the model lost. Not -2: that came in two looks in a
# row in one of eight runs of 20 epochs without any harm.
BLAME_T = 3.0

# Relative change of weights up to which none have run away: seeds without sabotage moved by 0.5 in two epochs of
# blending, and by 1.3 in five; those with a learning rate 100 times too high by 2.5 to 22 in one.
RUN = 1.0

FADE, HALT, REPORT = ON_HARM = ("fade", "halt", "report")


def harm_of_blend(probe: BlendProbe | None, limits: GateThresholds) -> bool:
    """Whether the loss is higher at the present alpha than without the seed, beyond what luck makes of it.

    Never where the noise is not known, nor where the loss without the seed is not finite: that is not its doing.
    """
    if probe is None or limits.max_probe_harm is None or not math.isfinite(probe.loss):
        return False
    return probe.certain_harm > limits.max_probe_harm


def harm_of_slope(known: SeedEvidence, limits: GateThresholds) -> bool:
    """Whether every step of this epoch says that less of the seed would be better: the t of its blend gain."""
    t = worst_gain_t(known)
    return limits.max_harm_t is not None and t is not None and t < -limits.max_harm_t


def worst_gain_t(known: SeedEvidence) -> float | None:
    """The lower one of the t statistics of the blend gain, over its window and over the last samples of that."""
    return min((t for t in (known.blend_gain_t, known.recent_gain_t) if t is not None), default=None)


def pace_of(known: SeedEvidence) -> float | None:
    """Relative change of the weights over the root of the optimizer's steps in which it came about; None: not known.

    A walk without a direction goes as far as the root, and one that has arrived no further: so over few steps and over
    many a seed of one learning rate has about one pace, where change per step would fall with each.
    """
    if known.displacement is None or not known.optimizer_steps:
        return None
    return known.displacement / math.sqrt(known.optimizer_steps)


@dataclass(frozen=True, kw_only=True)
class Watch(PlainState):
    """What the looks at one seed have found, as epochs in a row.

    Contribution is against the same model without the seed. That is no life without it, once the host has adapted: so
    harm by the probe has to come with a loss above the one at which the seed was let in, or to last; and a model that
    does worse than when the seed was let in is held against it where its blend gain says so too. A seed that runs away
    takes the host along, which is worse without it from then on: its own weights tell.

    Attributes:
        admission_loss: validation loss without the seed when it began to blend; None: not known.
        pace: how fast the seed's weights moved behind the host, see ``pace_of``, the most at the end of any epoch;
            None: not known.
        above: the probe found harm, and the loss was above ``admission_loss``.
        lasting: the probe found harm; where its noise is not known, a rise that is above ``admission_loss`` as well.
        sloped: the blend gain spoke against the seed.
        blamed: the blend gain did so with a ``BLAME_T``, and the model did worse than at admission.
        runaway: its weights moved many times as fast as behind the host, and by more than ``RUN``, and the blend gain
            did not speak for it.

    Raises:
        ConfigurationError: a count that is none.
    """

    LATER: ClassVar[Mapping[str, Any]] = MappingProxyType({"pace": None, "runaway": 0})

    admission_loss: float | None = None
    pace: float | None = None
    above: int = 0
    lasting: int = 0
    sloped: int = 0
    blamed: int = 0
    runaway: int = 0

    def __post_init__(self) -> None:
        for name in ("above", "lasting", "sloped", "blamed", "runaway"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise ConfigurationError(f"Watch: {name} must be a number of epochs, got {getattr(self, name)!r}")
        for name in ("admission_loss", "pace"):
            number = getattr(self, name)
            if number is not None and (type(number) not in (int, float) or not math.isfinite(number)):
                raise ConfigurationError(f"Watch: {name} must be a finite number or None, got {number!r}")

    def behind(self, known: SeedEvidence) -> Watch:
        """The same after one more epoch behind the host."""
        pace = pace_of(known)
        if pace is None or not math.isfinite(pace) or pace <= (self.pace or 0.0):
            return self
        return dataclasses.replace(self, pace=pace)

    def admitted(self, loss: float) -> Watch:
        """The same of a seed that begins to blend, with the validation loss without it."""
        return Watch(admission_loss=loss, pace=self.pace)

    def look(
        self,
        known: SeedEvidence,
        probe: BlendProbe | None,
        limits: GateThresholds,
        *,
        lost: bool = False,
        alone: bool = True,
    ) -> Watch:
        """The counts after one more epoch.

        Args:
            known: evidence of the seed.
            probe: at the present alpha alone.
            limits: those of the gates.
            lost: by what the script tells the model does worse than when the seed began to blend.
            alone: no other seed is to blame for that sooner than this one.
        """
        admission = self.admission_loss
        if probe is not None and (limits.max_probe_harm is None or not math.isfinite(probe.loss)):
            probe = None
        if admission is None and probe is not None:
            admission = probe.loss
        harms, above = harm_of_blend(probe, limits), False
        lasts = harms
        if probe is not None and admission is not None:
            now = probe.loss + probe.changes[0]
            above = not now <= admission
            lasts = harms or (not probe.precise and probe.changes[0] > 0.0 and above)
            # Of a loss, not of a change: since admission the host has moved as well.
            lost = lost or probe.risen_above(admission, FALL_ERRORS) > 0.0
        t = worst_gain_t(known)
        blamed = lost and alone and limits.max_harm_t is not None and t is not None and t < -BLAME_T
        return dataclasses.replace(
            self,
            admission_loss=admission,
            above=self.above + 1 if harms and above else 0,
            lasting=self.lasting + 1 if lasts else 0,
            sloped=self.sloped + 1 if harm_of_slope(known, limits) else 0,
            blamed=self.blamed + 1 if blamed else 0,
            runaway=self.runaway + 1 if self._runs_away(known, limits.max_pace) else 0,
        )

    def _runs_away(self, known: SeedEvidence, limit: float | None) -> bool:
        t, pace, moved = worst_gain_t(known), pace_of(known), known.displacement
        if limit is None or self.pace is None or pace is None or moved is None or t is None:
            return False
        return t <= 0.0 and not moved <= RUN and not pace <= limit * self.pace  # NaN has run away

    @property
    def suspicion(self) -> str | None:
        """In words what the last look found, however seldom before; None: nothing."""
        return next((words for epochs, words in self._counts() if epochs), None)

    def _counts(self) -> tuple[tuple[int, str], ...]:
        return (
            (self.above, "the validation loss is higher with it, and above that at admission"),
            (self.sloped, "its blend gain says that less of it would be better"),
            (self.blamed, "the model does worse than before it, and its blend gain blames it"),
            (self.runaway, "its weights move much faster than behind the host, and its blend gain is not for it"),
            (self.lasting, "the validation loss is higher with it"),
        )

    def begun_anew(self) -> Watch:
        """The same admission, nothing counted."""
        return Watch(admission_loss=self.admission_loss, pace=self.pace)

    def harm(self, limits: GateThresholds) -> str | None:
        """In words what harm the seed does, once it has lasted as long as the limits say; None: none, or not yet."""
        soon, late = limits.harm_epochs, limits.lasting_harm_epochs
        for (epochs, words), limit in zip(self._counts(), (soon, soon, soon, soon, late)):
            if limit is not None and epochs >= limit:
                return f"harm in {epochs} epochs in a row: {words}"
        return None
