"""The seeds' parameter groups in an optimizer, and the learning-rate schedulers that have to learn of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigurationError, WiringError
from .slot import SeedSlot

# Lists with one entry per parameter group that torch's schedulers keep; a new group needs an entry in each.
_PER_GROUP = (
    "base_lrs", "lr_lambdas", "_last_lr", "min_lrs", "max_lrs", "base_momentums", "max_momentums",
)


class SeedGroups:
    """Adds groups of seeds to an optimizer and takes them out again, with their state and their schedulers' entries."""

    def __init__(self, optimizer: torch.optim.Optimizer, schedulers: Iterable[Any]) -> None:
        self._optimizer, self._schedulers = optimizer, list(schedulers)

    def refuse_unknown_scheduler(self) -> None:
        """WiringError when the optimizer has a scheduler that nobody told us of."""
        scheduled = getattr(self._optimizer.step, "_wrapped_by_lr_sched", False)
        if scheduled and not self._schedulers:
            raise WiringError(
                "the optimizer has a learning-rate scheduler that would fail on a new parameter group; "
                "pass it: GrowthController(..., schedulers=[scheduler])"
            )

    def add(self, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
        """Add a group of these parameters by name; settings that are not told are the first group's present ones."""
        first = self._optimizer.param_groups[0]
        unknown = sorted(set(settings) - set(first))
        if unknown:
            raise ConfigurationError(f"the optimizer has no settings {unknown}; it has {sorted(first)}")
        group = {key: own_value(value) for key, value in first.items() if key not in ("params", "param_names")}
        if "lr" in settings and "initial_lr" in group:
            group["initial_lr"] = settings["lr"]
        group |= settings
        # Named parameters: an optimizer wants names in all groups or in none.
        group["params"] = list(parameters.items() if "param_names" in first else parameters.values())
        before = len(self._optimizer.param_groups)
        self._optimizer.add_param_group(group)
        for scheduler in _each_scheduler(self._schedulers):
            for values in _group_lists(scheduler, before):
                values.append(values[0])
            if hasattr(scheduler, "base_lrs") and "lr" in settings:
                scheduler.base_lrs[-1] = settings["lr"]

    def of(self, slot: SeedSlot) -> list[int]:
        """Indices of the optimizer's groups that hold parameters of this slot and no others."""
        # Looked up by parameter: the optimizer's load_state_dict makes new dicts of its groups.
        own = {id(parameter) for parameter in slot.parameters()}
        held = [[id(parameter) in own for parameter in group["params"]] for group in self._optimizer.param_groups]
        return [index for index, inside in enumerate(held) if inside and all(inside)]

    def remove(self, slot: SeedSlot) -> None:
        """Take a seed's groups out of the optimizer, with the state of their parameters."""
        groups = self._optimizer.param_groups
        for index in reversed(self.of(slot)):
            for parameter in groups[index]["params"]:
                self._optimizer.state.pop(parameter, None)
            for scheduler in _each_scheduler(self._schedulers):
                for values in _group_lists(scheduler, len(groups)):
                    del values[index]
            del groups[index]

    def insert(self, slot: SeedSlot, index: int, names: Sequence[str]) -> None:
        """Add a group of these parameters, at this place among the groups."""
        known = dict(slot.named_parameters())
        self.add({name: known[name] for name in names}, {})
        groups = self._optimizer.param_groups
        for scheduler in _each_scheduler(self._schedulers):
            for values in _group_lists(scheduler, len(groups)):
                values.insert(index, values.pop())
        groups.insert(index, groups.pop())


def own_value(value: Any) -> Any:
    # A learning rate may be a tensor; two groups must not share it.
    return value.clone() if isinstance(value, Tensor) else value


def _each_scheduler(schedulers: Iterable[Any]) -> Iterable[Any]:
    """The schedulers themselves and those inside chained and sequential ones."""
    for scheduler in schedulers:
        yield scheduler
        yield from _each_scheduler(getattr(scheduler, "_schedulers", ()))


def _group_lists(scheduler: Any, groups: int) -> list[list[Any]]:
    found = (getattr(scheduler, name, None) for name in _PER_GROUP)
    return [values for values in found if isinstance(values, list) and len(values) == groups]
