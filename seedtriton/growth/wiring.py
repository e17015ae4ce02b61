"""What a seed is wired to: a slot of the model, a group of the optimizer, a row of the monitor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ..core.errors import ConfigurationError, WiringError
from ..core.evidence import SeedEvidence
from ..core.lifecycle import Stage
from ..gradients.monitor import GradientMonitor
from ..gradients.noticing import is_shard
from .groups import SeedGroups
from .slot import SeedSlot

_T = TypeVar("_T")

# Classes around an adapted model by package and name, for it is not imported to be asked.
PEFT = {("peft", "PeftModel"), ("peft", "PeftMixedModel")}

if TYPE_CHECKING:
    from ..parallel.joining import Joining
    from ..parallel.ranks import Ranks


class Wiring:
    """A model with its slots, the optimizer that trains it, and the monitor that watches both.

    Args:
        model: the module itself, see ``unwrap``.
        slots: ``slots_of`` it; ``find`` keeps them up to date.
        optimizer: what trains the host and gets a group per seed; wrappers are looked through.
        schedulers: of its learning rates.
        window: samples that the monitor keeps.
        quarantine: see ``GradientMonitor``, as ``tag``.
        tag: the loss whose gradients count.
        ranks: the processes that train the model together, if there are others.

    Attributes:
        adapted: whether PEFT wraps the model, and saves adapters alone.
        joining: how seeds join the model on all of them; None: this process is alone.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: dict[str, SeedSlot],
        optimizer: Any,
        schedulers: Iterable[Any],
        window: int,
        quarantine: bool,
        tag: str | None,
        ranks: Ranks | None = None,
    ) -> None:
        wrapped, self.model, self.slots, self.ranks = model, unwrap(model), slots, ranks
        self.adapted = any(map(is_adapted, _shells(wrapped)))
        own = {id(module) for module in self.model.modules()}
        self._elsewhere = {name for name, slot in slots.items() if id(slot) not in own}
        self.groups = SeedGroups(optimizer, schedulers)
        self.optimizer = self.groups.optimizer
        self.joining = None if ranks is None else _joining(ranks, self.model, wrapped, self.optimizer, slots)
        self.monitor = GradientMonitor(
            self.model, {}, window=window, optimizers=self.optimizer, quarantine=quarantine, tag=tag, ranks=ranks
        )

    def slot(self, name: str) -> SeedSlot:
        """The slot of this name; ConfigurationError when there is none."""
        if not isinstance(name, str):
            raise ConfigurationError(
                f"a slot is told by its path in the model, one of {sorted(self.slots)}, not by a {type(name).__name__}"
            )
        self.find()
        if name not in self.slots:
            known = f"its slots are {sorted(self.slots)}"
            if not isinstance(dict(self.model.named_modules()).get(name), SeedSlot):
                raise ConfigurationError(f"the model has no slot {name!r}; {known}")
            if self.ranks is not None:
                raise WiringError(
                    f"slot {name!r} came into the model after the controller was made, and on many ranks it is not "
                    f"looked for again; {known}: make the controller when all slots are there"
                )
            raise WiringError(
                f"slot {name!r} lies in a seed that is not permanent yet, and would come and go with it; {known}"
            )
        return self.slots[name]

    def find(self) -> None:
        """Take in the slots that the model has got since: put in later, or in a seed that is a fossil by now.

        And forget the empty ones that it has no more. One that is there keeps its name when a wrapper has renamed it.
        Of this process alone: on many ranks all would have to be asked.
        """
        if self.ranks is not None:
            return
        there = slots_in(self.model)
        own, known = set(map(id, there.values())), set(map(id, self.slots.values()))
        for name, slot in list(self.slots.items()):
            if slot.stage is Stage.DORMANT and id(slot) not in own:
                del self.slots[name]
        for name, slot in there.items():
            if name not in self.slots and id(slot) not in known:
                slot.name = name
                self.slots[name] = slot

    def put_in(
        self,
        name: str,
        module: nn.Module,
        how: Mapping[str, Any],
        group: Mapping[str, Any] | None,
    ) -> None:
        """Put a seed into its slot, the optimizer and the monitor: all of them or none.

        Args:
            name: of an empty slot.
            module: the seed.
            how: arguments of ``SeedSlot.germinate``, without device and dtype: those of the model.
            group: settings of its group in the optimizer; None: it gets no group.

        Raises:
            ConfigurationError: an unknown blend or setting.
            WiringError: the seed is unfit, or the optimizer has an unknown scheduler; nothing has changed.
        """
        place = self.slots[name]
        self.settle()
        self.monitor.refresh()  # what has changed until now is none of the seed's
        refuse_shared(self.model, name, module)
        if group is not None:
            self.groups.refuse_unknown_scheduler()
        before = place.lifecycle.state_dict()
        place.germinate(module, **self._device_and_dtype(how["probe"]), **how)
        groups = len(self.optimizer.param_groups)
        try:
            self.join(name, getattr(how["probe"], "dtype", None))
            if group is not None and name not in self._elsewhere:
                self.groups.add(dict(place.named_parameters()), group)
            self.watch(name)
        except Exception:
            if len(self.optimizer.param_groups) > groups:
                self.groups.remove(place)
            self.leave(name)
            place.vacate()
            place.lifecycle.load_state_dict(before)
            raise

    def watch(self, name: str) -> None:
        """Have the monitor measure the seed in this slot; one in the model of another rank is measured there."""
        place = self.slots[name]
        here = name not in self._elsewhere
        self.monitor.add_seed(name, place.modules_of_seed() if here else (), alpha=place if here else None)

    def join(self, name: str, returns: torch.dtype | None = None) -> None:
        """Make the seed in this slot the same on all ranks, and like its host there; alone, nothing.

        Args:
            name: the slot.
            returns: dtype of the features there, if it is known.
        """
        if self.joining is not None and self.ranks is not None:
            place = self.slots[name]
            # One key for all, which is saved, and other numbers on each: they have other samples. Exchanged before the
            # weights are, which nobody could tell from the exchange of another call.
            place.random.key = self.told_by_all(place.random.key, "germinate()")[0]
            place.random.member = self.ranks.rank
            self.joining.enter(name, place.modules_of_seed(), returns)

    def leave(self, name: str) -> None:
        """The seed in this slot is gone; nothing where it never joined."""
        if self.joining is not None:
            self.joining.leave(name)

    def refuse_leaving(self, name: str) -> None:
        """WiringError for a seed that others wait for in every step, so that it can be neither taken out nor frozen."""
        if self.joining is not None:
            self.joining.refuse_leaving(name)

    def settle(self) -> None:
        """Between two steps: have the parameters in place that optimizer and monitor hold.

        Raises:
            WiringError: inside of DDP's ``join()``, see ``Joining.check``.
        """
        if self.joining is not None:
            self.joining.check()
            self.joining.settle()

    def sync_buffers(self) -> None:
        """Running statistics that ranks keep apart within an epoch become the same on all of them. On every rank.

        Behind an exchange that begins with its call's name: a rank in another call would only be waited for here.
        """
        if self.joining is not None:
            self.joining.sync_buffers()

    def read(
        self, call: str, facts: Mapping[str, object], told: Sequence[float] = (), *, strict: bool = False
    ) -> tuple[dict[str, SeedEvidence], list[list[float]]]:
        """The evidence of every living seed, and what every rank has told; see ``GradientMonitor.read_together``."""
        self.settle()
        found = self.monitor.read_together(call, facts, told, strict=strict)
        self.sync_buffers()
        return found

    def told_by_all(self, told: _T, call: str) -> list[_T]:
        """What every rank tells in ``call``, plain values; alone, what this one does."""
        return [told] if self.ranks is None else self.ranks.objects(told, call)

    def _device_and_dtype(self, probe: object) -> dict[str, Any]:
        """The probe's; but a dtype that no parameter of the model has is autocast's, and no seed should have it."""
        floating = [p for p in self.model.parameters() if p.is_floating_point()]
        device, dtype = floating[0].device, floating[0].dtype
        if isinstance(probe, Tensor):
            device = probe.device
            if probe.dtype in {p.dtype for p in floating}:
                dtype = probe.dtype
        return {"device": device, "dtype": dtype}


def refuse_shared(model: nn.Module, name: str, module: nn.Module) -> None:
    """WiringError when a seed for this slot has a parameter that the model has already."""
    known = {id(parameter) for parameter in model.parameters()}
    shared = [parameter for parameter, p in module.named_parameters() if id(p) in known]
    if shared:
        raise WiringError(
            f"the seed for slot {name!r} shares parameters with the model: {shared[:3]}; "
            "behind the host it must be a module of its own (copy.deepcopy)"
        )


def ranks_of(told: Ranks | Literal["auto"] | None, model: nn.Module) -> Ranks | None:
    """Those that were told, or "auto": all processes, if torch.distributed is initialised with more than one.

    Or with one alone, as when a script is tried out, where the model is cut into parts all the same.

    Raises:
        ConfigurationError: neither of them.
    """
    if told == "auto":
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return None
        return _all_ranks() if distributed.get_world_size() > 1 or any(map(is_shard, model.parameters())) else None
    if told is not None and not (hasattr(told, "headers") and hasattr(told, "total")):
        raise ConfigurationError(f'ranks must be seedtriton.Ranks(...), "auto" or None, got {told!r}')
    return told


def _all_ranks() -> Ranks:
    # Inside, so that one process alone imports nothing of it.
    from ..parallel.ranks import Ranks

    return Ranks()


def _joining(
    ranks: Ranks, model: nn.Module, wrapped: nn.Module, optimizer: Any, slots: Mapping[str, SeedSlot]
) -> Joining:
    from ..parallel.joining import Joining
    from ..parallel.sharding import refuse_wrappers

    refuse_wrappers(wrapped, optimizer)
    ddp = next((m for m in _shells(wrapped) if isinstance(m, nn.parallel.DistributedDataParallel)), None)
    return Joining(ranks, model, ddp, slots)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's, PEFT's and the data-parallel wrappers, so that slots keep their names."""
    *_, model = _shells(model)
    return model


def _shells(model: nn.Module) -> Iterator[nn.Module]:
    """The wrappers of a model from the outside in, and it."""
    yield model
    inner = getattr(model, "_orig_mod", None)
    if not isinstance(inner, nn.Module) and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner = model.module
    inner = inner if isinstance(inner, nn.Module) else _adapted(model)
    if isinstance(inner, nn.Module):
        yield from _shells(inner)


def _adapted(model: nn.Module) -> Any:
    """What PEFT has put adapters into; None of another model, and of one whose adapters are outside, as prompts are."""
    if _is(model, {("peft", "BaseTuner")}):
        return model.model
    return _adapted(model.base_model) if is_adapted(model) else None  # type: ignore[arg-type]


def is_adapted(model: nn.Module) -> bool:
    """Whether it is PEFT's wrapper of a model: that saves adapters, and nothing else that has learned."""
    return _is(model, PEFT)


def _is(model: nn.Module, kinds: set[tuple[str, str]]) -> bool:
    return any((kind.__module__.partition(".")[0], kind.__name__) in kinds for kind in type(model).__mro__)


def slots_in(model: nn.Module) -> dict[str, SeedSlot]:
    """The slots of this very model by their path; without those in a seed that is not permanent, which go with it."""
    own = {name: module for name, module in model.named_modules() if isinstance(module, SeedSlot)}
    coming = [name for name, slot in own.items() if slot.stage is not Stage.FOSSILIZED]
    return {name: slot for name, slot in own.items() if not in_seed_of(name, coming)}


def in_seed_of(name: str, slots: Iterable[str]) -> bool:
    """Whether a slot of this path lies in the seed of one of these."""
    return any(name.startswith(f"{slot}.seed.") for slot in slots)


def slots_of(model: nn.Module, ranks: Ranks | None = None) -> dict[str, SeedSlot]:
    """The slots of a model by their path in it, which they are told; WiringError when there is none.

    Of many ranks, those in any rank's model, in the same order on each: one that is elsewhere has a stand-in here,
    whose seed lives the same life and computes nothing.
    """
    own = slots_in(model)
    found = [list(own)] if ranks is None else ranks.objects(list(own), "GrowthController()")
    names = dict.fromkeys(name for theirs in found for name in theirs)
    slots = {name: own.get(name) or SeedSlot() for name in names}
    if not slots:
        raise WiringError(
            "the model has no SeedSlot: put one where a seed may grow, x = self.slot(x), or insert_slot(model, path)"
        )
    for name, slot in slots.items():
        slot.name = name
    return slots
