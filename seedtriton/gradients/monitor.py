"""GradientMonitor: what the user calls to measure, and to clip by what was measured.

Segment 0 is the host, 1..N the seeds. Measuring writes tensors only and waits for nothing; every
statistic is computed on the host, in evidence.py, when somebody reads (windows.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.errors import ConfigurationError
from ..core.evidence import HOST_FLOOR, RATIO_EPS
from . import ops
from .clipping import check_max_norm, refuse_nonfinite, summary_of
from .flat import FlatGradients, flat_place
from .in_backward import BackwardCollector
from .loss_scale import read_scaler
from .parameters import Gradients, Parameters, Watched
from .row import EXPLODING_RMS, UNSCALED, VANISHING_RMS, LossScale, Rules
from .step_hook import StepHook
from .windows import Windows

WINDOW = 128


class GradientMonitor(Windows):
    """Measures the gradients of a host and its seeds, and says what the last samples show.

    Call ``measure()`` (or the monitor itself) once per optimizer step: after backward and unscaling, before
    clipping and the step. It never writes to a gradient outside ``clip_grad_norm_``, holds none
    across steps, and leaves training bit for bit as it was.

    Args:
        host: a module, or parameters. Seeds found inside it are taken out by identity.
        seeds: by name, a module or parameters each.
        window: samples kept.
        alphas: by name, the blend factor of a seed: a 0-dim tensor that requires a gradient, or an object with
            such an attribute ``alpha``. Its gradient is the blend gain; it is set to zero once measured.
        optimizers: what trains the seeds; without them membership, steps and staleness are unknown.
        eps: added to the host's norm in the ratio.
        host_floor: host norm below which the ratio is undefined.
        lanes: dtype in which squares are first summed; see ``ops.segmented_sumsq``.
        vanishing_rms: a gradient tensor is vanishing when its root mean square, norm / sqrt(elements), is not 0 and
            below this; None: not counted. The loss scale is divided out, the scale of the loss is not.
        exploding_rms: and exploding when it is above this or not finite; None: not counted.
        flat: a ``FlatGradients``, which keeps the gradients in one buffer: they are put back into it before each
            measurement, and on a GPU neither checked one by one nor uploaded. "auto": somebody else may keep them
            so, as DDP does with ``gradient_as_bucket_view=True``; see ``flat.flat_place`` for what that costs.
        tag: the loss whose gradients count, in a loop with several backward passes per step (GAN, RL). Only
            ``measure(tag=...)`` with this very tag makes a sample; any other tag makes none, and a call without
            one is an error. One monitor per loss: an average of two losses' ratios means nothing.
        quarantine: ``measure()`` writes zeros over the gradients of a seed if one of them is not finite, without
            waiting, before a GradScaler, clipping or an optimizer sees them; not once the host feels the seed (its slot
            is past TRAINING). The sample is dropped and counted. Too late for ``collect_in_backward``.

    Raises:
        WiringError: no parameters on a side, or a parameter in two seeds.
        ConfigurationError: an impossible window, eps, floor, limit, flat or tag, or an alpha for an unknown seed.
    """

    def __init__(
        self,
        host: Parameters,
        seeds: Mapping[str, Parameters],
        *,
        window: int = WINDOW,
        alphas: Mapping[str, Any] | None = None,
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
        eps: float = RATIO_EPS,
        host_floor: float = HOST_FLOOR,
        lanes: torch.dtype = torch.float32,
        vanishing_rms: float | None = VANISHING_RMS,
        exploding_rms: float | None = EXPLODING_RMS,
        flat: FlatGradients | Literal["auto"] | None = None,
        tag: str | None = None,
        quarantine: bool = False,
    ) -> None:
        """Look the parameters up and lay out an empty ring on their device."""
        if type(window) is not int or window < 1:
            raise ConfigurationError(f"window must be a whole number of at least 1, got {window!r}")
        for name, value in (("eps", eps), ("host_floor", host_floor)):
            if not 0.0 < value < math.inf:
                raise ConfigurationError(f"{name} must be finite and above 0, got {value!r}")
        if not (flat is None or flat == "auto" or isinstance(flat, FlatGradients)):
            raise ConfigurationError(f'flat must be a FlatGradients, "auto" or None, got {flat!r}')
        if not (tag is None or isinstance(tag, str)):
            raise ConfigurationError(f"tag must be a string or None, got {tag!r}")
        _check_rms(vanishing_rms, exploding_rms)
        super().__init__(Watched(host, seeds, alphas or {}), window, eps, host_floor, vanishing_rms, exploding_rms)
        self.lanes, self.tag, self._flat = lanes, tag, flat
        self.max_norm, self._apart, self.quarantine = math.inf, False, quarantine
        self.watch(*([optimizers] if isinstance(optimizers, torch.optim.Optimizer) else optimizers))

    def _rules(self) -> Rules:
        """As the ops take them: limits that no tensor, or no finite one, is beyond stand for None."""
        vanishing, exploding = self.vanishing_rms, self.exploding_rms
        return Rules(
            self.max_norm, self.eps, 0.0 if vanishing is None else vanishing,
            math.inf if exploding is None else exploding, self.lanes,
            self._watched.modes(apart=self._apart, guarded=self.quarantine),
        )  # fmt: skip

    def forward(self, *, tag: str | None = None) -> None:
        """Measure; so that ``torch.compile(monitor, fullgraph=True)`` works."""
        self.measure(tag=tag)

    def measure(
        self,
        scaler: torch.amp.GradScaler | None = None,
        *,
        gradients: Gradients | None = None,
        tag: str | None = None,
    ) -> None:
        """Measure the gradients that exist now, as one sample. Waits for nothing, changes no gradient.

        Of the blend factors the gradient is taken: it is zero afterwards, so that the next backward pass
        starts afresh.

        Args:
            scaler: the GradScaler in use, if any. Before ``unscale_`` the sums are divided by its scale on the
                device; after it, a step that the scaler will skip is dropped from the window. The scaler
                itself is never touched.
            gradients: for loops that call ``torch.autograd.grad``: pairs ``zip(parameters, grads)``, or a dict by
                parameter. They are measured in place of ``p.grad``, which is then neither read nor written.
                Parameters that are not listed, or whose gradient is None, have no gradient. A blend factor may be
                among them. With a scaler, they are scaled as ``p.grad`` is at this moment.
            tag: the loss that these gradients are of; see the constructor. A call with another tag than the
                monitor's makes no sample, and discards what backward left for the blend factors, so that it is
                not added to theirs from the loss that counts: give each blend factor to one monitor only.

        Raises:
            WiringError: with a scaler: no optimizer is known, or one has already stepped. With ``gradients``: a
                parameter that is not watched. Nothing was measured.
            ConfigurationError: with ``gradients``: no pairs, a parameter that is listed twice, or a gradient of
                another shape; a tag where the monitor has none, or none where it has one. Nothing was measured.
        """
        counts = _counts(self.tag, tag)
        self._refresh_if_stale()
        given = None if gradients is None else self._watched.check(gradients)
        if not counts:
            if given is None:
                self._discard()
            return
        scale = UNSCALED if scaler is None else read_scaler(scaler, self._progress.steps.optimizers())
        self._measure(scale, given)

    @torch.no_grad()
    def _discard(self) -> None:
        """Forget what a backward pass that does not count has left for this monitor alone."""
        for slope in self._watched.gains_of(None).tensors:
            slope.zero_()
        if self._watched.collecting is not None:
            self._watched.collecting.take(self.ring.device)

    def watch(self, *optimizers: torch.optim.Optimizer) -> None:
        """Count the steps of more optimizers: those that train the seeds, if they are not the host's."""
        steps = self._progress.steps
        for optimizer in optimizers:
            if all(optimizer is not known for known in steps.optimizers()):
                steps.watch(optimizer, self._mark_stepped)

    def attach(self, *optimizers: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None) -> StepHook:
        """Measure by a hook inside the step, once per step: no line in the loop.

        Args:
            optimizers: in the order in which they step.
            scaler: the GradScaler in use, if any.

        Returns:
            A handle; ``handle.remove()`` ends it.

        Raises:
            ConfigurationError: no optimizer, or the monitor has a tag, which a hook cannot know.
            WiringError: later, in ``step(closure)``: the gradients do not exist yet when the hook runs.
        """
        if not optimizers:
            raise ConfigurationError("attach() needs the optimizers, in the order in which they step")
        if self.tag is not None:
            raise ConfigurationError(
                f"a hook in step() cannot know the loss, and this monitor measures {self.tag!r} alone: call "
                "measure(tag=...), or leave the tag out when these optimizers step for that loss only"
            )
        self.watch(*optimizers)
        return StepHook(self._measure, optimizers, scaler)

    def collect_in_backward(self) -> BackwardCollector:
        """Take the sums while backward runs, for optimizers that step inside it and free each gradient.

        Call it before registering the hooks that step. ``measure()`` after backward then closes the sample; it
        looks at no gradient any more. Not for accumulation over several backward passes: squares of partial
        gradients would be added. Nor under DDP, where a gradient is complete only after backward: these would be
        the sums of one process alone.

        Returns:
            A handle; ``handle.remove()`` ends it.
        """
        return self._watched.collect_in_backward(self.lanes)

    def _measure(self, scale: LossScale, given: dict[int, Tensor] | None = None) -> None:
        self._refresh_if_stale()
        if given is None and isinstance(self._flat, FlatGradients):
            self._flat.restore()
        gains = self._watched.gains_of(given)
        collecting = self._watched.collecting
        if given is None and collecting is not None:
            sums, listed, owners = collecting.take(self.ring.device)
            entries = self._watched.entries_of(owners)
            ops.record_sums_(sums, listed, gains, self._window(), self._rules(), scale, entries)
            return
        gradients = self._watched.gradients_of(given)
        tensors = gradients.tensors
        if not tensors and given is None and not torch.compiler.is_compiling():
            self._watched.warn_of_nothing()
        if tensors and tensors[0].device != self.ring.device:
            self.to(tensors[0].device)
        rules, names = self._rules(), partial(self._watched.name_of_gradient, given)
        flat = flat_place(self._flat, tensors, self._watched.segment_by_id) if given is None else None
        ops.record_(gradients, gains, self._window(), rules, scale, flat=flat, names=names)
        self._measured.remember(tensors)

    def clip_grad_norm_(
        self, max_norm: float, error_if_nonfinite: bool = False, *, apart: bool = False
    ) -> Tensor:
        """Scale all gradients so that their total norm is at most ``max_norm``, as torch's function does.

        Uses the pass of a ``measure()`` after the last optimizer step, and makes its own when there was none.
        ``coefficient = min(1, max_norm / (norm + 1e-6))``; NaN propagates. At a coefficient of exactly 1 no gradient is
        written (on a GPU with Triton, and on a CPU).

        Args:
            max_norm: the limit, above 0.
            error_if_nonfinite: raise when the norm is NaN or infinite; the only option that waits for the device.
            apart: clip the host by its own norm and every seed by its own, with the same limit, in the same launch;
                a seed whose slot is past TRAINING counts with the host. Clipped together, a seed takes from the
                host's step.

        Returns:
            The norm before clipping, the host's where seeds are apart: float32, 0-dim, on the device.

        Raises:
            ConfigurationError: ``max_norm`` is not above 0.
            RuntimeError: that norm is not finite, when that was asked for; nothing was scaled.
        """
        check_max_norm(max_norm)
        self._refresh_if_stale()
        gradients, known = self._watched.gradients_of(None), self._rules()
        measured = self._measured.are(gradients.tensors)
        self.max_norm, self._apart = max_norm, apart
        rules = self._rules()
        # A measurement that did not know this limit has the sums; the next one has the coefficients in its own pass.
        summary = self.summary
        if not measured or rules != known:
            summary = summary_of(gradients, self._window(), rules, measured=measured)
        if error_if_nonfinite:
            refuse_nonfinite(summary)
        total = ops.clip_(gradients, summary, partial(self._watched.name_of_gradient, None))
        self._mark_stepped()
        return total

def _check_rms(vanishing: float | None, exploding: float | None) -> None:
    for name, value in (("vanishing_rms", vanishing), ("exploding_rms", exploding)):
        if value is not None and not 0.0 < value < math.inf:
            raise ConfigurationError(f"{name} must be finite and above 0, or None (not counted), got {value!r}")
    if vanishing is not None and exploding is not None and vanishing > exploding:
        raise ConfigurationError(
            f"vanishing_rms {vanishing!r} is above exploding_rms {exploding!r}: a gradient would be both"
        )


def _counts(own: str | None, tag: str | None) -> bool:
    """Whether a call with this tag makes a sample of a monitor with its ``own``; ConfigurationError if none may."""
    if own is None and tag is not None:
        raise ConfigurationError(
            f"measure(tag={tag!r}), but this monitor measures every call: give each loss a monitor of its own, "
            f"GradientMonitor(..., tag={tag!r})"
        )
    if own is not None and tag is None:
        raise ConfigurationError(
            f"this monitor measures the loss {own!r} alone: say which loss it is now, measure(tag=...)"
        )
    return tag == own
