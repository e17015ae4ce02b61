"""Are the parameters still those? Noticing that modules were changed, without walking over them, and saying what."""

from __future__ import annotations

import operator
from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

# By segment the parameters of host and seeds: what to call each, and which it is.
Named = Mapping[int, Mapping[str, Tensor]]

SHOWN = 3  # parameters that a sentence names


def is_shard(value: Any) -> bool:
    """Whether it is a DTensor, of which each rank holds a part."""
    return hasattr(value, "placements") and hasattr(value, "device_mesh")


_flag = operator.attrgetter("requires_grad")


class _Registrations:
    """Counts what any module of the process was given, by torch's own global hooks: a change costs nobody a walk.

    Comparing that count takes 0.1 us where comparing the modules of 300 parameters takes 40, which is too much for
    every step. Assignments that bypass ``setattr`` and ``register_*`` (torch's own conversions, ``del``) do not count.
    """

    def __init__(self) -> None:
        self.count, self._hooked = 0, False

    def begin(self) -> None:
        """Put the hooks on, once."""
        if not self._hooked:
            self._hooked = True
            nn.modules.module.register_module_parameter_registration_hook(self._add)
            nn.modules.module.register_module_module_registration_hook(self._add)

    def _add(self, module: nn.Module, name: str, given: object) -> None:
        self.count += 1


_registrations = _Registrations()


def registered() -> int:
    """How often any module of the process was given a parameter or a child; the same number: none was replaced so."""
    return _registrations.count


class Snapshot:
    """The parameters of some modules as they were.

    Args:
        modules: whose own parameters and children are compared; strangers are looked up in no other place.
        named: all parameters, see ``Named``.
    """

    def __init__(self, modules: Iterable[nn.Module], named: Named) -> None:
        _registrations.begin()
        every = {id(module): module for module in modules}
        both = ((module._parameters, module._modules) for module in every.values())
        # A scripted module has other containers, and cannot be changed. What fully_shard keeps (DTensor) is another
        # object whenever it is gathered, and the same one again after backward.
        self._dicts: list[dict[str, Any]] = [
            held for pair in both for held in pair if isinstance(held, dict) and not any(map(is_shard, held.values()))
        ]
        self._held = self._now()
        self._count = _registrations.count
        self.named = named
        self._parameters = [p for parameters in named.values() for p in parameters.values()]
        self._flags = list(map(_flag, self._parameters))
        # Conversions that replace parameters (from "meta", by swapping) are no registration, but replace all of them.
        ends = {id(p) for p in (self._parameters[:1] + self._parameters[-1:])}
        self._ends = [(held, key, p) for held in self._dicts for key, p in held.items() if id(p) in ends]

    def stands(self, closely: bool = False) -> bool:
        """Whether these are still the parameters.

        Args:
            closely: compare all modules, also where no registration says that it may be needed, and what is frozen.
        """
        unchanged = self._count == _registrations.count and all(held.get(key) is p for held, key, p in self._ends)
        if unchanged and not closely:
            return True
        count, now = _registrations.count, self._now()
        if len(now) != len(self._held) or not all(map(operator.is_, now, self._held)):
            return False
        self._count = count
        return not closely or self.flags_stand()

    def flags_stand(self) -> bool:
        """Whether the same ones are frozen."""
        return list(map(_flag, self._parameters)) == self._flags

    def _now(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._dicts)))

    def differences(self, later: Snapshot, *, loaded: bool) -> dict[int, str]:
        """What is no longer the same in a later one, in words by segment; empty: nothing.

        Args:
            later: of the same host and seeds.
            loaded: a state was loaded in between: other objects of the same names and shapes are the same parameters,
                unless they were on "meta", without values.
        """
        flags = {id(p): flag for p, flag in zip(self._parameters, self._flags)}
        found = {}
        for segment, now in later.named.items():
            words = _compare(self.named.get(segment, {}), now, flags, loaded)
            if words:
                found[segment] = "; ".join(words)
        return found


def _compare(
    then: Mapping[str, Tensor], now: Mapping[str, Tensor], flags: Mapping[int, bool], loaded: bool
) -> list[str]:
    kinds: dict[str, list[str]] = {}
    for name, parameter in now.items():
        before = then.get(name)
        if before is None:
            kinds.setdefault("added", []).append(name)
        elif before is not parameter:
            if not loaded or before.shape != parameter.shape or before.is_meta:
                kinds.setdefault("replaced", []).append(name)
        elif flags[id(parameter)] != parameter.requires_grad:
            kinds.setdefault("unfrozen" if parameter.requires_grad else "frozen", []).append(name)
    gone = [name for name in then if name not in now]
    if gone:
        kinds["gone"] = gone
    return [f"{some(names)} {kind}" for kind, names in kinds.items()]


def some(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def unheld(
    named: Mapping[str, Tensor], optimizers: Iterable[torch.optim.Optimizer], watched: Container[int]
) -> list[str]:
    """Names of those of the host with a gradient that no optimizer will ever step or zero.

    Empty where the host's optimizer is simply not known: nothing of the host is held by one, and none holds anything
    that is no longer ``watched`` (by ``id``).
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    known = any(id(p) in held for p in named.values()) or any(one not in watched for one in held)
    if not known:
        return []
    return [name for name, p in named.items() if p.requires_grad and p.grad is not None and id(p) not in held]
