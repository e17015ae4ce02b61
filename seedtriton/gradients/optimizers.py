"""Optimizers inside wrappers: which one really steps, and which are refused because nobody outside can tell."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable
from typing import Any

import torch

from ..core.errors import ConfigurationError, WiringError

# Where wrappers keep what they wrap: accelerate, Trainer, Lightning, Lookahead; SAM; schedule-free.
_INSIDE = ("optimizer", "_optimizer", "base_optimizer", "base")

# Those whose parameters are no longer the model's, by the package or the name of their class.
_REFUSED = {
    "deepspeed": "DeepSpeed keeps the gradients in partitions of its own, p.grad is None: use FSDP2 (fully_shard)",
    "ZeroRedundancyOptimizer": "each rank steps a share of the parameters: use FSDP2 (fully_shard)",
}

# Of each optimizer that was found inside something: what it was found in, for whoever is asked about the outside.
_wrappers: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[weakref.ref[Any]]] = weakref.WeakKeyDictionary()


def chain_of(optimizer: Any) -> tuple[Any, ...]:
    """The wrapper that was given, what is inside it, and so on; the last is the torch optimizer that steps.

    Raises:
        ConfigurationError: no torch optimizer, and none inside.
        WiringError: one of those that cannot be watched from outside, by name.
    """
    chain = [optimizer]
    while (inner := _inside(chain[-1])) is not None and all(inner is not known for known in chain):
        chain.append(inner)
    last, shown = chain[-1], type(optimizer).__name__
    for item in chain:
        for known in (type(item).__module__.partition(".")[0], type(item).__name__):
            if known in _REFUSED:
                raise WiringError(f"{shown} cannot be watched: {_REFUSED[known]}")
    # Every step counts by a hook, and hooks are made by Optimizer.__init__.
    if not isinstance(last, torch.optim.Optimizer) or not hasattr(last, "_optimizer_step_post_hooks"):
        raise ConfigurationError(
            f"{shown} is no torch optimizer and holds none in {', '.join(map(repr, _INSIDE))}: give the "
            "torch.optim.Optimizer that it steps"
        )
    if chain[:-1]:
        refs = _wrappers.setdefault(last, [])
        refs += [weakref.ref(item) for item in chain[:-1] if all(item is not ref() for ref in refs)]
    return tuple(chain)


def plain(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer that steps, inside whatever wraps it; errors as ``chain_of``'s."""
    found: torch.optim.Optimizer = chain_of(optimizer)[-1]
    return found


def each_plain(optimizers: Any) -> list[torch.optim.Optimizer]:
    """One optimizer or several, wrapped or in a container of many (``.optimizers``), as those that step.

    Raises:
        ConfigurationError: something among them is no optimizer.
        WiringError: one cannot be watched.
    """
    if isinstance(optimizers, Iterable) and not isinstance(optimizers, str):
        return [found for optimizer in optimizers for found in each_plain(optimizer)]
    many = held_by(optimizers)
    return [plain(optimizers)] if not many else [found for optimizer in many for found in each_plain(optimizer)]


def held_by(container: Any) -> list[Any]:
    """The optimizers in a container of many, which steps each; empty for what is none."""
    many = getattr(container, "optimizers", None)
    return list(many) if isinstance(many, (list, tuple)) else []


def names_of(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The optimizer, and whatever it was found in: a GradScaler knows the one that its ``step`` was given."""
    return [optimizer, *(item for ref in _wrappers.get(optimizer, ()) if (item := ref()) is not None)]


def _inside(outer: Any) -> Any:
    """What a wrapper wraps: an attribute with parameter groups, of the very parameters that it shows itself."""
    for name in _INSIDE:
        inner = getattr(outer, name, None)
        if hasattr(inner, "param_groups") and hasattr(inner, "step") and _parameters(inner) == _parameters(outer):
            return inner
    return None


def _parameters(optimizer: Any) -> set[int]:
    groups = getattr(optimizer, "param_groups", None) or ()
    return {id(parameter) for group in groups for parameter in group["params"]}


def capturing() -> bool:
    """Whether a CUDA graph is captured: when it is replayed, nothing that Python counts happens again."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def makes_state(optimizer: torch.optim.Optimizer) -> bool:
    """Before a step: whether it is one that ``torch.distributed.checkpoint`` makes to have a state to load into.

    It sets all rates and all gradients to zero for that, so it trains nothing. A first step of a warm-up or of a dead
    network does the same, and a rank may hold no element to tell it by: who calls is the same on every rank.
    """
    if optimizer.state or torch.compiler.is_compiling():
        return False
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict":
            return True
        frame = frame.f_back
    return False
