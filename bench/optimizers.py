"""The optimizers that the benchmarks and the tests of the rule behind the host train with.

Each takes all parameters: a seed gets a parameter group of its own in the host's optimizer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Momentum whose step is orthogonal for matrices (filters are flattened), and AdamW's for everything else.

    After K. Jordan and others, "Muon: An optimizer for hidden layers in neural networks" (2024): Nesterov momentum,
    five Newton-Schulz iterations, ``sqrt(max(1, rows / columns))`` for matrices that are not square.

    Args:
        params: parameters or groups of them.
        lr: of the matrices.
        momentum: of the matrices.
        rest: learning rate of the rest, as a share of ``lr``.
        weight_decay: decoupled, of everything.
    """

    ITERATIONS = 5
    COEFFICIENTS = (3.4445, -4.7750, 2.0315)

    def __init__(
        self, params: Iterable[Any], lr: float = 0.02, momentum: float = 0.95, rest: float = 0.3,
        weight_decay: float = 0.01,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "momentum": momentum, "rest": rest, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step of everything that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    step = self._orthogonal_step if parameter.ndim >= 2 else self._adam_step
                    step(parameter, group)

    def _orthogonal_step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        average = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        matrix = orthogonal(gradient.lerp(average, group["momentum"]).flatten(1))
        scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
        parameter.add_(matrix.view_as(parameter), alpha=-group["lr"] * scale)

    def _adam_step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        if not state:
            state |= {"step": 0, "mean": torch.zeros_like(gradient), "square": torch.zeros_like(gradient)}
        state["step"] += 1
        state["mean"].lerp_(gradient, 0.1)
        state["square"].lerp_(gradient.square(), 0.001)
        mean, square = (state[name] / (1 - beta ** state["step"]) for name, beta in (("mean", 0.9), ("square", 0.999)))
        parameter.addcdiv_(mean, square.sqrt().add_(1e-8), value=-group["lr"] * group["rest"])


def orthogonal(matrix: Tensor) -> Tensor:
    """Nearly the orthogonal factor of ``matrix`` [m, n]: its singular values, whatever they are, go to about 1."""
    a, b, c = Muon.COEFFICIENTS
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(Muon.ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x if wide else x.T


ADAMW, SGD, MUON, FAST_SGD = "AdamW", "SGD", "Muon", "fast SGD"


@dataclasses.dataclass(frozen=True)
class Kind:
    """An optimizer and its learning rate; None: each task's own."""

    make: Callable[..., torch.optim.Optimizer]
    lr: float | None = None


# Learning rates at which the hosts of bench/tasks.py do well alone: SGD of 0.01 to 0.2 and Muon of 0.005 to 0.05 were
# tried. The fast one is where hosts still learn, some of them best, and seeds behind them do not.
OPTIMIZERS = {
    ADAMW: Kind(torch.optim.AdamW),
    SGD: Kind(functools.partial(torch.optim.SGD, momentum=0.9), 0.02),
    MUON: Kind(Muon, 0.01),
    FAST_SGD: Kind(functools.partial(torch.optim.SGD, momentum=0.9), 0.1),
}
