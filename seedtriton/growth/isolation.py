"""How a seed trains behind the host: the host's output and gradients are, bit for bit, those without it.

The seed sees a detached copy of the host's features; what it puts out goes nowhere, and only the
gradient that the host's output receives is handed to it. A leak is found in the graph, not by numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..core.errors import ConfigurationError
from .blending import call, slope, transforming


@dataclass(frozen=True)
class StraightThrough:
    """The seed gets dL/dout as it is.

    That objective is linear and has no floor: a seed that trains long enough grows without bound and
    wrecks the host when it is blended. It is what earlier systems do, and here for comparison.
    """


@dataclass(frozen=True)
class TrustRegion:
    """The seed gets ``g + lambda (s - h)`` with ``lambda = |g| / (rho |h|)``, once per batch.

    For a seed output s, the host's features h and g = dL/dout, the gradient vanishes where the seed's
    contribution s - h is the negative gradient scaled to a fraction ``rho`` of the host's features: a
    bounded target instead of a direction without end. Where h is all zero there is no scale to hold the
    seed to, and it gets g alone.

    The default of ``rho`` is the largest of 0.1, 0.2, 0.3, 0.5 and 1.0 that did not overshoot on a host that had
    nearly converged, where 0.5 raised the loss by up to 66 % while it was blended; on hosts that still learn
    all of these end alike (bench/growth.py).

    Raises:
        ConfigurationError: ``rho`` is not a finite number above 0.
    """

    rho: float = 0.2

    def __post_init__(self) -> None:
        number = isinstance(self.rho, (int, float)) and not isinstance(self.rho, bool)
        if not number or not 0.0 < self.rho < math.inf:
            raise ConfigurationError(f"rho must be a finite number above 0, got {self.rho!r}")


Isolation = StraightThrough | TrustRegion


class _Behind(Function):
    @staticmethod
    def forward(
        ctx: Any, host: Tensor, seed: Tensor, alpha: Tensor, rho: float | None, learned: Callable[[], None] | None
    ) -> Tensor:
        _keep(ctx, host, seed, alpha, rho, learned)
        # A copy, not the input itself: autograd forbids in-place operations on an input that a custom
        # function returned, and ReLU(inplace=True) behind a slot is everyday code.
        return host.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        host, seed = ctx.saved_tensors
        difference = seed - host
        to_alpha = to_seed = None
        if ctx.needs_input_grad[2]:
            to_alpha = slope(gradient, difference)
        if ctx.needs_input_grad[1]:
            to_seed = gradient
            if ctx.rho is not None:
                wide = torch.promote_types(gradient.dtype, torch.float32)
                radius = ctx.rho * torch.linalg.vector_norm(host, dtype=wide)
                norm = torch.linalg.vector_norm(gradient, dtype=wide)
                weight = torch.where(radius > 0, norm / radius, torch.zeros_like(norm))
                to_seed = gradient + weight.to(gradient.dtype) * difference
        if ctx.learned is not None:
            ctx.learned()
        return gradient if ctx.needs_input_grad[0] else None, to_seed, to_alpha, None, None


class _BehindTransformed(_Behind):
    generate_vmap_rule = True

    @staticmethod
    def forward(host: Tensor, *others: object) -> Tensor:  # type: ignore[override]
        return host.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _keep(ctx, *inputs)

    @staticmethod
    def jvp(ctx: Any, to_host: Tensor, *others: object) -> Tensor:
        # The output is the host's, whatever seed and alpha do.
        return to_host.clone()


def _keep(
    ctx: Any, host: Tensor, seed: Tensor, alpha: Tensor, rho: float | None, learned: Callable[[], None] | None
) -> None:
    ctx.rho, ctx.learned = rho, learned
    ctx.save_for_backward(host, seed)


def behind(
    host: Tensor, seed: Tensor, alpha: Tensor, isolation: Isolation, learned: Callable[[], None] | None = None
) -> Tensor:
    """The host's features, while the seed learns behind them.

    In the backward pass the host gets the incoming gradient g unchanged, the seed what ``isolation`` says,
    and ``alpha`` gets <g, seed - host>: the slope of the loss along the blend, at alpha = 0.

    Args:
        host: features of the host, any shape, floating.
        seed: what a full blend would put out for the detached features (``blending.candidate``; for "add" the
            seed's output), same shape and dtype.
        alpha: 0-dim float32 leaf that requires a gradient; its value is not used.
        isolation: what the seed is trained by.
        learned: called when a backward pass has reached the seed.

    Returns:
        A copy of ``host``, same bits and memory format.
    """
    rho = isolation.rho if isinstance(isolation, TrustRegion) else None
    return call(_Behind, _BehindTransformed, host, seed, alpha, rho, learned)


class _Wall(Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, anchor: Tensor) -> Tensor:
        return features.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def given_to(features: Tensor, anchor: Tensor, *, copy: bool, wall: bool) -> Tensor:
    """What a seed is given of its features: they themselves, or a copy.

    torch's group norm on a CPU writes the gradient of a channels_last input whether it is wanted or not: into nothing,
    which ends the process, where the input needs none. Such features come as a copy that takes a gradient and lets
    it go no further. (``torch.func`` has another backward pass, and may yet differentiate what seems to need none.)

    Args:
        features: floating, any shape.
        anchor: any tensor that requires a gradient; it gets none.
        copy: whether the seed writes into them.
        wall: whether the seed may have a group norm; otherwise a copy and the gradient of its input are saved.
    """
    # As torch counts channels_last, by strides. A contiguous tensor whose last dimensions are 1 may be taken for one
    # here as well, which costs a copy.
    last = wall and features.dim() > 3 and features.stride(1) <= features.stride(-1)
    quick = torch.compiler.is_compiling() or not transforming()
    if last and quick and features.is_cpu and not features.requires_grad and torch.is_grad_enabled():
        walled: Tensor = _Wall.apply(features, anchor)
        return walled
    return features.clone() if copy else features


def leaks(output: Tensor, own: Iterable[Tensor]) -> int:
    """How many leaves outside ``own`` a backward pass from ``output`` would reach.

    0 for a seed that is isolated. Looks at the autograd graph of the seed, which its detached input keeps
    as small as the seed; not for use inside a compiled region.
    """
    allowed = {id(tensor) for tensor in own}
    if output.grad_fn is None:
        # A leaf, or no graph at all: then the output itself is what a backward pass would reach.
        return int(output.requires_grad and id(output) not in allowed)
    # An AccumulateGrad node has its leaf.
    leaves = {id(node.variable) for node in _nodes(output) if getattr(node, "variable", None) is not None}
    return len(leaves - allowed)


def uses_group_norm(output: Tensor) -> bool:
    """Whether a group norm is in the graph of a seed's output; see ``given_to``."""
    return any(node.name().startswith("NativeGroupNormBackward") for node in _nodes(output))


def _nodes(output: Tensor) -> set[Any]:
    """Every node of the graph that ends in ``output``."""
    seen: set[Any] = set()
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return seen
