"""GradientMonitor: one row of the ring per measurement, one copy to the host per read.

Segment 0 is the host, 1..N the seeds. Measuring writes tensors only and waits for nothing; every
statistic is computed on the host, in evidence.py, when somebody reads.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..core.errors import ConfigurationError, StateDictError, WiringError
from ..core.evidence import HOST_FLOOR, NEVER_MEASURED, RATIO_EPS, Sample, SeedEvidence, collect_evidence
from ..core.state import check_state
from . import ops, reference
from .flat import FlatGradients, flat_buffer_of
from .in_backward import BackwardCollector
from .loss_scale import LossScale, read_scaler
from .parameters import Alpha, CallOnLoad, Parameters, ParameterSource
from .progress import Mark, StepCounter
from .reference import EXPLODING_RMS, VANISHING_RMS
from .step_hook import StepHook

logger = logging.getLogger("seedtriton")

WINDOW = 128
# A parameter and its gradient; None: autograd.grad(allow_unused=True) found none.
Gradients = Mapping[Tensor, Tensor | None] | Iterable[tuple[Tensor, Tensor | None]]
_version_of = attrgetter("_version")


class Latest(NamedTuple):
    """What ``GradientMonitor.latest`` returns.

    Attributes:
        evidence: by seed; empty until the first copy has arrived.
        age: optimizer steps since it left the device; None when nothing has arrived or no optimizer is known.
    """

    evidence: dict[str, SeedEvidence]
    age: int | None


class GradientMonitor(nn.Module):
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
            so, as DDP does with ``gradient_as_bucket_view=True``; whether all that are measured lie in one buffer,
            and where in it, is looked at in every measurement, because DDP moves them. That look costs more time
            on the CPU than comparing addresses does without it (0.37 against 0.07 ms for 300 tensors): it is for
            buffers that are another one in most steps, where it saves the upload.
        tag: the loss whose gradients count, in a loop with several backward passes per step (GAN, RL). Only
            ``measure(tag=...)`` with this very tag makes a sample; any other tag makes none, and a call without
            one is an error. One monitor per loss, each called with the same line: the ratio of a discriminator's
            loss and that of a generator's are two quantities, with a window, a reading and a gate each, and no
            average of them means anything.

    Raises:
        WiringError: no parameters on a side, or a parameter in two seeds.
        ConfigurationError: an impossible window, eps, floor, limit, flat or tag, or an alpha for an unknown seed.
    """

    VERSION = 2
    ring: Tensor
    count: Tensor
    since: Tensor
    summary: Tensor

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
    ) -> None:
        """Look the parameters up and lay out an empty ring on their device."""
        super().__init__()
        if type(window) is not int or window < 1:
            raise ConfigurationError(f"window must be a whole number of at least 1, got {window!r}")
        for name, value in (("eps", eps), ("host_floor", host_floor)):
            if not 0.0 < value < math.inf:
                raise ConfigurationError(f"{name} must be finite and above 0, got {value!r}")
        unknown = sorted(set(alphas or {}) - set(seeds))
        if unknown:
            raise ConfigurationError(f"alphas for unknown seeds {unknown}; seeds are {sorted(seeds)}")
        if not (flat is None or flat == "auto" or isinstance(flat, FlatGradients)):
            raise ConfigurationError(f'flat must be a FlatGradients, "auto" or None, got {flat!r}')
        if not (tag is None or isinstance(tag, str)):
            raise ConfigurationError(f"tag must be a string or None, got {tag!r}")
        _check_rms(vanishing_rms, exploding_rms)
        self.window, self.eps, self.host_floor, self.lanes = window, eps, host_floor, lanes
        self.vanishing_rms, self.exploding_rms = vanishing_rms, exploding_rms
        self.tag = tag
        self._flat = flat
        self._host = ParameterSource(host)
        self._seeds = {name: ParameterSource(seed) for name, seed in seeds.items()}
        self._alphas = {name: Alpha.of(alpha) for name, alpha in (alphas or {}).items()}
        self._handles: list[Any] = []
        self._collector: BackwardCollector | None = None
        self.refresh()
        segments = 1 + len(self._seeds)
        device = self._tracked[0].device
        ring = torch.zeros(window, segments, reference.QUANTITIES, dtype=torch.float64, device=device)
        self.register_buffer("ring", ring)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("since", torch.zeros(segments, dtype=torch.int64, device=device))
        self.register_buffer("summary", None, persistent=False)
        self._resize_summary()
        self.max_norm = math.inf
        self._steps = StepCounter()
        for optimizer in [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else optimizers:
            self._steps.watch(optimizer, self._mark_stepped)
        self._warned = False
        self._transit: _Transit | None = None
        self._arrived: _Transit | None = None
        self._marks = {name: Mark.of(self._seed_parameters[name], self._steps.total) for name in self._seeds}
        self.register_load_state_dict_pre_hook(_check_before_load)

    @property
    def _rms_limits(self) -> tuple[float, float]:
        """As the ops take them: limits that no tensor, or no finite one, is beyond stand for None."""
        vanishing, exploding = self.vanishing_rms, self.exploding_rms
        return 0.0 if vanishing is None else vanishing, math.inf if exploding is None else exploding

    @property
    def seeds(self) -> tuple[str, ...]:
        """Names of the seeds, in the order of their segments."""
        return tuple(self._seeds)

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
        counts = self._counts(tag)
        if self._stale:
            self.refresh()
        given = None if gradients is None else self._check_gradients(gradients)
        if not counts:
            if given is None:
                self._discard()
            return
        scale = LossScale() if scaler is None else read_scaler(scaler, self._steps.optimizers())
        self._measure(scale, given)

    def _counts(self, tag: str | None) -> bool:
        """Whether a call with this tag makes a sample."""
        if self.tag is None and tag is not None:
            raise ConfigurationError(
                f"measure(tag={tag!r}), but this monitor measures every call: give each loss a monitor of its own, "
                f"GradientMonitor(..., tag={tag!r})"
            )
        if self.tag is not None and tag is None:
            raise ConfigurationError(
                f"this monitor measures the loss {self.tag!r} alone: say which loss it is now, measure(tag=...)"
            )
        return tag == self.tag

    def _check_gradients(self, gradients: Gradients) -> dict[int, Tensor]:
        """Explicit gradients by ``id`` of their parameter or blend factor; refuses what does not fit."""
        pairs = gradients.items() if isinstance(gradients, Mapping) else gradients
        known = self._segment_by_id.keys() | {id(alpha.holder.alpha) for _, alpha in self._gains}
        seen: set[int] = set()
        given: dict[int, Tensor] = {}
        for pair in pairs:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], Tensor):
                raise ConfigurationError(
                    "gradients are pairs of a parameter and its gradient, zip(parameters, grads), or a dict by "
                    f"parameter, got {type(pair).__name__} inside"
                )
            parameter, gradient = pair
            if id(parameter) not in known:
                raise WiringError(
                    f"gradients has one for a tensor of shape {tuple(parameter.shape)} that is in neither host nor "
                    "seeds: list parameters of the monitor only, or call refresh() after they were replaced"
                )
            if id(parameter) in seen:
                raise ConfigurationError(f"gradients has two for {self._name_of(parameter)}: add them up first")
            seen.add(id(parameter))
            if gradient is None:
                continue
            if not isinstance(gradient, Tensor) or gradient.shape != parameter.shape:
                found = f"shape {tuple(gradient.shape)}" if isinstance(gradient, Tensor) else type(gradient).__name__
                raise ConfigurationError(f"the gradient given for {self._name_of(parameter)} has {found}")
            given[id(parameter)] = gradient
        return given

    @torch.no_grad()
    def _discard(self) -> None:
        """Forget what a backward pass that does not count has left for this monitor alone."""
        for _, alpha in self._gains:
            slope = alpha.gradient()
            if slope is not None:
                slope.zero_()
        if self._collector is not None and self._collector.active:
            self._collector.take(self.ring.device)

    def watch(self, *optimizers: torch.optim.Optimizer) -> None:
        """Count the steps of more optimizers: those that train the seeds, if they are not the host's."""
        for optimizer in optimizers:
            if all(optimizer is not known for known in self._steps.optimizers()):
                self._steps.watch(optimizer, self._mark_stepped)

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
        self._collector = BackwardCollector(self._segment_of, self.lanes)
        self._collector.watch(self._tracked)
        return self._collector

    def _segment_of(self, parameter: Tensor) -> int | None:
        return self._segment_by_id.get(id(parameter))

    def _measure(self, scale: LossScale, given: dict[int, Tensor] | None = None) -> None:
        if self._stale:
            self.refresh()
        if given is None and isinstance(self._flat, FlatGradients):
            self._flat.restore()
        gains: list[Tensor] = []
        gain_segments: list[int] = []
        for segment, alpha in self._gains:
            # A slope is zeroed once it is measured: not the one that was given.
            slope = alpha.gradient() if given is None else _copy(given.get(id(alpha.holder.alpha)))
            if slope is not None:
                gains.append(slope)
                gain_segments.append(segment)
        if given is None and self._collector is not None and self._collector.active:
            ops.record_sums_(
                *self._collector.take(self.ring.device), gains, gain_segments, self.ring, self.count, self.summary,
                self.max_norm, self.eps, scale.gradients, scale.gains, scale.found_inf, *self._rms_limits,
            )
            return
        found = [p.grad if given is None else given.get(id(p)) for p in self._tracked]
        gradients = [gradient for gradient in found if gradient is not None]
        segments = self._segments
        if len(gradients) < len(found):
            segments = [segment for segment, gradient in zip(segments, found) if gradient is not None]
        if not gradients and given is None and not torch.compiler.is_compiling():
            self._warn_of_nothing()
        if gradients and gradients[0].device != self.ring.device:
            self.to(gradients[0].device)
        flat = self._flat_buffer(gradients) if given is None else None
        ops.record_(
            gradients, segments, gains, gain_segments, self.ring, self.count, self.summary,
            self.max_norm, self.eps, scale.gradients, scale.gains, scale.found_inf, self.lanes,
            flat, self._flat != "auto", partial(self._name_of_gradient, given), *self._rms_limits,
        )
        self._remember(gradients)

    def _flat_buffer(self, gradients: Sequence[Tensor]) -> Tensor | None:
        """The buffer in which all of them lie, if they do and somebody is going to use it."""
        flat = self._flat
        if flat is None or torch.compiler.is_compiling() or ops.backend_of(self.ring.device).name == "torch":
            return None
        if not isinstance(flat, FlatGradients):
            return flat_buffer_of(gradients)
        # Our own: every gradient exists, and each has its place.
        if len(flat.buffers) != 1 or len(gradients) != len(self._tracked):
            return None
        return flat.buffer if flat.places() == self._segment_by_id.keys() else None

    def _name_of(self, parameter: Tensor) -> str:
        """A parameter or blend factor in words: a seed's name for what a seed and the host both hold."""
        for name, alpha in self._alphas.items():
            if alpha.holder.alpha is parameter:
                return f"the blend factor of seed {name!r}"
        owners = [*((f"seed {name!r}", source) for name, source in self._seeds.items()), ("the host", self._host)]
        for owner, source in owners:
            for name, known in source.named():
                if known is parameter:
                    return f"{name} of {owner} (shape {tuple(parameter.shape)})"
        return f"a parameter of shape {tuple(parameter.shape)}"

    def _name_of_gradient(self, given: dict[int, Tensor] | None, gradient: Tensor) -> str:
        owners = [*self._tracked, *(alpha.holder.alpha for _, alpha in self._gains)]
        for parameter in owners:
            held = parameter.grad if given is None else given.get(id(parameter))
            if held is gradient:
                return f"the gradient of {self._name_of(parameter)}"
        return "a gradient"

    def read(self, *, strict: bool = False) -> dict[str, SeedEvidence]:
        """What the window says of every seed. Copies to the host once, and waits for that copy.

        Args:
            strict: raise when a seed has no measurement at all, instead of saying so in its evidence.

        Raises:
            WiringError: with ``strict``, a seed that was never measured.
        """
        evidence = self._unpack(list(self._seeds), self._pack().tolist())
        missing = [name for name, known in evidence.items() if known.status == NEVER_MEASURED]
        if strict and missing:
            raise WiringError(
                f"seeds {missing} were never measured: call measure() after backward() and before optimizer.step()"
            )
        return evidence

    def latest(self) -> Latest:
        """The newest evidence that has already arrived on the host, and its age. Never waits.

        Each call sends the ring on its way (a pinned, asynchronous copy on a GPU), unless an earlier copy is
        still under way. On a CPU it arrives at once.
        """
        if self._transit is None:
            self._transit = _Transit(self._pack(), list(self._seeds), self._steps.total)
        if self._transit.arrived():
            self._arrived, self._transit = self._transit, None
        arrived = self._arrived
        if arrived is None or arrived.names != list(self._seeds):
            return Latest({}, None)
        age = self._steps.total - arrived.steps if self._steps.optimizers() else None
        return Latest(self._unpack(arrived.names, arrived.buffer.tolist()), age)

    def _pack(self) -> Tensor:
        """Everything that a read needs, float64 on the device: count, since, displacements, the ring."""
        if self._stale:
            self.refresh()
        with torch.no_grad():
            moved = [self._marks[name].displacement(self._seed_parameters[name]).view(1) for name in self._seeds]
            parts = [self.count.view(1).double(), self.since.double(), *moved, self.ring.view(-1)]
            return torch.cat([part.to(self.ring.device) for part in parts])

    def _unpack(self, names: list[str], packed: list[float]) -> dict[str, SeedEvidence]:
        segments = 1 + len(names)
        count = int(packed[0])
        since = [int(value) for value in packed[1 : 1 + segments]]
        moved_at = 1 + segments
        rows = packed[moved_at + len(names) :]
        steps = self._steps
        evidence = {}
        for index, name in enumerate(names):
            mark = self._marks[name]
            first = max(since[index + 1], count - self.window)
            samples = [self._sample(rows, number % self.window, index + 1, segments) for number in range(first, count)]
            displacement = packed[moved_at + index]
            evidence[name] = collect_evidence(
                name,
                samples,
                parameters=sum(p.requires_grad for p in self._seed_parameters[name]),
                eps=self.eps,
                host_floor=self.host_floor,
                age=mark.age(samples, first, steps.total) if steps.optimizers() else None,
                displacement=displacement if math.isfinite(displacement) else None,
                in_optimizer=steps.hold(self._seed_parameters[name]),
                optimizer_steps=steps.since(mark, self._seed_parameters[name]),
            )
        return evidence

    def _sample(self, rows: Sequence[float], row: int, segment: int, segments: int) -> Sample:
        width = reference.QUANTITIES
        host = row * segments * width
        seed = host + segment * width
        return Sample(
            host_sumsq=rows[host + reference.SUMSQ],
            seed_sumsq=rows[seed + reference.SUMSQ],
            host_tensors=int(rows[host + reference.TENSORS]),
            seed_tensors=int(rows[seed + reference.TENSORS]),
            host_elements=int(rows[host + reference.ELEMENTS]),
            seed_elements=int(rows[seed + reference.ELEMENTS]),
            live_tensors=int(rows[seed + reference.LIVE]),
            gain=rows[seed + reference.EXTRA],
            skipped=rows[host + reference.EXTRA] != 0.0,
            seed_vanishing=None if self.vanishing_rms is None else int(rows[seed + reference.VANISHING]),
            seed_exploding=None if self.exploding_rms is None else int(rows[seed + reference.EXPLODING]),
        )

    def clip_grad_norm_(self, max_norm: float, error_if_nonfinite: bool = False) -> Tensor:
        """Scale all gradients so that their total norm is at most ``max_norm``, as torch's function does.

        Uses the pass of a ``measure()`` that came after the last optimizer step, and makes its own when there
        was none. ``coefficient = min(1, max_norm / (norm + 1e-6))``; NaN propagates. At a coefficient of exactly
        1 no gradient is written (on a GPU with Triton, and on a CPU).

        Args:
            max_norm: the limit, above 0.
            error_if_nonfinite: raise when the norm is NaN or infinite; the only option that waits for the
                device.

        Returns:
            The norm before clipping: float32, 0-dim, on the device.

        Raises:
            ConfigurationError: ``max_norm`` is not above 0.
            RuntimeError: a non-finite norm, when that was asked for; nothing was scaled.
        """
        if not max_norm > 0.0:
            raise ConfigurationError(f"max_norm must be above 0, got {max_norm!r}")
        if self._stale:
            self.refresh()
        gradients = [p.grad for p in self._tracked if p.grad is not None]
        measured, self.max_norm, known = self._still_measured(gradients), max_norm, self.max_norm
        with torch.no_grad():
            summary = self.summary
            if not measured:
                summary = torch.zeros_like(self.summary)
                sums = ops.segmented_sumsq(gradients, [0] * len(gradients), 1, lanes=self.lanes)
                summary[reference.TOTAL_NORM] = sums[0].sqrt()
            if not measured or max_norm != known:
                # The measurement did not know this limit; the next one computes the coefficient in its own pass.
                total = summary[reference.TOTAL_NORM]
                summary[reference.CLIP_COEFFICIENT] = (max_norm / (total + reference.CLIP_EPS)).clamp(max=1.0)
            if error_if_nonfinite and not bool(torch.isfinite(summary[reference.TOTAL_NORM])):
                raise RuntimeError(
                    f"the total norm of the gradients is {float(summary[reference.TOTAL_NORM])}, so it cannot be "
                    "clipped; set error_if_nonfinite=False to scale them all the same"
                )
            total = ops.clip_(gradients, summary, partial(self._name_of_gradient, None))
        self._mark_stepped()
        return total

    def reset(self, name: str | None = None) -> None:
        """Begin the window of one seed, or of all, anew: samples so far and weights so far no longer count.

        Raises:
            ConfigurationError: no seed has this name.
        """
        if self._stale:
            self.refresh()
        for seed in self._seeds if name is None else [self._known(name)]:
            segment = 1 + list(self._seeds).index(seed)
            self.since[segment : segment + 1].copy_(self.count.view(1))
            self._marks[seed] = Mark.of(self._seed_parameters[seed], self._steps.total, self._steps.by_optimizer())

    def add_seed(self, name: str, seed: Parameters, *, alpha: Any = None) -> None:
        """Watch one more seed from now on; the samples of the others stay.

        Raises:
            ConfigurationError: the name is taken.
            WiringError: no parameters, or parameters of another seed; nothing has changed.
        """
        if name in self._seeds:
            raise ConfigurationError(f"a seed is already called {name!r}; seeds are {list(self._seeds)}")
        source, blend = ParameterSource(seed), None if alpha is None else Alpha.of(alpha)
        self._seeds[name] = source
        if blend is not None:
            self._alphas[name] = blend
        try:
            self.refresh()
            mark = Mark.of(self._seed_parameters[name], self._steps.total, self._steps.by_optimizer())
        except Exception:
            del self._seeds[name]
            self._alphas.pop(name, None)
            self.refresh()
            raise
        column = torch.zeros_like(self.ring[:, :1])
        self.ring = torch.cat([self.ring, column], dim=1)
        self.since = torch.cat([self.since, self.count.view(1)])
        self._resize_summary()
        self._marks[name] = mark

    def remove_seed(self, name: str) -> None:
        """Forget a seed: what is left of it in the host counts as host from now on.

        Raises:
            ConfigurationError: no seed has this name.
        """
        segment = 1 + list(self._seeds).index(self._known(name))
        keep = [index for index in range(self.ring.shape[1]) if index != segment]
        del self._seeds[name], self._marks[name]
        self._alphas.pop(name, None)
        self.ring = self.ring[:, keep].contiguous()
        self.since = self.since[keep].contiguous()
        self._resize_summary()
        self.refresh()

    def refresh(self) -> None:
        """Look all parameters up again: after a change to the modules that no load hook can see.

        Raises:
            WiringError: no parameters on a side, or a parameter in two seeds.
        """
        owner: dict[int, str] = {}
        found: dict[str, list[Tensor]] = {}
        for name, source in self._seeds.items():
            found[name] = source.parameters()
            if not sum(parameter.numel() for parameter in found[name]):
                raise WiringError(f"seed {name!r} has no parameters: there is nothing to measure")
            for parameter in found[name]:
                other = owner.setdefault(id(parameter), name)
                if other != name:
                    raise WiringError(
                        f"seeds {other!r} and {name!r} share a parameter of shape {tuple(parameter.shape)}; "
                        "a parameter belongs to one seed"
                    )
        host = [parameter for parameter in self._host.parameters() if id(parameter) not in owner]
        if not sum(parameter.numel() for parameter in host):
            raise WiringError("the host has no parameters outside the seeds: there is nothing to compare with")
        self._seed_parameters = found
        self._tracked = host + [parameter for parameters in found.values() for parameter in parameters]
        self._segments = [0] * len(host)
        for segment, parameters in enumerate(found.values(), start=1):
            self._segments += [segment] * len(parameters)
        self._segment_by_id = {id(p): segment for p, segment in zip(self._tracked, self._segments)}
        if self._collector is not None and self._collector.active:
            self._collector.watch(self._tracked)
        self._gains = [
            (segment, self._alphas[name])
            for segment, name in enumerate(self._seeds, start=1)
            if name in self._alphas
        ]
        for handle in self._handles:
            handle.remove()
        hook = CallOnLoad(self._mark_stale)
        self._handles = [
            module.register_load_state_dict_post_hook(hook)
            for source in (self._host, *self._seeds.values())
            for module in source.modules()
        ]
        self._stale = False

    def get_extra_state(self) -> dict[str, Any]:
        """What the buffers do not hold: names, and the weights at the beginning of each window."""
        return {
            "version": self.VERSION,
            "seeds": list(self._seeds),
            "tag": self.tag,
            "steps": self._steps.by_optimizer(),
            "marks": {name: mark.state_dict() for name, mark in self._marks.items()},
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over ``get_extra_state``, which the load has already checked."""
        self._steps.restore(state["steps"])
        for name, mark in state["marks"].items():
            self._marks[name] = Mark.from_state_dict(mark, self._seed_parameters[name])

    def _warn_of_nothing(self) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "measure() found no gradient at all: it belongs after backward() and before "
                "zero_grad(set_to_none=True), and loops with torch.autograd.grad pass measure(gradients=...); "
                "such samples count as empty"
            )

    def _mark_stale(self) -> None:
        self._stale = True

    def _mark_stepped(self) -> None:
        self._measured = False  # no optimizer step and no clipping since the last measurement
        # Emptied, because even a weak reference to a gradient stands in the way of torch.utils.swap_tensors.
        self._witnesses: list[weakref.ref[Tensor]] = []
        self._versions = 0

    def _known(self, name: str) -> str:
        if name not in self._seeds:
            raise ConfigurationError(f"no seed is called {name!r}; seeds are {list(self._seeds)}")
        return name

    def _resize_summary(self) -> None:
        self.summary = torch.zeros(
            reference.SUMMARY_HEAD + self.ring.shape[1], dtype=torch.float64, device=self.ring.device
        )
        self._mark_stepped()

    def _remember(self, gradients: Sequence[Tensor]) -> None:
        """Note what was measured, so that clipping knows whether those sums are still true."""
        self._measured = True
        # Weak: no gradient may live longer because it was measured. Not while compiling: what is set there is
        # set for good, and clipping then makes its own pass.
        self._witnesses = [] if torch.compiler.is_compiling() else list(map(weakref.ref, gradients))
        self._versions = 0 if torch.compiler.is_compiling() else sum(map(_version_of, gradients))

    def _still_measured(self, gradients: Sequence[Tensor]) -> bool:
        """Whether the last measurement was of these very gradients, in their present state."""
        return (
            self._measured
            and len(gradients) == len(self._witnesses) > 0
            and all(seen() is gradient for seen, gradient in zip(self._witnesses, gradients))
            and sum(map(_version_of, gradients)) == self._versions
        )

    def _apply(self, fn: Any, recurse: bool = True) -> GradientMonitor:
        # .half() and .to(dtype) are meant for models: sums of squares stay float64, only the device follows.
        device = fn(torch.empty(0, device=self.ring.device)).device
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(device)
        return self


def _copy(slope: Tensor | None) -> Tensor | None:
    return None if slope is None else slope.clone()


class _Transit:
    """A copy of packed evidence on its way to the host."""

    def __init__(self, packed: Tensor, names: list[str], steps: int) -> None:
        self.names, self.steps = names, steps
        self._event = None
        if packed.device.type == "cpu":
            self.buffer = packed
            return
        self.buffer = torch.empty(packed.shape, dtype=packed.dtype, device="cpu", pin_memory=True)
        self.buffer.copy_(packed, non_blocking=True)
        self._event = torch.get_device_module(packed.device).Event()
        self._event.record()

    def arrived(self) -> bool:
        return self._event is None or bool(self._event.query())


def _check_rms(vanishing: float | None, exploding: float | None) -> None:
    for name, value in (("vanishing_rms", vanishing), ("exploding_rms", exploding)):
        if value is not None and not 0.0 < value < math.inf:
            raise ConfigurationError(f"{name} must be finite and above 0, or None (not counted), got {value!r}")
    if vanishing is not None and exploding is not None and vanishing > exploding:
        raise ConfigurationError(
            f"vanishing_rms {vanishing!r} is above exploding_rms {exploding!r}: a gradient would be both"
        )


def _check_before_load(monitor: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Refuse a state that does not fit before anything of it is taken over."""
    assert isinstance(monitor, GradientMonitor)
    kind = "GradientMonitor"
    buffers = ("ring", "count", "since")
    entries = {key[len(prefix) :] for key in state_dict if key.startswith(prefix)}
    expected = {*buffers, "_extra_state"}
    if entries != expected:
        raise StateDictError(
            f"{kind}: missing {sorted(expected - entries)}, unknown {sorted(entries - expected)} entries"
        )
    state = check_state(state_dict[f"{prefix}_extra_state"], kind, monitor.VERSION, ("seeds", "tag", "steps", "marks"))
    if state["seeds"] != list(monitor.seeds):
        raise StateDictError(
            f"{kind}: the state is of seeds {state['seeds']}, the monitor has {list(monitor.seeds)}"
        )
    if state["tag"] != monitor.tag:
        raise StateDictError(f"{kind}: the state is of the loss {state['tag']!r}, the monitor's is {monitor.tag!r}")
    watched = len(monitor._steps.by_optimizer())
    if not isinstance(state["steps"], list) or len(state["steps"]) != watched:
        raise StateDictError(f"{kind}: the state counts steps {state['steps']!r}, the monitor {watched} optimizers")
    for name in buffers:
        saved, own = state_dict[prefix + name], getattr(monitor, name)
        if not isinstance(saved, Tensor) or saved.shape != own.shape:
            raise StateDictError(f"{kind}: entry {name!r} is not a tensor of shape {tuple(own.shape)}")
    if not isinstance(state["marks"], dict) or state["marks"].keys() != set(monitor.seeds):
        raise StateDictError(f"{kind}: the state does not hold one mark for each of {list(monitor.seeds)}")
    for name, parameters in monitor._seed_parameters.items():
        Mark.check_state(state["marks"][name], f"{kind}: seed {name!r}", parameters)
