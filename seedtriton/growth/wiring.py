"""What a seed is wired to: a slot of the model, a group of the optimizer, a row of the monitor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..core.errors import ConfigurationError, WiringError
from ..gradients.monitor import GradientMonitor
from .groups import SeedGroups
from .slot import SeedSlot


class Wiring:
    """A model with its slots, the optimizer that trains it, and the monitor that watches both.

    Args:
        model: the module itself, see ``unwrap``.
        slots: ``slots_of`` it.
        optimizer: what trains the host and gets a group per seed; wrappers are looked through.
        schedulers: of its learning rates.
        window: samples that the monitor keeps.
        quarantine: see ``GradientMonitor``, as ``tag``.
        tag: the loss whose gradients count.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: Mapping[str, SeedSlot],
        optimizer: Any,
        schedulers: Iterable[Any],
        window: int,
        quarantine: bool,
        tag: str | None,
    ) -> None:
        self.model, self.slots = model, slots
        self.groups = SeedGroups(optimizer, schedulers)
        self.optimizer = self.groups.optimizer
        self.monitor = GradientMonitor(
            model, {}, window=window, optimizers=self.optimizer, quarantine=quarantine, tag=tag
        )

    def slot(self, name: str) -> SeedSlot:
        """The slot of this name; ConfigurationError when there is none."""
        if name not in self.slots:
            raise ConfigurationError(f"the model has no slot {name!r}; its slots are {sorted(self.slots)}")
        return self.slots[name]

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
        self.monitor.refresh()  # what has changed until now is none of the seed's
        self.refuse_shared(name, module)
        if group is not None:
            self.groups.refuse_unknown_scheduler()
        before = place.lifecycle.state_dict()
        place.germinate(module, **self._device_and_dtype(how["probe"]), **how)
        groups = len(self.optimizer.param_groups)
        try:
            if group is not None:
                self.groups.add(dict(place.named_parameters()), group)
            self.monitor.add_seed(name, place.modules_of_seed(), alpha=place)
        except Exception:
            if len(self.optimizer.param_groups) > groups:
                self.groups.remove(place)
            place.vacate()
            place.lifecycle.load_state_dict(before)
            raise

    def _device_and_dtype(self, probe: object) -> dict[str, Any]:
        """The probe's; but a dtype that no parameter of the model has is autocast's, and no seed should have it."""
        floating = [p for p in self.model.parameters() if p.is_floating_point()]
        device, dtype = floating[0].device, floating[0].dtype
        if isinstance(probe, Tensor):
            device = probe.device
            if probe.dtype in {p.dtype for p in floating}:
                dtype = probe.dtype
        return {"device": device, "dtype": dtype}

    def refuse_shared(self, name: str, module: nn.Module) -> None:
        """WiringError when a seed for this slot has a parameter that the model has already."""
        known = {id(parameter) for parameter in self.model.parameters()}
        shared = [parameter for parameter, p in module.named_parameters() if id(p) in known]
        if shared:
            raise WiringError(
                f"the seed for slot {name!r} shares parameters with the model: {shared[:3]}; "
                "behind the host it must be a module of its own (copy.deepcopy)"
            )


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's and the data-parallel wrappers, so that slots keep their names."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def slots_of(model: nn.Module) -> dict[str, SeedSlot]:
    """The slots of a model by their path in it, which they are told; WiringError when there is none."""
    slots = {name: module for name, module in model.named_modules() if isinstance(module, SeedSlot)}
    if not slots:
        raise WiringError("the model has no SeedSlot: put one where a seed may grow, x = self.slot(x)")
    for name, slot in slots.items():
        slot.name = name
    return slots
