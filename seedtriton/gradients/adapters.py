"""Adapters as PEFT keeps them: those of a layer side by side in dicts by their names, of which some are active."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor, nn


class Held(NamedTuple):
    """One parameter of an adapter.

    Attributes:
        adapter: its name.
        layer: where it is in use, or would be.
        path: in the layer.
        parameter: itself.
    """

    adapter: str
    layer: nn.Module
    path: str
    parameter: Tensor


def active_of(layer: nn.Module) -> list[str] | None:
    """The adapters that a layer computes with, unless they are disabled; None: it has none."""
    active: object = getattr(layer, "active_adapters", None)
    return list(active) if isinstance(active, (list, tuple)) else None


def held_in(layer: nn.Module) -> Iterator[Held]:
    """The parameters of all adapters of one layer; none of a module that has no adapters."""
    if active_of(layer) is None:
        return
    for kind, held in layer.named_children():
        if isinstance(held, (nn.ModuleDict, nn.ParameterDict)):
            for path, parameter in held.named_parameters():
                yield Held(path.partition(".")[0], layer, f"{kind}.{path}", parameter)


def inactive(modules: Iterable[nn.Module]) -> dict[int, str]:
    """Of each parameter of an adapter that its layer does not compute with, by ``id``: its name and why, in words."""
    found = {}
    for adapter, layer, _, parameter in (held for module in modules for held in held_in(module)):
        active, merged = active_of(layer) or [], getattr(layer, "merged_adapters", None)
        if getattr(layer, "disable_adapters", None) is True:  # of a model of transformers it is a method
            why = ", and adapters are disabled: enable them before training"
        elif isinstance(merged, (list, tuple)) and adapter in merged:
            why = ", which is merged into the base: unmerge_adapter() before training"
        elif adapter not in active:
            why = f", which is inactive, and active is {active}: set_adapter({adapter!r})"
        else:
            continue
        found[id(parameter)] = f"it is the adapter {adapter!r}{why}"
    return found
