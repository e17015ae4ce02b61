"""accelerate: seeds that grow in a loop of yours, between ``accelerator.prepare`` and ``save_state``.

    from seedtriton.integrations.accelerate import prepare_growth

    growth = prepare_growth(accelerator, model, optimizer, [scheduler], {"slot": Adapter})    # after prepare()
    ...
            accelerator.backward(loss)
            growth.measure()                       # also between two syncs of accumulate(): there it does nothing
            optimizer.step()
    ...
        growth.end_epoch(accuracy=accuracy)

docs/clients.md says what happens where. Nothing of accelerate is imported: the accelerator is given.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import WiringError
from ..gradients.clipping import Limit
from ..gradients.parameters import Gradients
from ..growth import GrowthController
from ..growth.checkpoint import SeedOrFactory
from ..growth.clients import clip_apart, exchange, own_random_numbers
from ..growth.wiring import unwrap
from .saved import FILE

# They shard or replace the model, and load it before any hook.
REFUSED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA", "TP")


class AcceleratedGrowth(GrowthController):
    """The controller of a loop with an ``Accelerator``, which knows when gradients are whole and how they are scaled.

    Args:
        accelerator: after ``prepare``.
        model: the prepared one.
        optimizer: the prepared one, or that inside.
        **growth: arguments of ``GrowthController``.

    Attributes:
        seeds: by slot, what ``load_state`` makes seeds of.
    """

    def __init__(self, accelerator: Any, model: nn.Module, optimizer: Any, **growth: Any) -> None:
        """Wire it; ``prepare_growth`` also germinates, and stands by where states are saved, loaded and clipped."""
        self.accelerator, self.seeds = accelerator, dict[str, SeedOrFactory]()
        super().__init__(model, optimizer, **growth)

    def measure(
        self,
        scaler: torch.amp.GradScaler | None = None,
        *,
        gradients: Gradients | None = None,
        tag: str | None = None,
        every: int = 1,
    ) -> None:
        """As ``GrowthController.measure``, with the accelerator's scaler; between two syncs nothing."""
        if self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler if scaler is None else scaler
            super().measure(scaler, gradients=gradients, tag=tag, every=every)

    def clip_grad_norm_(self, max_norm: Limit, error_if_nonfinite: bool = False, *, reuse: bool = True) -> Tensor:
        """As ``GrowthController.clip_grad_norm_``, of gradients without their loss scale; between two syncs nothing.

        ``accelerator.clip_grad_norm_(model.parameters(), max_norm)`` is apart too, for the host in every bit torch's.
        """
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.accelerator.device)
        self.accelerator.unscale_gradients()
        return super().clip_grad_norm_(max_norm, error_if_nonfinite, reuse=reuse)


def prepare_growth(
    accelerator: Any,
    model: nn.Module,
    optimizer: Any,
    schedulers: Sequence[Any] = (),
    seeds: Mapping[str, SeedOrFactory] = MappingProxyType({}),
    *,
    germination: Mapping[str, Any] = MappingProxyType({}),
    **growth: Any,
) -> AcceleratedGrowth:
    """A controller that grows seeds in a prepared model; call it once, after ``accelerator.prepare``, on every process.

    From now on ``save_state`` writes the growth state, and ``load_state`` puts its seeds into their slots before it
    loads weights, whatever is there by then. ``accelerator.clip_grad_norm_`` clips every seed behind the host by its
    own norm.

    Args:
        accelerator: the ``Accelerator``.
        model: the prepared model, with its slots.
        optimizer: the prepared optimizer that trains it.
        schedulers: of its learning rates, prepared or not.
        seeds: by slot, a factory of the seed, or a module; germinated now, and made again by ``load_state``.
        germination: arguments of ``GrowthController.germinate`` for every seed, such as ``lr`` or ``blend``.
        **growth: arguments of ``GrowthController``, such as ``thresholds``.

    Raises:
        WiringError: the accelerator shards the model; and what ``GrowthController`` raises.
    """
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in REFUSED:
        raise WiringError(
            f"accelerate's {kind} keeps weights where no seed can join them in time: use DDP (MULTI_GPU, MULTI_CPU) or "
            "one process; or fully_shard and a loop of your own (docs/many-gpus.md)"
        )
    made = AcceleratedGrowth(accelerator, model, optimizer, schedulers=schedulers, **growth)
    made.seeds |= seeds
    with own_random_numbers(unwrap(model)):
        for name, seed in seeds.items():
            made.germinate(name, seed, **germination)
    accelerator.register_save_state_pre_hook(_saving(made))
    accelerator.register_load_state_pre_hook(_loading(made, unwrap(model)))
    accelerator.clip_grad_norm_ = _clipping(made, accelerator.clip_grad_norm_)
    return made


def _saving(growth: AcceleratedGrowth) -> Callable[[Any, Any, str], None]:
    def save(models: Any, weights: Any, folder: str) -> None:
        state = growth.state_dict()  # on every process
        growth.accelerator.save(state, os.path.join(folder, FILE), safe_serialization=False)

    return save


def _loading(growth: AcceleratedGrowth, model: nn.Module) -> Callable[[Any, str], None]:
    def load(models: Any, folder: str) -> None:
        path = os.path.join(folder, FILE)
        if not os.path.exists(path):
            raise WiringError(f"{folder} has no {FILE}: a state without seeds is loaded before prepare_growth()")
        state = torch.load(path, map_location="cpu", weights_only=True)
        with own_random_numbers(model):
            exchange(growth, state, growth.seeds)

    return load


def _clipping(growth: AcceleratedGrowth, inner: Callable[..., Any]) -> Callable[..., Any]:
    def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: Any, norm_type: Any = 2) -> Any:
        return clip_apart(inner, parameters, growth.slots, max_norm, norm_type)

    return clip_grad_norm_
