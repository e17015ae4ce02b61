"""What clients that own the loop need of a controller, and a script with a loop of its own does not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import checkpoint
from .slot import SeedSlot
from .trying import normal_tensors

if TYPE_CHECKING:
    from .controller import GrowthController

NUMBERS = (
    "ratio", "rms_ratio", "seed_norm", "host_norm", "samples", "dropped", "blend_gain", "blend_gain_t", "displacement",
    "live_share",
)  # fmt: skip


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
    if growth._position.unchecked is not None:
        growth._position.unchecked.check()
        growth._position.unchecked = None


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


def numbers(growth: GrowthController) -> dict[str, float]:
    """What loggers plot, by "slot/name": alpha of every seed, and of a living one what was read of it and is finite.

    Read when an epoch ended: there gates may move a seed on, whose evidence then begins anew.
    """
    found = {f"{name}/alpha": slot.alpha_value for name, slot in growth.slots.items() if slot.seed is not None}
    for name, life in growth._position.lives.items():
        for key in NUMBERS:
            value = getattr(life.evidence, key, None)
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
