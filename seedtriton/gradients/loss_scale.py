"""What a GradScaler has done to the gradients so far: read on the device, without waiting and without a change."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from ..core.errors import ConfigurationError, WiringError
from .optimizers import names_of
from .row import UNSCALED, LossScale

logger = logging.getLogger("seedtriton")


def read_scaler(
    scaler: torch.amp.GradScaler, optimizers: Sequence[torch.optim.Optimizer], *, in_step: bool = False
) -> LossScale:
    """The state of the scaler for these optimizers, before or after ``unscale_``.

    When one optimizer was unscaled and another was not, no ratio of their gradients means anything: the
    sample is marked as one to drop.

    Args:
        scaler: read, never touched.
        optimizers: whose gradients are measured.
        in_step: the last of them is about to step; the others have, and their gradients are still there.

    Raises:
        WiringError: no optimizer is known, or one has already stepped.
        ConfigurationError: it is none.
    """
    if not hasattr(scaler, "is_enabled"):
        raise ConfigurationError(f"measure() takes a GradScaler or nothing, got a {type(scaler).__name__}")
    # The public get_scale() waits for the device; these attributes are what torch's own optimizers are given.
    # A scaler that is switched off has none of them.
    scale: Tensor | None = scaler._scale if scaler.is_enabled() else None
    if scale is None:
        return UNSCALED
    if not optimizers:
        raise WiringError(
            "a scaler says for each optimizer whether its gradients are still scaled: give the monitor its optimizers"
        )
    table = table_of(scaler)
    states = [state_in(table, optimizer) for optimizer in optimizers]
    stages = {state["stage"] if state else OptState.READY for state in states}
    if in_step:
        stages = {OptState.UNSCALED if stage is OptState.STEPPED else stage for stage in stages}
    if OptState.STEPPED in stages:
        raise WiringError("measure before scaler.step(optimizer): after it the gradients are those of a step gone by")
    if stages == {OptState.READY}:
        return LossScale(scale, scale)
    if stages == {OptState.UNSCALED}:
        found = [inf.to(scale.device) for state in states if state for inf in state["found_inf_per_device"].values()]
        return LossScale(None, scale, found[0] if len(found) == 1 else torch.stack(found).sum() if found else None)
    return mixed(scale)


def scale_of(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> LossScale:
    """The state of the gradients of one optimizer that is about to step, has stepped or does not step this time."""
    # A scaler hands an optimizer that unscales by itself what it needs, for the duration of the step.
    scale = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        return LossScale(scale, scale, getattr(optimizer, "found_inf", None))
    return UNSCALED if scaler is None else read_scaler(scaler, (optimizer,), in_step=True)


def scale_of_all(scales: Sequence[LossScale], scaler: torch.amp.GradScaler | None) -> LossScale:
    """What holds for a sample of optimizers with these scales: what nobody unscales, and whether one will skip."""
    scale: Tensor | None = scaler._scale if scaler is not None and scaler.is_enabled() else None
    if scale is None:
        scale = next((known.gains for known in scales if known.gains is not None), None)
    found = [known.found_inf for known in scales if known.found_inf is not None]
    skips = torch.stack([inf.to(found[0].device).reshape(()) for inf in found]).sum() if found else None
    return LossScale(scale, scale, skips)


def table_of(scaler: torch.amp.GradScaler | None) -> Any:
    """What the scaler knows of each optimizer, another table after ``update()``; None: there is none, or it is off."""
    return getattr(scaler, "_per_optimizer_states", None)


def state_in(table: Any, optimizer: torch.optim.Optimizer) -> Any:
    """What such a table says of an optimizer, by itself or a wrapper of it; None where it says nothing."""
    # get(): looking up an unknown optimizer would add it to the table.
    states = [None if table is None else table.get(id(known)) for known in names_of(optimizer)]
    return next((state for state in states if state), None)


def step_if_grads(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> bool:
    """``scaler.step(optimizer)``, unless no parameter of the optimizer has a gradient.

    A seed that is not in the forward pass yet, or rests, leaves its optimizer without gradients;
    ``GradScaler.step`` then raises "No inf checks were recorded for this optimizer". Call ``scaler.update()`` once
    after all optimizers, as ever; it wants at least one of them to have had gradients.

    Args:
        scaler: switched off, it steps as the optimizer itself would, under the same condition.
        optimizer: unscaled before, or not.

    Returns:
        Whether the scaler was asked to step; like every step of a scaler, it is skipped on overflow.
    """
    if all(parameter.grad is None for group in optimizer.param_groups for parameter in group["params"]):
        return False
    scaler.step(optimizer)
    return True


def mixed(scale: Tensor) -> LossScale:
    """The scale of a sample that is to be dropped, because it mixes scaled and unscaled gradients; warns once."""
    global _warned
    if not _warned:
        _warned = True
        logger.warning(
            "one optimizer was unscaled and another was not: such samples are dropped; "
            "call scaler.unscale_ for all optimizers before measure(), or for none"
        )
    return LossScale(None, scale, torch.ones_like(scale))


_warned = False
