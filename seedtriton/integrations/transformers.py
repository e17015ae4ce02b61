"""Seeds in a model that transformers' Trainer trains: three lines beside its own.

Where the model has a slot, ``model.model.norm = nn.Sequential(SeedSlot(), model.model.norm)`` say::

    from seedtriton.integrations.transformers import GrowthCallback, GrowthTrainerMixin

    class GrowingTrainer(GrowthTrainerMixin, Trainer): ...

    trainer = GrowingTrainer(model, args, ..., callbacks=[GrowthCallback(seeds={"model.norm.0": make_seed})])

The callback has the controller, ``callback.growth``, and ends its epochs. The mixin does what no event is for: it
measures between backward and clipping, clips seeds behind the host apart, and puts them into slots before weights come.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from ..core.errors import ConfigurationError, WiringError
from ..core.schedules import AlphaSchedule
from ..core.thresholds import GateThresholds
from ..core.verdict import Verdict
from ..gradients.optimizers import plain
from ..growth import digest
from ..growth.checkpoint import SeedOrFactory, restore_slots
from ..growth.clients import check_weights, clip_apart, exchange, give_group, numbers, own_random_numbers
from ..growth.controller import GrowthController
from ..growth.probing import Evaluate
from ..growth.wiring import slots_of, unwrap
from .saved import FILE, load_weights, save, saved_in
from .saved import load_seeds as load_seeds

logger = logging.getLogger("seedtriton")


class GrowthCallback:
    """Grows a model while Trainer trains it; with ``GrowthTrainerMixin``, or alone where nothing is clipped or resumed.

    An instance is a ``transformers.TrainerCallback`` too.

    Args:
        seeds: by slot, a factory of its seed, or the seed.
        germinate_at: the optimizer step before which they germinate, or a function of Trainer's state that says when.
        accuracy_metric: of an evaluation, a share in [0, 1].
        loss_metric: of an evaluation.
        thresholds: limits of the gates.
        schedule: the first ramp of alpha, in optimizer steps.
        evaluate: validation losses of a model, see ``GrowthController``.
        how: arguments of ``germinate`` for every seed, such as ``lr`` or ``blend``.
        **growth: further arguments of ``GrowthController``; ``total_steps`` is Trainer's unless told.

    Attributes:
        growth: the controller; None until training begins.
        verdicts: of the last epoch that ended: an evaluation, or where there is none an epoch of the data.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> GrowthCallback:
        """An instance of this class and of the client's, which is imported now."""
        return object.__new__(_as_trainer_callback(cls))  # type: ignore[arg-type]

    def __init__(
        self,
        seeds: Mapping[str, SeedOrFactory],
        *,
        germinate_at: int | Callable[[Any], bool] = 0,
        accuracy_metric: str = "eval_accuracy",
        loss_metric: str = "eval_loss",
        thresholds: GateThresholds | None = None,
        schedule: AlphaSchedule | None = None,
        evaluate: Evaluate | None = None,
        how: Mapping[str, Any] | None = None,
        **growth: Any,
    ) -> None:
        """Keep what the controller will be made of."""
        self.seeds = dict(seeds)
        self.germinate_at, self.accuracy_metric, self.loss_metric = germinate_at, accuracy_metric, loss_metric
        self.how = dict(how or {})
        self._options = {"thresholds": thresholds, "schedule": schedule, "evaluate": evaluate, **growth}
        self.growth: GrowthController | None = None
        self.verdicts: list[Verdict] = []
        self.trainer: Any = None  # with the mixin, while it trains
        self._germinated: list[str] = []
        self._training = False
        self._ended_at = 0  # the step in which the last epoch ended
        self._unknown: set[str] = set()  # metrics of an evaluation that has none of those that we look for

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Build the controller, unless a checkpoint has, and let the seeds germinate that are due."""
        model = kwargs["model"] if self.trainer is None else self.trainer.model_wrapped
        if self.trainer is None:
            _refuse_alone(args)
        self.begin(model, kwargs["optimizer"], kwargs["lr_scheduler"], state.max_steps)
        self._training = True
        self._end_epoch_that_was_saved_first(args, state, control)
        self._germinate(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let seeds germinate that are due."""
        self.flush(state, control)
        self._germinate(state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, where no mixin has: the gradients are whole by now, and clipped if anybody clips."""
        if self.trainer is None:
            self._controller().measure()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End an epoch by an evaluation in the training, if there was a step since the last."""
        if not self._training or self._controller().step == self._ended_at:
            return
        metrics = kwargs.get("metrics") or {}
        accuracy, loss = metrics.get(self.accuracy_metric), metrics.get(self.loss_metric)
        if accuracy is None and loss is None:
            self._unknown |= set(metrics)  # of several data sets another one may have them
        else:
            self._end_epoch(state, control, accuracy, loss)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End an epoch where no evaluation does."""
        self.flush(state, control)
        evaluated = control.should_evaluate or args.eval_strategy == "steps"
        if not evaluated and self._controller().step > self._ended_at:
            self._end_epoch(state, control, None, None)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save where the seeds are, where no mixin has."""
        if self.trainer is None:
            self.flush(state, control)
            self.save(os.path.join(args.output_dir, f"checkpoint-{state.global_step}"), args.should_save)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say so when no gate was ever asked."""
        self.flush(state, control)
        self._training = False
        if self._controller().epoch == 0 and self._germinated:
            logger.warning(
                "the training ended before an epoch of the seeds did, so no gate was asked: with eval_strategy='steps' "
                "it is an evaluation that ends one"
            )

    def begin(self, model: nn.Module, optimizer: Any, scheduler: Any, total_steps: int, saved: Any = None) -> None:
        """A controller for this model and optimizer, from a saved state if there is one; the present one if it fits.

        Raises:
            WiringError: seeds are in the slots, or should be, and nobody told of their lives.
            ConfigurationError: no slot has the name of a seed.
        """
        known = self.growth
        if known is not None and known.optimizer is plain(optimizer) and known.model is unwrap(model):
            known.add_scheduler(scheduler)  # of a further train()
            return
        options = dict(self._options)
        if options.get("total_epochs") is None:
            options.setdefault("total_steps", total_steps)
        growth = GrowthController(model, optimizer, schedulers=[scheduler], **options)
        unknown = sorted(set(self.seeds) - set(growth.slots))
        if unknown:
            raise ConfigurationError(f"the model has no slots {unknown}; its slots are {sorted(growth.slots)}")
        saved = saved or _state_of_loaded(growth)
        self._germinated, self._ended_at = [], 0
        if saved is not None:
            growth.load_state_dict(saved["growth"])
            self.recall(saved)
        self.growth = growth

    def recall(self, saved: Mapping[str, Any]) -> None:
        """What this callback knows beside the controller."""
        self._germinated, self._ended_at = list(saved["germinated"]), saved["ended_at"]

    def save(self, folder: str, write: bool) -> None:
        """Into ``growth.pt`` in this folder, see ``saved.save``."""
        more = {"germinated": self._germinated, "ended_at": self._ended_at}
        save(self._controller(), folder, more, write=write)

    def flush(self, state: Any, control: Any) -> None:
        """End the epoch of an evaluation that had no metric for us."""
        if self._unknown:
            found, self._unknown = sorted(self._unknown), set()
            logger.warning(
                "the evaluation has neither %r nor %r but %s: the gates decide without them. "
                "GrowthCallback(accuracy_metric=..., loss_metric=...)", self.accuracy_metric, self.loss_metric, found,
            )  # fmt: skip
            self._end_epoch(state, control, None, None)

    def _end_epoch_that_was_saved_first(self, args: Any, state: Any, control: Any) -> None:
        """At the last step of an epoch the client may save before it ends the epoch, which a resume does not repeat."""
        whole = state.global_step > 0 and float(state.epoch or 0.5).is_integer()
        if not whole or args.eval_strategy == "steps" or self._controller().step == self._ended_at:
            return
        if args.eval_strategy != "no":
            logger.warning(
                "the checkpoint was saved before the evaluation of its epoch, which a resume does not make up for: the "
                "gates decide about that epoch without it. save_strategy='epoch' saves behind it"
            )
        self._end_epoch(state, control, None, None)

    def _controller(self) -> GrowthController:
        if self.growth is None:
            raise WiringError("GrowthCallback has no controller before a training begins")
        return self.growth

    def _germinate(self, state: Any) -> None:
        due = [slot for slot in self.seeds if slot not in self._germinated]
        if not due or not _is_due(self.germinate_at, state):
            return
        growth = self._controller()
        with own_random_numbers(growth.model):  # the host's draws are those of a training without seeds
            for slot in due:
                verdict = growth.germinate(slot, self.seeds[slot], **self.how)
                self._germinated.append(slot)
                _decay_as_the_host(growth, slot, self.trainer)
                if not verdict.passed:
                    logger.warning("%s", verdict)

    def _end_epoch(self, state: Any, control: Any, accuracy: float | None, loss: float | None) -> None:
        growth = self._controller()
        self._unknown.clear()
        self.verdicts = growth.end_epoch(accuracy, loss)
        self._ended_at = growth.step
        found = {f"growth/{name}": value for name, value in numbers(growth).items()}
        if not found:
            return
        if self.trainer is None:  # there is no way to the loggers, only to the history
            state.log_history.append({**found, "epoch": state.epoch, "step": state.global_step})
        else:
            due = control.should_log
            _log(self.trainer, found)
            control.should_log = due  # what is due is the client's own line


class GrowthTrainerMixin:
    """Before a Trainer among the bases: ``class GrowingTrainer(GrowthTrainerMixin, Trainer): ...``.

    What a seed behind the host promises needs it: the host is clipped as if there were no seed, seeds behind it each by
    their own norm; a checkpoint is resumed and the best model loaded with the seeds that were in it. Without a
    ``GrowthCallback`` it changes nothing.
    """

    accelerator: Any
    args: Any
    callback_handler: Any
    control: Any
    lr_scheduler: Any
    model: Any
    model_wrapped: Any
    optimizer: Any
    state: Any
    _steps_to_come: int | None = None  # unless a subclass makes its scheduler by itself

    @property
    def growth(self) -> GrowthController | None:
        """The callback's controller; None until training begins."""
        callback = self._growth_callback()
        return None if callback is None else callback.growth

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the client's."""
        callback = self._growth_callback()
        if callback is None:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        _refuse_sharded(self)
        callback.trainer = self
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            callback.trainer = None

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As the client's, and behind the last backward pass of an optimizer step the gradients are measured."""
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self.growth is not None and self.accelerator.sync_gradients:
            self.growth.measure(self.accelerator.scaler)
        return loss

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """As the client's; older ones tell their state of the number of steps only when a checkpoint is loaded."""
        self._steps_to_come = num_training_steps
        return super().create_scheduler(num_training_steps, *args, **kwargs)  # type: ignore[misc]

    def create_accelerator_and_postprocess(self) -> None:
        """As the client's, with a clipping that knows seeds."""
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        self.accelerator.clip_grad_norm_ = functools.partial(self._clip_apart, self.accelerator.clip_grad_norm_)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """As the client's, and where the seeds are beside it."""
        callback = self._growth_callback()
        if callback is not None and callback.growth is not None:
            callback.flush(self.state, self.control)
        super().save_model(output_dir, *args, **kwargs)  # type: ignore[misc]
        if callback is not None and callback.growth is not None:
            callback.save(self.args.output_dir if output_dir is None else output_dir, self.args.should_save)

    def _growth_callback(self) -> GrowthCallback | None:
        found = [item for item in self.callback_handler.callbacks if isinstance(item, GrowthCallback)]
        if len(found) > 1:
            raise WiringError("one GrowthCallback has the seeds of all slots: there are several")
        return found[0] if found else None

    def _clip_apart(
        self, clip: Callable[..., Any], parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float = 2
    ) -> Any:
        """See ``clients.clip_apart``."""
        return clip_apart(clip, parameters, {} if self.growth is None else self.growth.slots, max_norm, norm_type)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        """Seeds into their slots, then the weights."""
        callback, saved = self._growth_callback(), saved_in(resume_from_checkpoint)
        if callback is not None and saved is not None:
            with own_random_numbers(self.model):
                if callback.growth is not None and callback.growth.model is unwrap(self.model):
                    exchange(callback.growth, saved["growth"], callback.seeds)
                    callback.recall(saved)
                else:
                    restore_slots(self.model, saved["growth"], callback.seeds)
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        if callback is not None and saved is not None:
            load_weights(saved, slots_of(unwrap(self.model)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Seeds into the optimizer, then its state."""
        callback, saved = self._growth_callback(), None if checkpoint is None else saved_in(checkpoint)
        if callback is not None and saved is not None:
            steps = self.state.max_steps if self._steps_to_come is None else self._steps_to_come
            callback.begin(self.model_wrapped, self.optimizer, self.lr_scheduler, steps, saved)
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        """The seeds of that checkpoint into their slots, then its weights."""
        callback, growth = self._growth_callback(), self.growth
        if callback is None or growth is None:
            return super()._load_best_model()  # type: ignore[misc,no-any-return]
        saved = saved_in(self.state.best_model_checkpoint)
        if saved is not None:
            with own_random_numbers(self.model):
                exchange(growth, saved["growth"], callback.seeds)
            callback.recall(saved)
        elif any(slot.seed is not None for slot in growth.slots.values()):
            raise WiringError(
                f"the best model, {self.state.best_model_checkpoint}, was saved without {FILE}: which seeds it had is "
                "not known, so its weights are not loaded over those of the model, which are as they were at the end"
            )
        super()._load_best_model()  # type: ignore[misc]
        load_weights(saved or {}, growth.slots)
        check_weights(growth)
        return None


@functools.cache
def _as_trainer_callback(cls: type[GrowthCallback]) -> type[GrowthCallback]:
    from transformers import TrainerCallback

    if issubclass(cls, TrainerCallback):
        return cls
    both = type(cls.__name__, (cls, TrainerCallback), {"__module__": cls.__module__, "__doc__": cls.__doc__})
    assert issubclass(both, GrowthCallback)
    return both


def _log(trainer: Any, found: dict[str, float]) -> None:
    """To history and loggers; not through a subclass's ``log``, which may end sums of its own, as trl's does."""
    from transformers import Trainer

    Trainer.log(trainer, found)


def _refuse_alone(args: Any) -> None:
    """WiringError for what a callback cannot do: there is no event before clipping, and none before weights come."""
    wanted = {
        "max_grad_norm": "the seed behind the host would share its norm" if args.max_grad_norm else "",
        "load_best_model_at_end": "its seeds may be others" if args.load_best_model_at_end else "",
    }
    found = [f"{name}={getattr(args, name)} ({why})" for name, why in wanted.items() if why]
    if found:
        raise WiringError(
            f"a callback alone cannot see to {' and '.join(found)}: class GrowingTrainer(GrowthTrainerMixin, Trainer), "
            "or max_grad_norm=0 and load_best_model_at_end=False"
        )


def _refuse_sharded(trainer: Any) -> None:
    for name in ("is_fsdp_enabled", "is_deepspeed_enabled"):
        if getattr(trainer, name, False):
            raise WiringError(
                f"{name}: growing a model that Trainer shards is not supported; with fully_shard and a loop of your "
                "own it is, docs/many-gpus.md"
            )


def _state_of_loaded(growth: GrowthController) -> dict[str, Any] | None:
    """The lives of seeds that ``load_seeds`` has put there; None where all slots are empty and should be."""
    folder = str(getattr(growth.model, "name_or_path", "") or "")
    saved = saved_in(folder) if folder else None
    occupied = [name for name, slot in growth.slots.items() if slot.seed is not None]
    held = [] if saved is None else sorted(digest.saved_in(saved["growth"]))
    if occupied and saved is None:
        raise WiringError(
            f"slots {occupied} are not empty and nothing is known of their seeds' lives: resume with "
            "GrowthTrainerMixin, or load_seeds(model, folder, seeds) behind from_pretrained(folder)"
        )
    if held and not occupied:
        raise WiringError(
            f"the model is from {folder!r}, which has seeds in {held}, and from_pretrained has dropped them: "
            "load_seeds(model, folder, seeds) behind it"
        )
    return saved if occupied else None


def _is_due(at: int | Callable[[Any], bool], state: Any) -> bool:
    return bool(at(state)) if callable(at) else bool(state.global_step >= at)


def _decay_as_the_host(growth: GrowthController, slot: str, trainer: Any) -> None:
    """A group without weight decay for biases and norms of a seed, where the host has one."""
    from transformers import Trainer

    own = {id(p) for place in growth.slots.values() for p in place.parameters()}
    groups = [g for g in growth.optimizer.param_groups if not g["params"] or id(g["params"][0]) not in own]
    decays = {group.get("weight_decay") for group in groups}
    held = growth.optimizer.param_groups[-1]["params"]
    if len(decays) < 2 or 0.0 not in decays or None in decays or id(held[0]) not in own:
        return
    # By the names in the slot: its path may well have a "norm" in it.
    place = growth.slots[slot]
    decaying = set((trainer or Trainer).get_decay_parameter_names(*([] if trainer else [None]), place))
    mine = {id(p) for p in held}
    names = [name for name, p in place.named_parameters() if name not in decaying and id(p) in mine]
    give_group(growth, slot, names, weight_decay=0.0)
