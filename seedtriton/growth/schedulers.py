"""Learning-rate schedulers of an optimizer whose groups come and go: looked through, checked, and kept in step."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from ..core.errors import ConfigurationError, WiringError
from ..gradients.optimizers import chain_of

logger = logging.getLogger("seedtriton")

# Lists with one entry per parameter group that schedulers keep, torch's and timm's (base_values).
_PER_GROUP = (
    "base_lrs", "lr_lambdas", "_last_lr", "min_lrs", "max_lrs", "base_momentums", "max_momentums", "base_values",
)

# Where wrappers keep a scheduler: accelerate, Trainer and Lightning; ignite; warm-up before another one.
_INSIDE = ("scheduler", "lr_scheduler", "after_scheduler")


class Schedulers:
    """Those of one optimizer.

    Lists of a scheduler are replaced, never written to: a ``state_dict()`` that somebody holds shares them.

    Args:
        chain: the optimizer and what wraps it, see ``optimizers.chain_of``.
    """

    def __init__(self, chain: Sequence[Any]) -> None:
        self._chain, self._known = chain, list[Any]()

    def __iter__(self) -> Iterator[Any]:
        """Each that keeps something per group: those told, and those inside chained and sequential ones."""
        return iter(self._known)

    def add(self, scheduler: Any) -> None:
        """Take one more.

        Raises:
            ConfigurationError: no scheduler, and none inside.
            WiringError: it is another optimizer's, or was made for another number of groups; nothing has changed.
        """
        found = [item for item in _each(scheduler, []) if hasattr(item, "optimizer")]
        if not found:
            raise ConfigurationError(
                f"{type(scheduler).__name__} is no learning-rate scheduler: it has no optimizer, and neither has "
                f"anything in {', '.join(map(repr, _INSIDE))}"
            )
        for item in found:
            if chain_of(item.optimizer)[-1] is not self._chain[-1]:
                raise WiringError(
                    f"{type(item).__name__} schedules another optimizer than the one that the seeds are added to: "
                    "leave it out, or give the controller that optimizer"
                )
            self._check_lengths(item)
        self._known += [item for item in found if all(item is not known for known in self._known)]

    def refuse_unknown(self) -> None:
        """WiringError for a scheduler that nobody told us of, or whose entries are not those of the groups."""
        unknown = self._unknown()
        scheduled = any(getattr(getattr(item, "step", None), "_wrapped_by_lr_sched", False) for item in self._chain)
        if unknown or (scheduled and not self._known):
            names = " and ".join(type(item).__name__ for item in unknown) or "a learning-rate scheduler"
            raise WiringError(
                f"the optimizer has {names}, which would fail on a new parameter group; "
                "pass it: GrowthController(..., schedulers=[scheduler]), or growth.add_scheduler(scheduler)"
            )
        for item in self._known:
            self._check_lengths(item)

    def adopt_unknown(self) -> None:
        """Take over those that were made since, and that nobody told us of: a group that goes would break them."""
        for item in self._unknown():
            logger.warning(
                "the optimizer has a %s that was never told: growth.add_scheduler(scheduler) is where it belongs; "
                "its entries are kept in step with the groups from now on",
                type(item).__name__,
            )
            self._known.append(item)

    def add_entry(self, group: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """For a group that was added at the end with these settings."""
        for item in self._known:
            entry = partial(_entry, item, group, settings)
            self._replace(item, lambda name, values: [*values, entry(name, values)])  # noqa: B023 - called at once

    def copy_entry(self, index: int) -> None:
        """For a group that was added at the end, like this one."""
        for item in self._known:
            self._replace(item, lambda _, values: [*values, own_value(values[index])])

    def remove_entry(self, index: int) -> None:
        """Of a group that goes."""
        for item in self._known:
            self._replace(item, lambda _, values: [*values[:index], *values[index + 1 :]])

    def move_last_entry(self, index: int) -> None:
        """The last to another place."""
        for item in self._known:
            self._replace(item, lambda _, values: [*values[:index], values[-1], *values[index:-1]])

    def _replace(self, item: Any, change: Callable[[str, list[Any]], list[Any]]) -> None:
        # All before any is set: an entry may be made from another list's.
        for name, values in [(name, change(name, values)) for name, values in _lists(item)]:
            setattr(item, name, values)

    def _check_lengths(self, item: Any) -> None:
        groups = len(self._chain[-1].param_groups)
        for name, values in _lists(item):
            # What the last step found is found again by the next.
            if len(values) != groups and name != "_last_lr":
                raise WiringError(
                    f"{type(item).__name__} has {len(values)} entries in {name}, the optimizer has {groups} parameter "
                    "groups: give a scheduler to the controller before seeds germinate, or make it after that"
                )

    def _unknown(self) -> list[Any]:
        """Torch's schedulers of this optimizer that are alive and were not told."""
        # An optimizer knows none of its schedulers. Asked when a group comes or goes, so it may take milliseconds.
        if any(self._alive()):
            gc.collect()  # what only waits to be collected is nobody's any more
        return list(self._alive())

    def _alive(self) -> Iterator[Any]:
        known = set(map(id, self._known))
        for item in gc.get_objects():
            if issubclass(type(item), LRScheduler) and id(item) not in known:
                owner = item.__dict__.get("optimizer")
                if any(owner is link for link in self._chain):
                    yield item


def told_rates(group: Mapping[str, Any], settings: Mapping[str, Any], schedulers: Schedulers) -> dict[str, Any]:
    """What schedulers keep in a group, as it must be for the settings that a script tells to survive their steps.

    A told ``lr`` is what it would be for an optimizer without a scheduler: the rate that a schedule multiplies. That
    is ``initial_lr``; for OneCycleLR, which climbs from there, its peak ``max_lr``, and the other two follow it.
    """
    rates: dict[str, Any] = {}
    if "lr" in settings and "initial_lr" in group:
        rates["initial_lr"] = settings["lr"]
    if not any(isinstance(item, OneCycleLR) for item in schedulers) or "max_lr" not in group:
        return rates
    if "lr" in settings:
        told, peak = float(settings["lr"]), float(group["max_lr"])
        rates |= {key: told * group[key] / peak if peak else told for key in ("initial_lr", "max_lr", "min_lr")}
    momentum = _momentum(settings)
    if momentum is not None and "max_momentum" in group:
        rates |= {"base_momentum": momentum, "max_momentum": momentum}
    return rates


def own_value(value: Any) -> Any:
    """A copy of a tensor: a learning rate may be one, and two groups must not share it."""
    return value.clone() if isinstance(value, Tensor) else value


def _entry(item: Any, group: Mapping[str, Any], settings: Mapping[str, Any], name: str, values: Sequence[Any]) -> Any:
    """The entry of a new group in one of the lists: the first group's, unless the script told otherwise."""
    told = settings.get("lr")
    if name == "_last_lr":
        return own_value(group.get("lr"))
    if told is not None and name in ("base_lrs", "base_values"):
        return own_value(group.get("initial_lr", told))
    if told is not None and name == "max_lrs":
        base = float(item.base_lrs[0])
        return float(told) * values[0] / base if base else float(told)
    momentum = _momentum(settings)
    if momentum is not None and name in ("base_momentums", "max_momentums"):
        return momentum
    return own_value(values[0])


def _momentum(settings: Mapping[str, Any]) -> float | None:
    """What schedulers that move momentum take for it: the first of Adam's betas."""
    found = settings["betas"][0] if "betas" in settings else settings.get("momentum")
    return None if found is None else float(found)


def _lists(item: Any) -> list[tuple[str, list[Any]]]:
    found = ((name, getattr(item, name, None)) for name in _PER_GROUP)
    return [(name, values) for name, values in found if isinstance(values, list)]


def _each(scheduler: Any, seen: list[Any]) -> list[Any]:
    """The scheduler, what it wraps, and those inside chained and sequential ones, each once."""
    if any(scheduler is item for item in seen):
        return seen
    seen.append(scheduler)
    inner = [getattr(scheduler, name, None) for name in _INSIDE]
    for item in (*getattr(scheduler, "_schedulers", ()), *inner):
        if item is not None and hasattr(item, "step"):
            _each(item, seen)
    return seen
