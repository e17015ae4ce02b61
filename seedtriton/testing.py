"""Helpers for our tests and for people who write their own seeds."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .growth.slot import SeedSlot


def assert_isolated(
    model: nn.Module, inputs: Tensor, loss: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Assert that seeds in TRAINING are invisible: output and every host gradient, bit for bit.

    Runs forward and backward on two copies of the model, one as it is and one with every slot emptied, with
    the same random state.

    Args:
        model: contains slots with seeds in TRAINING; not changed.
        inputs: one batch for the model.
        loss: from the output to a scalar; the sum of squares unless told.

    Returns:
        The gradients that the seeds got, by parameter name.

    Raises:
        AssertionError: something differs, and what.
    """
    loss = loss or (lambda output: output.float().square().sum())
    grown, plain = copy.deepcopy(model), copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, SeedSlot):
            module.seed = module.gate = None
    results = []
    for candidate in (grown, plain):
        candidate.zero_grad(set_to_none=True)
        with torch.random.fork_rng():
            output = candidate(inputs)
            loss(output).backward()
        results.append(output)
    if not torch.equal(results[0], results[1]):
        raise AssertionError(f"the output differs by up to {(results[0] - results[1]).abs().max().item():.3g}")
    host = dict(plain.named_parameters())
    seeds = {}
    for name, parameter in grown.named_parameters():
        if name not in host:
            if parameter.grad is not None:
                seeds[name] = parameter.grad
            continue
        expected = host[name].grad
        same = parameter.grad is None if expected is None else _same(parameter.grad, expected)
        if not same:
            raise AssertionError(f"the gradient of host parameter {name!r} differs")
    return seeds


def _same(found: Tensor | None, expected: Tensor) -> bool:
    return found is not None and torch.equal(found, expected)
