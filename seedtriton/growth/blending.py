"""How the host's features and a seed's output become one, by a blend factor alpha.

An operator is what the blend is at alpha = 1, its *candidate*; every blend is the straight line from the
host to it. So all of them are the host exactly at alpha = 0, linear in alpha, and pass alpha its slope.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad

from ..core.errors import ConfigurationError, WiringError

ADD = "add"
MULTIPLY = "multiply"
GATE = "gate"
BLENDS = (ADD, MULTIPLY, GATE)


def check_blend(operator: object, gate_dims: object = None, channel_dim: object = None) -> None:
    """Raise ConfigurationError unless ``operator`` is the name of one and what is said of its gate can be meant."""
    if operator not in BLENDS:
        raise ConfigurationError(f"unknown blend {operator!r}; known blends: {list(BLENDS)}")
    if operator != GATE and (gate_dims is not None or channel_dim is not None):
        raise ConfigurationError(
            f"gate_dims={gate_dims!r} and channel_dim={channel_dim!r} are of blend 'gate', not of {operator!r}"
        )
    dims = () if gate_dims is None else gate_dims
    if not isinstance(dims, (tuple, list)) or any(type(dim) is not int for dim in dims):
        raise ConfigurationError(f"gate_dims must be a tuple of dimensions such as (2, 3), got {gate_dims!r}")
    if channel_dim is not None and type(channel_dim) is not int:
        raise ConfigurationError(f"channel_dim must be a whole number such as 1, got {channel_dim!r}")


def candidate(operator: str, host: Tensor, seed: Tensor, gate: nn.Module | None = None) -> Tensor:
    """What the blend is at alpha = 1; same shape and dtype as ``host``.

    - "add": ``seed``, the very tensor.
    - "multiply": ``host * (1 + tanh(seed - host))``, between 0 and twice the host.
    - "gate": ``host + g(host) * (seed - host)`` for a ``GateNetwork`` g.

    Every gradient is that of the formula, the host's inside tanh and g included; who wants the host's own path
    alone gives a detached ``host``.

    Args:
        operator: one of ``BLENDS``.
        host: features of the host, floating.
        seed: the seed's output, same shape and dtype.
        gate: the gate network, for "gate".
    """
    if operator == MULTIPLY:
        return host * (1 + torch.tanh(seed - host))
    if operator == GATE:
        assert gate is not None
        share: Tensor = gate(host).to(host.dtype)
        return host + share * (seed - host)
    return seed


def transforming() -> bool:
    """Whether grad, vmap or jvp of ``torch.func`` is at work, or forward-mode differentiation."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def call(quick: type[Function], transformed: type[Function], *inputs: object) -> Tensor:
    """Apply an autograd function in one of its two forms.

    ``quick`` takes a context in ``forward``: 9 us a call on a CPU against 44, and the only form that torch.compile
    knows beside a jvp. ``transformed``, a subclass of it, has ``setup_context`` and jvp, which ``torch.func`` asks for.
    """
    inside = not torch.compiler.is_compiling() and transforming()
    out: Tensor = (transformed if inside else quick).apply(*inputs)
    return out


class _Blend(Function):
    # torch.where, and nothing else, would hide the slope at alpha = 0, where a ramp begins.
    @staticmethod
    def forward(ctx: Any, host: Tensor, full: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(host, full, alpha)
        return _mixed(host, full, alpha)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        host, full, alpha = ctx.saved_tensors
        weight = alpha.to(gradient.dtype)
        to_host = gradient * (1 - weight) if ctx.needs_input_grad[0] else None
        to_full = gradient * weight if ctx.needs_input_grad[1] else None
        to_alpha = slope(gradient, full - host) if ctx.needs_input_grad[2] else None
        return to_host, to_full, to_alpha


class _BlendTransformed(_Blend):
    generate_vmap_rule = True

    @staticmethod
    def forward(host: Tensor, full: Tensor, alpha: Tensor) -> Tensor:  # type: ignore[override]
        return _mixed(host, full, alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, to_host: Tensor, to_full: Tensor, to_alpha: Tensor) -> Tensor:
        host, full, alpha = ctx.saved_tensors
        along: Tensor = _mixed(to_host, to_full, alpha) + to_alpha.to(host.dtype) * (full - host)
        return along


def _mixed(host: Tensor, full: Tensor, alpha: Tensor) -> Tensor:
    weight = alpha.to(host.dtype)
    mixed: Tensor = torch.where(weight == 0, host, torch.lerp(host, full, weight))
    return mixed


def blend(host: Tensor, full: Tensor, alpha: Tensor) -> Tensor:
    """``host + alpha * (full - host)``: exactly the host at 0 and exactly ``full`` at 1.

    At 0 not even a NaN or an infinity of ``full`` reaches the output.

    Args:
        host: features of the host, floating.
        full: a ``candidate``, same shape and dtype.
        alpha: 0-dim tensor in [0, 1]; its gradient is ``slope(dL/dout, full - host)``.
    """
    return call(_Blend, _BlendTransformed, host, full, alpha)


def slope(gradient: Tensor, difference: Tensor) -> Tensor:
    """``<gradient, difference>``: dL/dalpha of a blend, float32 0-dim. Its negative is the blend gain."""
    # bf16 sums keep three digits: everything that sums is at least fp32.
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return (gradient.to(wide) * difference.to(wide)).sum().float()


class _Shield(Function):
    @staticmethod
    def forward(ctx: Any, host: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(alpha)
        return host.view_as(host)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (alpha,) = ctx.saved_tensors
        return torch.where(alpha == 0, gradient.new_zeros(()), gradient), None


class _ShieldTransformed(_Shield):
    generate_vmap_rule = True

    @staticmethod
    def forward(host: Tensor, alpha: Tensor) -> Tensor:  # type: ignore[override]
        return host.view_as(host)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def jvp(ctx: Any, to_host: Tensor, to_alpha: Tensor) -> Tensor:
        return to_host.view_as(to_host)


def shield(host: Tensor, alpha: Tensor) -> Tensor:
    """The host's features, as a seed may see them: at alpha = 0 no gradient comes back through it.

    It would be zero times whatever the seed holds, and zero times NaN is NaN in every weight of the host. Alpha is
    only looked at: as an input of the graph its slope would wait for the whole backward pass of the seed, and come when
    it can no longer be seen whether the seed's gradients were cleared before (see ``gradients/slope.py``).
    """
    return call(_Shield, _ShieldTransformed, host, alpha.detach())


class GateNetwork(nn.Module):
    """Values in (0, 1), from the host's features: how much of the seed each place gets.

    Mean over ``dims``, then ``Linear(C, max(8, C // 4))``, ReLU, ``Linear(., 1)``, sigmoid along the channels. Nothing
    is mixed that ``dims`` does not name: without any there is one value for every position of every sample, and
    a position of a causal model sees no later one.

    Args:
        channels: number of channels C.
        dims: dimensions of the features that share one value, such as (2, 3) of [B, C, H, W]; None is all but the
            first and the channels, which is what states of the first version mean.
        channel_dim: where the channels are; dim 1 of 4-D features and the last of 2-D and 3-D ones unless told.
    """

    def __init__(self, channels: int, dims: tuple[int, ...] | None = (), channel_dim: int | None = None) -> None:
        """Make the two layers."""
        super().__init__()
        self.channels, self.dims, self.channel_dim = channels, dims, channel_dim
        hidden = max(8, channels // 4)
        self.squeeze, self.excite = nn.Linear(channels, hidden), nn.Linear(hidden, 1)

    def forward(self, features: Tensor) -> Tensor:
        """The gate: the shape of ``features`` with 1 in place of the channels and of ``dims``."""
        at = _channel_dim(features, self.channel_dim)
        dims = self.dims
        if dims is None:
            dims = tuple(dim for dim in range(1, features.dim()) if dim != at)
        pooled = features.mean(dim=dims, keepdim=True) if dims else features
        value = torch.sigmoid(self.excite(torch.relu(self.squeeze(pooled.movedim(at, -1)))))
        return value.movedim(-1, at)


def gate_for(features: Tensor, dims: tuple[int, ...], channel_dim: int | None) -> GateNetwork:
    """A gate network for such features.

    Raises:
        WiringError: the features do not have these dimensions, or nobody said where their channels are.
    """
    rank = features.dim()
    if channel_dim is None and rank not in (2, 3, 4):
        raise WiringError(
            f"blend 'gate' knows the channels of features of 2, 3 or 4 dimensions, got {tuple(features.shape)}; "
            "say channel_dim=, or use 'add' or 'multiply'"
        )
    named = (*dims, *(() if channel_dim is None else (channel_dim,)))
    if any(not -rank <= dim < rank for dim in named):
        raise WiringError(f"gate_dims {dims} and channel_dim {channel_dim} do not fit features {tuple(features.shape)}")
    at = _channel_dim(features, channel_dim)
    pooled = [dim % rank for dim in dims]
    if at in pooled or len(set(pooled)) < len(pooled):
        raise WiringError(
            f"gate_dims {dims} of {tuple(features.shape)} name a dimension twice, or dim {at}, the channels"
        )
    return GateNetwork(features.shape[at], dims, channel_dim)


def _channel_dim(features: Tensor, channel_dim: int | None) -> int:
    """Where the channels are, counted from the front."""
    if channel_dim is None:
        return 1 if features.dim() == 4 else features.dim() - 1
    return channel_dim % features.dim()
