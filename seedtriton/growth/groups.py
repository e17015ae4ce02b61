"""The seeds' parameter groups in an optimizer, and the learning-rate schedulers that have to learn of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigurationError, WiringError
from ..gradients.optimizers import chain_of, held_by
from .schedulers import Schedulers, own_value, told_rates
from .slot import SeedSlot


class SeedGroups:
    """Adds groups of seeds to an optimizer and takes them out again, with their state and their schedulers' entries.

    Args:
        optimizer: looked through, see ``optimizers.chain_of``.
        schedulers: of its learning rates, looked through likewise.

    Raises:
        ConfigurationError: no optimizer, or no scheduler.
        WiringError: a container of optimizers, or a scheduler of another optimizer.
    """

    def __init__(self, optimizer: Any, schedulers: Iterable[Any]) -> None:
        if held_by(optimizer):
            raise WiringError(
                f"{type(optimizer).__name__} steps {len(held_by(optimizer))} optimizers: give the one of them that "
                "shall train the seeds, and the others to growth.monitor.watch(...)"
            )
        self._chain = chain_of(optimizer)
        self.optimizer: torch.optim.Optimizer = self._chain[-1]
        self._schedulers = Schedulers(self._chain)
        for scheduler in schedulers:
            self._schedulers.add(scheduler)

    def add_scheduler(self, scheduler: Any) -> None:
        """See ``GrowthController.add_scheduler``."""
        self._schedulers.add(scheduler)

    def refuse_unknown_scheduler(self) -> None:
        """WiringError when the optimizer has a scheduler that nobody told us of, or one that does not fit it."""
        self._schedulers.refuse_unknown()

    def add(self, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
        """Add a group of these parameters by name; settings that are not told are the first group's present ones.

        Raises:
            ConfigurationError: a setting that the optimizer does not have; nothing has changed.
            WiringError: the optimizer would never step such parameters, or fail to; nothing has changed.
        """
        first = self.optimizer.param_groups[0]
        unknown = sorted(set(settings) - set(first))
        if unknown:
            raise ConfigurationError(f"the optimizer has no settings {unknown}; it has {sorted(first)}")
        group = {key: own_value(value) for key, value in first.items() if key not in ("params", "param_names")}
        group |= told_rates(group, settings, self._schedulers) | dict(settings)
        _refuse_unsteppable(self.optimizer, parameters, group)
        # Named parameters: an optimizer wants names in all groups or in none.
        group["params"] = list(parameters.items() if "param_names" in first else parameters.values())
        before = len(self.optimizer.param_groups)
        self._adder().add_param_group(group)
        if len(self.optimizer.param_groups) != before + 1:
            raise WiringError(f"{type(self._adder()).__name__}.add_param_group does not reach the optimizer inside")
        self._schedulers.add_entry(self.optimizer.param_groups[-1], settings)

    def split(self, slot: SeedSlot, names: Sequence[str], settings: Mapping[str, Any]) -> None:
        """Move parameters of a slot, by name, into groups like theirs but for these settings.

        Raises:
            ConfigurationError: a parameter that the slot, or a setting that the optimizer does not have; nothing has
                changed.
        """
        known = dict(slot.named_parameters())
        strange = sorted({*names} - set(known)) + sorted(set(settings) - set(self.optimizer.param_groups[0]))
        if strange:
            raise ConfigurationError(f"no parameters of the seed, and no settings of the optimizer: {strange}")
        moving = {id(known[name]) for name in names}
        for index in reversed(self.of(slot)):
            group = self.optimizer.param_groups[index]
            entries = list(zip(group["param_names"], group["params"])) if "param_names" in group else group["params"]
            moves = [id(parameter) in moving for parameter in group["params"]]
            if not any(moves):
                continue
            _keep(group, [not moved for moved in moves])
            fresh = {key: own_value(v) for key, v in group.items() if key not in ("params", "param_names")}
            fresh |= {**settings, "params": [entry for entry, moved in zip(entries, moves) if moved]}
            self._adder().add_param_group(fresh)
            self._schedulers.copy_entry(index)
            if not group["params"]:
                self._drop(index)

    def of(self, slot: SeedSlot) -> list[int]:
        """Indices of the optimizer's groups that hold parameters of this slot and no others."""
        # Looked up by parameter: the optimizer's load_state_dict makes new dicts of its groups.
        inner = [module for module in slot.modules() if isinstance(module, SeedSlot) and module is not slot]
        theirs = {id(parameter) for place in inner for parameter in place.parameters()}
        own = {id(parameter) for parameter in slot.parameters()} - theirs
        held = [[id(parameter) in own for parameter in group["params"]] for group in self.optimizer.param_groups]
        return [index for index, inside in enumerate(held) if inside and all(inside)]

    def remove(self, slot: SeedSlot) -> None:
        """Take a seed's groups out of the optimizer, with the state of their parameters."""
        groups = self.optimizer.param_groups
        indices = self.of(slot)
        if indices:
            self._schedulers.adopt_unknown()
        for index in reversed(indices):
            for parameter in groups[index]["params"]:
                self.optimizer.state.pop(parameter, None)
            self._drop(index)

    def sizes_without(self, slots: Iterable[SeedSlot]) -> list[int]:
        """How many parameters each group has that are in none of these slots; of groups that have any."""
        own = {id(parameter) for slot in slots for parameter in slot.parameters()}
        sizes = [sum(id(p) not in own for p in group["params"]) for group in self.optimizer.param_groups]
        return [size for size in sizes if size]

    def leave_out(self, slots: Iterable[SeedSlot], groups: int) -> None:
        """Take the parameters of these slots out of all groups; for an optimizer that has no state for them.

        A group that is empty then goes, where there are more than ``groups``: so many the host had, empty ones too.
        """
        own = {id(parameter) for slot in slots for parameter in slot.parameters()}
        for index, group in reversed(list(enumerate(self.optimizer.param_groups))):
            kept = [id(parameter) not in own for parameter in group["params"]]
            if not all(kept):
                _keep(group, kept)
                if not group["params"] and len(self.optimizer.param_groups) > groups:
                    self._drop(index)

    def insert(self, slot: SeedSlot, index: int, names: Sequence[str]) -> None:
        """Add a group of these parameters, at this place among the groups."""
        known = dict(slot.named_parameters())
        self.add({name: known[name] for name in names}, {})
        groups = self.optimizer.param_groups
        self._schedulers.move_last_entry(index)
        groups.insert(index, groups.pop())

    def _drop(self, index: int) -> None:
        self._schedulers.remove_entry(index)
        del self.optimizer.param_groups[index]

    def _adder(self) -> Any:
        """The outermost that adds groups in a way of its own: Lookahead counts steps in them."""
        for item in self._chain:
            own = getattr(type(item), "add_param_group", None)
            if own is not None and own is not torch.optim.Optimizer.add_param_group:
                return item
        return self.optimizer


def _keep(group: dict[str, Any], kept: Sequence[bool]) -> None:
    """Leave in a group those parameters that are to be kept, with their names where groups have any."""
    for key in ("params", "param_names"):
        if key in group:
            group[key] = [value for value, keep in zip(group[key], kept) if keep]


def _refuse_unsteppable(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], group: Mapping[str, Any]
) -> None:
    """WiringError for what an optimizer takes into its groups without a word, and then never steps, or cannot."""
    kinds = {kind.__name__ for kind in type(optimizer).__mro__}
    learning = {name: p for name, p in parameters.items() if p.requires_grad}
    reason = None
    if "LBFGS" in kinds:
        reason = "it steps the parameters of its first group alone"
    elif "SparseAdam" in kinds:
        reason = "it steps sparse gradients alone, and a seed has dense ones"
    elif any("muon" in kind.lower() for kind in kinds) and group.get("use_muon", True):
        # torch's steps matrices alone; others flatten what has more dimensions; whoever holds a vector takes vectors.
        exact = isinstance(optimizer, getattr(torch.optim, "Muon", ()))
        takes_vectors = any(p.ndim < 2 for known in optimizer.param_groups for p in known["params"])
        odd = [n for n, p in learning.items() if (p.ndim != 2 if exact else p.ndim < 2)]
        if odd and not takes_vectors:
            reason = f"it steps matrices alone, and the seed has {len(odd)} other parameters, such as {odd[:3]}"
    if reason is not None:
        raise WiringError(
            f"{type(optimizer).__name__} cannot train this seed: {reason}. Give the seed an optimizer of its own: "
            "germinate(..., add_to_optimizer=False), torch.optim.AdamW(seed.parameters()), "
            "growth.monitor.watch(that_optimizer)"
        )
