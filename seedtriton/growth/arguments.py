"""What scripts hand over by mistake: each likely slip is named before anything is built or changed.

Nothing here decides how something works; it says what was given, what is taken, and how to write it.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

from ..core.errors import ConfigurationError
from ..core.schedules import AlphaSchedule
from ..core.thresholds import GateThresholds

_T = TypeVar("_T")


def check_model(model: object) -> None:
    """ConfigurationError unless it is a module; a class of one says how to make it."""
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model must be a torch.nn.Module, got {_described(model)}")


def check_optimizer(optimizer: object) -> None:
    """ConfigurationError for several optimizers, a class, or parameters in its place; wrappers are for ``chain_of``."""
    if isinstance(optimizer, (list, tuple)):
        raise ConfigurationError(
            f"optimizer must be one torch optimizer, got a {type(optimizer).__name__} of {len(optimizer)}: give the "
            "one that shall train the seeds, and the others to growth.monitor.watch(...)"
        )
    if isinstance(optimizer, type):
        raise ConfigurationError(f"optimizer must be a torch optimizer, got {_described(optimizer)}")


def check_settings(
    thresholds: object, schedule: object, schedulers: object, auto_advance: object, evaluate: object
) -> None:
    """ConfigurationError for the first of a controller's settings that is of another kind than it takes."""
    if isinstance(thresholds, Mapping):
        written = ", ".join(f"{name}={value!r}" for name, value in thresholds.items())
        raise ConfigurationError(f"thresholds must be a GateThresholds, got a dict: GateThresholds({written})")
    if thresholds is not None and not isinstance(thresholds, GateThresholds):
        raise ConfigurationError(f"thresholds must be a GateThresholds, got {_described(thresholds)}")
    check_schedule(schedule)
    for name, given, many in (
        ("schedulers", schedulers, "learning-rate schedulers"), ("auto_advance", auto_advance, "gates")
    ):  # fmt: skip
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise ConfigurationError(f"{name} must be a list of {many}, got {_described(given)}: {name}=[...]")
    if evaluate is not None and not callable(evaluate):
        raise ConfigurationError(
            f"evaluate must be a function from a model to its validation losses, got {_described(evaluate)}"
        )


def check_schedule(schedule: object) -> None:
    """ConfigurationError unless it is an ``AlphaSchedule`` or None."""
    if schedule is not None and not isinstance(schedule, AlphaSchedule):
        way = f": AlphaSchedule(steps={schedule})" if type(schedule) is int else ""
        raise ConfigurationError(f"schedule must be an AlphaSchedule, got {_described(schedule)}{way}")


def listed_sinks(sinks: object) -> list[Any]:
    """The sinks as a list; ConfigurationError unless each can be called with an event."""
    if isinstance(sinks, (str, os.PathLike)):
        raise ConfigurationError(f"sinks must be a list, got {sinks!r}: sinks=[JsonLinesSink({os.fspath(sinks)!r})]")
    if isinstance(sinks, Mapping) or not isinstance(sinks, Iterable):
        raise ConfigurationError(f"sinks must be a list of sinks or functions, got {_described(sinks)}: sinks=[...]")
    found = list(sinks)
    for sink in found:
        if isinstance(sink, type) or not callable(sink):
            way = f": JsonLinesSink({sink!r}) writes a file" if isinstance(sink, str) else ""
            raise ConfigurationError(f"a sink is called with an event, and cannot be {_described(sink)}{way}")
    return found


def check_seeds(seeds: object) -> None:
    """ConfigurationError unless it maps slots to modules or factories."""
    if not isinstance(seeds, Mapping):
        raise ConfigurationError(
            f"seeds must be a mapping from slots to modules or factories, {{'block2': make_seed}}, got "
            f"{_described(seeds)}"
        )


def made_by(factory: Callable[[], _T], what: str) -> _T:
    """What a factory makes; ConfigurationError for a class or function that has to be given something."""
    needed = _needed(factory)
    if needed:
        kind = "the class" if isinstance(factory, type) else "the function"
        name = getattr(factory, "__name__", type(factory).__name__)
        raise ConfigurationError(
            f"{what} is a module or a factory without arguments, got {kind} {name}, which needs {', '.join(needed)}: "
            f"give {name}(...), or lambda: {name}(...)"
        )
    return factory()


def _needed(factory: Callable[..., object]) -> list[str]:
    """Arguments without which it cannot be called; none where nobody can tell."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in optional]


def _described(given: object) -> str:
    """A value in an error: short values as they are written, of others the type; a class as a class."""
    if isinstance(given, type):
        return f"the class {given.__name__}: give {given.__name__}(...)"
    if given is None or isinstance(given, (str, int, float, bool)):
        return repr(given)
    return f"a {type(given).__name__}"
