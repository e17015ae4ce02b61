"""Where seeds are, in a file beside the weights that a client saves, and models that are built from such a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from ..core.errors import StateDictError, WiringError
from ..growth import digest
from ..growth.checkpoint import SeedOrFactory, restore_slots
from ..growth.clients import own_random_numbers, saves_seeds, weights_of_seeds
from ..growth.controller import GrowthController
from ..growth.wiring import slots_of, unwrap

FILE = "growth.pt"  # beside the weights, in every checkpoint
VERSION = 1


def save(growth: GrowthController, folder: str, more: Mapping[str, Any], *, write: bool) -> None:
    """Save where the seeds are beside the weights in a folder; on every rank, of which those with ``write`` write.

    Where the client saves adapters alone, with the weights of the seeds, unless ``more`` has them.
    """
    values = {"version": VERSION, "growth": growth.state_dict(), **more}
    if "weights" not in more and not saves_seeds(growth):
        values["weights"] = weights_of_seeds(growth)
    if write:
        torch.save(values, os.path.join(folder, FILE))


def saved_in(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What ``GrowthCallback.save`` has written into a folder; None when it has not; StateDictError when damaged."""
    path = os.path.join(folder, FILE)
    if not os.path.isfile(path):
        return None
    values = torch.load(path, map_location="cpu", weights_only=True)
    keys = {"version", "growth", "germinated", "ended_at"}
    known = isinstance(values, dict) and set(values) - {"weights"} == keys and values["version"] == VERSION
    if not known or not _are_weights(values.get("weights", {})):
        raise StateDictError(f"{path} is no growth state of version {VERSION}")
    return cast("dict[str, Any]", values)


def _are_weights(weights: object) -> bool:
    return isinstance(weights, dict) and all(
        isinstance(own, dict) and all(isinstance(tensor, torch.Tensor) for tensor in own.values())
        for own in weights.values()
    )


def load_weights(saved: Mapping[str, Any], slots: Mapping[str, nn.Module]) -> None:
    """The weights of seeds into their slots, if they were saved there: behind ``restore_slots``.

    Raises:
        StateDictError: weights of a slot that the model does not have; nothing has changed.
        RuntimeError: what ``load_state_dict`` raises about weights.
    """
    weights = saved.get("weights", {})
    if unknown := sorted(set(weights) - set(slots)):
        raise StateDictError(f"{FILE} has weights of slots {unknown}; the slots of the model are {sorted(slots)}")
    for name, own in weights.items():
        slots[name].load_state_dict(own)


def load_seeds(
    model: nn.Module, folder: str | os.PathLike[str], seeds: Mapping[str, SeedOrFactory]
) -> dict[str, Any]:
    """Put the seeds of a saved model into one of ``from_pretrained``, which drops them.

    ::

        model = Net.from_pretrained(folder)
        load_seeds(model, folder, {"model.norm.0": make_seed})

    Args:
        model: its slots are empty.
        folder: a checkpoint of Trainer's, or where ``save_model`` or ``save_seeds`` has saved; local.
        seeds: by slot, as for the callback.

    Returns:
        What ``GrowthController.load_state_dict`` takes, for a training that goes on.

    Raises:
        WiringError: nothing says which seeds it had, or their weights are not in the folder.
        StateDictError: the state is damaged, or of another model.
        ConfigurationError: a slot's seed is missing.
    """
    saved = saved_in(folder)
    if saved is None:
        raise WiringError(
            f"{os.fspath(folder)!r} has no {FILE}: it was saved neither by a Trainer with a "
            "GrowthCallback nor by save_seeds(growth, folder)"
        )
    model = unwrap(model)
    slots = slots_of(model)
    with own_random_numbers(model):
        restore_slots(model, saved["growth"], seeds)
    if "weights" in saved:
        load_weights(saved, slots)
    else:
        model.load_state_dict(_weights_in(os.fspath(folder), [f"{name}." for name in slots]), strict=False)
    digest.check(digest.saved_in(saved["growth"]), slots)
    host = {id(p) for slot in slots.values() for p in slot.parameters()}
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point() and id(p) not in host), None)
    for slot in slots.values():
        slot.to(dtype=dtype)
    return cast("dict[str, Any]", saved["growth"])


def _weights_in(folder: str, prefixes: list[str]) -> dict[str, torch.Tensor]:
    """Tensors of these prefixes from the safetensors files of a folder."""
    from safetensors import safe_open

    found: dict[str, torch.Tensor] = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            with safe_open(os.path.join(folder, name), framework="pt") as file:
                found |= {key: file.get_tensor(key) for key in file.keys() if key.startswith(tuple(prefixes))}  # noqa: SIM118
    return found
