"""A small Muon for tests: momentum, orthogonalised for matrices; torch's own takes no biases and no convolutions.

Newton-Schulz iteration and its coefficients: Keller Jordan, "Muon: an optimizer for hidden layers", 2024.
"""

import torch


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr=0.02, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                update = state["momentum"].mul_(group["momentum"]).add_(parameter.grad)
                if parameter.ndim > 1:
                    update = orthogonal(update.flatten(1)).view_as(parameter)
                parameter.sub_(update, alpha=group["lr"])


def orthogonal(matrix):
    """Five iterations that bring every singular value near 1."""
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x
