"""How far training has come: optimizer steps taken, and what is known of each seed by them."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..core.errors import StateDictError
from ..core.evidence import Sample
from .marks import MOVED, Mark, displacement_of, moving_of
from .optimizers import capturing, makes_state, names_of

if TYPE_CHECKING:
    from .parameters import Watched
    from .spread import Ranks


class _Counted:
    """One optimizer, and how often it has stepped."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.ref: Callable[[], torch.optim.Optimizer | None] = weakref.ref(optimizer)
        self.calls = 0  # calls of step()
        self.measured = 0  # measurements when it last stepped
        self.idling = False  # whether its present step only makes a state
        self.captured = 0  # its calls at the last one that was captured in a CUDA graph, which is replayed uncounted
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

    Steps that a GradScaler skips itself never arrive; those that fused optimizers skip are counted on the device. One
    that is none, ``makes_state``, is not counted.

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
        def look(stepping: torch.optim.Optimizer, *_: object) -> None:
            entry.idling = makes_state(stepping)

        def count(*_: object) -> None:
            if entry.idling:
                return
            entry.calls += 1
            entry.measured = self.calls
            if capturing():
                entry.captured = entry.calls
            entry.note_skipped()
            self.total += 1
            alive = self._then() if self._then is not None else None
            if alive is not None:
                alive()

        optimizer.register_step_pre_hook(look)
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
            entry.calls, entry.skipped, entry.captured = saved, None, 0
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

    def of(self, parameters: Sequence[Tensor]) -> int:
        """Calls of ``step()`` of the optimizers that hold one of these."""
        return sum(self._watched[index].calls for index in self.holders(parameters))

    def since(self, mark: Mark, holders: Sequence[int], skipped: Sequence[float]) -> int | None:
        """Steps since the mark of those optimizers, the fewest of them; ``skipped`` since then by optimizer.

        None where one of them has stepped in a CUDA graph since the mark, or may be doing so: replays are not counted.
        """
        found = []
        for index in holders:
            begun = mark.by_optimizer[index] if index < len(mark.by_optimizer) else 0
            captured = self._watched[index].captured
            if captured and (captured > begun or captured == self._watched[index].calls):
                return None
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
        moved: ``Mark.moved`` of it.
        skipped: by optimizer the calls of ``step()`` that were skipped, so far.
        skipped_then: the same at the seed's mark.
    """

    moved: Sequence[float]
    skipped: Sequence[float]
    skipped_then: Sequence[float]


class SeedFacts(NamedTuple):
    """What one process knows of a seed beside its window; NaN: it knows nothing of this.

    Attributes:
        moved: sum of squares of what its weights have moved by since its mark.
        begun: of the weights then.
        elements: how many there are.
        parameters: tensors that learn.
        frozen: 1 if none learns, else 0.
        in_optimizer: 1 if all that learn are in an optimizer, else 0.
        steps: of its optimizers since its mark.
        idle: measurements since their last step.
        taken: steps of all optimizers so far.
    """

    moved: float
    begun: float
    elements: float
    parameters: float
    frozen: float
    in_optimizer: float
    steps: float
    idle: float
    taken: float

    @classmethod
    def merged(cls, found: Sequence[SeedFacts]) -> SeedFacts:
        """What all ranks know together: sums of what each holds a part of, else the worst that any of them says."""
        columns = [[value for value in column if not math.isnan(value)] for column in zip(*found)]
        worst = (max, max, min, min, max, min)
        # Weights of which one rank cannot say how far they have moved have moved by nobody knows what.
        summed = [sum(column) for column in list(zip(*found))[:3]]
        merged = [*summed, *(choose(column, default=math.nan) for choose, column in zip(worst, columns[3:]))]
        return cls._make(merged)

    @property
    def displacement(self) -> float | None:
        """See ``displacement_of``."""
        return displacement_of(self.moved, self.begun, self.elements)


class Progress:
    """How far every seed has come: the steps of the optimizers, and a mark for each seed where its window began."""

    def __init__(self) -> None:
        self.steps = StepCounter()
        self.marks: dict[str, Mark] = {}

    def begin(self, name: str, parameters: Sequence[Tensor]) -> None:
        """Begin the window of a seed here: steps so far do not count."""
        self.marks[name] = Mark.of(parameters, self.steps.total, self.steps.by_optimizer(), self.steps.skipped())

    def packed(self, watched: Watched, device: torch.device) -> list[Tensor]:
        """What ``unpacked`` reads, float64: skipped steps, then of each seed how far it has moved, and those then."""
        optimizers = len(self.steps.by_optimizer())
        parts = [_filled(self.steps.skipped(), optimizers, device)]
        for name, found in watched.of_seed.items():
            mark = self.marks[name]
            parts += [mark.moved(found, watched), _filled(mark.skipped, optimizers, device)]
        return parts

    @staticmethod
    def unpacked(numbers: Sequence[float], names: Sequence[str]) -> dict[str, Known]:
        """The numbers of ``packed`` for these seeds, on the host."""
        optimizers = (len(numbers) - MOVED * len(names)) // (1 + len(names))
        skipped, rest = numbers[:optimizers], numbers[optimizers:]
        known = {}
        for index, name in enumerate(names):
            of_seed = rest[index * (MOVED + optimizers) : (index + 1) * (MOVED + optimizers)]
            known[name] = Known(of_seed[:MOVED], skipped, of_seed[MOVED:])
        return known

    def facts(self, name: str, parameters: Sequence[Tensor], known: Known) -> SeedFacts:
        """What this process knows of a seed's weights, optimizers and steps; of one that it does not hold, nothing."""
        steps, holders = self.steps, self.steps.holders(parameters)
        missed = [now - then for now, then in zip(known.skipped, known.skipped_then)]
        if not parameters:
            return SeedFacts._make([0.0, 0.0, 0.0, *[math.nan] * 6])
        frozen = not any(parameter.requires_grad for parameter in parameters)
        learning = sum(p.requires_grad and p.numel() > 0 for p in parameters)
        told = steps.hold(parameters), steps.since(self.marks[name], holders, missed), steps.idle(holders)
        taken = steps.total - int(sum(known.skipped)) if steps.optimizers() else None
        numbers = (math.nan if number is None else float(number) for number in (*told, taken))
        return SeedFacts._make([*known.moved, float(learning), float(frozen), *numbers])

    def told(self, name: str, facts: SeedFacts, samples: Sequence[Sample], first: int) -> dict[str, Any]:
        """What ``collect_evidence`` is told of them; ``first`` numbers the first of the samples."""
        taken, optimizer_steps, idle = map(_whole, (facts.taken, facts.steps, facts.idle))
        return {
            "parameters": _whole(facts.parameters) or 0,
            "frozen": facts.frozen == 1.0,
            "age": None if taken is None else self.marks[name].age(samples, first, taken),
            "in_optimizer": None if math.isnan(facts.in_optimizer) else facts.in_optimizer == 1.0,
            "optimizer_steps": optimizer_steps,
            "idle": idle,
            "displacement": facts.displacement,
        }

    def state_dict(self, names: Iterable[str]) -> dict[str, Any]:
        """Steps and measurements since the last one by optimizer, and the mark of each of these seeds."""
        return {
            "steps": self.steps.taken(),
            "waited": self.steps.waited(),
            "marks": {name: self.marks[name].state_dict() for name in names},
        }

    @staticmethod
    def gathered(state: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
        """``state_dict`` with whole weights in its marks. On every rank."""
        marks = {
            name: {**mark, "weights": [ranks.whole(weight) for weight in mark["weights"]]}
            for name, mark in state["marks"].items()
        }
        return {**state, "marks": marks}

    @staticmethod
    def scattered(state: Any, parameters: Mapping[str, Sequence[Tensor]], ranks: Ranks) -> Any:
        """The other way: the weights as the parameters are cut. What does not fit stays as it is, to be refused."""
        marks = state.get("marks") if isinstance(state, Mapping) else None
        if not isinstance(marks, Mapping):
            return state
        cut = {}
        for name, mark in marks.items():
            moving = moving_of(parameters.get(name, ()))
            weights = mark.get("weights") if isinstance(mark, Mapping) else None
            shapes = [tuple(getattr(w, "shape", ())) for w in weights] if isinstance(weights, list) else None
            if isinstance(weights, list) and shapes == [tuple(p.shape) for p in moving]:
                cut[name] = {**mark, "weights": [ranks.cut(w, p) for w, p in zip(weights, moving)]}
            else:
                cut[name] = mark
        return {**state, "marks": cut}

    def later(self) -> dict[str, Any]:
        """What states of the first version do not hold, with what its absence means: that nobody waits."""
        return {"waited": [0] * len(self.steps.by_optimizer())}

    def check_state(self, state: Mapping[str, Any], kind: str, parameters: Mapping[str, Sequence[Tensor]]) -> None:
        """StateDictError, naming ``kind``, unless the state fits these optimizers and the parameters of these seeds."""
        steps, marks, watched = state["steps"], state["marks"], len(self.steps.by_optimizer())
        if not isinstance(steps, list) or len(steps) != watched or not all(type(s) is int and s >= 0 for s in steps):
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


def _whole(number: float) -> int | None:
    return None if math.isnan(number) else int(number)


def _filled(skipped: Sequence[Tensor | None], length: int, device: torch.device) -> Tensor:
    """One float64 number for each optimizer; zeros where nothing is known. Waits for nothing."""
    filled = torch.zeros(length, dtype=torch.float64, device=device)
    for place, missed in zip(filled, skipped):
        if missed is not None:
            place.copy_(missed)
    return filled
