"""Are the weights of a seed those that were saved? A few numbers for each of its tensors, kept with the growth state.

A loader that finds no place for a seed's weights leaves the fresh ones, often with a line in a log that nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import StateDictError, WiringError
from .slot import SeedSlot

CHUNK = 2**22  # elements that are looked at together
# By how much the numbers of one tensor may differ, as a share of its norm: for other orders of additions, and for a
# conversion to half precision and back, which rounds each element by 2^-9 of itself at most.
SAME, CONVERTED = 1e-6, 1e-2

Digest = dict[str, list[Any]]


@torch.no_grad()
def digest_of(slot: nn.Module) -> Digest:
    """Of each floating parameter and buffer of a slot's modules by name: dtype, norm, product with a pattern of signs.

    That has no structure that weights have, so that other weights of the same norm have another product; by
    chance within ``CONVERTED`` of it for one tensor in about a hundred.
    """
    return {
        name: [str(tensor.dtype).removeprefix("torch."), *_numbers(tensor)]
        for name, tensor in (*slot.named_parameters(), *slot.named_buffers())
        if tensor.is_floating_point() and not tensor.is_meta and "." in name  # alpha is no weight
    }


class Unchecked:
    """Weights that are still to be loaded.

    Args:
        saved: the digest of each slot that holds a seed.
        slots: all slots, by path.
        steps: optimizer steps so far; after one of them weights are others, and nobody can say.
    """

    def __init__(
        self, saved: Mapping[str, Digest], slots: Mapping[str, SeedSlot], steps: Callable[[], int]
    ) -> None:
        self.saved, self._slots, self._steps, self._then = saved, slots, steps, steps()
        self._seeds = {name: slots[name].seed for name in saved}

    def to_come(self) -> dict[str, Digest]:
        """Those of the seeds that are there yet, and no others in their slots."""
        there = {name: slot.seed for name, slot in self._slots.items() if slot.seed is not None}
        return {name: found for name, found in self.saved.items() if there.get(name) is self._seeds[name]}

    def check(self) -> None:
        """``check`` what was neither replaced nor trained since."""
        if self._steps() == self._then:
            check(self.to_come(), self._slots)


def check(saved: Mapping[str, Digest], slots: Mapping[str, nn.Module]) -> None:
    """WiringError, naming the first tensors, unless the weights in these slots are those that were saved."""
    apart = []
    for slot, digest in saved.items():
        now = digest_of(slots[slot])
        apart += [f"{slot}.{name}" for name, then in digest.items() if name in now and not _same(then, now[name])]
    if apart:
        raise WiringError(
            f"{len(apart)} tensors of seeds are not those that were saved, such as {apart[:3]}: whoever loaded the "
            "model's weights had no place for them. Put the seeds into their slots before, restore_slots(model, "
            "state, seeds), and then load the weights. PEFT saves adapters alone: save_seeds(growth, folder) beside "
            "them, and load_seeds(model, folder, seeds). Or, if other weights are meant, load_state_dict(state, seeds, "
            "check_weights=False)"
        )


def saved_in(state: Mapping[str, Any]) -> dict[str, Digest]:
    """The digests in a growth state, by slot; of those that hold a seed, if the state has any."""
    return {name: entry["digest"] for name, entry in state["slots"].items() if entry.get("digest")}


def checked(state: object, slot: str) -> Digest:
    """A saved digest; StateDictError when it is damaged."""
    if not isinstance(state, dict) or not all(
        isinstance(numbers, list) and [type(n) for n in numbers] == [str, float, float] for numbers in state.values()
    ):
        raise StateDictError(f"GrowthController: slot {slot!r} has a damaged digest of its weights")
    return state


def _same(saved: list[Any], now: list[Any]) -> bool:
    tolerance = (SAME if saved[0] == now[0] else CONVERTED) * max(saved[1], now[1])
    # What is not finite was so when it was saved, or it is found out by the first measurement.
    return all(abs(a - b) <= tolerance or a != a or b != b for a, b in zip(saved[1:], now[1:]))


def _numbers(tensor: Tensor) -> tuple[float, float]:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    squares = product = torch.zeros((), dtype=torch.float64, device=whole.device)
    for begin, part in enumerate(whole.detach().reshape(-1).split(CHUNK)):
        wide = part.double()
        place = torch.arange(begin * CHUNK, begin * CHUNK + len(part), device=part.device)
        # Knuth's multiplicative hash, of which the highest bit is as good as a coin.
        signs = 1.0 - 2.0 * ((place * 2654435761) >> 31 & 1).double()
        squares = squares + wide.square().sum()
        product = product + (wide * signs).sum()
    return float(squares.sqrt()), float(product)
