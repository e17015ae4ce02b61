"""GradientMonitor: what the user calls to measure, and to clip by what was measured.

Segment 0 is the host, 1..N the seeds. Measuring writes tensors only and waits for nothing; every
statistic is computed on the host, in evidence.py, when somebody reads (windows.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.copying import DeepCopied
from ..core.errors import ConfigurationError, WiringError
from ..core.evidence import HOST_FLOOR, RATIO_EPS
from . import ops, reference
from .checking import check_lanes
from .clipping import Limit, checked_max_norm, refuse_nonfinite, summary_of_all, sums_for_clipping
from .early import EarlySums
from .flat import FlatGradients, flat_place
from .in_backward import BackwardCollector
from .loss_scale import read_scaler
from .optimizers import each_plain
from .parameters import Gradients, Parameters, Watched
from .rounds import check_every
from .row import (
    EXPLODING_RMS,
    EXTRA,
    REPLACE,
    REPLACE_USABLE,
    UNSCALED,
    VANISHING_RMS,
    Listed,
    LossScale,
    Rules,
    kept_of,
)
from .spread import Ranks
from .step_hook import StepHook
from .windows import Windows

WINDOW = 128


class GradientMonitor(DeepCopied, Windows):
    """Measures the gradients of a host and its seeds, and says what the last samples show.

    Call ``measure()`` (or the monitor itself) once per optimizer step: after backward, before a GradScaler's
    ``unscale_`` (``measure(scaler)``), clipping and the step. Outside ``clip_grad_norm_`` it writes to no gradient, but
    for the zeros of ``quarantine``; it holds none across steps, and otherwise leaves training bit for bit as it was.

    Args:
        host: a module, or parameters. Seeds found inside it are taken out by identity.
        seeds: by name, a module or parameters each.
        window: samples kept.
        alphas: by name, the blend factor of a seed: a 0-dim tensor that requires a gradient, or an object with
            such an attribute ``alpha``. Its gradient is the blend gain; it is set to zero once measured.
        optimizers: what trains the seeds, one or a sequence; without them membership, steps and staleness are unknown.
            Wrappers are looked through (accelerate, Trainer, Lightning, schedule-free, Lookahead, SAM).
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
            is past TRAINING). The sample is dropped and counted. Too late for ``collect_in_backward``. Of a tensor that
            is cut over ranks each zeroes its part if something in that is not finite.
        ranks: the processes that train this model together, each with a monitor like this one, see
            ``parallel.Ranks``. ``measure()`` never communicates; construction, ``read()``, ``add_seed()`` and, where
            parameters are cut, ``clip_grad_norm_()`` do, and are called on every rank. A seed without parameters is
            one that others hold.

    Raises:
        WiringError: no parameters on a side, a parameter in two seeds, or an optimizer that cannot be watched.
        ConfigurationError: impossible window, eps, floor, limit, lanes, flat or tag, or an alpha for an unknown seed.
    """

    def __init__(
        self,
        host: Parameters,
        seeds: Mapping[str, Parameters],
        *,
        window: int = WINDOW,
        alphas: Mapping[str, Any] | None = None,
        optimizers: Any = (),
        eps: float = RATIO_EPS,
        host_floor: float = HOST_FLOOR,
        lanes: torch.dtype = torch.float32,
        vanishing_rms: float | None = VANISHING_RMS,
        exploding_rms: float | None = EXPLODING_RMS,
        flat: FlatGradients | Literal["auto"] | None = None,
        tag: str | None = None,
        quarantine: bool = False,
        ranks: Ranks | None = None,
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
        check_lanes(lanes)
        watched = Watched(host, seeds, alphas or {}, ranks)
        watched.exchange("GradientMonitor()")
        super().__init__(watched, window, eps, host_floor, vanishing_rms, exploding_rms)
        self.lanes, self.tag, self._flat = lanes, tag, flat
        self.max_norm, self._apart, self.quarantine = math.inf, False, quarantine
        self.watch(optimizers)

    def _rules(self) -> Rules:
        """As the ops take them: limits that no tensor, or no finite one, is beyond stand for None."""
        vanishing, exploding = self.vanishing_rms, self.exploding_rms
        return Rules(
            self.max_norm, self.eps, 0.0 if vanishing is None else vanishing,
            math.inf if exploding is None else exploding, self.lanes,
            self._watched.modes(apart=self._apart, guarded=self.quarantine),
        )  # fmt: skip

    def forward(self, *, tag: str | None = None) -> None:
        """``measure(tag=tag)``; so that ``torch.compile(monitor, fullgraph=True)`` works."""
        self.measure(tag=tag)

    def measure(
        self,
        scaler: torch.amp.GradScaler | None = None,
        *,
        gradients: Gradients | None = None,
        tag: str | None = None,
        every: int = 1,
    ) -> None:
        """Measure the gradients that exist now: one sample per optimizer step. Waits for nothing.

        A second call before the step, of micro-batches or hooks that fire twice, replaces the sample of the first.
        Without known optimizers every call is a sample, and so it is after ``rounds.PATIENCE`` calls without a step.

        Of the blend factors the gradient is taken, it is zero afterwards. It goes with the seed's gradients: what
        clears those (zero_grad, both ways) drops it, and what of it came before.

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
            every: measure in the first of so many optimizer steps, and only drop the slopes in the others, in which
                nothing is put in quarantine.

        Raises:
            WiringError: with a scaler: no optimizer is known, or one has already stepped. With ``gradients``: a
                parameter that is not watched. Nothing was measured.
            ConfigurationError: with ``gradients``: no pairs, a parameter that is listed twice, or a gradient of
                another shape; a tag where the monitor has none, or none where it has one; an impossible ``every``.
                Nothing was measured.
        """
        check_every(every)
        counts = _counts(self.tag, tag)
        self._refresh_if_stale()
        given = None if gradients is None else self._watched.check(gradients)
        if not counts:
            self._rounds.note_other(tag)
        if not counts or not self._rounds.due(every):
            if given is None:
                self._discard()
            return
        scale = UNSCALED if scaler is None else read_scaler(scaler, self._progress.steps.optimizers())
        self._measure(scale, given, scaler=scaler)

    def pass_over(self, *, tag: str | None = None, every: int = 1) -> None:
        """Count a call in whose place nothing is measured; ``tag`` and ``every``, and errors, are ``measure``'s."""
        check_every(every)
        if _counts(self.tag, tag):
            self._rounds.pass_over()

    @torch.no_grad()
    def _discard(self) -> None:
        """Forget what a backward pass that does not count has left for this monitor alone."""
        for slope in self._watched.gains_of(None).tensors:
            slope.zero_()
        self._watched.gains_taken(held=False)
        if self._watched.collecting is not None:
            self._watched.collecting.clear()

    def watch(self, *optimizers: Any) -> None:
        """Count the steps of more optimizers: those that train the seeds, if they are not the host's.

        Wrappers are looked through (``optimizers.chain_of``).

        Raises:
            ConfigurationError: something is no optimizer; nothing has changed.
            WiringError: one cannot be watched; nothing has changed.
        """
        steps = self._progress.steps
        for optimizer in each_plain(optimizers):
            if all(optimizer is not known for known in steps.optimizers()):
                steps.watch(optimizer, self._stepped)

    def attach(self, *optimizers: Any, scaler: torch.amp.GradScaler | None = None) -> StepHook:
        """Measure by a hook inside the step: no line in the loop, and one sample per round of steps.

        Of several optimizers, each one's gradients are summed as they are before its own step: between the steps they
        may be cleared, clipped or unscaled, and a step may overwrite them. The last one closes the sample; what no
        step of the round has used is measured then. A round in which the last one does not step, or a scaler skips
        it, is no sample.

        Args:
            optimizers: in the order in which they step.
            scaler: the GradScaler in use, if any. Of each optimizer it is looked up whether its gradients are unscaled;
                those of a parameter in no optimizer never are.

        Returns:
            A handle; ``handle.remove()`` ends it.

        Raises:
            ConfigurationError: no optimizer, or the monitor has a tag, which a hook cannot know.
            WiringError: one cannot be watched. Later, in ``step(closure)``: the gradients do not exist yet when the
                hook runs.
        """
        found = each_plain(optimizers)
        if not found:
            raise ConfigurationError("attach() needs the optimizers, in the order in which they step")
        if self.tag is not None:
            raise ConfigurationError(
                f"a hook in step() cannot know the loss, and this monitor measures {self.tag!r} alone: call "
                "measure(tag=...), or leave the tag out when these optimizers step for that loss only"
            )
        self.watch(found)
        return StepHook(self, found, scaler, self._progress.steps.optimizers)

    def collect_in_backward(self) -> BackwardCollector:
        """Take the sums while backward runs, for optimizers that step inside it and free each gradient.

        Call it before registering the hooks that clip, step and free: of what they free or write to, ``measure()``
        after backward takes the sum from before. When they ran several times since the last sample, it is that of the
        newest gradient. A gradient that backward has left alone is measured where it lies, as without collecting, so
        accumulation, ``unscale_``, ``measure(scaler)``, ``attach(...)`` and dropped batches are right. Not under DDP,
        where a gradient is complete only after backward: these would be the sums of one process alone.

        Frozen parameters have the hook too, and take part once they are thawed.

        Returns:
            A handle; ``handle.remove()`` ends it.

        Raises:
            WiringError: a parameter is no leaf, or there are ranks. Later, in backward: a hook that was registered
                before has freed the gradient; in ``clip_grad_norm_``: there is nothing left to clip.
        """
        if self._watched.ranks is not None:
            raise WiringError(
                "between ranks a gradient is complete only after backward: call measure() there, without "
                "collect_in_backward()"
            )
        return self._watched.collect_in_backward(self.lanes)

    def _take(self, parameters: Iterable[Tensor] | None, scale: LossScale, early: EarlySums) -> None:
        """Sum the gradients of these parameters (None: of all) as they are now, for a sample that is closed later."""
        self._refresh_if_stale()
        if self._watched.collecting is not None:
            self._watched.collecting.take(early, scale.gains)
        wanted = self._watched.tracked if parameters is None else parameters
        early.take(wanted, self._watched, self._rules(), scale)

    def _measure(
        self,
        scale: LossScale,
        given: dict[int, Tensor] | None = None,
        early: EarlySums | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """One sample: of the gradients that were given, or of those that exist, or of the sums taken of all of them."""
        self._refresh_if_stale()
        if not torch.compiler.is_compiling():
            self._progress.steps.calls += 1
        if given is None and isinstance(self._flat, FlatGradients):
            self._flat.restore()
        replace = self._rounds.enter(scaler)
        if replace == REPLACE_USABLE and self._watched.ranks is not None:
            replace = REPLACE  # what one rank holds may be finite where another's is not, and they have to count alike
        if replace:
            self._correct_gains(anew=given is not None)
        collecting = self._watched.collecting
        if given is None and early is None and collecting is not None and collecting.used_up():
            self._take(None, scale, early := EarlySums())
        gains = self._watched.gains_of(given)
        if early:
            if early.device != self.ring.device:
                self.to(early.device)
            sums, listed, owners = early.listed(self._watched, self.ring.device)
            window, entries = self._window(replace), self._watched.entries_of(owners)
            ops.record_sums_(sums, listed, gains, window, self._rules(), scale._replace(gradients=None), entries)
            self._measured.forget()
        else:
            self._measure_gradients(given, gains, replace, scale)
        if replace:
            self._include_replaced()
        if given is None:
            self._watched.gains_taken(held=not torch.compiler.is_compiling() and self._rounds.open)

    def _measure_gradients(
        self, given: dict[int, Tensor] | None, gains: Listed, replace: int, scale: LossScale
    ) -> None:
        gradients = self._watched.gradients_of(given)
        tensors = gradients.tensors
        if not tensors and given is None and not torch.compiler.is_compiling():
            self._watched.warn_of_nothing()
        if tensors and tensors[0].device != self.ring.device:
            self.to(tensors[0].device)
        names = partial(self._watched.name_of_gradient, given)
        flat = flat_place(self._flat, tensors, self._watched.segment_by_id) if given is None else None
        ops.record_(gradients, gains, self._window(replace), self._rules(), scale, flat=flat, names=names)
        self._measured.remember(tensors, scaled=scale.gradients is not None)

    @torch.no_grad()
    def _correct_gains(self, *, anew: bool) -> None:
        """Drop from the newest row what belongs to gradients that were cleared; ``anew``: what is given is all."""
        newest = (self.count - 1).remainder(self.window).view(1)
        for segment, alpha in self._watched.gains:
            correction = 0.0 if anew else alpha.correction
            if correction is not None:
                row = self.ring.index_select(0, newest)
                # Filled, because a number that is copied to a GPU waits for it; NaN: there is none.
                kept = correction.to(row.device) if isinstance(correction, Tensor) else row.new_full((), correction)
                row[:, segment, EXTRA] = row[:, segment, EXTRA].masked_fill(kept == 0, math.nan)
                self.ring.index_copy_(0, newest, row)

    def clip_grad_norm_(
        self, max_norm: Limit, error_if_nonfinite: bool = False, *, apart: bool = False, reuse: bool = True
    ) -> Tensor:
        """Scale all gradients so that their total norm is at most ``max_norm``, as torch's function does.

        Uses the pass of a ``measure()`` after the last optimizer step; where there was none, and the first time of all,
        it makes its own.
        ``coefficient = min(1, max_norm / (norm + 1e-6))``; NaN propagates. At a coefficient of exactly 1 no gradient is
        written (on a GPU with Triton, and on a CPU).

        Args:
            max_norm: the limit, above 0; a tensor of one element is read, which waits for its device.
            error_if_nonfinite: raise when the norm is NaN or infinite; the only option that waits for the device.
            apart: clip the host by its own norm and every seed by its own, with the same limit, in the same launch;
                a seed whose slot is past TRAINING counts with the host. Clipped together, a seed takes from the
                host's step.
            reuse: False: make a pass in any case. Whether gradients are still what was measured is seen by torch's
                version counters, and a write through ``grad.data``, by a kernel of one's own, by ``unscale_`` on a CPU
                or inside of a CUDA graph counts in none: pass False if there is one between ``measure()`` and clipping.

        Returns:
            The norm before clipping, the host's where seeds are apart: float32, 0-dim, on the device.

        Raises:
            ConfigurationError: ``max_norm`` is not above 0.
            WiringError: optimizers that step in backward have used all gradients up; see ``collect_in_backward``.
            RuntimeError: that norm is not finite, when that was asked for; nothing was scaled.
        """
        max_norm = checked_max_norm(max_norm)
        self._refresh_if_stale()
        gradients, known = self._watched.gradients_of(None), self._rules()
        if self._watched.collecting is not None:
            self._watched.collecting.refuse_clipping(gradients.tensors)
        measured = reuse and self._measured.are(gradients.tensors)
        self.max_norm, self._apart = max_norm, apart
        rules = self._rules()
        ranks = self._watched.ranks
        # A measurement that did not know this limit has the sums; the next one has the coefficients in its own pass.
        summary = self.summary
        if ranks is not None and not self._watched.holding.replicated:
            sums = sums_for_clipping(gradients, self._window(), rules, measured=measured)
            summary = summary_of_all(sums, self._watched, ranks, rules)
        elif not measured or rules != known:
            sums = sums_for_clipping(gradients, self._window(), rules, measured=measured)
            summary = reference.summarize(sums, rules)
        if error_if_nonfinite:
            refuse_nonfinite(summary)
        if self.quarantine and not measured:
            self._watched.keep_gains(kept_of(summary))
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
