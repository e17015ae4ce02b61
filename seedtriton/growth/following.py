"""Copies of a model that keep in step with it: an average of its weights (EMA, SWA) grows as it grows."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..core.errors import WiringError
from .slot import SeedSlot
from .wiring import in_seed_of, unwrap

logger = logging.getLogger("seedtriton")

_T = TypeVar("_T")
_Ref = Callable[[], "_T | None"]


class Followers:
    """The slots of copies, each made to hold what the slot of its name holds: seed, stage and alpha; not the weights.

    Args:
        slots: of the model that is followed, by path.
    """

    def __init__(self, slots: Mapping[str, SeedSlot]) -> None:
        self._slots = slots
        self._copies: list[_Copy] = []

    def add(self, model: nn.Module) -> None:
        """Let a copy follow from now on.

        Raises:
            WiringError: it has other slots; nothing has changed.
        """
        inner = unwrap(model.module if isinstance(model, AveragedModel) else model)
        own = {name: module for name, module in inner.named_modules() if isinstance(module, SeedSlot)}
        strange = [name for name in own.keys() - self._slots.keys() if not in_seed_of(name, own)]
        if strange or self._slots.keys() - own.keys():
            raise WiringError(f"a copy of the model has its slots {sorted(self._slots)}, this one has {sorted(own)}")
        own = {name: own[name] for name in self._slots}
        if any(own[name] is slot for name, slot in self._slots.items()):
            raise WiringError("a model cannot follow itself: give a copy of it, AveragedModel(model) or a deepcopy")
        self._copies.append(_Copy(inner, own, self._slots))
        self.step()

    def step(self) -> None:
        """Bring all copies up to date."""
        self._copies = [each for each in self._copies if each.step(self._slots)]


class _Copy:
    """One copy, by weak references: it ends when its owner lets it go."""

    def __init__(self, model: nn.Module, own: Mapping[str, SeedSlot], slots: Mapping[str, SeedSlot]) -> None:
        self._model: _Ref[nn.Module] = weakref.ref(model)
        self._own: dict[str, _Ref[SeedSlot]] = {name: weakref.ref(slot) for name, slot in own.items()}
        self._missing: set[str] = set()
        # Of which seed the copy's is one: another in the same slot is copied anew.
        self._of = {name: _ref(slots[name].seed) for name, slot in own.items() if slot.seed is not None}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Copy:
        """The copy of this copy, if it was copied before in the same ``deepcopy``; else one that has ended."""
        twin: _Copy = _Copy.__new__(_Copy)
        memo[id(self)] = twin
        twin._model = _twin(self._model, memo)
        twin._own = {name: _twin(ref, memo) for name, ref in self._own.items()}
        twin._missing = set(self._missing)
        twin._of = {name: _twin(ref, memo) for name, ref in self._of.items()}
        return twin

    def step(self, slots: Mapping[str, SeedSlot]) -> bool:
        """Whether the copy is still there."""
        model = self._model()
        if model is None:
            return False
        slots = {name: slot for name, slot in slots.items() if not _is_gone(slot)}
        self._missing &= slots.keys()
        for name in [name for name, ref in self._own.items() if name not in slots or _is_gone(ref())]:
            del self._own[name]
        if slots.keys() - self._own.keys() - self._missing:
            self._find(model, slots)
        for name, ref in self._own.items():
            if (place := ref()) is not None:
                self._mirror(name, slots[name], place)
        return True

    def _find(self, model: nn.Module, slots: Mapping[str, SeedSlot]) -> None:
        """Look, once, for slots that the model has got since; what a copy has not got is said."""
        modules = dict(model.named_modules())
        for name in slots.keys() - self._own.keys() - self._missing:
            place = modules.get(name)
            if isinstance(place, SeedSlot):
                self._own[name] = weakref.ref(place)
            else:
                self._missing.add(name)
                logger.warning("a copy that follows the model has no slot %r, and will miss what grows there", name)

    def _mirror(self, name: str, slot: SeedSlot, place: SeedSlot) -> None:
        if place.seed is not None and self._of.get(name, _nothing)() is not slot.seed:
            place.vacate()
        if slot.seed is not None and place.seed is None:
            place.load_lifecycle_state(slot.lifecycle_state(), copy.deepcopy(slot.seed))
            if slot.gate is not None and place.gate is not None:
                place.gate.load_state_dict(slot.gate.state_dict())
            place.seed.train(place.training)  # type: ignore[attr-defined]
            self._of[name] = _ref(slot.seed)
        elif (place.stage, place.frozen) != (slot.stage, slot.frozen):
            place.load_lifecycle_state(slot.lifecycle_state())
        if slot.seed is not None and place.alpha_value != slot.alpha_value:
            place.set_alpha(slot.alpha_value)


def _is_gone(place: SeedSlot | None) -> bool:
    """Whether its model has it no more, as far as a slot knows, whoever may still hold it."""
    return place is None or getattr(place, "removed", False)


def _nothing() -> None:
    return None


def _ref(seed: nn.Module | None) -> _Ref[nn.Module]:
    assert seed is not None
    return weakref.ref(seed)


def _twin(ref: _Ref[_T], memo: Mapping[int, Any]) -> _Ref[_T]:
    twin = memo.get(id(ref()))
    return _nothing if twin is None else weakref.ref(twin)
