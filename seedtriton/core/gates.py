"""QualityGates: the questions that each gate asks of a seed. What was not measured never passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from . import evidence as ev
from . import questions as ask
from .errors import ConfigurationError
from .evidence import SeedEvidence
from .lifecycle import Stage
from .schedules import ProgressThreshold
from .state import PlainState, check_state
from .thresholds import GateThresholds
from .verdict import PERMISSIVE, STRICT, Check, Gate, SeedStatus, Verdict

# What G2, G3 and G5 ask in every mode: health, because it is off unless somebody wants it.
PERMISSIVE_ASKS = frozenset(
    {
        "stage", "measured", "finite", "exploding", "exploding_tensors", "health", "epochs", "alpha", "harm",
        "identity", "modes",
    }
)  # fmt: skip

GATE_OF: Mapping[Stage, Gate] = MappingProxyType(
    {
        Stage.GERMINATED: Gate.G0,
        Stage.TRAINING: Gate.G1,
        Stage.BLENDING: Gate.G2,
        Stage.HOLDING: Gate.G3,
        Stage.FOSSILIZED: Gate.G5,
    }
)


@dataclass
class QualityGates(PlainState):
    """Asks the questions of a gate and gives the verdict.

    Args:
        thresholds: limits of all gates.
        mode: "strict" asks everything. "permissive" asks G2, G3 and G5 only for the epochs, that gradients were
            measured, are finite and do not explode, in all or tensor by tensor, that alpha has arrived, that nothing
            shows harm, and for a health that was set; the rest is listed as not asked.

    Raises:
        ConfigurationError: an unknown mode.
    """

    thresholds: GateThresholds = field(default_factory=GateThresholds)
    mode: str = STRICT

    def __post_init__(self) -> None:
        if self.mode not in (STRICT, PERMISSIVE):
            raise ConfigurationError(f"mode must be {STRICT!r} or {PERMISSIVE!r}, got {self.mode!r}")

    def state_dict(self) -> dict[str, Any]:
        """Plain, JSON-safe values."""
        return {"version": self.VERSION, "thresholds": self.thresholds.state_dict(), "mode": self.mode}

    @classmethod
    def from_state_dict(cls, state: object) -> QualityGates:
        """The gates saved by ``state_dict``; StateDictError, or ConfigurationError for bad values."""
        values = check_state(state, "QualityGates", cls.VERSION, ("thresholds", "mode"))
        return cls(GateThresholds.from_state_dict(values["thresholds"]), values["mode"])

    def judge(self, target: Stage, status: SeedStatus) -> Verdict:
        """The verdict on moving ``status.seed`` to ``target``.

        Raises:
            ConfigurationError: no gate guards ``target``.
        """
        gate = GATE_OF.get(target) if isinstance(target, Stage) else None
        if gate is None:
            guarded = ", ".join(str(stage) for stage in GATE_OF)
            raise ConfigurationError(f"no gate leads to {target}; gates lead to {guarded}")
        checks = tuple(ask.naming(check, status.tensors) for check in self._QUESTIONS[gate](self, status))
        if self.mode == PERMISSIVE and gate >= Gate.G2:
            checks = tuple(check if check.question in PERMISSIVE_ASKS else ask.unasked(check) for check in checks)
        if gate is Gate.G2:
            checks = ask.refused_by_probe_alone(checks, status, self.thresholds.min_blend_gain_t)
        # Every gate has a question that cannot be switched off, so "nothing failed" means something.
        passed = all(check.passed is not False for check in checks)
        return Verdict(gate, target, status.seed, passed, checks, self.mode)

    def overshoots(self, verdict: Verdict) -> bool:
        """Whether a seed went the right way, by its blend gain, and too far, by the probe, in the ``verdict`` of G2."""
        answers, limit = {check.question: check for check in verdict.checks}, self.thresholds.min_blend_gain_t
        if limit is None or "probe_harm" not in answers or answers["probe_harm"].passed is not False:
            return False
        t = answers["blend_gain"].value
        return answers["probe_harm"].value is not None and isinstance(t, float) and t >= limit

    def asks_probe(self, target: Stage) -> bool:
        """Whether the gate to ``target`` has a question that a probe answers."""
        limits = self.thresholds
        felt = [limits.max_probe_harm, limits.max_accuracy_drop]
        answered = {
            Stage.BLENDING: [limits.min_probe_gain, limits.max_probe_harm] if self.mode == STRICT else [],
            Stage.HOLDING: felt,
            Stage.FOSSILIZED: [*felt, limits.min_contribution],
        }
        return any(limit is not None for limit in answered.get(target, ()))

    def _g0(self, status: SeedStatus) -> list[Check]:
        return [
            ask.stage_is(status, Stage.DORMANT, "slot_free", "slot_occupied"),
            ask.answer(
                "parameters", status.parameters > 0, "has_parameters", "no_parameters",
                status.parameters, 1, f"{status.parameters} trainable elements",
            ),
        ]

    def _g1(self, status: SeedStatus) -> list[Check]:
        shape = Check("shape", "shape_untried", None, reason="not tried yet: the first forward pass will")
        if status.preserves_shape is not None:
            shape = ask.answer(
                "shape", status.preserves_shape, "shape_preserved", "shape_changed",
                status.preserves_shape, True, "output against input, shape and dtype",
            )
        return [ask.stage_is(status, Stage.GERMINATED, "germinated", "not_germinated"), shape, ask.hands_on(status)]

    def _g2(self, status: SeedStatus) -> list[Check]:
        limits, known = self.thresholds, status.known
        # Causes before symptoms: the first refusals in the list are the ones to act on.
        return [
            ask.stage_is(status, Stage.TRAINING, "in_training", "not_in_training"),
            ask.measured(known),
            ask.finite(known, limits.max_dropped_share),
            ask.at_most(
                "quarantine", "max_seed_not_finite", known.seed_not_finite, limits.max_seed_not_finite,
                "seed_always_finite", "seed_not_finite",
                "measurements in which the seed's gradients were not finite and the host's were; blended in, they are "
                "the host's",
            ),
            ask.not_clipped(known, limits.max_plateau_share),
            ask.in_optimizer(known, limits.require_optimizer),
            ask.at_least(
                "displacement", "min_displacement", known.displacement, limits.min_displacement,
                "weights_moved", "weights_not_moved", "relative change of the weights since TRAINING began",
            ),
            ask.at_most(
                "runaway", "max_displacement", known.displacement, limits.max_displacement,
                "weights_bounded", "weights_ran_away", "relative change of the weights since TRAINING began",
            ),
            ask.at_least(
                "live_share", "min_live_share", known.live_share, limits.min_live_share,
                "gradients_alive", "gradients_dead", "share of the parameters whose gradient is not all zero",
            ),
            *ask.tensors_healthy(known, limits),
            self._ratio(status, known),
            self._not_exploding(known),
            ask.at_least(
                "samples", "min_samples", known.samples, limits.min_samples,
                "samples_sufficient", "samples_insufficient", "samples in the window",
            ),
            ask.fresh(known, limits.max_sample_age),
            ask.epochs(
                status, limits.min_training_epochs, "min_training_epochs", "seed_ready", "seed_not_ready"
            ),
            ask.improvement(status, limits.min_training_improvement),
            ask.at_most(
                "isolation", "max_isolation_violations", status.isolation_violations,
                limits.max_isolation_violations, "isolated", "isolation_violated",
                "forward passes in which the seed reached into the host",
            ),
            ask.hands_on(status),
            self._blend_gain(status, known),
            ask.probed_fall(
                "probe_gain", "min_probe_gain", status, limits.min_probe_gain,
                "blend_lowers_loss", "blend_lowers_no_loss",
            ),
            ask.probed_harm(status, limits.max_probe_harm),
            ask.modes_agree(known, status.probe, limits.min_blend_gain_t),
        ]

    def _g3(self, status: SeedStatus) -> list[Check]:
        limits = self.thresholds
        return [
            ask.stage_is(status, Stage.BLENDING, "in_blending", "not_in_blending"),
            *ask.seen_lately(status.known, limits),
            ask.answer(
                "alpha", status.alpha_holds and status.alpha == status.alpha_target > 0.0,
                "alpha_target_reached", "alpha_not_at_target",
                status.alpha, status.alpha_target, f"alpha {status.alpha:.3g} of {status.alpha_target:.3g}",
            ),
            ask.epochs(
                status, limits.min_blending_epochs, "min_blending_epochs",
                "blending_complete", "blending_incomplete",
            ),
            ask.performance_kept(status, limits),
            ask.harmless(status, limits),
        ]

    def _g5(self, status: SeedStatus) -> list[Check]:
        limits = self.thresholds
        return [
            ask.stage_is(status, Stage.HOLDING, "in_holding", "not_in_holding"),
            *ask.seen_lately(status.known, limits),
            ask.epochs(status, limits.min_holding_epochs, "min_holding_epochs", "held", "not_held_long_enough"),
            ask.probed_fall(
                "contribution", "min_contribution", status, limits.min_contribution,
                "seed_contributes", "seed_contributes_nothing",
            ),
            ask.gain_not_against(status.known, limits.max_harm_t),
            ask.performance_kept(status, limits),
            ask.harmless(status, limits),
        ]

    def _chosen(self, known: SeedEvidence) -> float | None:
        return known.rms_ratio if self.thresholds.ratio == "rms" else known.ratio

    def _not_exploding(self, known: SeedEvidence) -> Check:
        value = self._chosen(known)
        limit = self.thresholds.max_gradient_ratio
        if limit is None:
            return ask.not_asked("exploding", "max_gradient_ratio", value)
        if value is None:
            return self._without_host("exploding", known, limit)
        return ask.answer(
            "exploding", value <= limit, "seed_gradient_bounded", "seed_gradient_exploding",
            value, limit, f"{self.thresholds.ratio} ratio {value:.3g}, at most {limit:.3g}",
        )

    def _ratio(self, status: SeedStatus, known: SeedEvidence) -> Check:
        limit = self.thresholds.min_gradient_ratio
        value = self._chosen(known)
        if limit is None:
            return ask.not_asked("gradient_ratio", "min_gradient_ratio", value)
        if isinstance(limit, ProgressThreshold):
            if status.progress is None:
                return Check(
                    "gradient_ratio", "progress_unknown", False, value, None,
                    "min_gradient_ratio depends on the progress of training, which is not known: "
                    "give the controller total_epochs or total_steps",
                )
            limit = limit(status.progress)
        if value is None:
            return self._without_host("gradient_ratio", known, limit)
        return ask.answer(
            "gradient_ratio", value >= limit, "seed_gradient_active", "seed_gradient_low",
            value, limit, f"{self.thresholds.ratio} {known.reason}; at least {limit:.3g}",
        )

    def _blend_gain(self, status: SeedStatus, known: SeedEvidence) -> Check:
        # A mean of which nobody knows the noise tells less than the gain does, and so takes nothing from it. Switched
        # off, it is off with a probe as well.
        probed = status.probe_due is not None or (status.probe is not None and status.probe.precise)
        alone = not probed or self.thresholds.min_blend_gain_t is None
        name = "min_blend_gain_t" if alone else "min_probed_gain_t"
        return ask.at_least(
            "blend_gain", name, known.blend_gain_t, getattr(self.thresholds, name),
            "blend_gain_significant", "blend_gain_insignificant", ask.gain_in_words(known),
        )

    def _without_host(self, question: str, known: SeedEvidence, limit: float) -> Check:
        """What stands in a verdict for a ratio that has no value.

        A frozen host leaves nothing to divide by, and says nothing about the seed. Where the blend gain is asked,
        which needs no host, it decides; every other missing ratio is a refusal.
        """
        name = ask.missing_name(known)
        if known.status == ev.HOST_UNDEFINED and self.thresholds.min_blend_gain_t is not None and self.mode == STRICT:
            return Check(question, name, None, None, limit, f"not asked, the blend gain decides: {known.reason}")
        return Check(question, name, False, None, limit, known.reason)

    _QUESTIONS = {  # noqa: RUF012 - a table of methods, never changed
        Gate.G0: _g0,
        Gate.G1: _g1,
        Gate.G2: _g2,
        Gate.G3: _g3,
        Gate.G5: _g5,
    }
