"""What is known of one seed: the statistics of its window and the formulas of its ratio, in plain Python.

The one place where these are defined. Nothing here measures and nothing decides: the monitor hands in
samples, the gates ask for ``SeedEvidence``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from .errors import ConfigurationError
from .probe import BlendProbe as BlendProbe  # the first version had it here, and users import it from here
from .series import plateau_share, root_mean, t_statistic
from .state import PlainState

RATIO_EPS = 1e-8
# Below this the eps above is more than 1 % of the host's norm, and the ratio says nothing of the seed.
HOST_FLOOR = 1e-6
# Samples behind the t statistic of the blend gain. Older ones belong to another seed: on 44 runs the
# last 100 separated learning from not learning, the whole run did so less well.
GAIN_SAMPLES = 100
# Samples behind the t statistic that watches a seed once it is felt: one that goes wrong has to be seen before the good
# gains have left the longer window.
RECENT_SAMPLES = 32
# Measurements without a step after which an optimizer has stopped: more than one step usually has micro-batches.
IDLE_LIMIT = 32
# What a share of 1 takes from the health of a seed's gradients. Together they go below 0: all of one is bad enough.
VANISHING_WEIGHT = 0.5
EXPLODING_WEIGHT = 0.8

# What the ratio is worth. Each is a different answer, and only the first is a number.
MEASURED = "measured"
NEVER_MEASURED = "never_measured"
NO_GRADIENT = "no_gradient"
NOT_FINITE = "not_finite"
HOST_UNDEFINED = "host_undefined"
STATUSES = (MEASURED, NEVER_MEASURED, NO_GRADIENT, NOT_FINITE, HOST_UNDEFINED)


class Sample(NamedTuple):
    """One measurement of the host and one seed, after one backward pass.

    Attributes:
        host_sumsq: sum of squares of the host's gradients.
        seed_sumsq: the same of the seed's.
        host_tensors: gradient tensors of the host.
        seed_tensors: those of the seed.
        host_elements: elements of the host's.
        seed_elements: elements of the seed's.
        live_tensors: gradient tensors of the seed that are not all zero; of one that is cut, the share of parts.
        gain: blend gain -<dL/dout, seed - host>; NaN: not measured.
        skipped: the optimizer will skip this step (loss-scale overflow).
        seed_vanishing: gradient tensors of the seed below the RMS limit, not zero; None: not counted.
        seed_exploding: above the other limit, or not finite; None: not counted.
    """

    host_sumsq: float
    seed_sumsq: float
    host_tensors: float
    seed_tensors: float
    host_elements: float
    seed_elements: float
    live_tensors: float
    gain: float
    skipped: bool
    seed_vanishing: float | None = None
    seed_exploding: float | None = None

    @property
    def empty(self) -> bool:
        """No parameter of either side had a gradient: nothing was there to measure."""
        return self.host_tensors == 0 and self.seed_tensors == 0

    @property
    def usable(self) -> bool:
        """Both sides finite and the step taken: only then is it averaged in."""
        return math.isfinite(self.host_sumsq) and math.isfinite(self.seed_sumsq) and not self.skipped

    @property
    def spoilt_by_seed(self) -> bool:
        """The seed alone was not finite, and nobody skips the step for it."""
        return math.isfinite(self.host_sumsq) and not math.isfinite(self.seed_sumsq) and not self.skipped


def gradient_ratio(seed_norm: float, host_norm: float, eps: float = RATIO_EPS) -> float:
    """``seed_norm / (host_norm + eps)``, the formula of the original gate.

    Raises:
        ConfigurationError: a norm is negative, NaN or infinite, or there is nothing to divide by.
    """
    for name, norm in (("seed_norm", seed_norm), ("host_norm", host_norm)):
        if not 0.0 <= norm < math.inf:
            raise ConfigurationError(f"{name} must be finite and at least 0, got {norm}")
    if not host_norm + eps > 0.0:
        raise ConfigurationError(f"the host's norm and eps are both 0 (eps {eps}): the ratio has no value")
    return seed_norm / (host_norm + eps)


def rms_ratio(ratio: float, host_elements: float, seed_elements: float) -> float:
    """The ratio of root mean squares: ``ratio * sqrt(host_elements / seed_elements)``.

    Sizes divide the finished ratio, not the norms before eps is added: eps on a per-element intensity
    halves the ratio of a model of 10 000 parameters at norms of 1e-6.

    Raises:
        ConfigurationError: no elements on a side.
    """
    if host_elements <= 0 or seed_elements <= 0:
        raise ConfigurationError(
            f"the RMS ratio needs elements on both sides, got host {host_elements}, seed {seed_elements}"
        )
    return ratio * math.sqrt(host_elements / seed_elements)


def gradient_health(vanishing: float, exploding: float) -> float:
    """``1 - 0.5 * vanishing - 0.8 * exploding`` in [0, 1], of shares of the gradient tensors.

    Raises:
        ConfigurationError: a share outside [0, 1].
    """
    for name, share in (("vanishing", vanishing), ("exploding", exploding)):
        if not 0.0 <= share <= 1.0:
            raise ConfigurationError(f"the share of {name} gradients must lie in [0, 1], got {share}")
    return max(0.0, 1.0 - VANISHING_WEIGHT * vanishing - EXPLODING_WEIGHT * exploding)


def clipped_share(samples: Sequence[Sample]) -> float | None:
    """The larger ``plateau_share()`` of seed and host: near 1 when somebody clips each by its own norm.

    Clipping both by their common norm leaves the ratio as it is and must not count. It makes a plateau of the common
    norm, and of the host's as well when the seed's is less than about 1 % of it; never of both. So where the common
    norm lies on a plateau, both sides have to.
    """
    seed = plateau_share([sample.seed_sumsq for sample in samples])
    host = plateau_share([sample.host_sumsq for sample in samples])
    common = plateau_share([sample.host_sumsq + sample.seed_sumsq for sample in samples])
    if seed is None or host is None or common is None:
        return None
    return max(seed, host) if common < max(seed, host) else min(seed, host)


@dataclass(frozen=True, kw_only=True)
class SeedEvidence(PlainState):
    """What the window says of one seed. A number that could not be had is None, and ``reason`` says why.

    Attributes:
        seed: its name.
        status: what the ratio is worth: "measured", "never_measured", "no_gradient", "not_finite" or
            "host_undefined".
        reason: the same in words, with numbers.
        ratio: seed norm / (host norm + eps) over the window.
        rms_ratio: the same for root mean squares per element.
        seed_norm: root of the mean sum of squares over the window.
        host_norm: the same for the host.
        samples: measurements averaged.
        dropped: measurements left out because a side was not finite or the step was skipped.
        seed_not_finite: those of them in which the seed's gradients were not finite, the host's were, and the step was
            not skipped.
        empty: measurements at which no parameter at all had a gradient.
        age: optimizer steps since the last read that found a new sample; None without an optimizer.
        blend_gain: mean over the last ``GAIN_SAMPLES`` of -<dL/dout, seed - host>, the first-order
            decrease of the loss per unit of blending.
        blend_gain_t: its t statistic, corrected for autocorrelation.
        recent_gain_t: the same over the last ``RECENT_SAMPLES`` alone.
        effective_samples: how many independent samples those gains are worth.
        displacement: |w - w0| / |w0| of the seed's parameters since the window began.
        live_share: share of the seed's parameters (by tensor) with a gradient that is not all zero.
        vanishing_share: share of the seed's gradient tensors whose root mean square is below the monitor's
            ``vanishing_rms`` without being zero.
        exploding_share: share of those above ``exploding_rms``. What is not finite drops the whole sample.
        health: 1 when every gradient tensor is neither silent, vanishing nor exploding; see ``gradient_health``.
            All-zero tensors count as vanishing here, so a dead seed is not a healthy one.
        in_optimizer: every parameter of the seed that requires a gradient is in an optimizer.
        optimizer_steps: steps of that optimizer since the window began; those that a GradScaler skipped do not count.
        idle: measurements since that optimizer last stepped.
        frozen: no parameter of the seed requires a gradient, or it is an adapter that is not active.
        plateau_share: share of the samples whose norm, the seed's or the host's, lies at the top of the window: near
            1 when somebody clips host and seed apart before they are measured. See ``clipped_share()`` and
            ``plateau_share()``, also for what they cannot see. None for fewer than 8 samples.

    Raises:
        ConfigurationError: a status that is none, or a count below 0.
    """

    seed: str
    status: str = NEVER_MEASURED
    reason: str = ""
    ratio: float | None = None
    rms_ratio: float | None = None
    seed_norm: float | None = None
    host_norm: float | None = None
    samples: int = 0
    dropped: int = 0
    seed_not_finite: int = 0
    empty: int = 0
    age: int | None = None
    blend_gain: float | None = None
    blend_gain_t: float | None = None
    effective_samples: float | None = None
    displacement: float | None = None
    live_share: float | None = None
    vanishing_share: float | None = None
    exploding_share: float | None = None
    health: float | None = None
    in_optimizer: bool | None = None
    optimizer_steps: int | None = None
    plateau_share: float | None = None
    idle: int | None = None
    frozen: bool = False
    recent_gain_t: float | None = None

    LATER: ClassVar[Mapping[str, Any]] = MappingProxyType({"idle": None, "frozen": False, "recent_gain_t": None})

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ConfigurationError(f"unknown status {self.status!r}; known: {STATUSES}")
        for name in ("samples", "dropped", "seed_not_finite", "empty"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"{name} must be at least 0, got {getattr(self, name)}")

    def __repr__(self) -> str:
        """What is known in one line: the reason, the numbers that decide, and whether it is in an optimizer."""
        parts = [f"{self.status}: {self.reason}" if self.reason else self.status]
        if self.blend_gain_t is not None:
            parts.append(f"t of the blend gain {self.blend_gain_t:.3g}")
        if self.displacement is not None:
            parts.append(f"displacement {self.displacement:.3g}")
        if self.in_optimizer is False:
            parts.append("in no optimizer")
        return f"SeedEvidence({self.seed!r}, {self.samples} samples, {'; '.join(parts)})"

    @property
    def dropped_share(self) -> float:
        """Share of the measurements that were dropped; 0.0 when there are none."""
        seen = self.samples + self.dropped
        return self.dropped / seen if seen else 0.0


def collect_evidence(
    seed: str,
    samples: Sequence[Sample],
    *,
    parameters: int,
    eps: float = RATIO_EPS,
    host_floor: float = HOST_FLOOR,
    age: int | None = None,
    displacement: float | None = None,
    in_optimizer: bool | None = None,
    optimizer_steps: int | None = None,
    idle: int | None = None,
    frozen: bool = False,
) -> SeedEvidence:
    """The statistics of one seed's window, oldest sample first.

    Args:
        seed: its name.
        samples: the window, none older than the seed's entry into its stage.
        parameters: parameters (tensors) of the seed, for the share that is live.
        eps: added to the host's norm.
        host_floor: a host norm below this leaves the ratio undefined.
        age: passed on, as are displacement, in_optimizer, optimizer_steps, idle and frozen.
        displacement: see ``SeedEvidence``.
        in_optimizer: see ``SeedEvidence``.
        optimizer_steps: see ``SeedEvidence``.
        idle: see ``SeedEvidence``.
        frozen: see ``SeedEvidence``.
    """
    used = [sample for sample in samples if not sample.empty and sample.usable]
    empty = sum(sample.empty for sample in samples)
    dropped = len(samples) - len(used) - empty
    window = _window_ratio(used, dropped, empty, eps, host_floor, frozen)
    gains = [sample.gain for sample in used if math.isfinite(sample.gain)][-GAIN_SAMPLES:]
    gain_t, effective = t_statistic(gains) if gains else (None, None)
    vanishing, exploding, health = _judge_tensors(used)
    live = sum(min(sample.live_tensors, parameters) for sample in used)
    return SeedEvidence(
        seed=seed,
        **window._asdict(),
        samples=len(used),
        dropped=dropped,
        seed_not_finite=sum(sample.spoilt_by_seed for sample in samples),
        empty=empty,
        age=age,
        blend_gain=sum(gain / len(gains) for gain in gains) if gains else None,
        blend_gain_t=gain_t,
        effective_samples=effective,
        displacement=displacement,
        live_share=live / (len(used) * parameters) if used and parameters else None,
        vanishing_share=vanishing,
        exploding_share=exploding,
        health=health,
        in_optimizer=in_optimizer,
        optimizer_steps=optimizer_steps,
        plateau_share=clipped_share(used),
        idle=idle,
        frozen=frozen,
        recent_gain_t=t_statistic(gains[-RECENT_SAMPLES:])[0],
    )


class _WindowRatio(NamedTuple):
    """The fields of ``SeedEvidence`` that say what the ratio is, or why there is none."""

    status: str
    reason: str
    ratio: float | None
    rms_ratio: float | None
    seed_norm: float | None
    host_norm: float | None


def _window_ratio(
    used: Sequence[Sample], dropped: int, empty: int, eps: float, host_floor: float, frozen: bool
) -> _WindowRatio:
    seed_norm = root_mean([sample.seed_sumsq for sample in used]) if used else None
    host_norm = root_mean([sample.host_sumsq for sample in used]) if used else None
    seed_elements = sum(sample.seed_elements for sample in used)
    host_elements = sum(sample.host_elements for sample in used)
    status, reason = _judge_window(used, dropped, empty, seed_norm, host_norm, host_floor, frozen)
    ratio = rms = None
    if status == MEASURED and seed_norm is not None and host_norm is not None:
        ratio = gradient_ratio(seed_norm, host_norm, eps)
        rms = rms_ratio(ratio, host_elements, seed_elements) if seed_elements and host_elements else None
        reason = f"ratio {ratio:.3g} = seed {seed_norm:.3g} / host {host_norm:.3g}, {len(used)} samples"
        if dropped:
            reason += f", {dropped} dropped"
    return _WindowRatio(status, reason, ratio, rms, seed_norm, host_norm)


def _judge_tensors(used: Sequence[Sample]) -> tuple[float | None, float | None, float | None]:
    """Shares of vanishing and exploding tensors over the window, and the health; None is what nobody counted."""
    tensors = sum(sample.seed_tensors for sample in used)
    if not tensors:
        return None, None, None
    vanishing = _total([sample.seed_vanishing for sample in used])
    exploding = _total([sample.seed_exploding for sample in used])
    health = None
    if vanishing is not None and exploding is not None:
        silent = sum(max(0, sample.seed_tensors - sample.live_tensors) for sample in used)
        health = gradient_health((vanishing + silent) / tensors, exploding / tensors)
    return (
        None if vanishing is None else vanishing / tensors,
        None if exploding is None else exploding / tensors,
        health,
    )


def _total(counts: Sequence[float | None]) -> float | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _judge_window(
    used: Sequence[Sample],
    dropped: int,
    empty: int,
    seed_norm: float | None,
    host_norm: float | None,
    host_floor: float,
    frozen: bool,
) -> tuple[str, str]:
    """Which of the five answers the window gives, and why."""
    if not used and dropped:
        return NOT_FINITE, (
            f"all {dropped} measurements were dropped: a gradient was not finite, or the step was skipped"
        )
    if not used and empty:
        return NO_GRADIENT, (
            f"no parameter had a gradient in any of {empty} measurements: "
            "measure after backward() and before zero_grad()"
        )
    if not used or seed_norm is None or host_norm is None:
        return NEVER_MEASURED, "no measurement: call measure() after backward() and before optimizer.step()"
    if not any(sample.seed_tensors for sample in used):
        why = "it is frozen, no parameter requires one" if frozen else "is it part of the forward pass?"
        return NO_GRADIENT, f"no parameter of the seed had a gradient in {len(used)} samples: {why}"
    if host_norm < host_floor:
        return HOST_UNDEFINED, (
            f"the host's gradient norm {host_norm:.3g} is below its floor {host_floor:.3g} (a frozen host?): "
            "the ratio is undefined, use a criterion without the host"
        )
    return MEASURED, ""
