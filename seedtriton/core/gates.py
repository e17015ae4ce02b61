"""QualityGates: the questions that each gate asks of a seed. What was not measured never passes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from . import evidence as ev
from .errors import ConfigurationError
from .evidence import BlendProbe, SeedEvidence
from .lifecycle import Stage
from .schedules import ProgressThreshold
from .state import PlainState, check_state
from .tensors import NAMING, TensorReading, name_tensors
from .thresholds import GateThresholds
from .verdict import PERMISSIVE, SEED_REPLACES_HOST, STRICT, Check, Gate, SeedStatus, Verdict

PERMISSIVE_ASKS = frozenset({"stage", "measured", "finite", "exploding", "exploding_tensors", "epochs", "identity"})
# A seed that hands on less of the host's features than this replaces them: an untrained seed hands on about 1 of them
# with a residual and about 0 without; with few channels chance blurs both.
HANDS_ON = 0.5

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
        mode: "strict" asks everything. "permissive" asks G2 only for the epochs and that gradients were
            measured, are finite and do not explode, in all or tensor by tensor; the rest is listed as not asked.

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
        checks = tuple(_naming(check, status.tensors) for check in self._QUESTIONS[gate](self, status))
        # Every gate has a question that cannot be switched off, so "nothing failed" means something.
        passed = all(check.passed is not False for check in checks)
        return Verdict(gate, target, status.seed, passed, checks, self.mode)

    def asks_probe(self, target: Stage) -> bool:
        """Whether the gate to ``target`` has a question that only a probe can answer."""
        limits = self.thresholds
        if target is Stage.BLENDING and self.mode == STRICT:
            return limits.min_probe_gain is not None or limits.max_probe_harm is not None
        return target is Stage.FOSSILIZED and limits.min_contribution is not None

    def _g0(self, status: SeedStatus) -> list[Check]:
        return [
            _stage_is(status, Stage.DORMANT, "slot_free", "slot_occupied"),
            _yes(
                "parameters", status.parameters > 0, "has_parameters", "no_parameters",
                status.parameters, 1, f"{status.parameters} trainable elements",
            ),
        ]

    def _g1(self, status: SeedStatus) -> list[Check]:
        shape = Check("shape", "shape_untried", None, reason="not tried yet: the first forward pass will")
        if status.preserves_shape is not None:
            shape = _yes(
                "shape", status.preserves_shape, "shape_preserved", "shape_changed",
                status.preserves_shape, True, "output against input, shape and dtype",
            )
        return [_stage_is(status, Stage.GERMINATED, "germinated", "not_germinated"), shape, _hands_on(status)]

    def _g2(self, status: SeedStatus) -> list[Check]:
        limits, known = self.thresholds, status.known
        # Causes before symptoms: the first refusals in the list are the ones to act on.
        checks = [
            _stage_is(status, Stage.TRAINING, "in_training", "not_in_training"),
            _measured(known),
            _finite(known, limits.max_dropped_share),
            _not_clipped(known, limits.max_plateau_share),
            _in_optimizer(known, limits.require_optimizer),
            _at_least(
                "displacement", "min_displacement", known.displacement, limits.min_displacement,
                "weights_moved", "weights_not_moved", "relative change of the weights since TRAINING began",
            ),
            _at_most(
                "runaway", "max_displacement", known.displacement, limits.max_displacement,
                "weights_bounded", "weights_ran_away", "relative change of the weights since TRAINING began",
            ),
            _at_least(
                "live_share", "min_live_share", known.live_share, limits.min_live_share,
                "gradients_alive", "gradients_dead", "share of the parameters whose gradient is not all zero",
            ),
            *_tensors_healthy(known, limits),
            self._ratio(status, known),
            self._not_exploding(known),
            _at_least(
                "samples", "min_samples", known.samples, limits.min_samples,
                "samples_sufficient", "samples_insufficient", "samples in the window",
            ),
            _fresh(known, limits.max_sample_age),
            _epochs(
                status, limits.min_training_epochs, "min_training_epochs", "seed_ready", "seed_not_ready"
            ),
            _improvement(status, limits.min_training_improvement),
            _at_most(
                "isolation", "max_isolation_violations", status.isolation_violations,
                limits.max_isolation_violations, "isolated", "isolation_violated",
                "forward passes in which the seed reached into the host",
            ),
            _hands_on(status),
            self._blend_gain(status, known),
            _probed(
                "probe_gain", "min_probe_gain", status.probe, limits.min_probe_gain,
                "blend_lowers_loss", "blend_lowers_no_loss",
            ),
            _probed(
                "probe_harm", "max_probe_harm", status.probe, limits.max_probe_harm,
                "blend_harmless", "blend_would_harm",
            ),
        ]
        if self.mode == STRICT:
            return checks
        return [
            check if check.question in PERMISSIVE_ASKS else _unasked(check) for check in checks
        ]

    def _g3(self, status: SeedStatus) -> list[Check]:
        limits = self.thresholds
        return [
            _stage_is(status, Stage.BLENDING, "in_blending", "not_in_blending"),
            *_seen_lately(status.known, limits),
            _yes(
                "alpha", status.alpha_holds and status.alpha == status.alpha_target > 0.0,
                "alpha_target_reached", "alpha_not_at_target",
                status.alpha, status.alpha_target, f"alpha {status.alpha:.3g} of {status.alpha_target:.3g}",
            ),
            _epochs(
                status, limits.min_blending_epochs, "min_blending_epochs",
                "blending_complete", "blending_incomplete",
            ),
            _accuracy_kept(status, limits.max_accuracy_drop),
        ]

    def _g5(self, status: SeedStatus) -> list[Check]:
        limits = self.thresholds
        return [
            _stage_is(status, Stage.HOLDING, "in_holding", "not_in_holding"),
            *_seen_lately(status.known, limits),
            _epochs(status, limits.min_holding_epochs, "min_holding_epochs", "held", "not_held_long_enough"),
            _probed(
                "contribution", "min_contribution", status.probe, limits.min_contribution,
                "seed_contributes", "seed_contributes_nothing",
            ),
            _accuracy_kept(status, limits.max_accuracy_drop),
        ]

    def _chosen(self, known: SeedEvidence) -> float | None:
        return known.rms_ratio if self.thresholds.ratio == "rms" else known.ratio

    def _not_exploding(self, known: SeedEvidence) -> Check:
        value = self._chosen(known)
        limit = self.thresholds.max_gradient_ratio
        if limit is None:
            return _not_asked("exploding", "max_gradient_ratio", value)
        if value is None:
            return self._without_host("exploding", known, limit)
        return _yes(
            "exploding", value <= limit, "seed_gradient_bounded", "seed_gradient_exploding",
            value, limit, f"{self.thresholds.ratio} ratio {value:.3g}, at most {limit:.3g}",
        )

    def _ratio(self, status: SeedStatus, known: SeedEvidence) -> Check:
        limit = self.thresholds.min_gradient_ratio
        value = self._chosen(known)
        if limit is None:
            return _not_asked("gradient_ratio", "min_gradient_ratio", value)
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
        return _yes(
            "gradient_ratio", value >= limit, "seed_gradient_active", "seed_gradient_low",
            value, limit, f"{self.thresholds.ratio} {known.reason}; at least {limit:.3g}",
        )

    def _blend_gain(self, status: SeedStatus, known: SeedEvidence) -> Check:
        # Switched off, it is off with a probe as well.
        alone = status.probe is None or self.thresholds.min_blend_gain_t is None
        name = "min_blend_gain_t" if alone else "min_probed_gain_t"
        return _at_least(
            "blend_gain", name, known.blend_gain_t, getattr(self.thresholds, name),
            "blend_gain_significant", "blend_gain_insignificant", _gain_in_words(known),
        )

    def _without_host(self, question: str, known: SeedEvidence, limit: float) -> Check:
        """What stands in a verdict for a ratio that has no value.

        A frozen host leaves nothing to divide by, and says nothing about the seed. Where the blend gain is asked,
        which needs no host, it decides; every other missing ratio is a refusal.
        """
        name = _missing_name(known)
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


SEED_FROZEN = "seed_frozen"

# What a missing ratio is called in a verdict: five answers, none of which passes.
_MISSING = MappingProxyType(
    {
        ev.NEVER_MEASURED: "gradient_never_measured",
        ev.NO_GRADIENT: "seed_gradient_missing",
        ev.NOT_FINITE: "gradient_not_finite",
        ev.HOST_UNDEFINED: "host_gradient_undefined",
        ev.MEASURED: "gradient_ratio_undefined",
    }
)


def _missing_name(known: SeedEvidence) -> str:
    return SEED_FROZEN if known.frozen and known.status == ev.NO_GRADIENT else _MISSING[known.status]


def _yes(
    question: str, passed: bool, yes: str, no: str, value: Any = None, limit: Any = None, reason: str = ""
) -> Check:
    return Check(question, yes if passed else no, passed, value, limit, reason)


def _naming(check: Check, tensors: Sequence[TensorReading] | None) -> Check:
    """A refusal with the tensors behind it in its reason, where they are known."""
    if tensors is None or check.passed is not False or check.question not in NAMING:
        return check
    names = name_tensors(check.question, tensors)
    return dataclasses.replace(check, reason=f"{check.reason}; {names}") if names else check


def _unasked(check: Check) -> Check:
    return dataclasses.replace(check, passed=None, reason="not asked: permissive")


def _not_asked(question: str, threshold: str, value: Any) -> Check:
    return Check(question, question, None, value, None, f"not asked: {threshold} is None")


def _compare(
    question: str, threshold: str, value: float | int | None, limit: float | int | None,
    yes: str, no: str, words: str, holds: Callable[[float, float], bool], bound: str,
) -> Check:
    """One number against one limit; exactly at the limit passes, NaN and "unknown" never do."""
    if limit is None:
        return _not_asked(question, threshold, value)
    if value is None:
        return Check(question, f"{question}_never_measured", False, None, limit, f"unknown: {words}")
    shown = f"{value:.3g}" if isinstance(value, float) else str(value)
    reason = f"{words}: {shown}, {bound} {limit:.3g}"
    return _yes(question, math.isfinite(value) and holds(value, limit), yes, no, value, limit, reason)


def _at_least(
    question: str, threshold: str, value: float | int | None, limit: float | int | None,
    yes: str, no: str, words: str,
) -> Check:
    return _compare(question, threshold, value, limit, yes, no, words, lambda a, b: a >= b, "at least")


def _at_most(
    question: str, threshold: str, value: float | int | None, limit: float | int | None,
    yes: str, no: str, words: str,
) -> Check:
    return _compare(question, threshold, value, limit, yes, no, words, lambda a, b: a <= b, "at most")


def _stage_is(status: SeedStatus, stage: Stage, yes: str, no: str) -> Check:
    return _yes("stage", status.stage is stage, yes, no, str(status.stage), str(stage), f"in {status.stage}")


def _hands_on(status: SeedStatus) -> Check:
    """Told, never asked: a seed that replaces the host's features is legal, and seldom meant."""
    value = status.handed_on
    if value is None:
        return Check("identity", "identity", None, None, HANDS_ON, "not known: the seed's output was not looked at yet")
    words = f"share of the host's features that the seed handed on when it was first looked at: {value:.3g}"
    if value >= HANDS_ON:
        return Check("identity", "seed_hands_on_host", True, value, HANDS_ON, f"{words}, 1 for x + f(x)")
    reason = f"{words}, 0 for f(x) instead of x + f(x); as far as it is blended in, the host's features are gone"
    return Check("identity", SEED_REPLACES_HOST, None, value, HANDS_ON, reason)


def _measured(known: SeedEvidence) -> Check:
    """Asked always: no threshold can wave through what was never seen."""
    passed = known.samples > 0 and known.status in (ev.MEASURED, ev.HOST_UNDEFINED)
    name = "gradient_measured" if passed else _missing_name(known)
    return Check("measured", name, passed, known.samples, 1, known.reason)


def _finite(known: SeedEvidence, limit: float | None) -> Check:
    if limit is None:
        return _not_asked("finite", "max_dropped_share", known.dropped_share)
    if not known.samples and not known.dropped:
        return Check("finite", _missing_name(known), False, None, limit, known.reason)
    words = f"share of the measurements dropped, {known.dropped} of {known.samples + known.dropped}"
    if known.seed_not_finite:
        words += f"; in {known.seed_not_finite} the seed's own gradients were not finite"
    return _at_most(
        "finite", "max_dropped_share", known.dropped_share, limit, "gradients_finite", "gradients_not_finite", words
    )


def _not_clipped(known: SeedEvidence, limit: float | None) -> Check:
    share = known.plateau_share
    if limit is not None and share is None:
        few = f"not asked: {known.samples} samples are too few to tell a plateau"
        return Check("clipping", "clipping", None, None, limit, few)
    return _at_most(
        "clipping", "max_plateau_share", share, limit,
        "not_clipped_before_measuring", "clipped_before_measuring",
        "share of the samples whose norm sits at one largest value, as after clipping host or seed by its own norm "
        "(measure before you clip)",
    )


def _fresh(known: SeedEvidence, limit: int | None) -> Check:
    if limit is not None and known.age is None:
        unknown = known.samples or known.dropped or known.empty
        name = "samples_age_unknown" if unknown else _missing_name(known)
        reason = "no optimizer is known: give the monitor its optimizers" if unknown else known.reason
        return Check("age", name, False, None, limit, reason)
    return _at_most(
        "age", "max_sample_age", known.age, limit,
        "samples_fresh", "samples_stale", "optimizer steps without a new measurement",
    )


def _seen_lately(known: SeedEvidence, limits: GateThresholds) -> list[Check]:
    """What a seed that is felt is still asked about its gradients."""
    finite, fresh = _finite(known, limits.max_dropped_share), _fresh(known, limits.max_sample_age)
    return [_measured(known), finite, fresh]


def _in_optimizer(known: SeedEvidence, required: bool | None) -> Check:
    if not required:
        check = _not_asked("optimizer", "require_optimizer", known.in_optimizer)
        return dataclasses.replace(check, reason=f"not asked: require_optimizer is {required}")
    if known.frozen:
        reason = "no parameter of the seed requires a gradient: requires_grad_(True), or prune it"
        return Check("optimizer", SEED_FROZEN, False, False, True, reason)
    if known.in_optimizer is None:
        reason = "no optimizer is known: give the monitor its optimizers"
        return Check("optimizer", "optimizer_never_measured", False, None, True, reason)
    if not known.in_optimizer:
        reason = "parameters of the seed are in no optimizer: they get gradients and never move"
        return Check("optimizer", "seed_in_no_optimizer", False, False, True, reason)
    if known.optimizer_steps == 0:
        reason = "the seed's optimizer has not stepped since the window began"
        return Check("optimizer", "optimizer_never_stepped", False, 0, 1, reason)
    if known.idle is not None and known.idle >= ev.IDLE_LIMIT:
        reason = (
            f"the seed's optimizer has not stepped in the last {known.idle} measurements: if another one has taken its "
            "place, it must hold the seed's parameters, and monitor.watch(optimizer) tells of it"
        )
        return Check("optimizer", "optimizer_stopped", False, known.idle, ev.IDLE_LIMIT, reason)
    steps = "" if known.optimizer_steps is None else f", {known.optimizer_steps} steps"
    return Check("optimizer", "seed_in_optimizer", True, True, True, f"all parameters{steps}")


def _tensors_healthy(known: SeedEvidence, limits: GateThresholds) -> list[Check]:
    return [
        _at_most(
            "vanishing", "max_vanishing_share", known.vanishing_share, limits.max_vanishing_share,
            "gradients_substantial", "gradients_vanishing",
            "share of the gradient tensors whose root mean square is below the monitor's vanishing_rms",
        ),
        _at_most(
            "exploding_tensors", "max_exploding_share", known.exploding_share, limits.max_exploding_share,
            "gradients_bounded", "gradients_exploding",
            "share of the gradient tensors whose root mean square is above the monitor's exploding_rms",
        ),
        _at_least(
            "health", "min_health", known.health, limits.min_health,
            "gradients_healthy", "gradients_unhealthy", "health of the gradients",
        ),
    ]


def _epochs(status: SeedStatus, limit: int | None, threshold: str, yes: str, no: str) -> Check:
    words = f"epochs in {status.stage}"
    return _at_least("epochs", threshold, status.epochs_in_stage, limit, yes, no, words)


def _improvement(status: SeedStatus, limit: float | None) -> Check:
    return _at_least(
        "improvement", "min_training_improvement", status.improvement, limit,
        "global_improvement", "global_improvement_insufficient", "percentage points since TRAINING began",
    )


def _accuracy_kept(status: SeedStatus, limit: float | None) -> Check:
    drop = None if status.accuracy_change is None else -status.accuracy_change
    return _at_most(
        "accuracy", "max_accuracy_drop", drop, limit,
        "accuracy_kept", "accuracy_lost", "percentage points lost since BLENDING began",
    )


def _probed(
    question: str, threshold: str, probe: BlendProbe | None, limit: float | None, yes: str, no: str
) -> Check:
    """A question about the probe; without a validation function, or when refused already, it is not asked."""
    if probe is None:
        reason = f"not asked: {threshold} is None" if limit is None else "not asked: the validation loss was not probed"
        return Check(question, question, None, None, limit, reason)
    if question == "probe_harm":
        words = f"{_probe_in_words(probe)}; largest rise that is more than noise, as a share"
        return _at_most(question, threshold, probe.harm, limit, yes, no, words)
    words = f"{_probe_in_words(probe)}; largest fall that is more than noise, as a share"
    return _at_least(question, threshold, probe.gain, limit, yes, no, words)


def _probe_in_words(probe: BlendProbe) -> str:
    errors = probe.errors or (None,) * len(probe.alphas)
    tried = [
        f"{change:+.3g}" + ("" if error is None else f" ± {error:.1g}") + f" at alpha {alpha:.3g}"
        for alpha, change, error in zip(probe.alphas, probe.changes, errors)
    ]
    return f"validation loss {probe.loss:.4g}, " + ", ".join(tried)


def _gain_in_words(known: SeedEvidence) -> str:
    if known.blend_gain is None or known.effective_samples is None:
        return "t of the blend gain, which was not measured"
    return f"t of the blend gain {known.blend_gain:.3g} over {known.effective_samples:.0f} effective samples"
