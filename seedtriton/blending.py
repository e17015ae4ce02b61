"""How the host's features and a seed's output become one, by a blend factor alpha.

Each operator is the host exactly at alpha = 0 and passes alpha its gradient, the slope of the loss
along the blend.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add(host: Tensor, seed: Tensor, alpha: Tensor) -> Tensor:
    """``host + alpha * (seed - host)``: exactly the host at 0 and exactly the seed at 1.

    At 0 not even a NaN or an infinity of the seed reaches the output.

    Args:
        host: features of the host, floating.
        seed: the seed's output, same shape and dtype.
        alpha: 0-dim tensor in [0, 1].
    """
    weight = alpha.to(host.dtype)
    return torch.where(weight == 0, host, torch.lerp(host, seed, weight))
