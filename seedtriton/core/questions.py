"""The questions that gates ask of a seed: one function each, from what is known to a Check with its reason in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

from . import evidence as ev
from .evidence import SeedEvidence
from .harm import Watch, harm_of_blend, harm_of_slope, worst_gain_t
from .lifecycle import Stage
from .probe import FALL_ERRORS, RISE_ERRORS, BlendProbe
from .tensors import NAMING, TensorReading, name_tensors
from .thresholds import GateThresholds
from .verdict import MODES_DISAGREE, SEED_REPLACES_HOST, Check, SeedStatus

# A seed that hands on less of the host's features than this replaces them: an untrained seed hands on about 1 of them
# with a residual and about 0 without; with few channels chance blurs both.
HANDS_ON = 0.5
ACCURACY_LOST, LOSS_RISEN = "accuracy_lost", "loss_risen"
BY_PROBE = ("probe_gain", "probe_harm")  # questions of G2 that only a probe answers
THREE_WAYS = (
    "nothing says how the model does: tell end_epoch(accuracy=...) or end_epoch(loss=...) in every epoch, or give the "
    "controller evaluate="
)
SEED_FROZEN = "seed_frozen"
RISES = (
    "evaluate returns an accuracy or another score, which rises when blending helps: let it return the loss, or 1 - "
    "the accuracy"
)

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


def missing_name(known: SeedEvidence) -> str:
    return SEED_FROZEN if known.frozen and known.status == ev.NO_GRADIENT else _MISSING[known.status]


def answer(
    question: str, passed: bool, yes: str, no: str, value: Any, limit: Any, reason: str
) -> Check:
    """Yes or no, each by its name."""
    return Check(question, yes if passed else no, passed, value, limit, reason)


def naming(check: Check, tensors: Sequence[TensorReading] | None) -> Check:
    """A refusal with the tensors behind it in its reason, where they are known."""
    if tensors is None or check.passed is not False or check.question not in NAMING:
        return check
    names = name_tensors(check.question, tensors)
    return dataclasses.replace(check, reason=f"{check.reason}; {names}") if names else check


def unasked(check: Check) -> Check:
    return dataclasses.replace(check, passed=None, reason="not asked: permissive")


def not_asked(question: str, threshold: str, value: Any) -> Check:
    return Check(question, question, None, value, None, f"not asked: {threshold} is None")


def compare(
    question: str, threshold: str, value: float | int | None, limit: float | int | None,
    yes: str, no: str, words: str, holds: Callable[[float, float], bool], bound: str,
) -> Check:
    """One number against one limit; exactly at the limit passes, NaN and "unknown" never do."""
    if limit is None:
        return not_asked(question, threshold, value)
    if value is None:
        return Check(question, f"{question}_never_measured", False, None, limit, f"unknown: {words}")
    shown = f"{value:.3g}" if isinstance(value, float) else str(value)
    reason = f"{words}: {shown}, {bound} {limit:.3g}"
    return answer(question, math.isfinite(value) and holds(value, limit), yes, no, value, limit, reason)


def at_least(
    question: str, threshold: str, value: float | int | None, limit: float | int | None,
    yes: str, no: str, words: str,
) -> Check:
    return compare(question, threshold, value, limit, yes, no, words, lambda a, b: a >= b, "at least")


def at_most(
    question: str, threshold: str, value: float | int | None, limit: float | int | None,
    yes: str, no: str, words: str,
) -> Check:
    return compare(question, threshold, value, limit, yes, no, words, lambda a, b: a <= b, "at most")


def stage_is(status: SeedStatus, stage: Stage, yes: str, no: str) -> Check:
    return answer("stage", status.stage is stage, yes, no, str(status.stage), str(stage), f"in {status.stage}")


def hands_on(status: SeedStatus) -> Check:
    """Told, never asked: a seed that replaces the host's features is legal, and seldom meant."""
    value = status.handed_on
    if value is None:
        return Check("identity", "identity", None, None, HANDS_ON, "not known: the seed's output was not looked at yet")
    words = f"share of the host's features that the seed handed on when it was first looked at: {value:.3g}"
    if value >= HANDS_ON:
        return Check("identity", "seed_hands_on_host", True, value, HANDS_ON, f"{words}, 1 for x + f(x)")
    reason = f"{words}, 0 for f(x) instead of x + f(x); as far as it is blended in, the host's features are gone"
    return Check("identity", SEED_REPLACES_HOST, None, value, HANDS_ON, reason)


def measured(known: SeedEvidence) -> Check:
    """Asked always: no threshold can wave through what was never seen."""
    passed = known.samples > 0 and known.status in (ev.MEASURED, ev.HOST_UNDEFINED)
    name = "gradient_measured" if passed else missing_name(known)
    return Check("measured", name, passed, known.samples, 1, known.reason)


def finite(known: SeedEvidence, limit: float | None) -> Check:
    if limit is None:
        return not_asked("finite", "max_dropped_share", known.dropped_share)
    if not known.samples and not known.dropped:
        return Check("finite", missing_name(known), False, None, limit, known.reason)
    words = f"share of the measurements dropped, {known.dropped} of {known.samples + known.dropped}"
    if known.seed_not_finite:
        words += f"; in {known.seed_not_finite} the seed's own gradients were not finite"
    return at_most(
        "finite", "max_dropped_share", known.dropped_share, limit, "gradients_finite", "gradients_not_finite", words
    )


def not_clipped(known: SeedEvidence, limit: float | None) -> Check:
    share = known.plateau_share
    if limit is not None and share is None:
        few = f"not asked: {known.samples} samples are too few to tell a plateau"
        return Check("clipping", "clipping", None, None, limit, few)
    return at_most(
        "clipping", "max_plateau_share", share, limit,
        "not_clipped_before_measuring", "clipped_before_measuring",
        "share of the samples whose norm sits at one largest value, as after clipping host or seed by its own norm "
        "(measure before you clip)",
    )


def fresh(known: SeedEvidence, limit: int | None) -> Check:
    if limit is not None and known.age is None:
        unknown = known.samples or known.dropped or known.empty
        name = "samples_age_unknown" if unknown else missing_name(known)
        reason = "no optimizer is known: give the monitor its optimizers" if unknown else known.reason
        return Check("age", name, False, None, limit, reason)
    return at_most(
        "age", "max_sample_age", known.age, limit,
        "samples_fresh", "samples_stale", "optimizer steps without a new measurement",
    )


def seen_lately(known: SeedEvidence, limits: GateThresholds) -> list[Check]:
    """What a seed that is felt is still asked about its gradients."""
    return [measured(known), finite(known, limits.max_dropped_share), fresh(known, limits.max_sample_age)]


def in_optimizer(known: SeedEvidence, required: bool | None) -> Check:
    if not required:
        check = not_asked("optimizer", "require_optimizer", known.in_optimizer)
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


def tensors_healthy(known: SeedEvidence, limits: GateThresholds) -> list[Check]:
    return [
        at_most(
            "vanishing", "max_vanishing_share", known.vanishing_share, limits.max_vanishing_share,
            "gradients_substantial", "gradients_vanishing",
            "share of the gradient tensors whose root mean square is below the monitor's vanishing_rms",
        ),
        at_most(
            "exploding_tensors", "max_exploding_share", known.exploding_share, limits.max_exploding_share,
            "gradients_bounded", "gradients_exploding",
            "share of the gradient tensors whose root mean square is above the monitor's exploding_rms",
        ),
        at_least(
            "health", "min_health", known.health, limits.min_health,
            "gradients_healthy", "gradients_unhealthy", "health of the gradients",
        ),
    ]


def epochs(status: SeedStatus, limit: int | None, threshold: str, yes: str, no: str) -> Check:
    words = f"epochs in {status.stage}"
    return at_least("epochs", threshold, status.epochs_in_stage, limit, yes, no, words)


def improvement(status: SeedStatus, limit: float | None) -> Check:
    return at_least(
        "improvement", "min_training_improvement", status.improvement, limit,
        "global_improvement", "global_improvement_insufficient", "percentage points since TRAINING began",
    )


def performance_kept(status: SeedStatus, limits: GateThresholds) -> Check:
    """Did blending cost the model anything? By the accuracy, the loss, or, where neither is told, the probe."""
    limit = limits.max_accuracy_drop
    if status.accuracy_change is None and limit is not None:
        if status.loss_rise is not None:
            return at_most(
                "loss", "max_loss_rise", status.loss_rise, limits.max_loss_rise, "loss_kept", LOSS_RISEN,
                "rise of the loss since BLENDING began, in changes that were usual from epoch to epoch before",
            )
        if status.probe is not None and limits.max_probe_harm is not None and math.isfinite(status.probe.loss):
            return _probed_loss_kept(status.probe, status.watch, limits.max_probe_harm)
        return Check("accuracy", "accuracy_never_measured", False, None, limit, THREE_WAYS)
    drop = None if status.accuracy_change is None else -status.accuracy_change
    return at_most(
        "accuracy", "max_accuracy_drop", drop, limit,
        "accuracy_kept", ACCURACY_LOST, "percentage points lost since BLENDING began",
    )


def _probed_loss_kept(probe: BlendProbe, watch: Watch | None, limit: float) -> Check:
    admission = None if watch is None else watch.admission_loss
    if admission is None or not probe.precise:
        return Check("loss", "loss", None, None, limit, "not asked: not told, and the probe's noise is not known")
    return at_most(
        "loss", "max_probe_harm", probe.risen_above(admission, RISE_ERRORS), limit, "loss_kept", LOSS_RISEN,
        f"rise of the validation loss above {admission:.4g}, that at admission, in standard deviations of the samples'",
    )


def harmless(status: SeedStatus, limits: GateThresholds) -> Check:
    """What the watch found in this epoch; once is enough not to go on, to take the seed out it has to last."""
    known = status.known
    probe = None if limits.max_probe_harm is None else status.probe
    if probe is not None and not math.isfinite(probe.loss):
        probe = None
    t = None if limits.max_harm_t is None else worst_gain_t(known)
    if probe is not None and harm_of_blend(probe, limits):
        return Check("harm", "seed_harms", False, probe.certain_harm, limits.max_probe_harm, str(probe))
    if t is not None and harm_of_slope(known, limits):
        return Check("harm", "seed_harms", False, t, limits.max_harm_t, f"{gain_in_words(known)}, of late {t:.3g}")
    if status.watch is not None and (suspicion := status.watch.suspicion) is not None:
        return Check("harm", "seed_harms", False, t, limits.max_harm_t, suspicion)
    if probe is None and t is None:
        return Check("harm", "harm", None, None, None, "not known: no probe, and no t of the blend gain yet")
    words = gain_in_words(known) if probe is None else str(probe)
    return Check("harm", "seed_harmless", True, t, limits.max_harm_t, words)


def gain_not_against(known: SeedEvidence, limit: float | None) -> Check:
    """Before a seed becomes permanent its blend gain has to be known, and not to speak against it."""
    return at_least(
        "blend_gain", "max_harm_t", worst_gain_t(known), None if limit is None else -limit,
        "blend_gain_agrees", "blend_gain_against", gain_in_words(known),
    )


def probed_fall(
    question: str, threshold: str, status: SeedStatus, limit: float | None, yes: str, no: str
) -> Check:
    """Whether the probe found a fall of the loss; without a validation function, or when refused already, not asked."""
    probe = status.probe
    if probe is None or limit is None:
        return _unprobed(question, threshold, status, limit, None if probe is None else probe.gain)
    if probe.gain == math.inf:
        return Check(question, yes, True, None, limit, f"{probe}; how large that is is not known")
    words = f"{probe}; largest fall that is more than noise, in standard deviations of the samples' losses"
    return at_least(question, threshold, probe.gain, limit, yes, no, words)


def probed_harm(status: SeedStatus, limit: float | None) -> Check:
    """Whether the probe found no rise of the loss; asked as ``probed_fall`` is."""
    probe = status.probe
    if probe is None or limit is None:
        return _unprobed("probe_harm", "max_probe_harm", status, limit, None if probe is None else probe.harm)
    words = f"{probe}; largest rise that is more than noise, in standard deviations of the samples' losses"
    return at_most(
        "probe_harm", "max_probe_harm", probe.harm, limit, "blend_harmless", "blend_would_harm", words
    )


def _unprobed(
    question: str, threshold: str, status: SeedStatus, limit: float | None, value: float | None
) -> Check:
    if limit is None:
        return not_asked(question, threshold, value)
    if status.probe_due is not None:
        reason = f"refused by the probe before, probed again in epoch {status.probe_due}; advance() asks at once"
        return Check(question, "probe_not_due", False, None, limit, reason)
    return Check(question, question, None, None, limit, "not asked: the validation loss was not probed")


def modes_agree(known: SeedEvidence, probe: BlendProbe | None, limit: float | None) -> Check:
    """Told, never asked: gradients, in training mode, say one thing and the probe, in evaluation mode, another."""
    t = known.blend_gain_t
    if probe is None or probe.errors is None or t is None or limit is None or not probe.finite:
        return Check("modes", "modes", None, None, None, "not known: needs a probe with its noise and a blend gain")
    change, bound = probe.changes[0], probe.noise(FALL_ERRORS, probe.errors[0])
    if (t >= limit and change > bound) or (t <= -limit and change < -bound):
        reason = (
            f"t of the blend gain {t:.3g} where the seed is trained, but {probe}: batch statistics or Dropout that "
            "differ in evaluation mode, another loss, or what it learned holds for the training samples alone; or "
            f"{RISES}"
        )
        return Check("modes", MODES_DISAGREE, None, t, limit, reason)
    return Check("modes", "modes_agree", True, t, limit, "training and evaluation do not contradict each other")


def refused_by_probe_alone(
    checks: tuple[Check, ...], status: SeedStatus, limit: float | None
) -> tuple[Check, ...]:
    """The same checks; where gradients alone would have let the seed pass, the probe's refusals say so."""
    t = status.known.blend_gain_t
    against = [check for check in checks if check.passed is False]
    by_probe = all(check.question in BY_PROBE for check in against)
    if not against or not by_probe or status.probe is None or limit is None or t is None or t < limit:
        return checks
    words = f"by its gradients alone it would have passed, t of the blend gain {t:.3g}"
    if 0.0 <= min(status.probe.changes) < max(status.probe.changes):
        words += f"; unless {RISES}"
    return tuple(
        dataclasses.replace(check, reason=f"{check.reason}; {words}") if check in against else check for check in checks
    )


def gain_in_words(known: SeedEvidence) -> str:
    if known.blend_gain is None or known.effective_samples is None:
        return "t of the blend gain, which was not measured"
    return f"t of the blend gain {known.blend_gain:.3g} over {known.effective_samples:.0f} effective samples"
