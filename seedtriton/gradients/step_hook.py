"""Measuring by a hook inside optimizer.step(), once per step, also with several optimizers and a loss scale."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..core.errors import WiringError
from .loss_scale import mixed, read_scaler
from .row import UNSCALED, LossScale


class StepHook:
    """Hooks on the first and the last of some optimizers, of which one measures.

    Normally it is the last: by then a scaler has unscaled the gradients of all of them. Optimizers that
    unscale by themselves (fused ones) do so in their own step, and leave their gradients unscaled: then it is
    the first, when the gradients of all are still scaled alike.
    """

    def __init__(
        self,
        measure: Callable[[LossScale], None],
        optimizers: Sequence[torch.optim.Optimizer],
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self._measure = weakref.WeakMethod(measure)
        self._optimizers = tuple(optimizers)
        self._scaler = scaler
        self._measured_by_first = False
        ends = dict.fromkeys((optimizers[0], optimizers[-1]))
        self._handles = [optimizer.register_step_pre_hook(self) for optimizer in ends]

    def remove(self) -> None:
        """End it."""
        for handle in self._handles:
            handle.remove()

    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Measure, if this is the optimizer to do it at; WiringError for a step with a closure."""
        measure = self._measure()
        if measure is None:
            return
        # torch passes the optimizer itself among the arguments.
        if any(value is not None and value is not optimizer for value in (*args, kwargs.get("closure"))):
            raise WiringError(
                "optimizer.step(closure) makes the gradients inside the step, after this hook: "
                "call measure() at the end of the closure (in Lightning: on_before_optimizer_step) instead"
            )
        first, last = self._optimizers[0], self._optimizers[-1]
        # A scaler hands an optimizer that unscales by itself what it needs, for the duration of the step.
        scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        if optimizer is first and scale is not None:
            self._measured_by_first = first is not last
            measure(LossScale(scale, scale, found_inf))
        elif optimizer is last and self._measured_by_first:
            self._measured_by_first = False
        elif optimizer is last and scale is not None:
            measure(mixed(scale))
        elif optimizer is last:
            measure(UNSCALED if self._scaler is None else read_scaler(self._scaler, self._optimizers, in_step=True))
