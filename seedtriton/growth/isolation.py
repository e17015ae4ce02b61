"""How a seed trains behind the host: the host's output and gradients are, bit for bit, those without it.

The seed sees a detached copy of the host's features; what it puts out goes nowhere, and only the
gradient that the host's output receives is handed to it. A leak is found in the graph, not by numbers.
"""

from __future__ import annotations

import dataclasses
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


ELEMENTWISE = "elementwise"
NORM = "norm"
RULES = (ELEMENTWISE, NORM)


@dataclass(frozen=True)
class TrustRegion:
    """The seed gets a gradient with a target: the negative gradient, no larger than the host's features allow.

    Straight-through's objective is a direction without end. Both rules here end it, where the seed's contribution
    s - h has a size that is ``rho`` times that of the host's features; ``towards`` has the formulas.

    - "elementwise": every element of the contribution is held to ``rho`` times the root mean square of its sample's
      features, so that cutting a batch into micro-batches changes nothing. (A sample is dim 0; where that is time, each
      moment has a radius of its own.)
      Never longer than straight-through's gradient in any element, and so as stable as that under every optimizer.
    - "norm": the contribution as a whole is held to it, and only in the middle over its elements. Its gradient is as
      long as the contribution is wide, without a limit: SGD with momentum runs away with it. What the first version
      had, for comparison.

    The default of ``rho`` is the largest of 0.1, 0.2, 0.3, 0.5 and 1.0 that did not overshoot on a host that had
    nearly converged (by the rule "norm"; ``bench.growth --warm``); on hosts that still learn all of these end alike.
    Where it overshoots all the same, gate G2 says so: the probe finds harm although the blend gain is certain. Then a
    ``GrowthController`` halves the elementwise ``rho``, down to ``least``; with ``least`` at ``rho`` it never does.

    Raises:
        ConfigurationError: ``rho`` or ``least`` is not a finite number above 0, or no rule has this name.
    """

    rho: float = 0.2
    rule: str = ELEMENTWISE
    least: float = 0.0125

    def __post_init__(self) -> None:
        for name in ("rho", "least"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < math.inf:
                raise ConfigurationError(f"{name} must be a finite number above 0, got {value!r}")
        if self.rule not in RULES:
            raise ConfigurationError(f"rule must be one of {list(RULES)}, got {self.rule!r}")

    def narrower(self) -> TrustRegion:
        """Half as wide, at least ``least``; as it is where that is not narrower, and by the rule "norm"."""
        rho = max(self.rho / 2, self.least)
        return dataclasses.replace(self, rho=rho) if self.rule == ELEMENTWISE and rho < self.rho else self


Isolation = StraightThrough | TrustRegion


@torch.no_grad()
def towards(gradient: Tensor, host: Tensor, difference: Tensor, isolation: Isolation) -> Tensor:
    """What a seed behind the host gets for g = dL/dout, where it contributes d = s - h to the features h.

    - ``StraightThrough``: g, the very tensor.
    - ``TrustRegion``, "elementwise": ``m = (g r + |g| d) / (r + |d|)`` in every element, with the ``radius`` r of its
      sample. m = 0 at d = -r sign(g), and where g = 0; m = g where d has the sign of g, and everywhere when r is 0:
      then there is no scale to hold the seed to. |m| <= |g|, after rounding too.
    - ``TrustRegion``, "norm": ``g + lambda d``, ``lambda = |g| / (rho |h|)`` once per call, 0 when h is all zero.

    What is not finite in g or d stays visible. A rule and no derivative: in a second differentiation it is a constant.

    Args:
        gradient: g, floating.
        host: h, same shape.
        difference: d, same shape and dtype.
        isolation: which rule.

    Returns:
        Same shape and dtype as ``gradient``; computed in float32 or wider but for the sum of "norm".
    """
    if isinstance(isolation, StraightThrough):
        return gradient
    wide = torch.promote_types(gradient.dtype, torch.float32)
    if isolation.rule == NORM:
        reach = isolation.rho * torch.linalg.vector_norm(host, dtype=wide)
        norm = torch.linalg.vector_norm(gradient, dtype=wide)
        weight = torch.where(reach > 0, norm / reach, torch.zeros_like(norm))
        return gradient + weight.to(gradient.dtype) * difference
    bound = radius(host, isolation.rho)
    # Beside a radius as large as this, every d is nothing.
    bound = bound.masked_fill(bound == 0, torch.finfo(wide).max / 2)
    # m = g (r + sign(g) d) / (r + |d|), in this order: rounding is monotone, so numerator, quotient and product are
    # none of them larger than what bounds them. Two buffers beside the result of the sign.
    pull = (gradient.sign() * difference).to(wide)
    span = pull.abs().add_(bound)
    return pull.add_(bound).div_(span).mul_(gradient).to(gradient.dtype)


def radius(host: Tensor, rho: float) -> Tensor:
    """``rho sqrt(mean(h^2))`` of each sample, over all dimensions but the first; of all samples where that is 0.

    Features without a dimension of samples, 1-D or less, are one sample.

    Args:
        host: h, floating; dim 0 the samples.
        rho: share of the size of the features.

    Returns:
        [n, 1, ...] or 0-dim, float32 or wider; 0 where all features are.
    """
    wide = torch.promote_types(host.dtype, torch.float32)
    if host.dim() < 2 or not host.numel():
        whole: Tensor = torch.linalg.vector_norm(host, dtype=wide) * (rho / max(host.numel(), 1) ** 0.5)
        return whole
    norms = torch.linalg.vector_norm(host, dim=tuple(range(1, host.dim())), keepdim=True, dtype=wide)
    radii: Tensor = norms * (rho / host[0].numel() ** 0.5)
    # A sample on which the features are all zero has no scale of its own, and is held to that of the others.
    shared: Tensor = torch.linalg.vector_norm(radii) / len(host) ** 0.5
    return torch.where(radii > 0, radii, shared)


class _Behind(Function):
    @staticmethod
    def forward(
        ctx: Any, host: Tensor, seed: Tensor, alpha: Tensor, isolation: Isolation, learned: Callable[[], None] | None
    ) -> Tensor:
        _keep(ctx, host, seed, alpha, isolation, learned)
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
            to_seed = towards(gradient, host, difference, ctx.isolation)
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
    ctx: Any, host: Tensor, seed: Tensor, alpha: Tensor, isolation: Isolation, learned: Callable[[], None] | None
) -> None:
    ctx.isolation, ctx.learned = isolation, learned
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
    return call(_Behind, _BehindTransformed, host, seed, alpha, isolation, learned)


class _Wall(Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, anchor: Tensor) -> Tensor:
        return features.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


# Holds walls; a leaf of its own, because whoever has a hook on a leaf of theirs would be called without a gradient.
_ANCHOR = torch.zeros((), requires_grad=True, device="cpu")


def given_to(features: Tensor, learning: Iterable[Tensor], *, copy: bool, wall: bool) -> Tensor:
    """What a seed is given of its features: they themselves, or a copy.

    torch's group norm on a CPU writes the gradient of a channels_last input whether it is wanted or not: into nothing,
    which ends the process, where the input needs none. Such features come as a copy that takes a gradient and lets
    it go no further. (``torch.func`` has another backward pass, and may yet differentiate what seems to need none.)

    Args:
        features: floating, any shape.
        learning: where none of them requires a gradient, no backward pass gets there.
        copy: whether the seed writes into them.
        wall: whether the seed may have a group norm; otherwise a copy and the gradient of its input are saved.
    """
    # As torch counts channels_last, by strides. A contiguous tensor whose last dimensions are 1 may be taken for one
    # here as well, which costs a copy.
    last = wall and features.dim() > 3 and features.stride(1) <= features.stride(-1)
    quick = torch.compiler.is_compiling() or not transforming()
    needed = last and quick and features.is_cpu and not features.requires_grad and torch.is_grad_enabled()
    if needed and any(tensor.requires_grad for tensor in learning):
        walled: Tensor = _Wall.apply(features, _ANCHOR)
        return walled
    return features.clone() if copy else features


@torch.no_grad()
def handed_on(features: Tensor, output: Tensor) -> Tensor:
    """How much of ``features`` is still in a seed's ``output``: the slope of one on the other over the samples.

    About 1 for an untrained ``x + f(x)`` and 0 for ``f(x)``. Means over dim 0 are left out: a bias is in no relation
    to the features, and the mean of what a ReLU puts out would make it one. What it cannot see: features in a
    branch that is ten times as loud as they are.

    Args:
        features: of the host, floating, dim 0 the samples.
        output: of the seed, same shape.

    Returns:
        0-dim, float32 or wider; NaN when the features do not differ between the samples.
    """
    wide = torch.promote_types(features.dtype, torch.float32)
    centred = features.to(wide) - features.mean(0, keepdim=True, dtype=wide)
    return (output.to(wide) * centred).sum() / centred.square().sum()


def as_number(number: Tensor | float | None) -> float | None:
    """A 0-dim tensor, or what was made of it before, as a number; None when it is not finite. Waits for the device."""
    if number is None or (isinstance(number, Tensor) and number.is_meta) or not math.isfinite(number):
        return None
    return float(number)


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
    """Every node of the graph that ends in ``output``, up to the wall."""
    seen: set[Any] = set()
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if node.name() != f"{_Wall.__name__}Backward":
                waiting += [following for following, _ in node.next_functions]
    return seen
