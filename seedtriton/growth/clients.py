"""What clients that own the loop need of a controller, and a script with a loop of its own does not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

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
    """What loggers plot, by "slot/name": alpha of every seed, and of a living one what is known of it and finite."""
    found = {f"{name}/alpha": slot.alpha_value for name, slot in growth.slots.items() if slot.seed is not None}
    for name, evidence in growth.evidence().items():
        for key in NUMBERS:
            value = getattr(evidence, key)
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
