"""How the host's features and a seed's output become one, by a blend factor alpha.

An operator is what the blend is at alpha = 1, its *candidate*; every blend is the straight line from the
host to it. So all of them are the host exactly at alpha = 0, linear in alpha, and pass alpha its slope.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigurationError, WiringError

ADD = "add"
MULTIPLY = "multiply"
GATE = "gate"
BLENDS = (ADD, MULTIPLY, GATE)


def check_blend(operator: object) -> None:
    """Raise ConfigurationError unless ``operator`` is the name of one."""
    if operator not in BLENDS:
        raise ConfigurationError(f"unknown blend {operator!r}; known blends: {list(BLENDS)}")


def candidate(operator: str, host: Tensor, seed: Tensor, gate: nn.Module | None = None) -> Tensor:
    """What the blend is at alpha = 1; same shape and dtype as ``host``.

    - "add": ``seed``, the very tensor.
    - "multiply": ``host * (1 + tanh(seed - host))``, between 0 and twice the host. Inside the tanh the host is
      detached: its gradient there would couple it to a seed it has not asked for.
    - "gate": ``host + g(host) * (seed - host)`` for a ``GateNetwork`` g.

    Args:
        operator: one of ``BLENDS``.
        host: features of the host, floating.
        seed: the seed's output, same shape and dtype.
        gate: the gate network, for "gate".
    """
    if operator == MULTIPLY:
        return host * (1 + torch.tanh(seed - host.detach()))
    if operator == GATE:
        assert gate is not None
        share: Tensor = gate(host).to(host.dtype)
        return host + share * (seed - host)
    return seed


class _Blend(torch.autograd.Function):
    # torch.where, and nothing else, would hide the slope at alpha = 0, where a ramp begins.
    @staticmethod
    def forward(ctx: Any, host: Tensor, full: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(host, full, alpha)
        weight = alpha.to(host.dtype)
        return torch.where(weight == 0, host, torch.lerp(host, full, weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        host, full, alpha = ctx.saved_tensors
        weight = alpha.to(gradient.dtype)
        to_host = gradient * (1 - weight) if ctx.needs_input_grad[0] else None
        to_full = gradient * weight if ctx.needs_input_grad[1] else None
        to_alpha = slope(gradient, full - host) if ctx.needs_input_grad[2] else None
        return to_host, to_full, to_alpha


def blend(host: Tensor, full: Tensor, alpha: Tensor) -> Tensor:
    """``host + alpha * (full - host)``: exactly the host at 0 and exactly ``full`` at 1.

    At 0 not even a NaN or an infinity of ``full`` reaches the output.

    Args:
        host: features of the host, floating.
        full: a ``candidate``, same shape and dtype.
        alpha: 0-dim tensor in [0, 1]; its gradient is ``slope(dL/dout, full - host)``.
    """
    out: Tensor = _Blend.apply(host, full, alpha)
    return out


def slope(gradient: Tensor, difference: Tensor) -> Tensor:
    """``<gradient, difference>``: dL/dalpha of a blend, float32 0-dim. Its negative is the blend gain."""
    # bf16 sums keep three digits: everything that sums is at least fp32.
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return (gradient.to(wide) * difference.to(wide)).sum().float()


class _Shield(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, host: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(alpha)
        return host.view_as(host)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (alpha,) = ctx.saved_tensors
        return torch.where(alpha == 0, gradient.new_zeros(()), gradient), None


def shield(host: Tensor, alpha: Tensor) -> Tensor:
    """The host's features, as a seed may see them: at alpha = 0 no gradient comes back through it.

    It would be zero times whatever the seed holds, and zero times NaN is NaN in every weight of the host.
    """
    out: Tensor = _Shield.apply(host, alpha)
    return out


class GateNetwork(nn.Module):
    """One value in (0, 1) per sample, from the host's features: how much of the seed this sample gets.

    Mean over everything but batch and channels, then ``Linear(C, max(8, C // 4))``, ReLU, ``Linear(., 1)``,
    sigmoid. Channels are dim 1 of 4-D features and the last of 2-D and 3-D ones.

    Args:
        channels: number of channels C.
    """

    def __init__(self, channels: int) -> None:
        """Make the two layers."""
        super().__init__()
        self.channels = channels
        hidden = max(8, channels // 4)
        self.squeeze, self.excite = nn.Linear(channels, hidden), nn.Linear(hidden, 1)

    def forward(self, features: Tensor) -> Tensor:
        """The gate, ``[batch, 1, ...]`` with as many dimensions as ``features``."""
        if features.dim() == 4:
            pooled = features.mean(dim=(2, 3))
        else:
            pooled = features.mean(dim=1) if features.dim() == 3 else features
        value = torch.sigmoid(self.excite(torch.relu(self.squeeze(pooled))))
        return value.view(-1, *[1] * (features.dim() - 1))


def channels_of(features: Tensor) -> int:
    """Channels as ``GateNetwork`` counts them; WiringError when features are not 2-D, 3-D or 4-D."""
    if features.dim() not in (2, 3, 4):
        raise WiringError(
            f"blend 'gate' needs features of 2, 3 or 4 dimensions, got {tuple(features.shape)}; use 'add' or 'multiply'"
        )
    return features.shape[1] if features.dim() == 4 else features.shape[-1]
