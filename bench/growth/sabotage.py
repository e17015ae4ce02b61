"""What is done to seeds so that they learn nothing: before a gate has seen them, or after G2 let them in.

Whether that makes a seed harmful is measured, not written here: random features help a host that is too small, and a
host that trains on finds a use for weights that were turned round.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.tasks import Task


class Sabotage:
    """Does nothing; the others override one of these.

    Attributes:
        name: of the row.
    """

    name = "none"

    def task(self, task: Task, random_seed: int) -> Task:
        """The task, changed before anything is trained."""
        return task

    def germinate(self) -> dict[str, Any]:
        """Arguments of ``growth.germinate``."""
        return {}

    def before_step(self, seed: nn.Module) -> None:
        """In every step, after the gradients were measured."""

    def once_felt(self, seed: nn.Module, group: dict[str, Any]) -> None:
        """One epoch after G2 let the seed in; ``group`` is its parameter group in the optimizer."""


class NoOptimizer(Sabotage):
    """It gets gradients and never moves."""

    name = "in no optimizer"

    def germinate(self) -> dict[str, Any]:
        return {"add_to_optimizer": False}


class ZeroRate(Sabotage):
    """Learning rate 0."""

    name = "learning rate 0"

    def germinate(self) -> dict[str, Any]:
        return {"lr": 0.0}


class Shuffled(Sabotage):
    """The elements of its gradients change places after they were measured: it moves, as far as others, anywhere."""

    name = "gradients shuffled"

    def before_step(self, seed: nn.Module) -> None:
        for parameter in seed.parameters():
            if parameter.grad is not None:
                order = torch.randperm(parameter.numel())
                parameter.grad.copy_(parameter.grad.flatten()[order].view_as(parameter))


class RandomLabels(Sabotage):
    """Nothing to learn, for the host neither: what is learned is learned by heart."""

    name = "random labels"

    def task(self, task: Task, random_seed: int) -> Task:
        return task.with_shuffled_labels(random_seed)


class GoesSilent(Sabotage):
    """It puts out nothing from then on, and takes the host's features with it."""

    name = "silent once felt"

    def once_felt(self, seed: nn.Module, group: dict[str, Any]) -> None:
        seed.register_forward_hook(_silent)


def _silent(module: nn.Module, given: Any, output: Tensor) -> Tensor:
    return 0.0 * output


class Noisy(Sabotage):
    """Its output drowns in noise, as loud as itself three times over."""

    name = "noisy once felt"

    def once_felt(self, seed: nn.Module, group: dict[str, Any]) -> None:
        seed.register_forward_hook(_noisy)


def _noisy(module: nn.Module, given: Any, output: Tensor) -> Tensor:
    return output + 3.0 * output.detach().std() * torch.randn_like(output)


class Forgets(Sabotage):
    """What it has learned is turned round, and it learns no more."""

    name = "turned round once felt"

    def once_felt(self, seed: nn.Module, group: dict[str, Any]) -> None:
        group["lr"] = 0.0
        with torch.no_grad():
            for parameter in list(seed.parameters())[-2:]:
                parameter.mul_(-3.0)


class GoesWild(Sabotage):
    """A learning rate a hundred times too high."""

    name = "wild once felt"

    def once_felt(self, seed: nn.Module, group: dict[str, Any]) -> None:
        group["lr"] *= 100.0


KINDS = (NoOptimizer, ZeroRate, Shuffled, RandomLabels, GoesSilent, Noisy, Forgets, GoesWild)
SABOTAGES = {kind.name: kind for kind in KINDS}
