"""How far training has come: optimizer steps taken, and how far a seed's weights have moved since a mark."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.errors import StateDictError
from ..core.evidence import Sample
from ..core.state import check_state
from . import ops
from .optimizers import names_of

# Root mean square below which weights count as this large, when their relative change is computed: a
# layer that starts at zero would otherwise have moved infinitely far after one step.
WEIGHT_FLOOR = 1e-3


class _Counted:
    """One optimizer, and how often it has stepped."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.ref: Callable[[], torch.optim.Optimizer | None] = weakref.ref(optimizer)
        self.calls = 0  # calls of step()
        self.measured = 0  # measurements when it last stepped
        # Of those calls the skipped ones, float64 0-dim on the device; None: none was told to skip.
        self.skipped: Tensor | None = None

    def note_skipped(self) -> None:
        """During the call: a fused optimizer is told on the device whether to skip, and nobody else ever knows."""
        optimizer = self.ref()
        known = [] if optimizer is None else names_of(optimizer)
        found = next((f for name in known if isinstance(f := getattr(name, "found_inf", None), Tensor)), None)
        if found is not None:
            with torch.no_grad():
                if self.skipped is None:
                    self.skipped = torch.zeros((), dtype=torch.float64, device=found.device)
                self.skipped.add_((found.detach().reshape(-1)[0] != 0).to(self.skipped.device))

    def taken(self) -> int:
        """Steps that were taken; waits for the device if any was told to skip."""
        return self.calls - (0 if self.skipped is None else int(self.skipped))


class StepCounter:
    """Optimizer steps, by hooks that change nothing.

    Steps that a GradScaler skips itself never arrive; those that fused optimizers skip are counted on the device.

    Attributes:
        total: calls of ``step()``, of all optimizers.
        calls: measurements, of which the optimizer's steps are to be no fewer; not counted in a compiled graph.
    """

    def __init__(self) -> None:
        self.total = self.calls = 0
        self._watched: list[_Counted] = []
        self._then: weakref.WeakMethod[Callable[[], None]] | None = None

    def watch(self, optimizer: torch.optim.Optimizer, then: Callable[[], None]) -> None:
        """Count the steps of ``optimizer``, and call the bound method ``then`` after each while it lives."""
        self._then = weakref.WeakMethod(then)
        entry = _Counted(optimizer)
        self._watched.append(entry)
        self._hook(optimizer, entry)

    def _hook(self, optimizer: torch.optim.Optimizer, entry: _Counted) -> None:
        def count(*_: object) -> None:
            entry.calls += 1
            entry.measured = self.calls
            entry.note_skipped()
            self.total += 1
            alive = self._then() if self._then is not None else None
            if alive is not None:
                alive()

        optimizer.register_step_post_hook(count)

    def __deepcopy__(self, memo: dict[int, Any]) -> StepCounter:
        """A copy goes with the copies of the optimizers that were copied before it, in the same ``deepcopy``."""
        twin = memo[id(self)] = StepCounter()
        twin.total, twin.calls = self.total, self.calls
        then = self._then() if self._then is not None else None
        owner = None if then is None else memo.get(id(then.__self__))  # type: ignore[attr-defined]
        if then is not None and owner is not None:
            twin._then = weakref.WeakMethod(getattr(owner, then.__name__))
        for entry in self._watched:
            optimizer = memo.get(id(entry.ref()))
            copied = copy.copy(entry)
            copied.skipped = None if entry.skipped is None else entry.skipped.clone()
            copied.ref = weakref.ref(optimizer) if optimizer is not None else _nothing
            twin._watched.append(copied)
            if optimizer is not None:
                twin._hook(optimizer, copied)
        return twin

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [optimizer for entry in self._watched if (optimizer := entry.ref()) is not None]

    def hold(self, parameters: Sequence[Tensor]) -> bool | None:
        """Whether every parameter that requires a gradient is in an optimizer; None without optimizers."""
        optimizers = self.optimizers()
        if not optimizers:
            return None
        held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        return bool(wanted) and all(id(parameter) in held for parameter in wanted)

    def restore(self, by_optimizer: Sequence[int], waited: Sequence[int]) -> None:
        for entry, saved, measurements in zip(self._watched, by_optimizer, waited):
            entry.calls, entry.skipped = saved, None
            entry.measured = self.calls - measurements
        self.total = sum(by_optimizer)

    def by_optimizer(self) -> list[int]:
        return [entry.calls for entry in self._watched]

    def taken(self) -> list[int]:
        """Steps by optimizer without the skipped ones; waits for the device."""
        return [entry.taken() for entry in self._watched]

    def skipped(self) -> list[Tensor | None]:
        """Calls by optimizer that were skipped on the device, so far."""
        return [None if entry.skipped is None else entry.skipped.clone() for entry in self._watched]

    def holders(self, parameters: Sequence[Tensor]) -> list[int]:
        """Which of the optimizers, by number, hold a parameter of these."""
        wanted = {id(parameter) for parameter in parameters}
        return [
            index
            for index, entry in enumerate(self._watched)
            if (optimizer := entry.ref()) is not None
            and any(id(p) in wanted for group in optimizer.param_groups for p in group["params"])
        ]

    def since(self, mark: Mark, holders: Sequence[int], skipped: Sequence[float]) -> int | None:
        """Steps since the mark of those optimizers, the fewest of them; ``skipped`` since then by optimizer."""
        found = []
        for index in holders:
            begun = mark.by_optimizer[index] if index < len(mark.by_optimizer) else 0
            missed = skipped[index] if index < len(skipped) else 0.0
            found.append(self._watched[index].calls - begun - int(missed))
        return min(found, default=None)

    def waited(self) -> list[int]:
        """Measurements since its last step, by optimizer."""
        return [self.calls - entry.measured for entry in self._watched]

    def idle(self, holders: Sequence[int]) -> int | None:
        """Measurements since the last step of those optimizers, the most of them."""
        waited = self.waited()
        return max((waited[index] for index in holders), default=None)


def _nothing() -> None:
    """What a weak reference to an optimizer that is gone returns."""


class Known(NamedTuple):
    """What a read brings from the device for one seed.

    Attributes:
        displacement: None where it could not be had.
        skipped: by optimizer the calls of ``step()`` that were skipped, so far.
        skipped_then: the same at the seed's mark.
    """

    displacement: float | None
    skipped: Sequence[float]
    skipped_then: Sequence[float]


class Progress:
    """How far every seed has come: the steps of the optimizers, and a mark for each seed where its window began."""

    def __init__(self) -> None:
        self.steps = StepCounter()
        self.marks: dict[str, Mark] = {}

    def begin(self, name: str, parameters: Sequence[Tensor]) -> None:
        """Begin the window of a seed here: steps so far do not count."""
        self.marks[name] = Mark.of(parameters, self.steps.total, self.steps.by_optimizer(), self.steps.skipped())

    def packed(self, parameters: Mapping[str, Sequence[Tensor]], device: torch.device) -> list[Tensor]:
        """What ``unpacked`` reads, float64: skipped steps, then of each seed how far it has moved, and those then."""
        optimizers = len(self.steps.by_optimizer())
        parts = [_filled(self.steps.skipped(), optimizers, device)]
        for name, found in parameters.items():
            mark = self.marks[name]
            parts += [mark.displacement(found).view(1), _filled(mark.skipped, optimizers, device)]
        return parts

    @staticmethod
    def unpacked(numbers: Sequence[float], names: Sequence[str]) -> dict[str, Known]:
        """The numbers of ``packed`` for these seeds, on the host."""
        optimizers = (len(numbers) - len(names)) // (1 + len(names))
        skipped, rest = numbers[:optimizers], numbers[optimizers:]
        known = {}
        for index, name in enumerate(names):
            moved, *then = rest[index * (1 + optimizers) : (index + 1) * (1 + optimizers)]
            known[name] = Known(moved if math.isfinite(moved) else None, skipped, then)
        return known

    def facts(
        self, name: str, parameters: Sequence[Tensor], samples: Sequence[Sample], first: int, known: Known
    ) -> dict[str, Any]:
        """What ``collect_evidence`` is told of weights, optimizers and steps; ``first`` numbers the first sample."""
        steps, mark, holders = self.steps, self.marks[name], self.steps.holders(parameters)
        missed = [now - then for now, then in zip(known.skipped, known.skipped_then)]
        taken = steps.total - int(sum(known.skipped))
        return {
            "age": mark.age(samples, first, taken) if steps.optimizers() else None,
            "in_optimizer": steps.hold(parameters),
            "optimizer_steps": steps.since(mark, holders, missed),
            "idle": steps.idle(holders),
            "displacement": known.displacement,
        }

    def state_dict(self, names: Iterable[str]) -> dict[str, Any]:
        """Steps and measurements since the last one by optimizer, and the mark of each of these seeds."""
        return {
            "steps": self.steps.taken(),
            "waited": self.steps.waited(),
            "marks": {name: self.marks[name].state_dict() for name in names},
        }

    def later(self) -> dict[str, Any]:
        """What states of 0.1 do not hold, with what its absence means: that nobody waits."""
        return {"waited": [0] * len(self.steps.by_optimizer())}

    def check_state(self, state: Mapping[str, Any], kind: str, parameters: Mapping[str, Sequence[Tensor]]) -> None:
        """StateDictError, naming ``kind``, unless the state fits these optimizers and the parameters of these seeds."""
        steps, marks, watched = state["steps"], state["marks"], len(self.steps.by_optimizer())
        if not isinstance(steps, list) or len(steps) != watched:
            raise StateDictError(f"{kind}: the state counts steps {steps!r}, the monitor {watched} optimizers")
        waited = state["waited"]
        if not isinstance(waited, list) or len(waited) != watched or not all(type(w) is int and w >= 0 for w in waited):
            raise StateDictError(f"{kind}: the state's 'waited' is {waited!r}, not {watched} counts of measurements")
        if not isinstance(marks, dict) or marks.keys() != parameters.keys():
            raise StateDictError(f"{kind}: the state does not hold one mark for each of {list(parameters)}")
        for name, found in parameters.items():
            Mark.check_state(marks[name], f"{kind}: seed {name!r}", found)

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, Sequence[Tensor]]) -> None:
        """Take over ``state_dict``, which was checked."""
        self.steps.restore(state["steps"], {**self.later(), **state}["waited"])
        for name, mark in state["marks"].items():
            self.marks[name] = Mark.from_state_dict(mark, parameters[name])


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
        return cls([_values(p).clone() for p in _moving(parameters)], steps, list(by_optimizer), list(skipped))

    def displacement(self, parameters: Sequence[Tensor]) -> Tensor:
        """``|w - w0| / max(|w0|, WEIGHT_FLOOR sqrt(n))``, float64 0-dim; NaN where ``unknown`` says why."""
        device = parameters[0].device
        if self.unknown(parameters):
            return torch.full((), math.nan, dtype=torch.float64, device="cpu" if device.type == "meta" else device)
        values = [_values(p) for p in _moving(parameters)]
        weights = [w.to(v.device) for v, w in zip(values, self.weights)]
        apart = [v.to(_wide(v)) - w.to(_wide(v)) for v, w in zip(values, weights)]
        ones = [0] * len(apart)
        moved = ops.segmented_sumsq(apart, ones, 1)[0].sqrt()
        size = ops.segmented_sumsq(weights, ones, 1)[0].sqrt()
        floor = WEIGHT_FLOOR * math.sqrt(sum(w.numel() for w in weights))
        return moved / size.clamp(min=floor)

    def unknown(self, parameters: Sequence[Tensor]) -> list[str]:
        """Why nobody can say how far the weights have moved, in words; empty when it can be said."""
        moving = _moving(parameters)
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
        wanted = [tuple(p.shape) for p in _moving(parameters)]
        if [tuple(getattr(w, "shape", ())) for w in values["weights"]] != wanted:
            raise StateDictError(f"{kind}: the saved weights do not have the shapes {wanted}")

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
        weights = [w.to(p.device, copy=True) for w, p in zip(state["weights"], _moving(parameters))]
        mark = cls(weights, state["steps_then"], list(state["by_optimizer"]))
        mark.newest = state["newest"]
        return mark


def _filled(skipped: Sequence[Tensor | None], length: int, device: torch.device) -> Tensor:
    """One float64 number for each optimizer; zeros where nothing is known. Waits for nothing."""
    filled = torch.zeros(length, dtype=torch.float64, device=device)
    for place, missed in zip(filled, skipped):
        if missed is not None:
            place.copy_(missed)
    return filled


def _moving(parameters: Sequence[Tensor]) -> list[Tensor]:
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
