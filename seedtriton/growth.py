"""GrowthController: slots, optimizer, monitor and gates of one training script.

It moves seeds through their life, and only where a gate says so. Without a germinated seed it changes
nothing that the script does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .blending import ADD
from .errors import ConfigurationError, WiringError
from .evidence import SeedEvidence
from .gates import STRICT, GateThresholds, QualityGates, SeedStatus, Verdict
from .isolation import Isolation
from .lifecycle import FORWARD, Stage
from .monitor import WINDOW, GradientMonitor
from .schedules import HOLD, AlphaController, AlphaSchedule
from .slot import SeedSlot, seed_module
from .telemetry import Event, LogSink, Sink, Telemetry, gate_fields

logger = logging.getLogger("seedtriton")

# Lists with one entry per parameter group that torch's schedulers keep; a new group needs an entry in each.
_PER_GROUP = (
    "base_lrs", "lr_lambdas", "_last_lr", "min_lrs", "max_lrs", "base_momentums", "max_momentums",
)


@dataclass
class _Life:
    """What the controller knows of one seed beyond its slot."""

    name: str
    slot: SeedSlot
    group: dict[str, Any] | None  # the optimizer's, while the seed has one
    schedule: AlphaSchedule  # of the first ramp; later ones take steps and curve from it unless told
    alpha: AlphaController = field(default_factory=AlphaController)
    training_accuracy: float | None = None  # when TRAINING began
    blending_accuracy: float | None = None  # when BLENDING began
    evidence: SeedEvidence | None = field(default=None)


class GrowthController:
    """Grows a model while it trains: ``germinate``, then ``measure`` per step and ``end_epoch`` per epoch.

    Args:
        model: contains one ``SeedSlot`` or more; DDP and compiled wrappers are looked through.
        optimizer: what trains the host; a seed gets a parameter group of its own in it.
        thresholds: limits of the gates.
        mode: "strict" or "permissive", see ``QualityGates``.
        schedule: the first ramp of alpha, in optimizer steps.
        schedulers: learning-rate schedulers of the optimizer; they must learn of every new group.
        total_epochs: length of the whole training, for thresholds that depend on its progress.
        window: samples that the monitor keeps.
        sinks: take every event; a log at level INFO unless told.

    Raises:
        WiringError: the model has no slot.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        thresholds: GateThresholds | None = None,
        mode: str = STRICT,
        schedule: AlphaSchedule | None = None,
        schedulers: Sequence[Any] = (),
        total_epochs: int | None = None,
        window: int = WINDOW,
        sinks: Iterable[Sink | Callable[[Event], None]] | None = None,
    ) -> None:
        """Find the slots and wire monitor and gates to them."""
        model = _unwrap(model)
        self.slots: Mapping[str, SeedSlot] = {
            name: module for name, module in model.named_modules() if isinstance(module, SeedSlot)
        }
        if not self.slots:
            raise WiringError("the model has no SeedSlot: put one where a seed may grow, x = self.slot(x)")
        if total_epochs is not None and (type(total_epochs) is not int or total_epochs < 1):
            raise ConfigurationError(f"total_epochs must be a whole number of at least 1, got {total_epochs!r}")
        self.model, self.optimizer = model, optimizer
        self.gates = QualityGates(thresholds or GateThresholds(), mode)
        self.schedule = schedule or AlphaSchedule()
        self.schedulers = list(schedulers)
        self.total_epochs = total_epochs
        self.monitor = GradientMonitor(model, {}, window=window, optimizers=optimizer)
        self.telemetry = Telemetry([LogSink()] if sinks is None else sinks)
        self.epoch = 0
        self.step = 0
        self._accuracy: float | None = None
        self._lives: dict[str, _Life] = {}

    def germinate(
        self,
        slot: str,
        seed: nn.Module | Callable[[], nn.Module],
        *,
        probe: Tensor | None = None,
        isolation: Isolation | None = None,
        blend: str = ADD,
        add_to_optimizer: bool = True,
        schedule: AlphaSchedule | None = None,
        **group: Any,
    ) -> Verdict:
        """Put a seed into a slot, its parameters into the optimizer, and let it train behind the host.

        Args:
            slot: the slot's path in the model, such as "block2".
            seed: a module that keeps shape and dtype, or a factory of one; moved to the model's device and
                dtype.
            probe: features as the slot sees them, to try the seed on now; otherwise the first forward pass
                does.
            isolation: how it trains, ``TrustRegion()`` unless told.
            blend: how it is blended in: "add", "multiply", or "gate", which learns how much of the seed each
                sample gets and needs a ``probe``.
            add_to_optimizer: put its parameters into the optimizer as a group of their own.
            schedule: the first ramp of alpha; the controller's unless told.
            **group: settings of that group, such as ``lr``; the first group's present ones unless told.

        Returns:
            The verdict of gate G1, passed.

        Raises:
            ConfigurationError: no slot has this name, or no blend.
            WiringError: the slot is occupied, or the seed is unfit: no trainable parameter, another shape,
                parameters of the host or of another seed; nothing has changed.
        """
        place = self._slot(slot)
        if place.stage is not Stage.DORMANT:
            raise WiringError(f"slot {slot!r} is occupied or resting (stage {place.stage}); prune it first")
        module = seed_module(seed)
        self._refuse_shared(slot, module)
        if add_to_optimizer:
            self._refuse_unknown_scheduler()
        like = probe if probe is not None else next(p for p in self.model.parameters() if p.is_floating_point())
        dormant = self._status(slot, place, None, parameters=_trainable(module))
        before = place.lifecycle.state_dict()
        place.germinate(
            module, probe=probe, isolation=isolation, blend=blend, device=like.device, dtype=like.dtype
        )
        added = None
        try:
            if add_to_optimizer:
                added = self._add_group(place, group)
            self.monitor.add_seed(slot, place.modules_of_seed(), alpha=place)
        except Exception:
            self._remove_group(added)
            place.move(Stage.PRUNED, "refused")
            place.lifecycle.load_state_dict(before)
            raise
        self._lives[slot] = life = _Life(slot, place, added, schedule or self.schedule)
        parameters = _trainable(*place.modules_of_seed())
        self._emit("germinated", slot, parameters=parameters, in_optimizer=add_to_optimizer, blend=blend)
        self._emit_gate(life, self.gates.judge(Stage.GERMINATED, dormant))
        verdict = self.gates.judge(Stage.TRAINING, self._status(slot, place, life))
        self._emit_gate(life, verdict)
        if verdict.passed:
            self._move(life, Stage.TRAINING, str(verdict))
        return verdict

    def measure(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Measure the gradients of this step: after backward and unscaling, before clipping and the step.

        Also moves every alpha that is on its way one step, from the next forward pass on.
        Does nothing while no slot holds a living seed. A ``scaler`` is read, never touched; see
        ``GradientMonitor.measure``.
        """
        self.step += 1
        if not self._lives:
            return
        self.monitor.measure(scaler)
        for life in self._lives.values():
            if life.alpha.mode != HOLD:
                life.slot.set_alpha(life.alpha.step())

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """``GradientMonitor.clip_grad_norm_`` over the whole model, seeds included."""
        return self.monitor.clip_grad_norm_(max_norm)

    def end_epoch(
        self, accuracy: float | None = None, loss: float | None = None, *, strict: bool = False
    ) -> list[Verdict]:
        """Count one epoch, read the evidence once, and let the gates decide about every seed.

        Args:
            accuracy: validation accuracy as a share in [0, 1].
            loss: validation loss, for the record.
            strict: raise when a living seed was never measured, instead of only refusing it.

        Returns:
            One verdict per living seed, in the order of germination; those that passed have moved.

        Raises:
            ConfigurationError: an accuracy outside [0, 1]; nothing has changed.
            WiringError: with ``strict``, a seed that was never measured; nothing has changed.
        """
        if accuracy is not None and not 0.0 <= accuracy <= 1.0:
            raise ConfigurationError(
                f"accuracy must be a share in [0, 1], got {accuracy}; divide percentages by 100"
            )
        evidence = self.monitor.read(strict=strict) if self._lives else {}
        self.epoch += 1
        self._accuracy = accuracy
        self._emit("epoch", None, accuracy=accuracy, loss=loss)
        verdicts = []
        for name, life in list(self._lives.items()):
            life.slot.lifecycle.tick()
            life.evidence = evidence[name]
            if life.training_accuracy is None and life.slot.stage is Stage.TRAINING:
                # Germinated before any accuracy was known: the first one seen is where the rise begins.
                life.training_accuracy = accuracy
            target = FORWARD[life.slot.stage]
            verdict = self.gates.judge(target, self._status(name, life.slot, life))
            self._emit_epoch(life, accuracy, loss)
            self._emit_gate(life, verdict)
            verdicts.append(verdict)
            if verdict.passed:
                self._move(life, target, str(verdict))
            elif life.slot.stage is Stage.TRAINING:
                life.slot.check_isolation_again()
        for name, slot in self.slots.items():
            if name not in self._lives:
                self._rest(name, slot)
        return verdicts

    def set_alpha_target(
        self, slot: str, target: float, *, steps: int | None = None, curve: str | None = None
    ) -> None:
        """Send alpha of a blending or held seed to another target; a held seed goes back to BLENDING.

        Args:
            slot: the slot's path in the model.
            target: in (0, 1].
            steps: optimizer steps it takes, 0 for a jump; those of the seed's schedule unless told.
            curve: "linear", "cosine" or "sigmoid"; the one of the seed's schedule unless told.

        Raises:
            ConfigurationError: no slot has this name, alpha is still on its way, or a value is impossible;
                nothing has changed.
            WiringError: the slot has no seed in BLENDING or HOLDING.
        """
        life = self._living(slot)
        if life.slot.stage not in (Stage.BLENDING, Stage.HOLDING):
            raise WiringError(f"alpha moves in BLENDING and HOLDING, the seed in {slot!r} is in {life.slot.stage}")
        if not 0.0 < target <= 1.0:
            raise ConfigurationError(f"target must lie in (0, 1], got {target!r}; prune() ends a seed")
        life.alpha.retarget(
            target,
            life.schedule.steps if steps is None else steps,
            life.schedule.curve if curve is None else curve,
        )
        life.slot.set_alpha(life.alpha.alpha)
        self._emit("alpha_target", slot, target=life.alpha.target, steps=life.alpha.steps_total, curve=life.alpha.curve)
        if life.slot.stage is Stage.HOLDING:
            self._move(life, Stage.BLENDING, f"alpha target {target:.3g}")

    def prune(self, slot: str, reason: str = "pruned by the script") -> None:
        """Take a seed out: of its slot, of the monitor, and of the optimizer with its state.

        Raises:
            ConfigurationError: no slot has this name.
            WiringError: the slot has no living seed; a fossil is part of the host and stays.
        """
        life = self._living(slot)
        self._remove_group(life.group)
        del self._lives[slot]
        self._move(life, Stage.PRUNED, reason)
        # Once the slot is empty: while the seed is in the model, what is left of it would count as host.
        self.monitor.remove_seed(slot)

    def evidence(self) -> dict[str, SeedEvidence]:
        """What the monitor says of every living seed now; copies to the host once."""
        return self.monitor.read()

    def _slot(self, name: str) -> SeedSlot:
        if name not in self.slots:
            raise ConfigurationError(f"the model has no slot {name!r}; its slots are {sorted(self.slots)}")
        return self.slots[name]

    def _living(self, name: str) -> _Life:
        place, life = self._slot(name), self._lives.get(name)
        if life is None:
            raise WiringError(f"slot {name!r} has no living seed (stage {place.stage}); a fossil stays as it is")
        return life

    def _status(
        self, name: str, slot: SeedSlot, life: _Life | None, parameters: int | None = None
    ) -> SeedStatus:
        progress = None if self.total_epochs is None else min(1.0, self.epoch / self.total_epochs)
        return SeedStatus(
            seed=name,
            stage=slot.stage,
            epochs_in_stage=slot.lifecycle.epochs_in_stage,
            parameters=_trainable(*slot.modules_of_seed()) if parameters is None else parameters,
            preserves_shape=slot.preserves_shape,
            evidence=life.evidence if life else None,
            improvement=_points(life.training_accuracy if life else None, self._accuracy),
            accuracy_change=_points(life.blending_accuracy if life else None, self._accuracy),
            isolation_violations=slot.isolation_violations,
            alpha=slot.alpha_value,
            alpha_target=life.alpha.target if life else 1.0,
            alpha_holds=life is None or life.alpha.mode == HOLD,
            progress=progress,
        )

    def _move(self, life: _Life, target: Stage, reason: str) -> None:
        source = life.slot.stage
        life.slot.move(target, reason)
        if target is Stage.TRAINING:
            life.training_accuracy = self._accuracy
        elif target is Stage.BLENDING and source is Stage.TRAINING:
            # Not when it comes back from HOLDING: the accuracy to be kept is the one before it was felt at all.
            life.blending_accuracy = self._accuracy
            life.alpha = AlphaController(life.schedule.start)
            life.alpha.retarget(life.schedule.target, life.schedule.steps, life.schedule.curve)
            life.slot.set_alpha(life.alpha.alpha)
        self._emit("stage", life.name, source=str(source), target=str(target), reason=reason)
        if target is Stage.PRUNED:
            self._emit("pruned", life.name, reason=reason)
        elif target is Stage.FOSSILIZED:
            # From now on its parameters are the host's; they stay where they are in the optimizer.
            self.monitor.remove_seed(life.name)
            del self._lives[life.name]
            self._emit("fossilized", life.name, alpha=life.slot.alpha_value)
        else:
            # Evidence belongs to a stage: what the seed did behind the host says nothing of the blend.
            self.monitor.reset(life.name)

    def _rest(self, name: str, slot: SeedSlot) -> None:
        """One step of the rest after a prune; an epoch each, then the slot may be used again."""
        source = slot.stage
        if source in (Stage.PRUNED, Stage.EMBARGOED, Stage.RESETTING):
            slot.move(FORWARD[source])
            self._emit("stage", name, source=str(source), target=str(slot.stage), reason="time")

    def _refuse_shared(self, slot: str, module: nn.Module) -> None:
        known = {id(parameter) for parameter in self.model.parameters()}
        shared = [name for name, parameter in module.named_parameters() if id(parameter) in known]
        if shared:
            raise WiringError(
                f"the seed for slot {slot!r} shares parameters with the model: {shared[:3]}; "
                "behind the host it must be a module of its own (copy.deepcopy)"
            )

    def _refuse_unknown_scheduler(self) -> None:
        scheduled = getattr(self.optimizer.step, "_wrapped_by_lr_sched", False)
        if scheduled and not self.schedulers:
            raise WiringError(
                "the optimizer has a learning-rate scheduler that would fail on a new parameter group; "
                "pass it: GrowthController(..., schedulers=[scheduler])"
            )

    def _add_group(self, slot: SeedSlot, settings: Mapping[str, Any]) -> dict[str, Any]:
        first = self.optimizer.param_groups[0]
        unknown = sorted(set(settings) - set(first))
        if unknown:
            raise ConfigurationError(f"the optimizer has no settings {unknown}; it has {sorted(first)}")
        group = {key: _own(value) for key, value in first.items() if key not in ("params", "param_names")}
        if "lr" in settings and "initial_lr" in group:
            group["initial_lr"] = settings["lr"]
        group |= settings
        if "param_names" in first:  # named parameters: an optimizer wants names in all groups or in none
            group["params"] = [
                (f"{part}.{name}", p) for part, module in slot.named_children() for name, p in module.named_parameters()
            ]
        else:
            group["params"] = list(slot.parameters())
        before = len(self.optimizer.param_groups)
        self.optimizer.add_param_group(group)
        for scheduler in _each_scheduler(self.schedulers):
            for values in _group_lists(scheduler, before):
                values.append(values[0])
            if hasattr(scheduler, "base_lrs") and "lr" in settings:
                scheduler.base_lrs[-1] = settings["lr"]
        return self.optimizer.param_groups[-1]

    def _remove_group(self, group: dict[str, Any] | None) -> None:
        """Take a group out of the optimizer, with the state of its parameters; nothing if it is not there."""
        groups = self.optimizer.param_groups
        index = next((i for i, known in enumerate(groups) if known is group), None)
        if index is None:
            return
        for parameter in groups[index]["params"]:
            self.optimizer.state.pop(parameter, None)
        for scheduler in _each_scheduler(self.schedulers):
            for values in _group_lists(scheduler, len(groups)):
                del values[index]
        del groups[index]

    def _emit(self, event: str, name: str | None, **fields: Any) -> None:
        stage = None if name is None else str(self.slots[name].stage)
        self.telemetry.emit(
            {"event": event, "seed": name, "epoch": self.epoch, "step": self.step, "stage": stage, **fields}
        )

    def _emit_gate(self, life: _Life, verdict: Verdict) -> None:
        self._emit("gate", life.name, **gate_fields(verdict), **_numbers(life.evidence))

    def _emit_epoch(self, life: _Life, accuracy: float | None, loss: float | None) -> None:
        self._emit(
            "epoch", life.name, accuracy=accuracy, loss=loss, alpha=life.slot.alpha_value,
            **_numbers(life.evidence),
        )


def _numbers(evidence: SeedEvidence | None) -> Event:
    names = ("ratio", "host_norm", "seed_norm", "blend_gain", "blend_gain_t", "samples", "dropped", "displacement")
    return {name: getattr(evidence, name, None) for name in names}


def _points(before: float | None, now: float | None) -> float | None:
    """Rise of an accuracy in percentage points."""
    return None if before is None or now is None or math.isnan(now) else 100.0 * (now - before)


def _trainable(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)


def _unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's and the data-parallel wrappers, so that slots keep their names."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def _own(value: Any) -> Any:
    # A learning rate may be a tensor; two groups must not share it.
    return value.clone() if isinstance(value, Tensor) else value


def _each_scheduler(schedulers: Iterable[Any]) -> Iterable[Any]:
    """The schedulers themselves and those inside chained and sequential ones."""
    for scheduler in schedulers:
        yield scheduler
        yield from _each_scheduler(getattr(scheduler, "_schedulers", ()))


def _group_lists(scheduler: Any, groups: int) -> list[list[Any]]:
    found = (getattr(scheduler, name, None) for name in _PER_GROUP)
    return [values for values in found if isinstance(values, list) and len(values) == groups]
