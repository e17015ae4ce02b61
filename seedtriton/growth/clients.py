"""What clients that own the loop need of a controller, and a script with a loop of its own does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..report.events import evidence_fields
from . import checkpoint
from .slot import SeedSlot
from .trying import normal_tensors

if TYPE_CHECKING:
    from .controller import GrowthController


@normal_tensors()
def exchange(growth: GrowthController, state: object, seeds: Mapping[str, checkpoint.SeedOrFactory]) -> None:
    """Take out every seed, fossils too, and put in those of an earlier ``state_dict``: before their weights come back.

    For a client that ends a training with the weights of its best epoch. Seeds that were there then, and stand in
    another stage by now or are gone, are again what they were; their moments in the optimizer are not.

    Raises:
        StateDictError: another version, a damaged state, or one of another model or optimizer.
        WiringError: other ranks wait for a seed, so that it cannot leave.
        ConfigurationError: a slot's seed is missing. In each case nothing has changed.
    """
    checkpoint.exchange(growth._wiring, growth._position, state, seeds)


def check_weights(growth: GrowthController) -> None:
    """WiringError now, and not in the next step, when the weights of a seed are not those that were saved."""
    growth._position.check_weights()


def weights_of_seeds(growth: GrowthController) -> dict[str, dict[str, Any]]:
    """The ``state_dict`` of every slot with a seed, fossils too."""
    return {name: slot.state_dict() for name, slot in growth.slots.items() if slot.seed is not None}


def saves_seeds(growth: GrowthController) -> bool:
    """Whether who saves the model saves its seeds: PEFT saves adapters alone."""
    return not growth._wiring.adapted


def give_group(growth: GrowthController, slot: str, names: Iterable[str], **settings: Any) -> None:
    """Give some parameters of a seed a group of their own in the optimizer: as the seed's but for these settings.

    Clients decay matrices and leave biases and norms alone; a seed that germinates has one group.

    Args:
        growth: the controller.
        slot: the slot's path in the model.
        names: parameters by their names in the slot, "seed.0.bias"; nothing happens when there are none.
        **settings: those of the new group that are others, such as ``weight_decay``.

    Raises:
        ConfigurationError: no slot or parameter of it has this name, or a setting that the optimizer does not have.
    """
    growth._wiring.groups.split(growth._wiring.slot(slot), list(names), settings)


def parted(
    parameters: Iterable[Tensor], slots: Mapping[str, SeedSlot]
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Those that are clipped together, in their order, and by slot those of a seed behind the host.

    A client that clips all of them by one norm couples the host with seeds that it does not feel.
    """
    owners = {id(p): name for name, slot in slots.items() if slot.behind for p in slot.parameters()}
    felt, behind = list[Tensor](), dict[str, list[Tensor]]()
    for parameter in parameters:
        owner = owners.get(id(parameter))
        (felt if owner is None else behind.setdefault(owner, [])).append(parameter)
    return felt, behind


def clip_apart(
    clip: Callable[..., Any],
    parameters: Tensor | Iterable[Tensor],
    slots: Mapping[str, SeedSlot],
    max_norm: float,
    norm_type: float = 2,
) -> Any:
    """A client's clipping of what is clipped together, and each seed behind the host by its own norm.

    The client's own, so that the host's coefficient is in every bit what it is without a seed; called once, for it
    unscales all gradients, which may be done once.

    Args:
        clip: takes parameters, a norm and its type.
        parameters: those that the client clips.
        slots: by path in the model.
        max_norm: of the host, and of each of those seeds.
        norm_type: see ``torch.nn.utils.clip_grad_norm_``.

    Returns:
        What ``clip`` has: the host's norm.
    """
    felt, behind = parted([parameters] if isinstance(parameters, Tensor) else parameters, slots)
    norm = clip(felt, max_norm, norm_type)
    for own in behind.values():
        nn.utils.clip_grad_norm_(own, max_norm, norm_type)
    return norm


def numbers(growth: GrowthController) -> dict[str, float]:
    """What loggers plot, by "slot/name": alpha of every seed, and the ``evidence_fields`` of a living one, if finite.

    Read when an epoch ended: there gates may move a seed on, whose evidence then begins anew.
    """
    found = {f"{name}/alpha": slot.alpha_value for name, slot in growth.slots.items() if slot.seed is not None}
    for name, life in growth._position.lives.items():
        for key, value in evidence_fields(life.evidence).items():
            if value is not None and math.isfinite(value):
                found[f"{name}/{key}"] = float(value)
    return found


@contextmanager
def own_random_numbers(model: nn.Module) -> Iterator[None]:
    """Inside, what draws has the numbers that come next, and behind it they come again: seeds are made without a trace.

    Of the CPU, and of the devices on which the model lies.
    """
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    with torch.random.fork_rng(sorted({d.index or 0 for d in devices if d.type == kind}), device_type=kind):
        yield
