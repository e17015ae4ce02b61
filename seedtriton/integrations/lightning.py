"""Lightning: seeds that grow in a LightningModule, by one callback.

    from seedtriton.integrations.lightning import GrowthCallback

    growth = GrowthCallback({"net.slot": Adapter}, monitor="val_acc")     # slots by their path in the LightningModule
    trainer = L.Trainer(callbacks=[growth])

docs/clients.md says what happens where. Importing this module does not import Lightning: ``GrowthCallback`` is made,
as a ``lightning.pytorch.Callback``, when somebody asks for it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from ..core.errors import ConfigurationError, WiringError
from ..core.lifecycle import Stage
from ..gradients.optimizers import plain
from ..growth import GrowthController
from ..growth import restore_slots as restore
from ..growth.checkpoint import SeedOrFactory
from ..growth.clients import numbers, own_random_numbers, parted
from ..growth.wiring import slots_of

KEY = "seedtriton"  # where a checkpoint without callbacks keeps the growth state
AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")


class Growing:
    """What ``GrowthCallback`` does; the callback itself is this and Lightning's Callback.

    Args:
        seeds: by slot, a factory of the seed, or a module; germinated when a training begins, unless it resumes one.
        optimizer_idx: which optimizer trains the seeds.
        monitor: the metric by which the gates judge an epoch, logged by the LightningModule: a loss if "loss" is in
            its name, else an accuracy in [0, 1]. None: they go without.
        germination: arguments of ``GrowthController.germinate`` for every seed, such as ``lr`` or ``blend``.
        **growth: arguments of ``GrowthController``, such as ``thresholds`` or ``schedule``.

    Attributes:
        growth: the controller, from ``on_fit_start`` on.
        verdicts: of the last epoch.
    """

    def __init__(
        self,
        seeds: Mapping[str, SeedOrFactory],
        *,
        optimizer_idx: int = 0,
        monitor: str | None = "val_acc",
        germination: Mapping[str, Any] = MappingProxyType({}),
        **growth: Any,
    ) -> None:
        """Note them; nothing is built before a training begins."""
        super().__init__()
        self.seeds, self.optimizer_idx, self.monitor = dict(seeds), optimizer_idx, monitor
        self.growth: GrowthController | None = None
        self.verdicts: list[Any] = []
        self._germination, self._arguments = dict(germination), growth
        self._loaded: Any = None  # the growth state of a checkpoint that nobody has taken over yet
        self._fresh = False  # whether there are gradients that are not measured
        self._unclipped: dict[int, Any] = {}  # such gradients, of parameters of optimizers that train no seed
        self._undo: list[Callable[[], None]] = []

    # --- before the weights ---

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Refuse what would lose a seed, and stand where weights are loaded and gradients clipped."""
        self._refuse(trainer, stage)
        self._let_go()
        self._stand_in(pl_module, "on_load_checkpoint", functools.partial(self._load_first, pl_module))
        self._stand_in(pl_module, "on_save_checkpoint", self._save_too)
        self._stand_in(pl_module, "clip_gradients", functools.partial(self._clip_apart, pl_module))

    def _load_first(self, pl_module: nn.Module, inner: Callable[[Any], None], checkpoint: dict[str, Any]) -> None:
        """The last hook before Lightning loads a checkpoint's weights: their slots get the seeds of then."""
        state = growth_state(checkpoint)
        if state is not None:
            for slot in slots_of(pl_module).values():
                slot.vacate()
            with own_random_numbers(pl_module):
                restore(pl_module, state, self.seeds)
            self._loaded, self.growth = state, None
        inner(checkpoint)

    def _save_too(self, inner: Callable[[Any], None], checkpoint: dict[str, Any]) -> None:
        """A checkpoint of weights alone has no callbacks, and is of no use without the seeds' stages."""
        state = self.state_dict()
        if "callbacks" not in checkpoint and state:
            checkpoint[KEY] = state["growth"]
        inner(checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """The growth state; on every rank."""
        state = self._loaded if self.growth is None else self.growth.state_dict()
        return {} if state is None else {"growth": state}

    # --- before the optimizers' states ---

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Make the controller, with what a checkpoint or the training before knows of its seeds."""
        optimizer = self._optimizer(trainer)
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        own = [s for s in schedulers if plain(s.optimizer) is plain(optimizer)]
        state, check = self._loaded, True
        if self.growth is not None and self._grows_in(pl_module):
            state, check = self.growth.state_dict(), False  # another fit of the same model: its weights are there
        self.growth = GrowthController(trainer.model, optimizer, **{"schedulers": own, **self._arguments})
        if state is not None:
            self.growth.load_state_dict(state, check_weights=check)
        self._known, self._loaded = state is not None, None
        slots = self.growth.slots.items()
        lost = [name for name, slot in slots if slot.seed is not None and slot.stage is not Stage.FOSSILIZED]
        if lost and not self._known:
            raise WiringError(
                f"slots {lost} hold seeds of whose life this GrowthCallback knows nothing: leave it to the callback to "
                "put seeds into empty slots, or fit with the callback that did"
            )

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Germinate, in a training that begins: behind the optimizers' states, which may be those of the host alone."""
        if not self._known:
            with own_random_numbers(pl_module):
                for name, seed in self.seeds.items():
                    self._controller.germinate(name, seed, **self._germination)

    # --- between backward and step ---

    def on_after_backward(self, trainer: Any, pl_module: nn.Module) -> None:
        """New gradients; those with a loss scale are measured now, before anybody looks for infinities."""
        self._fresh = True
        self._unclipped.clear()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            self._measure(pl_module, scaler)

    def on_before_optimizer_step(self, trainer: Any, pl_module: nn.Module, optimizer: Any) -> None:
        """The gradients of the step are whole: measure them, unless clipping has."""
        if self._trains_seeds(optimizer):
            self._measure(pl_module)

    def _clip_apart(
        self, pl_module: nn.Module, inner: Callable[..., None], optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Lightning's own clipping, once for the host with all that it feels, and once for every seed behind it."""
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if self._trains_seeds(optimizer):
            self._measure(pl_module)
        elif self._fresh:
            # Another optimizer's, by hand. If the seeds' own steps next, these are of its sample as they are now.
            self._unclipped |= {id(p): p.grad.clone() for p in held if p.grad is not None}
        felt, behind = parted(held, {} if self.growth is None else self.growth.slots)
        parts = [_Part(optimizer, parameters) for parameters in (felt, *behind.values()) if parameters]
        for part in parts if behind else [optimizer]:
            inner(part, *args, **kwargs)

    def _measure(self, pl_module: nn.Module, scaler: Any = None) -> None:
        if not self._fresh:
            return
        self._fresh, kept, growth = False, self._unclipped, self._controller
        given = None
        if kept:
            given = [(p, kept.get(id(p), p.grad)) for p in pl_module.parameters() if p.grad is not None]
        growth.measure(scaler, gradients=given)
        kept.clear()

    def _trains_seeds(self, optimizer: Any) -> bool:
        return self.growth is not None and plain(optimizer) is self.growth.optimizer

    # --- epochs ---

    def on_validation_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """An epoch ends with its validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._end_epoch(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Without validation it ends here; numbers are logged in either case."""
        if not trainer.enable_validation:
            self._end_epoch(trainer)
        for name, value in numbers(self._controller).items():
            pl_module.log(f"growth/{name}", value, sync_dist=trainer.world_size > 1, batch_size=1)

    def _end_epoch(self, trainer: Any) -> None:
        told: dict[str, Any] = {}
        if self.monitor is not None:
            if self.monitor not in trainer.callback_metrics:
                raise WiringError(
                    f"no metric {self.monitor!r} was logged, of which the gates are to be told; there are "
                    f"{sorted(trainer.callback_metrics)}. Log it, or GrowthCallback(..., monitor=None)"
                )
            told["loss" if "loss" in self.monitor else "accuracy"] = float(trainer.callback_metrics[self.monitor])
        self.verdicts = self._controller.end_epoch(**told)

    # --- behind all ---

    def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Leave the module as it was."""
        self._let_go()

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """The same."""
        self._let_go()

    def _stand_in(self, pl_module: nn.Module, name: str, hook: Callable[..., None]) -> None:
        """Have ``hook(inner, ...)`` called in place of a method of the module."""
        inner, before = getattr(pl_module, name), vars(pl_module).get(name)

        def stand_in(*args: Any, **kwargs: Any) -> None:
            hook(inner, *args, **kwargs)

        vars(pl_module)[name] = stand_in

        def undo() -> None:
            if before is None:
                vars(pl_module).pop(name, None)
            else:
                vars(pl_module)[name] = before

        self._undo.append(undo)

    def _let_go(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _refuse(self, trainer: Any, stage: str) -> None:
        if trainer.strategy.restore_checkpoint_after_setup:
            raise WiringError(
                f"{type(trainer.strategy).__name__} loads weights after the optimizers were made, when it is too late "
                "for seeds: use one device or DDPStrategy; or fully_shard and a loop of your own (docs/many-gpus.md)"
            )
        averaging = [c for c in trainer.callbacks if {k.__name__ for k in type(c).__mro__}.intersection(AVERAGING)]
        if averaging and stage == "fit":
            raise WiringError(
                f"{type(averaging[0]).__name__} averages a copy of the model from before there were seeds, and "
                "would lose them: average in a fit of its own, without GrowthCallback, when seeds are fossils or pruned"
            )

    def _optimizer(self, trainer: Any) -> Any:
        count = len(trainer.optimizers)
        if not 0 <= self.optimizer_idx < count:
            raise ConfigurationError(f"optimizer_idx={self.optimizer_idx}, and the module has {count} optimizers")
        return trainer.optimizers[self.optimizer_idx]

    def _grows_in(self, pl_module: nn.Module) -> bool:
        own = slots_of(pl_module)
        return all(own.get(name) is slot for name, slot in self._controller.slots.items())

    @property
    def _controller(self) -> GrowthController:
        if self.growth is None:
            raise WiringError("GrowthCallback has no controller before on_fit_start")
        return self.growth


class _Part:
    """An optimizer of which a client sees some parameters only."""

    def __init__(self, optimizer: Any, parameters: Iterable[Any]) -> None:
        self._optimizer, self.param_groups = optimizer, [{"params": list(parameters)}]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def growth_state(checkpoint: Mapping[str, Any]) -> Any:
    """What a Lightning checkpoint knows of seeds, as ``GrowthController.state_dict`` has it; None: nothing."""
    states = (state for key, state in (checkpoint.get("callbacks") or {}).items() if "GrowthCallback" in str(key))
    return next((state["growth"] for state in states if state), checkpoint.get(KEY))


def restore_slots(model: nn.Module, checkpoint: Mapping[str, Any], seeds: Mapping[str, SeedOrFactory]) -> None:
    """Put a checkpoint's seeds into the slots of a fresh model, where no Trainer with a GrowthCallback does it.

    In a LightningModule, for ``load_from_checkpoint``; where the callback was there before, it does nothing::

        def on_load_checkpoint(self, checkpoint):
            restore_slots(self, checkpoint, {"net.slot": Adapter})

    Raises:
        WiringError: the checkpoint knows of no seeds; and what ``seedtriton.restore_slots`` raises.
    """
    state = growth_state(checkpoint)
    if state is None:
        raise WiringError("the checkpoint has no growth state: it was saved by a Trainer without a GrowthCallback")
    if all(slot.stage is Stage.DORMANT for slot in slots_of(model).values()):
        restore(model, state, seeds)


def __getattr__(name: str) -> Any:
    """``GrowthCallback``, made when it is asked for."""
    if name != "GrowthCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Lightning goes by two names, and the classes of one know nothing of the other.
    if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
        from pytorch_lightning import Callback
    else:
        from lightning.pytorch import Callback
    kind = type(name, (Growing, Callback), {"__module__": __name__, "__doc__": Growing.__doc__})
    globals()[name] = kind
    return kind
