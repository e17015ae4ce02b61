"""How far training has come: optimizer steps taken, and how far a seed's weights have moved since a mark."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import StateDictError
from ..core.evidence import Sample
from ..core.state import check_state
from . import ops

# Root mean square below which weights count as this large, when their relative change is computed: a
# layer that starts at zero would otherwise have moved infinitely far after one step.
WEIGHT_FLOOR = 1e-3


class StepCounter:
    """Optimizer steps taken, by hooks that change nothing. Skipped steps of a GradScaler never arrive."""

    def __init__(self) -> None:
        self.total = 0
        self._watched: list[tuple[weakref.ref[torch.optim.Optimizer], list[int]]] = []

    def watch(self, optimizer: torch.optim.Optimizer, then: Callable[[], None]) -> None:
        """Count the steps of ``optimizer``, and call the bound method ``then`` after each while it lives."""
        steps = [0]
        method = weakref.WeakMethod(then)

        def count(*_: object) -> None:
            steps[0] += 1
            self.total += 1
            alive = method()
            if alive is not None:
                alive()

        optimizer.register_step_post_hook(count)
        self._watched.append((weakref.ref(optimizer), steps))

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [optimizer for ref, _ in self._watched if (optimizer := ref()) is not None]

    def hold(self, parameters: Sequence[Tensor]) -> bool | None:
        """Whether every parameter that requires a gradient is in an optimizer; None without optimizers."""
        optimizers = self.optimizers()
        if not optimizers:
            return None
        held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        return bool(wanted) and all(id(parameter) in held for parameter in wanted)

    def restore(self, by_optimizer: Sequence[int]) -> None:
        for (_, steps), saved in zip(self._watched, by_optimizer):
            steps[0] = saved
        self.total = sum(by_optimizer)

    def by_optimizer(self) -> list[int]:
        return [steps[0] for _, steps in self._watched]

    def since(self, mark: Mark, parameters: Sequence[Tensor]) -> int | None:
        """Steps since the mark of the optimizers that hold a parameter of the seed; the fewest of them."""
        wanted = {id(parameter) for parameter in parameters}
        found = []
        for index, (ref, steps) in enumerate(self._watched):
            optimizer = ref()
            if optimizer is not None and any(
                id(p) in wanted for group in optimizer.param_groups for p in group["params"]
            ):
                begun = mark.by_optimizer[index] if index < len(mark.by_optimizer) else 0
                found.append(steps[0] - begun)
        return min(found, default=None)


class Progress:
    """How far every seed has come: the steps of the optimizers, and a mark for each seed where its window began."""

    def __init__(self) -> None:
        self.steps = StepCounter()
        self.marks: dict[str, Mark] = {}

    def begin(self, name: str, parameters: Sequence[Tensor], by_optimizer: Sequence[int] | None = None) -> None:
        """Begin the window of a seed here; ``by_optimizer`` steps do not count, all so far unless told."""
        taken = self.steps.by_optimizer() if by_optimizer is None else by_optimizer
        self.marks[name] = Mark.of(parameters, self.steps.total, taken)

    def displacements(self, parameters: Mapping[str, Sequence[Tensor]]) -> list[Tensor]:
        """How far the weights of every seed have moved since its mark, float64 [1] each."""
        return [self.marks[name].displacement(found).view(1) for name, found in parameters.items()]

    def facts(
        self, name: str, parameters: Sequence[Tensor], samples: Sequence[Sample], first: int
    ) -> dict[str, Any]:
        """What ``collect_evidence`` is told of optimizers and steps; ``first`` is the number of the first sample."""
        steps, mark = self.steps, self.marks[name]
        return {
            "age": mark.age(samples, first, steps.total) if steps.optimizers() else None,
            "in_optimizer": steps.hold(parameters),
            "optimizer_steps": steps.since(mark, parameters),
        }


    def state_dict(self, names: Iterable[str]) -> dict[str, Any]:
        """Steps by optimizer, and the mark of each of these seeds."""
        return {
            "steps": self.steps.by_optimizer(),
            "marks": {name: self.marks[name].state_dict() for name in names},
        }

    def check_state(self, state: Mapping[str, Any], kind: str, parameters: Mapping[str, Sequence[Tensor]]) -> None:
        """StateDictError, naming ``kind``, unless the state fits these optimizers and the parameters of these seeds."""
        steps, marks, watched = state["steps"], state["marks"], len(self.steps.by_optimizer())
        if not isinstance(steps, list) or len(steps) != watched:
            raise StateDictError(f"{kind}: the state counts steps {steps!r}, the monitor {watched} optimizers")
        if not isinstance(marks, dict) or marks.keys() != parameters.keys():
            raise StateDictError(f"{kind}: the state does not hold one mark for each of {list(parameters)}")
        for name, found in parameters.items():
            Mark.check_state(marks[name], f"{kind}: seed {name!r}", found)

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, Sequence[Tensor]]) -> None:
        """Take over ``state_dict``, which was checked."""
        self.steps.restore(state["steps"])
        for name, mark in state["marks"].items():
            self.marks[name] = Mark.from_state_dict(mark, parameters[name])


class Mark:
    """Where a seed's window began: its weights then, and the steps taken by then."""

    VERSION = 1

    def __init__(self, weights: list[Tensor], steps: int, by_optimizer: list[int]) -> None:
        self.weights = weights
        self.by_optimizer = by_optimizer
        self.newest = -1  # number of the newest usable sample that a read has seen
        self.steps_then = steps

    @classmethod
    def of(cls, parameters: Sequence[Tensor], steps: int, by_optimizer: Sequence[int] = ()) -> Mark:
        return cls([p.detach().clone() for p in _moving(parameters)], steps, list(by_optimizer))

    def displacement(self, parameters: Sequence[Tensor]) -> Tensor:
        """``|w - w0| / max(|w0|, WEIGHT_FLOOR sqrt(n))``, float64 0-dim; NaN when the shapes have changed."""
        device = parameters[0].device
        parameters = _moving(parameters)
        if not parameters or [p.shape for p in parameters] != [w.shape for w in self.weights]:
            return torch.full((), math.nan, dtype=torch.float64, device=device)
        weights = [w.to(p.device) for p, w in zip(parameters, self.weights)]
        apart = [p.detach().to(_wide(p)) - w.to(_wide(p)) for p, w in zip(parameters, weights)]
        ones = [0] * len(apart)
        moved = ops.segmented_sumsq(apart, ones, 1)[0].sqrt()
        size = ops.segmented_sumsq(weights, ones, 1)[0].sqrt()
        floor = WEIGHT_FLOOR * math.sqrt(sum(w.numel() for w in weights))
        return moved / size.clamp(min=floor)

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
        wanted = [tuple(p.shape) for p in _moving(parameters)]
        if [tuple(getattr(w, "shape", ())) for w in values["weights"]] != wanted:
            raise StateDictError(f"{kind}: the saved weights do not have the shapes {wanted}")

    def state_dict(self) -> dict[str, Any]:
        return {
            "version": self.VERSION,
            "weights": self.weights,
            "by_optimizer": self.by_optimizer,
            "newest": self.newest,
            "steps_then": self.steps_then,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], parameters: Sequence[Tensor]) -> Mark:
        weights = [w.to(p.device, copy=True) for w, p in zip(state["weights"], _moving(parameters))]
        mark = cls(weights, state["steps_then"], list(state["by_optimizer"]))
        mark.newest = state["newest"]
        return mark


def _moving(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Those that training can move: a frozen int8 weight has no place in a norm."""
    return [p for p in parameters if p.is_floating_point() or p.is_complex()]


def _wide(tensor: Tensor) -> torch.dtype:
    # Weights that moved by less than a bf16 ulp did not move; their difference must not be rounded again.
    return torch.promote_types(tensor.dtype, torch.float32)
