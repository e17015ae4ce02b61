"""GradientMonitor: one row of the ring per measurement, one copy to the host per read.

Segment 0 is the host, 1..N the seeds. Measuring writes tensors only and waits for nothing; every
statistic is computed on the host, in evidence.py, when somebody reads.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import ops, reference
from .errors import ConfigurationError, StateDictError, WiringError
from .evidence import HOST_FLOOR, RATIO_EPS, Sample, SeedEvidence, collect_evidence

Parameters = nn.Module | Iterable[Tensor] | Iterable[nn.Module]

WINDOW = 128
# Root mean square below which weights count as this large, when their relative change is computed: a
# layer that starts at zero would otherwise have moved infinitely far after one step.
WEIGHT_FLOOR = 1e-3


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

    Raises:
        WiringError: no parameters on a side, or a parameter in two seeds.
        ConfigurationError: an impossible window, eps or floor, or an alpha for an unknown seed.
    """

    VERSION = 1
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
        self.window, self.eps, self.host_floor, self.lanes = window, eps, host_floor, lanes
        self._host = _Source(host)
        self._seeds = {name: _Source(seed) for name, seed in seeds.items()}
        self._alphas = {name: _Alpha.of(alpha) for name, alpha in (alphas or {}).items()}
        self._handles: list[Any] = []
        self.refresh()
        segments = 1 + len(self._seeds)
        ring = torch.zeros(window, segments, reference.QUANTITIES, dtype=torch.float64)
        self.register_buffer("ring", ring)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("since", torch.zeros(segments, dtype=torch.int64))
        summary = torch.zeros(reference.SUMMARY_HEAD + segments, dtype=torch.float64)
        self.register_buffer("summary", summary, persistent=False)
        self.to(self._tracked[0].device)
        self.max_norm = math.inf
        self._measured = False  # no optimizer step since the last measurement
        self._witnesses: tuple[tuple[weakref.ref[Tensor], int], ...] = ()
        self._steps = _StepCounter()
        for optimizer in [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else optimizers:
            self._steps.watch(optimizer, self)
        self._marks = {name: _Mark.of(self._seed_parameters[name], self._steps.total) for name in self._seeds}
        self.register_load_state_dict_pre_hook(_check_before_load)

    @property
    def seeds(self) -> tuple[str, ...]:
        """Names of the seeds, in the order of their segments."""
        return tuple(self._seeds)

    def forward(self) -> None:
        """Measure; so that ``torch.compile(monitor, fullgraph=True)`` works."""
        self.measure()

    def measure(self) -> None:
        """Measure the gradients that exist now, as one sample. Waits for nothing, changes no gradient.

        Of the blend factors the gradient is taken: it is zero afterwards, so that the next backward pass
        starts afresh.
        """
        if self._stale:
            self.refresh()
        gradients: list[Tensor] = []
        segments: list[int] = []
        for parameter, segment in zip(self._tracked, self._segments):
            gradient = parameter.grad
            if gradient is not None:
                gradients.append(gradient)
                segments.append(segment)
        gains: list[Tensor] = []
        gain_segments: list[int] = []
        for segment, alpha in self._gains:
            slope = alpha.gradient()
            if slope is not None:
                gains.append(slope)
                gain_segments.append(segment)
        if gradients and gradients[0].device != self.ring.device:
            self.to(gradients[0].device)
        ops.record_(
            gradients, segments, gains, gain_segments, self.ring, self.count, self.summary,
            self.max_norm, self.eps, lanes=self.lanes,
        )
        self._measured = bool(gradients)
        # Without an optimizer to watch, two gradients tell whether the sums are still those of this step.
        self._witnesses = ()
        if gradients and not torch.compiler.is_compiling():
            ends = (gradients[0], gradients[-1])
            self._witnesses = tuple((weakref.ref(gradient), gradient._version) for gradient in ends)

    def read(self) -> dict[str, SeedEvidence]:
        """What the window says of every seed. Copies to the host once, and waits for that copy."""
        names = list(self._seeds)
        segments = 1 + len(names)
        with torch.no_grad():
            moved = [self._marks[name].displacement(self._seed_parameters[name]) for name in names]
            parts = [self.count.view(1).double(), self.since.double(), *(part.view(1) for part in moved)]
            packed = torch.cat([*(part.to(self.ring.device) for part in parts), self.ring.view(-1)]).tolist()
        count = int(packed[0])
        since = [int(value) for value in packed[1 : 1 + segments]]
        moved_at = 1 + segments
        rows = packed[moved_at + len(names) :]
        steps = self._steps
        evidence = {}
        for index, name in enumerate(names):
            mark = self._marks[name]
            first = max(since[index + 1], count - self.window)
            samples = [_sample(rows, number % self.window, index + 1, segments) for number in range(first, count)]
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
        with torch.no_grad():
            if self._still_measured(gradients):
                total = self.summary[reference.TOTAL_NORM].clone()
                coefficient = self.summary[reference.CLIP_COEFFICIENT]
            else:
                total = ops.segmented_sumsq(gradients, [0] * len(gradients), 1, lanes=self.lanes)[0].sqrt()
                coefficient = None
            if coefficient is None or max_norm != self.max_norm:
                coefficient = (max_norm / (total + reference.CLIP_EPS)).clamp(max=1.0)
            if error_if_nonfinite and not bool(torch.isfinite(total)):
                raise RuntimeError(
                    f"the total norm of the gradients is {float(total)}, so it cannot be clipped; "
                    "set error_if_nonfinite=False to scale them all the same"
                )
            ops.scale_(gradients, coefficient)
        self.max_norm = max_norm  # the next measurement computes the coefficient in its own pass
        self._measured = False
        return total.float()

    def reset(self, name: str | None = None) -> None:
        """Begin the window of one seed, or of all, anew: samples so far and weights so far no longer count.

        Raises:
            ConfigurationError: no seed has this name.
        """
        for seed in self._seeds if name is None else [self._known(name)]:
            segment = 1 + list(self._seeds).index(seed)
            self.since[segment : segment + 1].copy_(self.count.view(1))
            self._marks[seed] = _Mark.of(self._seed_parameters[seed], self._steps.total, self._steps.by_optimizer())

    def add_seed(self, name: str, seed: Parameters, *, alpha: Any = None) -> None:
        """Watch one more seed from now on; the samples of the others stay.

        Raises:
            ConfigurationError: the name is taken.
            WiringError: no parameters, or parameters of another seed; nothing has changed.
        """
        if name in self._seeds:
            raise ConfigurationError(f"a seed is already called {name!r}; seeds are {list(self._seeds)}")
        source, blend = _Source(seed), None if alpha is None else _Alpha.of(alpha)
        self._seeds[name] = source
        if blend is not None:
            self._alphas[name] = blend
        try:
            self.refresh()
        except WiringError:
            del self._seeds[name]
            self._alphas.pop(name, None)
            self.refresh()
            raise
        column = torch.zeros_like(self.ring[:, :1])
        self.ring = torch.cat([self.ring, column], dim=1)
        self.since = torch.cat([self.since, self.count.view(1)])
        self._resize_summary()
        self._marks[name] = _Mark.of(self._seed_parameters[name], self._steps.total, self._steps.by_optimizer())

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
        self._gains = [
            (segment, self._alphas[name])
            for segment, name in enumerate(self._seeds, start=1)
            if name in self._alphas
        ]
        for handle in self._handles:
            handle.remove()
        hook = _MarkStale(self)
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
            "steps": self._steps.total,
            "marks": {name: mark.state_dict() for name, mark in self._marks.items()},
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over ``get_extra_state``, which the load has already checked."""
        self._steps.total = state["steps"]
        for name, mark in state["marks"].items():
            self._marks[name] = _Mark.from_state_dict(mark, self._seed_parameters[name])

    def _known(self, name: str) -> str:
        if name not in self._seeds:
            raise ConfigurationError(f"no seed is called {name!r}; seeds are {list(self._seeds)}")
        return name

    def _resize_summary(self) -> None:
        self.summary = torch.zeros(
            reference.SUMMARY_HEAD + self.ring.shape[1], dtype=torch.float64, device=self.ring.device
        )
        self._measured = False

    def _still_measured(self, gradients: Sequence[Tensor]) -> bool:
        """Whether the last measurement was of these very gradients, in their present state."""
        if not self._measured or not gradients:
            return False
        ends = (gradients[0], gradients[-1])
        return all(
            seen() is gradient and gradient._version == version
            for (seen, version), gradient in zip(self._witnesses, ends)
        )

    def _apply(self, fn: Any, recurse: bool = True) -> GradientMonitor:
        # .half() and .to(dtype) are meant for models: sums of squares stay float64, only the device follows.
        device = fn(torch.empty(0, device=self.ring.device)).device
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(device)
        return self


class _Source:
    """Where parameters come from: looked up again on every call, each once."""

    def __init__(self, source: Parameters) -> None:
        items: tuple[object, ...] = (source,) if isinstance(source, nn.Module) else tuple(source)
        self._items: list[nn.Module | Tensor] = []
        for item in items:
            if not isinstance(item, (nn.Module, Tensor)):
                raise ConfigurationError(
                    f"host and seeds are modules or iterables of parameters, got {type(item).__name__} inside"
                )
            self._items.append(item)

    def parameters(self) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for item in self._items:
            tensors: Iterable[Tensor] = (item,) if isinstance(item, Tensor) else item.parameters()
            for tensor in tensors:
                found.setdefault(id(tensor), tensor)
        return list(found.values())

    def modules(self) -> list[nn.Module]:
        return [module for item in self._items if isinstance(item, nn.Module) for module in item.modules()]


class _Alpha:
    """A blend factor, looked up again each time: ``.to()`` replaces the tensor of a slot."""

    def __init__(self, holder: Any) -> None:
        self.holder = holder

    @classmethod
    def of(cls, alpha: Any) -> _Alpha:
        if isinstance(alpha, Tensor):
            alpha = _Holder(alpha)
        if not hasattr(alpha, "alpha"):
            raise ConfigurationError(
                f"an alpha is a 0-dim tensor or an object with one as attribute `alpha`, got {type(alpha).__name__}"
            )
        return cls(alpha)

    def gradient(self) -> Tensor | None:
        tensor: Tensor | None = self.holder.alpha
        return None if tensor is None else tensor.grad


class _Holder:
    def __init__(self, alpha: Tensor) -> None:
        self.alpha = alpha


class _MarkStale:
    """A load hook: after ``load_state_dict(assign=True)`` the parameters are other objects."""

    def __init__(self, monitor: GradientMonitor | None) -> None:
        self._monitor = weakref.ref(monitor) if monitor is not None else lambda: None

    def __call__(self, module: nn.Module, incompatible_keys: object) -> None:
        monitor = self._monitor()
        if monitor is not None:
            monitor._stale = True

    def __reduce__(self) -> tuple[type[_MarkStale], tuple[None]]:
        # The hook lives in the user's modules, which must stay copyable and picklable.
        return _MarkStale, (None,)


class _StepCounter:
    """Optimizer steps taken, by hooks that change nothing. Skipped steps of a GradScaler never arrive."""

    def __init__(self) -> None:
        self.total = 0
        self._watched: list[tuple[weakref.ref[torch.optim.Optimizer], list[int]]] = []

    def watch(self, optimizer: torch.optim.Optimizer, monitor: GradientMonitor) -> None:
        steps = [0]
        owner = weakref.ref(monitor)

        def count(*_: object) -> None:
            steps[0] += 1
            self.total += 1
            alive = owner()
            if alive is not None:
                alive._measured = False

        optimizer.register_step_post_hook(count)
        self._watched.append((weakref.ref(optimizer), steps))

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [optimizer for ref, _ in self._watched if (optimizer := ref()) is not None]

    def hold(self, parameters: Sequence[Tensor]) -> bool | None:
        """Whether every parameter that requires a gradient is in an optimizer; None without optimizers."""
        optimizers = self.optimizers()
        if not optimizers:
            return None
        held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        return bool(wanted) and all(id(parameter) in held for parameter in wanted)

    def by_optimizer(self) -> list[int]:
        return [steps[0] for _, steps in self._watched]

    def since(self, mark: _Mark, parameters: Sequence[Tensor]) -> int | None:
        """Steps since the mark of the optimizers that hold a parameter of the seed; the fewest of them."""
        wanted = {id(parameter) for parameter in parameters}
        found = []
        for index, (ref, steps) in enumerate(self._watched):
            optimizer = ref()
            if optimizer is not None and any(
                id(p) in wanted for group in optimizer.param_groups for p in group["params"]
            ):
                begun = mark.by_optimizer[index] if index < len(mark.by_optimizer) else 0
                found.append(steps[0] - begun)
        return min(found, default=None)


class _Mark:
    """Where a seed's window began: its weights then, and the steps taken by then."""

    def __init__(self, weights: list[Tensor], steps: int, by_optimizer: list[int]) -> None:
        self.weights = weights
        self.by_optimizer = by_optimizer
        self.newest = -1  # number of the newest usable sample that a read has seen
        self.steps_then = steps

    @classmethod
    def of(cls, parameters: Sequence[Tensor], steps: int, by_optimizer: Sequence[int] = ()) -> _Mark:
        return cls([p.detach().clone() for p in parameters], steps, list(by_optimizer))

    def displacement(self, parameters: Sequence[Tensor]) -> Tensor:
        """``|w - w0| / max(|w0|, WEIGHT_FLOOR sqrt(n))``, float64 0-dim; NaN when the shapes have changed."""
        device = parameters[0].device
        if [p.shape for p in parameters] != [w.shape for w in self.weights]:
            return torch.full((), math.nan, dtype=torch.float64, device=device)
        weights = [w.to(p.device) for p, w in zip(parameters, self.weights)]
        apart = [p.detach().to(_wide(p)) - w.to(_wide(p)) for p, w in zip(parameters, weights)]
        ones = [0] * len(apart)
        moved = ops.segmented_sumsq(apart, ones, 1)[0].sqrt()
        size = ops.segmented_sumsq(weights, ones, 1)[0].sqrt()
        floor = WEIGHT_FLOOR * math.sqrt(sum(w.numel() for w in weights))
        return moved / size.clamp(min=floor)

    def age(self, samples: Sequence[Sample], first: int, steps: int) -> int:
        """Optimizer steps since the last read that found a usable sample it had not seen."""
        usable = [first + i for i, sample in enumerate(samples) if sample.usable and not sample.empty]
        newest = max(usable, default=-1)
        if newest > self.newest:
            self.newest, self.steps_then = newest, steps
        return steps - self.steps_then

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": self.weights,
            "by_optimizer": self.by_optimizer,
            "newest": self.newest,
            "steps_then": self.steps_then,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], parameters: Sequence[Tensor]) -> _Mark:
        weights = [w.to(p.device, copy=True) for w, p in zip(state["weights"], parameters)]
        mark = cls(weights, state["steps_then"], list(state["by_optimizer"]))
        mark.newest = state["newest"]
        return mark


def _wide(tensor: Tensor) -> torch.dtype:
    # Weights that moved by less than a bf16 ulp did not move; their difference must not be rounded again.
    return torch.promote_types(tensor.dtype, torch.float32)


def _sample(rows: Sequence[float], row: int, segment: int, segments: int) -> Sample:
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
    )


def _check_before_load(
    monitor: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: object
) -> None:
    """Refuse a state that does not fit before anything of it is taken over."""
    assert isinstance(monitor, GradientMonitor)
    state = state_dict.get(f"{prefix}_extra_state")
    if not isinstance(state, dict) or state.get("version") != GradientMonitor.VERSION:
        found = state.get("version") if isinstance(state, dict) else None
        raise StateDictError(
            f"GradientMonitor: state has version {found!r}, this release reads {GradientMonitor.VERSION}"
        )
    if state.get("seeds") != list(monitor.seeds):
        raise StateDictError(
            f"GradientMonitor: the state is of seeds {state.get('seeds')}, the monitor has {list(monitor.seeds)}"
        )
    for name in ("ring", "count", "since"):
        saved, own = state_dict.get(prefix + name), getattr(monitor, name)
        if not isinstance(saved, Tensor) or saved.shape != own.shape:
            raise StateDictError(f"GradientMonitor: entry {name!r} is missing or not of shape {tuple(own.shape)}")
    for name, parameters in monitor._seed_parameters.items():
        saved_shapes = [tuple(w.shape) for w in state["marks"][name]["weights"]]
        if saved_shapes != [tuple(p.shape) for p in parameters]:
            raise StateDictError(f"GradientMonitor: the weights saved for seed {name!r} have other shapes")
