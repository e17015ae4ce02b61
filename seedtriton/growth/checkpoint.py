"""What a controller saves of a training that grows, and how another one takes it over: all of it or nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import nn

from ..core.errors import ConfigurationError, SeedtritonError, StateDictError, WiringError
from ..core.lifecycle import RESTING, Stage, stage_named
from ..core.state import check_state
from . import digest
from .arguments import check_seeds
from .life import Life, Position
from .schedulers import own_value
from .slot import SeedSlot
from .slot_state import SavedSlot
from .together import taken, told_of
from .trying import seed_module
from .wiring import Wiring, in_seed_of, refuse_shared, slots_of, unwrap

VERSION = 1
LATER: Mapping[str, Any] = MappingProxyType({"loss": None, "losses": (), "epoch_began": 0, "epoch_steps": 0})

SeedOrFactory = nn.Module | Callable[[], nn.Module]


def save(wiring: Wiring, position: Position) -> dict[str, Any]:
    """Plain values and tensors, see ``GrowthController.state_dict``."""
    wiring.find()
    wiring.settle()
    taken(wiring.told_by_all(told_of(None, None, wiring.slots), "state_dict()"), wiring.slots)
    wiring.sync_buffers()
    names = {id(p): name for slot in wiring.slots.values() for name, p in slot.named_parameters()}
    groups = wiring.optimizer.param_groups
    # Ranks differ in one thing alone, the mark of a random state of each; the first one's is saved.
    own = {name: slot.lifecycle_state() for name, slot in wiring.slots.items()}
    states = wiring.told_by_all(own, "state_dict()")[0]
    to_come = {} if position.unchecked is None else position.unchecked.to_come()
    return {
        "version": VERSION,
        "epoch": position.epoch,
        "step": position.step,
        "accuracy": position.accuracy,
        "loss": position.loss,
        "losses": list(position.losses),
        "epoch_began": position.epoch_began,
        "epoch_steps": position.epoch_steps,
        "group_sizes": [len(group["params"]) for group in groups],
        "slots": {
            name: {
                "slot": states[name],
                "digest": to_come.get(name) or (None if slot.seed is None else digest.digest_of(slot)),
                "groups": [[i, [names[id(p)] for p in groups[i]["params"]]] for i in wiring.groups.of(slot)],
            }
            for name, slot in wiring.slots.items()
        },
        "lives": [life.state_dict() for life in position.lives.values()],
        "monitor": _monitor_state(wiring),
    }


def restore_slots(model: nn.Module, state: object, seeds: Mapping[str, SeedOrFactory]) -> None:
    """Put seeds into the empty slots of a model, as a saved growth state says: before anybody loads its weights.

    For scripts in which somebody else loads them, and makes the optimizer. ``GrowthController.load_state_dict`` with
    the same state then finds the seeds in their slots, and does the rest::

        restore_slots(model, saved["growth"], {"block2": make_seed})
        model.load_state_dict(...)                                    # or from_pretrained, or whatever a client does
        growth = GrowthController(model, optimizer)
        growth.load_state_dict(saved["growth"])

    Args:
        model: with its slots; DDP and compiled wrappers are looked through.
        state: what ``GrowthController.state_dict`` returned.
        seeds: by slot, a module like the one that was there, or a factory; not used for slots that had none.

    Raises:
        StateDictError: another version, a damaged state, or one of another model.
        WiringError: the slots are not empty, or a seed is unfit.
        ConfigurationError: a slot's seed is missing. In each case nothing has changed.
    """
    check_seeds(seeds)
    model = unwrap(model)
    slots = slots_of(model)
    occupied = [name for name, slot in slots.items() if slot.stage is not Stage.DORMANT]
    if occupied:
        raise WiringError(f"slots {occupied} are not empty: restore into a freshly built model")
    values = _read(state)
    check_slots(values, slots)
    modules = _modules(values, seeds, slots)
    slots |= _inner(values, slots, modules)
    before = {name: slot.lifecycle_state() for name, slot in slots.items()}
    try:
        _fill(model, slots, values, modules)
    except Exception as error:
        _empty(slots, before, modules)
        if isinstance(error, SeedtritonError):
            raise
        raise StateDictError(f"GrowthController: the state does not fit these seeds: {error!r}") from error


def load(
    wiring: Wiring, position: Position, state: object, seeds: Mapping[str, SeedOrFactory], check_weights: bool
) -> None:
    """Put seeds into the slots as ``state`` says, see ``GrowthController.load_state_dict``.

    Raises:
        StateDictError: another version, a damaged state, or one of another model or optimizer.
        WiringError: the slots are neither empty nor as ``restore_slots`` left them, or a seed is unfit.
        ConfigurationError: a slot's seed is missing, or an impossible value. In each case nothing has changed.
    """
    check_seeds(seeds)
    wiring.find()
    values = _read(state)
    check_slots(values, wiring.slots)
    occupied = [name for name, slot in wiring.slots.items() if slot.stage is not Stage.DORMANT]
    restored = wiring.slots.keys() == values["slots"].keys()
    restored = restored and all(s.stage is _saved_stage(values["slots"][name]) for name, s in wiring.slots.items())
    if position.lives or (occupied and not restored):
        raise WiringError(f"slots {occupied} are not empty: load into a freshly built model and controller")
    modules = {} if occupied else _modules(values, seeds, wiring.slots)
    inner = _inner(values, wiring.slots, modules)
    lives = _check(values, wiring, {**wiring.slots, **inner})
    before = {name: slot.lifecycle_state() for name, slot in wiring.slots.items()}, _monitor_state(wiring)
    wiring.slots.update(inner)
    try:
        _restore(wiring, values, lives, modules)
    except Exception as error:
        _undo(wiring, *before, modules)
        for name in inner:
            del wiring.slots[name]
        if isinstance(error, SeedtritonError):
            raise
        raise StateDictError(f"GrowthController: the state does not fit these seeds: {error!r}") from error
    saved = digest.saved_in(values)
    steps = wiring.monitor.steps_taken
    position.unchecked = digest.Unchecked(saved, wiring.slots, steps) if check_weights and saved else None
    position.epoch, position.step, position.accuracy = values["epoch"], values["step"], values["accuracy"]
    position.losses, position.loss = list(values["losses"]), values["loss"]
    position.epoch_began, position.epoch_steps = values["epoch_began"], values["epoch_steps"]
    position.lives = {life.name: life for life in lives}


def exchange(wiring: Wiring, position: Position, state: object, seeds: Mapping[str, SeedOrFactory]) -> None:
    """The seeds of ``state`` for those that are there, see ``clients.exchange``."""
    wiring.find()
    values = _read(state)
    check_slots(values, wiring.slots)
    modules = _modules(values, seeds, wiring.slots)
    _check(values, wiring, {**wiring.slots, **_inner(values, wiring.slots, modules)})
    occupied = {name: slot for name, slot in wiring.slots.items() if slot.seed is not None}
    for name in occupied:
        wiring.refuse_leaving(name)
    for name, slot in wiring.slots.items():
        if name in wiring.monitor.seeds:
            wiring.monitor.remove_seed(name)
        if name in occupied:
            wiring.groups.remove(slot)
            wiring.leave(name)
        slot.vacate()
    for name in [name for name in wiring.slots if in_seed_of(name, wiring.slots)]:
        del wiring.slots[name]
    position.lives, position.last = {}, {}
    load(wiring, position, state, modules, check_weights=True)


def _monitor_state(wiring: Wiring) -> dict[str, Any]:
    # Copies: the buffers go on changing.
    return {key: own_value(value) for key, value in wiring.monitor.whole_state().items()}


def check_slots(values: Mapping[str, Any], own: Mapping[str, SeedSlot]) -> None:
    """StateDictError unless a saved state is whole as far as its slots go, and they are these; see also ``_inner``."""
    kind, slots = "GrowthController", values["slots"]
    if not isinstance(slots, dict) or not all(type(name) is str for name in slots) or _outer(slots) != _outer(own):
        found = sorted(map(str, slots)) if isinstance(slots, dict) else slots
        raise StateDictError(f"{kind}: the state is of slots {found}, the model has {sorted(own)}")
    for name, entry in slots.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("slot"), dict):
            raise StateDictError(f"{kind}: damaged entry of slot {name!r}: {entry!r}")
        SavedSlot.read(entry["slot"])
        if entry.get("digest") is not None:
            digest.checked(entry["digest"], name)


def _outer(slots: Iterable[str]) -> set[str]:
    """Those that are not in the seed of another."""
    names = list(slots)
    return {name for name in names if not in_seed_of(name, names)}


def _inner(
    values: Mapping[str, Any], own: Mapping[str, SeedSlot], modules: Mapping[str, nn.Module]
) -> dict[str, SeedSlot]:
    """The slots of a saved state that the model gets with these seeds.

    Raises:
        StateDictError: a seed has no such slot.
    """
    found = {
        f"{name}.seed.{path}": place
        for name, module in modules.items()
        for path, place in module.named_modules()
        if isinstance(place, SeedSlot)
    }
    coming = [name for name in values["slots"] if name not in own]
    missing = [name for name in coming if name not in found]
    if missing:
        raise StateDictError(f"GrowthController: the state is of slots {missing} in seeds, and these seeds have none")
    for name in coming:
        found[name].name = name
    return {name: found[name] for name in coming}


def _check(values: Mapping[str, Any], wiring: Wiring, own_slots: Mapping[str, SeedSlot]) -> list[Life]:
    """The seeds' lives in a saved state; StateDictError unless it fits this model and optimizer."""
    kind, accuracy, sizes = "GrowthController", values["accuracy"], values["group_sizes"]
    counts = ("epoch", "step", "epoch_began", "epoch_steps")
    whole = all(type(values[name]) is int and values[name] >= 0 for name in counts)
    known = accuracy is None or (type(accuracy) in (int, float) and 0.0 <= accuracy <= 1.0)
    lists = isinstance(values["lives"], list) and isinstance(sizes, list) and all(type(size) is int for size in sizes)
    told = values["losses"]
    losses = isinstance(told, (list, tuple)) and all(type(x) in (int, float) and math.isfinite(x) for x in told)
    losses = losses and type(values["loss"]) in (int, float, type(None))
    if not (whole and known and lists and losses and isinstance(values["monitor"], dict)):
        raise StateDictError(f"{kind}: damaged epoch, step, accuracy, losses, lives, group_sizes or monitor")
    slots = values["slots"]
    for name, entry in slots.items():
        groups = entry.get("groups")
        if not isinstance(groups, list) or not all(map(_is_group, groups)):
            raise StateDictError(f"{kind}: damaged entry of slot {name!r}: groups {groups!r}")
        if not all(0 <= index < len(sizes) and sizes[index] == len(names) for index, names in groups):
            raise StateDictError(f"{kind}: slot {name!r} has optimizer groups {groups}, sizes are {sizes}")
    of_seeds = [index for entry in slots.values() for index, _ in entry["groups"]]
    saved = [size for index, size in enumerate(sizes) if size and index not in of_seeds]
    own = wiring.groups.sizes_without(wiring.slots.values())
    if saved != own or len(set(of_seeds)) != len(of_seeds):
        raise StateDictError(
            f"{kind}: outside the seeds the saved optimizer had groups of {saved} parameters, this one has {own}: "
            "load before anything else, into an optimizer built as at the beginning"
        )
    lives = [Life.from_state_dict(entry, own_slots) for entry in values["lives"]]
    living = [name for name, entry in slots.items() if _holds_seed(entry) and not _is_fossil(entry)]
    if sorted(life.name for life in lives) != sorted(living):
        raise StateDictError(f"{kind}: lives of {[life.name for life in lives]}, living seeds in {living}")
    return lives


def _read(state: object) -> Mapping[str, Any]:
    keys = ("epoch", "step", "accuracy", "group_sizes", "slots", "lives", "monitor")
    return check_state(state, "GrowthController", VERSION, (*keys, *LATER), LATER)


def _modules(
    values: Mapping[str, Any], seeds: Mapping[str, SeedOrFactory], slots: Mapping[str, SeedSlot]
) -> dict[str, nn.Module]:
    unknown = sorted(set(seeds) - {*slots, *values["slots"]})
    missing = [name for name, entry in values["slots"].items() if _holds_seed(entry) and name not in seeds]
    if unknown or missing:
        raise ConfigurationError(
            f"a module or factory in seeds= is needed for slots {missing}; unknown slots: {unknown}"
        )
    return {name: seed_module(seeds[name]) for name, entry in values["slots"].items() if _holds_seed(entry)}


def _fill(
    model: nn.Module, slots: Mapping[str, SeedSlot], values: Mapping[str, Any], modules: Mapping[str, nn.Module]
) -> None:
    device = next(p.device for p in model.parameters() if p.is_floating_point())
    for name, entry in values["slots"].items():
        module = modules.get(name)
        if module is not None:
            refuse_shared(model, name, module)
        slots[name].load_lifecycle_state(entry["slot"], module, device=device)


def _empty(slots: Mapping[str, SeedSlot], before: Mapping[str, dict[str, Any]], modules: Collection[str]) -> None:
    for name, state in before.items():
        if name in modules:
            slots[name].vacate()
        slots[name].load_lifecycle_state(state)


def _is_group(group: object) -> bool:
    """Whether it is a place among the optimizer's groups with the names of the parameters there."""
    if not isinstance(group, (list, tuple)) or len(group) != 2:
        return False
    index, names = group
    return type(index) is int and isinstance(names, list) and all(type(name) is str for name in names)


def _restore(
    wiring: Wiring, values: Mapping[str, Any], lives: Sequence[Life], modules: Mapping[str, nn.Module]
) -> None:
    _fill(wiring.model, wiring.slots, values, modules)
    # An optimizer that was built after ``restore_slots`` has found their parameters among the host's.
    of_seeds = sum(len(entry["groups"]) for entry in values["slots"].values())
    wiring.groups.leave_out(wiring.slots.values(), len(values["group_sizes"]) - of_seeds)
    for name, slot in wiring.slots.items():
        if slot.seed is not None:
            wiring.join(name)
    groups = [(index, name, names) for name, entry in values["slots"].items() for index, names in entry["groups"]]
    if groups:
        wiring.groups.refuse_unknown_scheduler()
    for index, name, names in sorted(groups):
        wiring.groups.insert(wiring.slots[name], index, names)
    for life in lives:
        wiring.watch(life.name)
    wiring.monitor.load_whole_state(values["monitor"])


def _undo(
    wiring: Wiring, slots: Mapping[str, dict[str, Any]], monitor: Mapping[str, Any], modules: Collection[str]
) -> None:
    """Back to slots as they were, after a restoration that failed half-way."""
    for slot in wiring.slots.values():
        if slot.seed is not None:
            wiring.groups.remove(slot)
    for name in slots:
        wiring.leave(name)
    _empty(wiring.slots, slots, modules)
    for name in wiring.monitor.seeds:
        wiring.monitor.remove_seed(name)
    wiring.monitor.load_whole_state(monitor)


def _saved_stage(entry: Mapping[str, Any]) -> Stage:
    return stage_named(entry["slot"]["lifecycle"]["stage"])


def _holds_seed(entry: Mapping[str, Any]) -> bool:
    return _saved_stage(entry) not in (Stage.DORMANT, *RESTING)


def _is_fossil(entry: Mapping[str, Any]) -> bool:
    return _saved_stage(entry) is Stage.FOSSILIZED
