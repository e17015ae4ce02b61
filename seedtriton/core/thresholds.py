"""GateThresholds: the limits of every gate, as keyword arguments that are checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, cast

from .errors import ConfigurationError
from .schedules import ProgressThreshold
from .state import PlainState

RATIOS = ("norm", "rms")


@dataclass(frozen=True, kw_only=True)
class GateThresholds(PlainState):
    """Limits of all gates. None switches a question off, visibly: it is listed as not asked.

    Exactly at a limit passes. The limits from ``min_samples`` to ``min_blend_gain_t`` are provisional: they
    stand where first measurements separated seeds that learn from seeds that do not.

    Attributes:
        min_training_improvement: G2, rise of the accuracy since TRAINING began, in percentage points. Off unless told:
            the original gate asked for 1.0, but behind the host a seed cannot move the accuracy, and in the readiness
            benchmark that question refuses seeds that are ready and none that the others let pass wrongly.
        max_isolation_violations: G2, forward passes in which the seed reached into the host.
        min_training_epochs: G2, epochs in TRAINING.
        min_gradient_ratio: G2, seed's gradient norm over the host's; a number, or a ``ProgressThreshold``. The ratio
            only tells a dead seed: the original's 0.05 refused seeds that were ready (0.02 to 0.06 for a zero start
            near the end of its trust region), while dead ones have less than 1e-5.
        ratio: "norm" or "rms": which ratio the two limits on it are for.
        max_gradient_ratio: G2, above it the seed is exploding.
        min_samples: G2, measurements in the window.
        max_sample_age: G2, G3, G5, optimizer steps without a new measurement.
        max_dropped_share: G2, G3, G5, share of the measurements that were not finite or skipped.
        max_seed_not_finite: G2, measurements in which the seed's gradients were not finite and the host's were: behind
            the host they cost the seed a step, and blended in they are the host's. In the readiness benchmark 23 of
            25 seeds with a NaN on every tenth batch passed without this question.
        max_plateau_share: G2, share of the samples whose norm, seed's or host's, sits at one largest value: above
            it somebody clips them apart before they are measured, and the ratio says nothing. Too few samples
            to tell are listed as not asked.
        require_optimizer: G2, the seed's parameters are in an optimizer that steps.
        min_displacement: G2, relative change of the seed's weights since TRAINING began.
        max_displacement: G2, the same: above it the seed has run away. Far above where seeds go that become ready, also
            from weights that began near zero and leave little to divide by.
        min_live_share: G2, share of the seed's parameters whose gradient is not all zero.
        max_vanishing_share: G2, share of the seed's gradient tensors that are vanishing. Off: no measurement says
            yet where seeds that learn stop, and what is all zero is ``min_live_share``'s.
        max_exploding_share: G2, share of those that are exploding. Off: the limits of both are absolute, and a loss
            that is a sum instead of a mean has gradients as many times larger; ``max_gradient_ratio`` has no unit.
        min_health: G2, health of the seed's gradients. Off, as the two above.
        min_blend_gain_t: G2, t statistic of the blend gain, where it has to decide alone.
        min_probed_gain_t: G2, the same where the validation loss was probed: that measures what the gain predicts,
            so it is enough that the gain does not contradict it.
        min_probe_gain: G2, fall of the validation loss at the best alpha that was probed, if it is more than the
            noise of the validation set, in standard deviations of the samples' losses: that unit is the same for a
            loss times a factor and plus a constant. Asked where a validation function was given; of losses of which
            only the mean is known, any fall will do.
        max_probe_harm: G2, rise of the validation loss at the worst alpha, likewise; of means alone, no rise will do.
            From BLENDING on, at the present alpha, a rise above it that is no luck is harm (G3, G5 and the watch);
            where neither accuracy nor loss is told, so is for G3 and G5 a rise above the loss at admission.
        min_blending_epochs: G3, epochs in BLENDING.
        min_holding_epochs: G5, epochs in HOLDING.
        min_contribution: G5, fall of the validation loss that the seed in its place makes, against the same model
            without it, if it is more than noise, in the unit of ``min_probe_gain``. Asked where a validation function
            was given.
        max_accuracy_drop: G3 and G5, fall of the accuracy since BLENDING began, in percentage points. None asks
            neither for that nor for the loss.
        max_loss_rise: G3 and G5, where no accuracy is told, rise of the told loss since BLENDING began, in changes
            that were usual from epoch to epoch before (root of their mean square).
        max_harm_t: G3, G5 and the watch: a t of the blend gain below minus this says that the seed harms.
        max_pace: G3, G5 and the watch: a seed whose weights move this many times as fast as behind the host (over the
            root of the steps), and by more than their own length, with a t of the blend gain that is not above 0, has
            run away. In 42 lives of the growth benchmark without sabotage the most was 1.1 times then, and 3.4 at any
            t; in 10 at a learning rate 100 times too high 8 to 30.
        harm_epochs: the watch acts on harm in so many epochs in a row: by the blend gain, or by the probe with a loss
            above that at admission. None: it does not.
        lasting_harm_epochs: the same for harm by the probe alone.

    Raises:
        ConfigurationError: negative, NaN, a share above 1, an unknown ratio, a wrong type.
    """

    min_training_improvement: float | None = None
    max_isolation_violations: int | None = 3
    min_training_epochs: int | None = 3
    min_gradient_ratio: float | ProgressThreshold | None = 0.01
    ratio: str = "norm"
    max_gradient_ratio: float | None = 1000.0
    min_samples: int | None = 32
    max_sample_age: int | None = 20
    max_dropped_share: float | None = 0.1
    max_seed_not_finite: int | None = 0
    max_plateau_share: float | None = 0.5
    require_optimizer: bool | None = True
    min_displacement: float | None = 1e-4
    max_displacement: float | None = 1e4
    min_live_share: float | None = 0.5
    max_vanishing_share: float | None = None
    max_exploding_share: float | None = None
    min_health: float | None = None
    min_blend_gain_t: float | None = 4.0
    min_probed_gain_t: float | None = 0.0
    min_probe_gain: float | None = 5e-4
    max_probe_harm: float | None = 1e-3
    min_blending_epochs: int | None = 1
    min_holding_epochs: int | None = 1
    min_contribution: float | None = 1e-3
    max_accuracy_drop: float | None = 5.0
    max_loss_rise: float | None = 3.0
    max_harm_t: float | None = 6.0
    max_pace: float | None = 5.0
    harm_epochs: int | None = 2
    lasting_harm_epochs: int | None = 6

    # A release without these questions asked nothing there.
    LATER: ClassVar[Mapping[str, Any]] = MappingProxyType(dict.fromkeys((
        "max_seed_not_finite", "max_displacement", "max_loss_rise", "max_harm_t", "max_pace", "harm_epochs",
        "lasting_harm_epochs",
    )))  # fmt: skip

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value is None:
                continue
            if item.name == "ratio":
                if value not in RATIOS:
                    raise ConfigurationError(f"ratio must be one of {RATIOS}, got {value!r}")
            elif item.name == "require_optimizer":
                if type(value) is not bool:
                    raise ConfigurationError(f"require_optimizer must be True, False or None, got {value!r}")
            elif not (item.name == "min_gradient_ratio" and isinstance(value, ProgressThreshold)):
                _check_limit(item.name, value, whole="int" in str(item.type))
        if self.ratio is None:
            raise ConfigurationError(f"ratio must be one of {RATIOS}, got None")

    @classmethod
    def original(cls, **changes: Any) -> GateThresholds:
        """The numbers of the original review: rise of the accuracy 1.0, ratio 0.05; ``changes`` on top."""
        numbers: dict[str, Any] = {"min_training_improvement": 1.0, "min_gradient_ratio": 0.05}
        return cls(**(numbers | changes))

    @classmethod
    def esper(cls, **changes: Any) -> GateThresholds:
        """The numbers of esper-lite: improvement 0.5, 10 epochs, RMS ratio 0.10; ``changes`` on top."""
        numbers: dict[str, Any] = {
            "min_training_improvement": 0.5,
            "min_training_epochs": 10,
            "min_gradient_ratio": 0.10,
            "ratio": "rms",
            "min_blending_epochs": 10,
        }
        return cls(**(numbers | changes))

    def without(self, *names: str) -> GateThresholds:
        """A copy with the limits of these ``names`` switched off; ConfigurationError for one that is no limit."""
        known = {item.name for item in dataclasses.fields(self)} - {"ratio"}
        for name in names:
            if name not in known:
                raise ConfigurationError(f"no limit is called {name!r}; known: {sorted(known)}")
        return dataclasses.replace(self, **cast("dict[str, Any]", dict.fromkeys(names)))

    def state_dict(self) -> dict[str, Any]:
        """Plain, JSON-safe values; a threshold that depends on progress is a dict of its own."""
        state = super().state_dict()
        if isinstance(self.min_gradient_ratio, ProgressThreshold):
            state["min_gradient_ratio"] = self.min_gradient_ratio.state_dict()
        return state

    @classmethod
    def from_state_dict(cls, state: object) -> GateThresholds:
        """The thresholds saved by ``state_dict``; StateDictError, or ConfigurationError for bad values."""
        if isinstance(state, dict) and isinstance(state.get("min_gradient_ratio"), dict):
            ratio = ProgressThreshold.from_state_dict(state["min_gradient_ratio"])
            state = {**state, "min_gradient_ratio": ratio}
        restored: GateThresholds = super().from_state_dict(state)
        return restored


def _check_limit(name: str, value: object, *, whole: bool) -> None:
    kinds: tuple[type, ...] = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        kind = "a whole number" if whole else "a number"
        raise ConfigurationError(f"{name} must be {kind} or None, got {value!r}")
    highest = 1.0 if name.endswith(("_share", "_health")) else math.inf
    if not 0.0 <= value <= highest or value == math.inf:  # type: ignore[operator]
        limit = "[0, 1]" if highest == 1.0 else "[0, inf)"
        raise ConfigurationError(f"{name} must lie in {limit}, got {value!r}")
