"""PEFT: adapters watched as seeds, and slots in a model that PEFT has wrapped.

    from seedtriton.integrations.peft import monitor_adapters

    monitor = monitor_adapters(model, optimizer)       # a seed for each adapter; the base is the host

docs/clients.md says what happens where. Nothing of PEFT is imported: the model is given.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigurationError, WiringError
from ..gradients.adapters import held_in
from ..gradients.monitor import GradientMonitor
from ..gradients.noticing import registered
from ..gradients.parameters import Part
from ..growth.clients import weights_of_seeds
from ..growth.controller import GrowthController
from .saved import load_seeds as load_seeds
from .saved import save

logger = logging.getLogger("seedtriton")


class Adapter(Part):
    """The parameters of an adapter in all its layers, also of modules that it trains as a whole.

    Args:
        model: with the adapter.
        name: the adapter's.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        """Look nothing up yet."""
        self._model, self._name = model, name

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """See ``Part``."""
        begin = f"{prefix}." if prefix else ""
        for path, layer in self._model.named_modules():
            for held in held_in(layer):
                if held.adapter == self._name:
                    yield begin + (f"{path}." if path else "") + held.path, held.parameter

    def modules(self) -> Iterator[nn.Module]:
        """See ``Part``."""
        return (layer for layer in self._model.modules() if any(h.adapter == self._name for h in held_in(layer)))


class Base(Part):
    """What a model has beside its adapters.

    Args:
        model: with adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        """Look nothing up yet."""
        self._model = model

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """See ``Part``."""
        adapted = {id(held.parameter) for layer in self._model.modules() for held in held_in(layer)}
        named = self._model.named_parameters(prefix)
        return ((path, parameter) for path, parameter in named if id(parameter) not in adapted)

    def modules(self) -> Iterator[nn.Module]:
        """See ``Part``."""
        return self._model.modules()


class AdapterMonitor(GradientMonitor):
    """A ``GradientMonitor`` whose seeds are the adapters that are there when somebody reads.

    One that was added is watched from then on, one that was deleted no more; both are said in the log. One that is not
    active, is merged or disabled is called so in the reason of its evidence. ``model``, ``optimizer``, ``adapters`` and
    ``**monitor`` are those of ``monitor_adapters``.

    Raises:
        ConfigurationError: ``adapters`` names one that the model does not have.
        WiringError: the model has no adapters.
    """

    def __init__(self, model: nn.Module, optimizer: Any, adapters: Iterable[str] | None, **monitor: Any) -> None:
        """Watch the adapters that are there."""
        self._wanted = None if adapters is None else tuple(adapters)
        self._left: set[str] = set()  # removed by hand, and still in the model
        self._adapted = (model,)  # in a tuple, for it is no part of the monitor
        self._registered, found = registered(), self._there()
        missing = [name for name in self._wanted or () if name not in found]
        if missing:
            raise ConfigurationError(f"the model has no adapters {missing}; its adapters are {_names_in(model)}")
        if not found:
            raise WiringError("the model has no adapters: get_peft_model(model, config) before monitor_adapters()")
        seeds = {name: Adapter(model, name) for name in found}
        super().__init__(Base(model), seeds, optimizers=optimizer, **monitor)
        self._followed = set(found)

    def remove_seed(self, *names: str) -> None:
        """As ``GradientMonitor.remove_seed``; of an adapter that stays in the model, for good."""
        super().remove_seed(*names)
        self._left |= set(names)
        self._followed -= set(names)

    def _there(self) -> list[str]:
        found = _names_in(self._adapted[0])
        self._left &= set(found)
        wanted = found if self._wanted is None else [name for name in self._wanted if name in found]
        return [name for name in wanted if name not in self._left]

    def _refresh_if_stale(self, *, closely: bool = False) -> None:
        # Between ranks a seed comes with an exchange, and measuring makes none.
        moved = self._watched.ranks is None and self._registered != registered()
        if not torch.compiler.is_compiling() and (closely or moved):
            self._follow_adapters()
        super()._refresh_if_stale(closely=closely)

    def _follow_adapters(self) -> None:
        self._registered, found = registered(), self._there()
        gone = [name for name in self._followed if name not in found]
        if gone:
            super().remove_seed(*gone)
            self._followed -= set(gone)
            logger.warning("adapters %s were deleted, or merged and unloaded: they are watched no more", sorted(gone))
        for name in found:
            if name not in self._followed:
                self.add_seed(name, Adapter(self._adapted[0], name))
                self._followed.add(name)
                logger.warning("adapter %r was added: it is watched from now on", name)


def monitor_adapters(
    model: nn.Module, optimizer: Any, adapters: Iterable[str] | None = None, **monitor: Any
) -> AdapterMonitor:
    """Watch the adapters of a PEFT model as seeds, by their names; the host is what the model has beside adapters.

    The forward pass computes with an adapter from the first step on, so there is no slot, no blend factor and no gate:
    it is the gradients that are told. Of a base that is frozen the ratio is undefined, and its evidence says so; the
    norm of the adapter, the share of it that gets a gradient and how far it has moved are known.

    Args:
        model: ``get_peft_model``'s, or one with adapters that were injected; wrappers may be around it.
        optimizer: what trains the adapters, one or several.
        adapters: by name; unless told all that are there, also those that are added later.
        **monitor: arguments of ``GradientMonitor``, such as ``window``.

    Returns:
        A ``GradientMonitor``: ``measure()`` between backward and step, ``read()["default"]``.

    Raises:
        WiringError: no adapters, adapters that share a parameter, or an optimizer that cannot be watched.
        ConfigurationError: an adapter that is not there, by name.
    """
    return AdapterMonitor(model, optimizer, adapters, **monitor)


def save_seeds(growth: GrowthController, folder: str | os.PathLike[str]) -> None:
    """Save stages, alpha and weights of the seeds into ``growth.pt`` beside an adapter, which has no place for them.

    Behind ``model.save_pretrained(folder)``; ``load_seeds(model, folder, seeds)`` brings them back. On every rank, of
    which the first writes.
    """
    weights = weights_of_seeds(growth)
    more = {"germinated": list(weights), "ended_at": growth.step, "weights": weights}
    save(growth, os.fspath(folder), more, write=growth.monitor.ranks is None or growth.monitor.ranks.rank == 0)


def _names_in(model: nn.Module) -> list[str]:
    return list(dict.fromkeys(held.adapter for layer in model.modules() for held in held_in(layer)))
