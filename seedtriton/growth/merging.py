"""A model that has grown, without growth: rebuilt from its weights alone, or with its fossils as plain modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..core.errors import ConfigurationError, WiringError
from ..core.lifecycle import Stage
from . import blending
from .arguments import check_seeds
from .checkpoint import restore_slots
from .inserting import InsertedSlot, changed_in, take_out
from .slot import SeedSlot
from .trying import seed_module
from .wiring import in_seed_of, slots_of, unwrap

_WAY = (Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED)


class MergedSeed(nn.Module):
    """What a fossil of blend "multiply" or "gate" computes at alpha 1; no slot, and nothing of a life.

    Attributes:
        seed: the module that was in the slot.
        gate: its gate network, or None.
        blend: "multiply" or "gate", see ``blending.candidate``.
    """

    def __init__(self, seed: nn.Module, gate: blending.GateNetwork | None, blend: str) -> None:
        """Take over the modules of a slot."""
        super().__init__()
        self.seed, self.gate, self.blend = seed, gate, blend

    def forward(self, features: Tensor) -> Tensor:
        """Features in, features of the same shape and dtype out."""
        return blending.candidate(self.blend, features, self.seed(features).to(features.dtype), self.gate)


class MergedFollower(nn.Module):
    """A fossil in the place of an inserted slot: it follows the same module, in the same way.

    Attributes:
        seed: the module that was in the slot, or ``MergedSeed``.
        features: see ``insert_slot``.
        hooked: see ``InsertedSlot``.
    """

    def __init__(self, seed: nn.Module, slot: InsertedSlot) -> None:
        """Take the place of the slot."""
        super().__init__()
        self.seed, self.features, self.hooked, self._name = seed, slot.features, slot.hooked, slot.name

    def forward(self, output: Any, *others: Any, by_hook: bool = False, **named: Any) -> Any:
        """What the module returned, with the seed's output for the features."""
        return output if self.hooked != by_hook else changed_in(output, self.features, self.seed, self._name)


def merge_fossils(model: nn.Module) -> list[str]:
    """Turn every fossil into plain modules, in place, and every empty slot into the identity: no slot is left.

    At alpha 1 a slot with blend "add" computes what its seed does: the seed takes its place, so that ``slot.seed.w`` of
    the state_dict is ``slot.w`` from now on. Behind a module that ``insert_slot`` has put it, it stays ``seed.w``, and
    of an empty slot nothing is left. For when growing is over: a controller of this model has nothing left to do, and
    its saved state fits it no longer.

    Args:
        model: DDP and compiled wrappers are looked through; compile it again.

    Returns:
        The paths of the fossils.

    Raises:
        WiringError: a living seed, or a fossil whose alpha is not 1; nothing has changed.
    """
    model = unwrap(model)
    slots = {name: module for name, module in model.named_modules() if isinstance(module, SeedSlot)}
    for name, slot in slots.items():
        if slot.seed is not None and slot.stage is not Stage.FOSSILIZED:
            raise WiringError(f"the seed in {name!r} lives (stage {slot.stage}): let it become permanent, or prune it")
        if slot.stage is Stage.FOSSILIZED and slot.alpha_value != 1.0:
            raise WiringError(
                f"the fossil in {name!r} has alpha {slot.alpha_value:.3g}, and only one of alpha 1 can take the slot's "
                "place: give its schedule the target 1, or keep the slot"
            )
    for name, slot in reversed(slots.items()):  # what lies in a seed before the seed changes its path
        parent, _, own = name.rpartition(".")
        if isinstance(slot, InsertedSlot) and slot.seed is None:
            take_out(model.get_submodule(parent))
        else:
            setattr(model.get_submodule(parent), own, _plain(slot))
    return [name for name, slot in slots.items() if slot.seed is not None]


def _plain(slot: SeedSlot) -> nn.Module:
    if slot.seed is None:
        return nn.Identity()
    seed = slot.seed if slot.blend == blending.ADD else MergedSeed(slot.seed, slot.gate, slot.blend)
    return MergedFollower(seed, slot) if isinstance(slot, InsertedSlot) else seed


def load_grown(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    seeds: Mapping[str, nn.Module | Callable[[], nn.Module]],
    growth: object = None,
) -> nn.Module:
    """Rebuild a model that has grown from its ``state_dict``, for inference: no optimizer, no controller.

    Args:
        model: with empty slots, as it was built.
        state_dict: of the grown model.
        seeds: by slot, a module like the one that was there, or a factory.
        growth: what ``GrowthController.state_dict`` returned, if it is at hand: it knows the stages and the blends.
            Without it a seed is of blend "add", and permanent where its alpha is above 0; where that is 0 it stays out
            of the forward pass, which is what the host felt of it.

    Returns:
        The model itself, with the weights loaded.

    Raises:
        ConfigurationError: a seed is missing, one is not in the state, or a gate network asks for ``growth``.
        WiringError: a slot that is not empty.
        StateDictError: ``growth`` does not fit.
        RuntimeError: what ``load_state_dict`` raises about weights.
    """
    check_seeds(seeds)
    slots = slots_of(unwrap(model))
    names = [*slots, *(name for name in sorted(seeds) if name not in slots and in_seed_of(name, seeds))]
    held = [name for name in names if any(key.startswith(f"{name}.seed.") for key in state_dict)]
    if sorted(held) != sorted(seeds):
        raise ConfigurationError(f"the state has seeds in slots {held}, and seeds= names {sorted(seeds)}")
    if growth is not None:
        restore_slots(model, growth, seeds)
    else:
        gated = [name for name in held if any(key.startswith(f"{name}.gate.") for key in state_dict)]
        if gated:
            raise ConfigurationError(
                f"slots {gated} have gate networks, and only the growth state knows how they gate: load_grown(model, "
                "state_dict, seeds, growth=saved['growth'])"
            )
        for name in held:
            place = unwrap(model).get_submodule(name)
            if not isinstance(place, SeedSlot):
                raise ConfigurationError(f"{name!r} is no slot of the seed around it, {type(place).__name__}")
            _put_in(place, seed_module(seeds[name]), float(state_dict[f"{name}.alpha"]))
    unwrap(model).load_state_dict(state_dict)
    return model


def _put_in(slot: SeedSlot, seed: nn.Module, alpha: float) -> None:
    slot.germinate(seed)
    if alpha > 0.0:
        slot.set_alpha(alpha)
        for stage in _WAY:
            slot.move(stage, "load_grown")
