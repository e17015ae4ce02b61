"""How far a seed's weights have moved since a mark, and the steps taken by then."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import StateDictError
from ..core.evidence import Sample
from ..core.state import check_state
from . import ops
from .spread import ALONE, Places

# Root mean square below which weights count as this large, when their relative change is computed: a
# layer that starts at zero would otherwise have moved infinitely far after one step.
WEIGHT_FLOOR = 1e-3
MOVED = 3  # numbers that say how far weights have moved


def displacement_of(moved: float, begun: float, elements: float) -> float | None:
    """``|w - w0| / max(|w0|, WEIGHT_FLOOR sqrt(n))`` from squares of the norms, and n; None where it is not known."""
    if not math.isfinite(moved) or not elements > 0:
        return None
    return math.sqrt(moved) / max(math.sqrt(begun), WEIGHT_FLOOR * math.sqrt(elements))


class Mark:
    """Where a seed's window began: its weights then, and the steps taken by then."""

    VERSION = 1

    def __init__(
        self, weights: list[Tensor], steps: int, by_optimizer: list[int], skipped: Sequence[Tensor | None] = ()
    ) -> None:
        self.weights = weights
        self.by_optimizer = by_optimizer
        self.skipped = skipped  # of those steps the skipped ones, on the device
        self.newest = -1  # number of the newest usable sample that a read has seen
        self.steps_then = steps

    @classmethod
    def of(
        cls,
        parameters: Sequence[Tensor],
        steps: int,
        by_optimizer: Sequence[int] = (),
        skipped: Sequence[Tensor | None] = (),
    ) -> Mark:
        return cls([_values(p).clone() for p in moving_of(parameters)], steps, list(by_optimizer), list(skipped))

    def displacement(self, parameters: Sequence[Tensor]) -> float | None:
        """How far the weights have moved, of a seed that this process has for itself; waits for their device."""
        return displacement_of(*self.moved(parameters).tolist())

    def moved(self, parameters: Sequence[Tensor], places: Places = ALONE) -> Tensor:
        """``|w - w0|^2``, ``|w0|^2`` and n, float64 [MOVED]; NaN where ``unknown`` says why. Waits for nothing.

        Where many ranks hold them: this rank's share of these, of which the sum over all ranks is that of one process.
        """
        device = parameters[0].device if parameters else torch.device("cpu")
        if not parameters or self.unknown(parameters):
            nothing = math.nan if parameters else 0.0
            device = torch.device("cpu") if device.type == "meta" else device
            return torch.full((MOVED,), nothing, dtype=torch.float64, device=device)
        moving = moving_of(parameters)
        values = [places.part_of(_values(p)) for p in moving]
        weights = [places.part_of(w).to(v.device) for v, w in zip(values, self.weights)]
        apart = [v.to(_wide(v)) - w.to(_wide(v)) for v, w in zip(values, weights)]
        copies = places.copies_of(moving)
        held = sorted(set(copies))
        segments = [held.index(number) for number in copies]
        sums = [ops.segmented_sumsq(found, segments, len(held)) for found in (apart, weights)]
        moved, begun = (torch.stack([total / number for total, number in zip(by_copies, held)]) for by_copies in sums)
        elements = sum(w.numel() / number for w, number in zip(weights, copies))
        return torch.stack([moved.sum(), begun.sum(), torch.full_like(moved[0], elements)])

    def unknown(self, parameters: Sequence[Tensor]) -> list[str]:
        """Why nobody can say how far the weights have moved, in words; empty when it can be said."""
        moving = moving_of(parameters)
        if not moving:
            dtypes = sorted({str(p.dtype) for p in parameters})
            return [f"how far its weights have moved is not known: they are quantised ({', '.join(dtypes)})"]
        if any(tensor.is_meta for tensor in (*moving, *self.weights)):
            return ["how far its weights have moved is not known: they are or were on 'meta', without values"]
        if [p.shape for p in moving] != [w.shape for w in self.weights]:
            return ["how far its weights have moved is not known: they have other shapes than when its window began"]
        return []

    def age(self, samples: Sequence[Sample], first: int, steps: int) -> int:
        """Optimizer steps since the last read that found a usable sample it had not seen."""
        usable = [first + i for i, sample in enumerate(samples) if sample.usable and not sample.empty]
        newest = max(usable, default=-1)
        if newest > self.newest:
            self.newest, self.steps_then = newest, steps
        return steps - self.steps_then

    @classmethod
    def check_state(cls, state: object, kind: str, parameters: Sequence[Tensor]) -> None:
        """Raise StateDictError, naming ``kind``, unless ``state`` is a mark of such parameters."""
        values = check_state(state, kind, cls.VERSION, ("weights", "by_optimizer", "newest", "steps_then"))
        wanted, weights = [tuple(p.shape) for p in moving_of(parameters)], values["weights"]
        tensors = isinstance(weights, list) and all(isinstance(w, Tensor) for w in weights)
        if not tensors or [tuple(w.shape) for w in weights] != wanted:
            raise StateDictError(f"{kind}: the saved weights do not have the shapes {wanted}")
        steps, newest, then = values["by_optimizer"], values["newest"], values["steps_then"]
        counts = [*steps, newest + 1, then] if isinstance(steps, list) and type(newest) is int else [None]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise StateDictError(f"{kind}: no counts: by_optimizer {steps!r}, newest {newest!r}, steps_then {then!r}")

    def state_dict(self) -> dict[str, Any]:
        return {
            "version": self.VERSION,
            "weights": self.weights,
            "by_optimizer": [
                steps - (0 if missed is None else int(missed))
                for steps, missed in zip_longest(self.by_optimizer, self.skipped[: len(self.by_optimizer)])
            ],
            "newest": self.newest,
            "steps_then": self.steps_then,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], parameters: Sequence[Tensor]) -> Mark:
        weights = [w.to(p.device, copy=True) for w, p in zip(state["weights"], moving_of(parameters))]
        mark = cls(weights, state["steps_then"], list(state["by_optimizer"]))
        mark.newest = state["newest"]
        return mark


def moving_of(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Those that training can move: a frozen int8 weight has no place in a norm."""
    return [p for p in parameters if p.is_floating_point() or p.is_complex()]


def _values(parameter: Tensor) -> Tensor:
    """The numbers that a quantised tensor (torchao's kind, which says it is floating point) stands for; itself else."""
    if type(parameter) in (Tensor, nn.Parameter) or hasattr(parameter, "placements"):
        return parameter.detach()
    try:
        return parameter.dequantize().detach()
    except (NotImplementedError, RuntimeError, TypeError):  # some other subclass
        return parameter.detach()


def _wide(tensor: Tensor) -> torch.dtype:
    # Weights that moved by less than a bf16 ulp did not move; their difference must not be rounded again.
    return torch.promote_types(tensor.dtype, torch.float32)
