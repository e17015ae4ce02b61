"""How a seed joins a model that many ranks train, and leaves it, whatever the model is wrapped in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..core.errors import WiringError
from ..gradients.noticing import is_shard
from .averaging import SeedAveraging, broadcast_modules
from .losses import gather_losses
from .ranks import Ranks
from .sharding import settle, shard_like


class Joining:
    """Makes a seed like its host: the same weights on every rank, cut like the host's, or averaged as DDP does.

    Args:
        ranks: who trains the model.
        model: the module itself.
        ddp: what averages its gradients, if the controller was given it; None: what a forward pass runs in, if any.
        slots: by path in the model, see ``_Noticing``.
    """

    def __init__(
        self, ranks: Ranks, model: nn.Module, ddp: DistributedDataParallel | None, slots: Mapping[str, nn.Module]
    ) -> None:
        """Have a seed in any of the slots tell what runs it."""
        self._ranks, self._model, self._ddp = ranks, model, ddp
        self._averaging: SeedAveraging | None = None
        self._averaged: set[str] = set()
        self._joined: dict[str, list[nn.Module]] = {}
        notice = _Noticing(self)
        for slot in slots.values():
            slot.register_forward_pre_hook(notice)

    def check(self) -> None:
        """WiringError where uneven inputs are joined: ranks that have none left would not measure."""
        config = getattr(self._ddp, "_join_config", None)
        if getattr(config, "enable", False):
            raise WiringError(
                "inside of DDP's join() ranks with fewer batches stop measuring, and no sample is of all ranks: give "
                "every rank as many batches (DistributedSampler, drop_last=True) and leave join() out"
            )

    def enter(self, name: str, modules: Sequence[nn.Module], returns: torch.dtype | None) -> None:
        """Make the modules of a seed the same on every rank, and like their host. On every rank.

        Args:
            name: the path of its slot.
            modules: the seed, and its gate network.
            returns: dtype of the features at the slot, if it is known.
        """
        self.check()
        broadcast_modules([module for module in modules if not _cut(module)], self._ranks.group)
        for module in modules:
            shard_like(module, self._model, name, returns=returns)
        self._joined[name] = list(modules)
        self._average()

    def leave(self, name: str) -> None:
        """A seed is gone, and its slot is empty."""
        if self._joined.pop(name, None) is not None:
            self._average()
        # It broadcasts buffers before a forward pass, alpha among them, if there were any when it last looked.
        look = getattr(self._ddp, "_assign_modules_buffers", None)
        if look is not None:
            look()

    def refuse_leaving(self, name: str) -> None:
        """WiringError for a seed that DDP waits for: it can be neither taken out nor frozen."""
        ddp = self._ddp
        if ddp is None or ddp.find_unused_parameters or not self._in_reducer(name):
            return
        raise WiringError(
            f"the seed in {name!r} was in the model when DistributedDataParallel wrapped it, which waits for its "
            "gradients in every step: it can be neither pruned nor faded out. Germinate after the wrap, or wrap with "
            "find_unused_parameters=True; a new DistributedDataParallel(model) after the prune does as well"
        )

    def gather(self, found: Any) -> Any:
        """What the ranks have found in a probe, together, see ``losses.gather_losses``. On every rank."""
        return gather_losses(found, lambda said: self._ranks.objects(said, "probe()"))

    def settle(self) -> None:
        """Between two steps: parameters are the ones that optimizers hold, and buffers of seeds those of one rank."""
        settle(self._model)

    def sync_buffers(self) -> None:
        """Running statistics of seeds that DDP does not know of become the first rank's. On every rank."""
        if self._averaging is not None:
            self._averaging.sync_buffers()

    def seen(self, ddp: DistributedDataParallel) -> None:
        """A forward pass runs inside of this wrapper."""
        if ddp is not self._ddp:
            for name in self._averaged:
                assert self._averaging is not None
                self._averaging.remove(name)
            self._ddp, self._averaging, self._averaged = ddp, None, set()
            self._average()

    def _average(self) -> None:
        """Average what DDP does not know of and would; where there is no DDP, the script averages all gradients."""
        ddp = self._ddp
        if ddp is None:
            return
        wanted = {
            name: [module for module in modules if not _cut(module)]
            for name, modules in self._joined.items()
            if not self._in_reducer(name)
        }
        if self._averaging is None and any(wanted.values()):
            # In a group of its own, of the ranks that DDP averages over, which may be some of all.
            group = self._ranks.new_group("germinate()", ddp.process_group)
            self._averaging = SeedAveraging(group, lambda: bool(ddp.require_backward_grad_sync))
        if self._averaging is None:
            return
        for name in self._averaged - wanted.keys():
            self._averaging.remove(name)
        for name in [name for name in wanted if name not in self._averaged and wanted[name]]:
            self._averaging.add(name, wanted[name])
        self._averaged = {name for name, modules in wanted.items() if modules}

    def _in_reducer(self, name: str) -> bool:
        held: Iterable[Tensor] = getattr(self._ddp, "_module_parameters", ())
        known = {id(parameter) for parameter in held}
        return any(id(p) in known for module in self._joined.get(name, ()) for p in module.parameters())


class _Noticing:
    """A hook on the slots: which DistributedDataParallel runs them, also one that was made after the controller."""

    def __init__(self, joining: Joining) -> None:
        self._joining: Joining | None = joining

    def __call__(self, slot: nn.Module, inputs: object) -> None:
        if self._joining is None or torch.compiler.is_compiling():
            return
        ddp = DistributedDataParallel._get_active_ddp_module()
        if ddp is not None:
            self._joining.seen(ddp)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Noticing:
        """A copy of a model is trained by nobody yet."""
        copied = _Noticing.__new__(_Noticing)
        copied._joining = None
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return _noticing_nothing, ()


def _noticing_nothing() -> _Noticing:
    made = _Noticing.__new__(_Noticing)
    made._joining = None
    return made


def _cut(module: nn.Module) -> bool:
    return any(map(is_shard, module.parameters()))
