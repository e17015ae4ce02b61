"""A slot behind any module of a model whose code stays as it is, and the way back.

The slot is a child of the module that it follows, so it goes wherever that goes: into copies and files, onto devices,
through ``fully_shard``. Nothing else gets another name, and an empty slot adds no key to the ``state_dict``.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigurationError, WiringError
from ..core.lifecycle import Stage
from . import blending
from .slot import SeedSlot
from .trying import slot_named
from .wiring import unwrap

NAME = "growth_slot"  # of the slot in the module that it follows


class InsertedSlot(SeedSlot):
    """A ``SeedSlot`` that is given what the module before it returns, and puts its output in the place of the features.

    Attributes:
        features: which part of it those are, see ``insert_slot``.
        hooked: a hook of that module calls it. Whoever else does goes over the module's children, and gets back what
            he gave.
        removed: it is in no model any more.
    """

    def __init__(self, features: int | str | None, hooked: bool) -> None:
        """Begin empty."""
        super().__init__()
        self.features, self.hooked, self.removed = features, hooked, False

    def forward(self, features: Any, *others: Any, by_hook: bool = False, **named: Any) -> Any:
        """What the module returned, with the slot's output for the features; the very object where nothing changes.

        Raises:
            WiringError: the features are not in it, or what ``SeedSlot.forward`` refuses.
        """
        output = features
        if self._mode is None or self.hooked != by_hook:
            return output
        return changed_in(output, self.features, super().forward, self.name)

    def _place(self, seed: nn.Module, gate: blending.GateNetwork | None, blend: str, device: torch.device) -> None:
        if self.removed:
            raise WiringError(f"{slot_named(self.name)} was removed from its model: insert_slot() makes another")
        super()._place(seed, gate, blend, device)


def insert_slot(model: nn.Module, path: str, *, features: int | str | None = None) -> SeedSlot:
    """Put a slot behind a module of a model, whose code stays as it is: what the module returns passes through it.

    Its name, ``slot.name``, is ``path + ".growth_slot"``. An ``nn.Sequential`` runs it as its last module, everything
    else by a forward hook. A controller that was there before finds it; on many ranks call it before, and on every
    rank. Before or after ``torch.compile``, DDP and ``fully_shard`` is all the same; what was compiled is so anew.

    Args:
        model: DDP and compiled wrappers are looked through, as are wrappers of the module itself.
        path: of the module, as in ``model.named_modules()``: "layers.3". It has to be called, not only looked into: the
            ``out_proj`` of ``nn.MultiheadAttention`` is not. One that is called twice, or found under two paths, has
            one slot, that is run as often.
        features: which part of what it returns: None is the tensor itself, or the first of a tuple, list or dataclass
            (Hugging Face's ModelOutput); else a position in it, or the name of a field or key.

    Returns:
        The slot, empty.

    Raises:
        ConfigurationError: no such module, one that is never called, a slot, or a part of one.
        WiringError: the module is followed by a slot already.
    """
    module = _module_at(model, path)
    forward = getattr(type(module), "forward", None)
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)) or forward is nn.Module.forward:
        inner = [f"{path}.{name}" for name in module._modules]
        raise ConfigurationError(
            f"{path!r} is a {type(module).__name__}, which is not called and has no output: put the slot behind one of "
            f"its modules, {_some(inner)}"
        )
    if not (features is None or isinstance(features, str) or (type(features) is int and features >= 0)):
        raise ConfigurationError(f"features must be a position from 0 on, a name or None, got {features!r}")
    if hasattr(module, NAME):
        raise WiringError(f"{path!r} is followed by a slot already: {path}.{NAME}")
    slot = InsertedSlot(features, hooked=forward is not nn.Sequential.forward)
    slot.train(module.training)
    module.add_module(NAME, slot)
    if slot.hooked:
        # In front: a hook that is there, as FSDP2's that takes the parameters away, finds the module's whole output.
        module.register_forward_hook(_follow, prepend=True)
    slot.name = next(name for name, found in unwrap(model).named_modules() if found is slot)
    _forget_compiled()
    return slot


def remove_slot(model: nn.Module, path: str) -> None:
    """Take back what ``insert_slot(model, path)`` did. A controller forgets the slot; one of many ranks refuses it.

    Raises:
        ConfigurationError: no such module, or no inserted slot behind it.
        WiringError: the slot is occupied or resting; nothing has changed.
    """
    module = _module_at(model, path)
    slot = module._modules.get(NAME)
    if not isinstance(slot, InsertedSlot):
        raise ConfigurationError(f"no slot was inserted behind {path!r}")
    if slot.stage is not Stage.DORMANT:
        raise WiringError(
            f"{slot_named(slot.name)} is occupied or resting (stage {slot.stage}): prune its seed and wait until it is "
            "DORMANT; one that is FOSSILIZED is part of the model"
        )
    take_out(module)
    _forget_compiled()


def take_out(module: nn.Module) -> None:
    """Remove the slot behind a module, and the hook that calls it."""
    slot = module._modules.pop(NAME)
    assert isinstance(slot, InsertedSlot)
    slot.removed = True
    for key in [key for key, hook in module._forward_hooks.items() if hook is _follow]:
        del module._forward_hooks[key]


def _follow(module: nn.Module, inputs: object, output: Any) -> Any:
    """The hook: a function of the file, which copies and files of the module have as it is, and their own slots."""
    slot = module._modules.get(NAME)
    return None if slot is None or slot.seed is None else slot(output, by_hook=True)


def _module_at(model: nn.Module, path: str) -> nn.Module:
    module, way = unwrap(model), path.split(".")
    for depth, name in enumerate(way):
        if isinstance(module, SeedSlot):
            raise ConfigurationError(f"{path!r} is in a slot, {'.'.join(way[:depth])!r}: a seed has no slots")
        found = getattr(module, name, None) if name else None
        if not isinstance(found, nn.Module):
            here = f"{'.'.join(way[:depth])!r}" if depth else "it"
            raise ConfigurationError(f"the model has no module {path!r}; {here} has {_some(list(module._modules))}")
        module = _inside(found)
    if isinstance(module, SeedSlot):
        raise ConfigurationError(f"{path!r} is a slot itself: give the module that a slot is to follow")
    return module


def _inside(module: nn.Module) -> nn.Module:
    """The module in torch.compile's and the checkpoints' wrappers, which rename what else is in them as they like."""
    while True:
        module = unwrap(module)
        wrapped = module._modules.get("_checkpoint_wrapped_module")
        if wrapped is None:
            return module
        module = wrapped


def _some(names: list[str]) -> str:
    return f"{', '.join(map(repr, names[:8]))}{', ...' if len(names) > 8 else ''}" if names else "none"


def changed_in(output: Any, features: int | str | None, change: Callable[[Tensor], Tensor], name: str | None) -> Any:
    """What a module has returned, with the features in it changed; the very object where they are not.

    Args:
        output: what it has returned.
        features: see ``insert_slot``.
        change: takes them, and returns what is to be in their place.
        name: of the slot, for errors.

    Raises:
        WiringError: the features are not in it.
    """
    if isinstance(output, Tensor) and features in (None, 0):
        return change(output)
    key = _key(output, features, name)
    given = _part(output, key)
    if not isinstance(given, Tensor):
        raise _without_features(output, features, name, f"{key!r} in it is {type(given).__name__}")
    changed = change(given)
    return output if changed is given else _with_part(output, key, changed)


def _key(output: Any, features: int | str | None, name: str | None) -> int | str:
    """Where the features are in what the module returned: a position, a key or the name of a field."""
    wanted = 0 if features is None else features
    names: list[Any] = []
    if isinstance(output, (tuple, list)):
        names = list(getattr(output, "_fields", range(len(output))))
        keys = dict(enumerate(range(len(output)))) | {name: position for position, name in enumerate(names)}
    elif dataclasses.is_dataclass(output):  # Hugging Face's ModelOutput too
        names = [field.name for field in dataclasses.fields(output) if getattr(output, field.name) is not None]
        keys = dict(enumerate(names)) | {name: name for name in names}
    else:
        names = list(output) if isinstance(output, Mapping) else []
        keys = {name: name for name in names}
    if wanted not in keys:
        raise _without_features(output, features, name, f"it has {names}" if names else "it is no tensor")
    key: int | str = keys[wanted]
    return key


def _without_features(output: Any, features: int | str | None, name: str | None, what: str) -> WiringError:
    return WiringError(
        f"{slot_named(name)} is given {type(output).__name__} ({what}) and looks for features {features!r}: "
        "insert_slot(model, path, features=...) takes the position or the name of a tensor"
    )


def _part(output: Any, key: int | str) -> Any:
    return getattr(output, str(key)) if dataclasses.is_dataclass(output) else output[key]


def _with_part(output: Any, key: int | str, part: Tensor) -> Any:
    """A copy of what the module returned, with another part: nobody else's object is written to."""
    if isinstance(output, tuple):
        parts = [part if position == key else item for position, item in enumerate(output)]
        return output._make(parts) if hasattr(output, "_make") else type(output)(parts)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return dataclasses.replace(output, **{str(key): part})
    # The first two are what torch.compile knows how to copy.
    changed: Any = [*output] if type(output) is list else {**output} if type(output) is dict else copy.copy(output)
    changed[key] = part
    return changed


def _forget_compiled() -> None:
    """What torch.compile has made looks neither for new hooks nor for new children."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
