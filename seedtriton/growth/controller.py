"""GrowthController: slots, optimizer, monitor and gates of one training script.

It moves seeds through their life, and only where a gate says so. Without a germinated seed it changes
nothing that the script does.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.errors import ConfigurationError, SeedtritonError, StateDictError, WiringError
from ..core.evidence import BlendProbe, SeedEvidence
from ..core.gates import QualityGates
from ..core.lifecycle import FORWARD, RESTING, Lifecycle, Stage, stage_named
from ..core.schedules import HOLD, AlphaController, AlphaSchedule
from ..core.state import check_state
from ..core.thresholds import GateThresholds
from ..core.verdict import STRICT, Gate, SeedStatus, Verdict
from ..gradients.monitor import WINDOW, GradientMonitor, Gradients
from ..report.events import Event, evidence_fields, gate_fields
from ..report.sinks import LogSink, Sink, Telemetry
from .blending import ADD
from .groups import SeedGroups, own_value
from .isolation import Isolation
from .probing import PROBE_AT, Evaluate, probe
from .slot import SeedSlot, seed_module

logger = logging.getLogger("seedtriton")

SeedOrFactory = nn.Module | Callable[[], nn.Module]

# G0 is asked when the script germinates a seed; these lead from one stage of its life to the next.
MOVING_GATES = (Gate.G1, Gate.G2, Gate.G3, Gate.G5)


@dataclass
class _Life:
    """What the controller knows of one seed beyond its slot."""

    name: str
    slot: SeedSlot
    schedule: AlphaSchedule  # of the first ramp; later ones take steps and curve from it unless told
    alpha: AlphaController = field(default_factory=AlphaController)
    pruning: tuple[str, str] | None = None  # reason and initiator, while alpha is on its way down to the end
    training_accuracy: float | None = None  # when TRAINING began
    blending_accuracy: float | None = None  # when BLENDING began
    evidence: SeedEvidence | None = field(default=None)
    warned: set[str] = field(default_factory=set)  # names of warnings that were said

    VERSION: ClassVar[int] = 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "version": self.VERSION,
            "slot": self.name,
            "schedule": self.schedule.state_dict(),
            "alpha": self.alpha.state_dict(),
            "pruning": None if self.pruning is None else list(self.pruning),
            "training_accuracy": self.training_accuracy,
            "blending_accuracy": self.blending_accuracy,
        }

    @classmethod
    def from_state_dict(cls, state: object, slots: Mapping[str, SeedSlot]) -> _Life:
        keys = ("slot", "schedule", "alpha", "pruning", "training_accuracy", "blending_accuracy")
        values = check_state(state, "GrowthController: life", cls.VERSION, keys)
        pruning, accuracies = values["pruning"], (values["training_accuracy"], values["blending_accuracy"])
        if pruning is not None and not (isinstance(pruning, list) and [type(x) for x in pruning] == [str, str]):
            raise StateDictError(f"GrowthController: pruning must be a reason and an initiator, got {pruning!r}")
        if values["slot"] not in slots or any(type(a) not in (int, float, type(None)) for a in accuracies):
            raise StateDictError(f"GrowthController: life of slot {values['slot']!r} with accuracies {accuracies}")
        return cls(
            values["slot"],
            slots[values["slot"]],
            AlphaSchedule.from_state_dict(values["schedule"]),
            AlphaController.from_state_dict(values["alpha"]),
            None if pruning is None else (pruning[0], pruning[1]),
            *accuracies,
        )


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
        auto_advance: gates that move a seed by themselves in ``end_epoch`` (G1 in ``germinate``); the others only
            report, and ``advance`` moves.
        pruned_epochs: epochs that a slot rests in PRUNED after a prune, at least 1.
        embargoed_epochs: the same in EMBARGOED.
        resetting_epochs: the same in RESETTING.
        window: samples that the monitor keeps.
        evaluate: validation loss of a model, see ``probing.probe``; with it, G2 asks what blending would do to that
            loss and G5 what the seed contributes. Called when all other questions of the gate are answered well.
        sinks: take every event; a log at level INFO unless told.

    Raises:
        WiringError: the model has no slot.
        ConfigurationError: an impossible number of epochs, or a gate that does not move a seed.
    """

    VERSION = 1

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
        auto_advance: Iterable[Gate] = MOVING_GATES,
        pruned_epochs: int = 1,
        embargoed_epochs: int = 1,
        resetting_epochs: int = 1,
        window: int = WINDOW,
        evaluate: Evaluate | None = None,
        sinks: Iterable[Sink | Callable[[Event], None]] | None = None,
    ) -> None:
        """Find the slots and wire monitor and gates to them."""
        model = _unwrap(model)
        self.slots: Mapping[str, SeedSlot] = {
            name: module for name, module in model.named_modules() if isinstance(module, SeedSlot)
        }
        if not self.slots:
            raise WiringError("the model has no SeedSlot: put one where a seed may grow, x = self.slot(x)")
        rests = dict(zip(RESTING, (pruned_epochs, embargoed_epochs, resetting_epochs)))
        counts = {"total_epochs": 1 if total_epochs is None else total_epochs}
        counts |= {f"{str(stage).lower()}_epochs": rest for stage, rest in rests.items()}
        for name, count in counts.items():
            if type(count) is not int or count < 1:
                raise ConfigurationError(f"{name} must be a whole number of at least 1, got {count!r}")
        self.auto_advance = frozenset(auto_advance)
        unknown = [gate for gate in self.auto_advance if gate not in MOVING_GATES or not isinstance(gate, Gate)]
        if unknown:
            known = ", ".join(f"Gate.{gate}" for gate in MOVING_GATES)
            raise ConfigurationError(f"auto_advance takes gates that move a seed, {known}; got {unknown}")
        self.model, self.optimizer = model, optimizer
        self.gates = QualityGates(thresholds or GateThresholds(), mode)
        self.schedule = schedule or AlphaSchedule()
        self._groups = SeedGroups(optimizer, schedulers)
        self.total_epochs = total_epochs
        self.evaluate = evaluate
        self.rests: Mapping[Stage, int] = rests
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
            The verdict of gate G1.

        Raises:
            ConfigurationError: no slot has this name, or no blend.
            WiringError: the slot is occupied, or the seed is unfit: no trainable parameter, another shape,
                parameters of the host or of another seed; nothing has changed.
        """
        place = self._slot(slot)
        if place.stage in RESTING:
            left = self._epochs_of_rest(place)
            raise WiringError(f"slot {slot!r} is resting (stage {place.stage}), {left} more epochs; use another")
        if place.stage is not Stage.DORMANT:
            raise WiringError(f"slot {slot!r} is occupied (stage {place.stage}); prune it first, or use another")
        module = seed_module(seed)
        self._refuse_shared(slot, module)
        if add_to_optimizer:
            self._groups.refuse_unknown_scheduler()
        like = probe if probe is not None else next(p for p in self.model.parameters() if p.is_floating_point())
        dormant = self._status(slot, place, None, parameters=_trainable(module))
        before = place.lifecycle.state_dict()
        place.germinate(
            module, probe=probe, isolation=isolation, blend=blend, device=like.device, dtype=like.dtype
        )
        groups = len(self.optimizer.param_groups)
        try:
            if add_to_optimizer:
                self._groups.add(dict(place.named_parameters()), group)
            self.monitor.add_seed(slot, place.modules_of_seed(), alpha=place)
        except Exception:
            if len(self.optimizer.param_groups) > groups:
                self._groups.remove(place)
            place.move(Stage.PRUNED, "refused")
            place.lifecycle.load_state_dict(before)
            raise
        self._lives[slot] = life = _Life(slot, place, schedule or self.schedule)
        parameters = _trainable(*place.modules_of_seed())
        self._emit("germinated", slot, parameters=parameters, in_optimizer=add_to_optimizer, blend=blend)
        self._emit_gate(life, self.gates.judge(Stage.GERMINATED, dormant))
        verdict = self._judge(life)
        if verdict.passed and verdict.gate in self.auto_advance:
            self._move(life, Stage.TRAINING, str(verdict), "gate")
        return verdict

    def measure(
        self, scaler: torch.amp.GradScaler | None = None, *, gradients: Gradients | None = None
    ) -> None:
        """Measure the gradients of this step: after backward and unscaling, before clipping and the step.

        Also moves every alpha that is on its way one step, from the next forward pass on.
        Does nothing while no slot holds a living seed. A ``scaler`` is read, never touched; for it and for
        explicit ``gradients`` see ``GradientMonitor.measure``.
        """
        self.step += 1
        if not self._lives:
            return
        self.monitor.measure(scaler, gradients=gradients)
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
            One verdict per living seed, in the order of germination, except for seeds on their way out. Those
            that passed have moved, where ``auto_advance`` has the gate.

        Raises:
            ConfigurationError: an accuracy outside [0, 1]; nothing has changed.
            WiringError: with ``strict``, a seed that was never measured; nothing has changed.
            Exception: what ``evaluate`` raises passes through; the epoch has been counted by then.
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
        resting = [name for name, slot in self.slots.items() if slot.stage in RESTING]
        for name, life in list(self._lives.items()):
            life.slot.lifecycle.tick()
            life.evidence = evidence[name]
            if life.training_accuracy is None and life.slot.stage is Stage.TRAINING:
                # Germinated before any accuracy was known: the first one seen is where the rise begins.
                life.training_accuracy = accuracy
            self._emit_epoch(life, accuracy, loss)
            if life.pruning is not None:
                if life.alpha.mode == HOLD:
                    self._remove(life, *life.pruning)
                continue
            verdict = self._judge(life)
            verdicts.append(verdict)
            if verdict.passed and verdict.gate in self.auto_advance:
                self._move(life, verdict.target, str(verdict), "gate")
            elif life.slot.stage is Stage.TRAINING:
                life.slot.check_isolation_again()
        for name in resting:
            self._rest(name, self.slots[name])
        return verdicts

    def advance(self, slot: str) -> Verdict:
        """Ask the gate before a seed now, and move the seed if it passes; reads the evidence, which waits for a copy.

        Raises:
            ConfigurationError: no slot has this name.
            WiringError: the slot has no living seed, or it is on its way out.
        """
        life = self._living(slot)
        if life.pruning is not None:
            raise WiringError(
                f"the seed in {slot!r} is being pruned ({life.pruning[0]}); set_alpha_target() would keep it"
            )
        life.evidence = self.monitor.read()[slot]
        verdict = self._judge(life)
        if verdict.passed:
            self._move(life, verdict.target, str(verdict), "script")
        return verdict

    def set_alpha_target(
        self, slot: str, target: float, *, steps: int | None = None, curve: str | None = None
    ) -> None:
        """Send alpha of a blending or held seed to another target; a held seed goes back to BLENDING.

        A seed that is being faded out is kept: it learns again, and its evidence begins anew.

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
        steps = life.schedule.steps if steps is None else steps
        curve = life.schedule.curve if curve is None else curve
        AlphaSchedule(steps=steps, curve=curve)
        if life.pruning is not None:
            life.pruning = None
            life.alpha.halt()
            life.slot.thaw()
            self.monitor.reset(slot)
            self._emit("prune_cancelled", slot)
        life.alpha.retarget(target, steps, curve)
        life.slot.set_alpha(life.alpha.alpha)
        self._emit("alpha_target", slot, target=life.alpha.target, steps=life.alpha.steps_total, curve=life.alpha.curve)
        if life.slot.stage is Stage.HOLDING:
            self._move(life, Stage.BLENDING, f"alpha target {target:.3g}", "script")

    def prune(
        self,
        slot: str,
        reason: str = "pruned by the script",
        *,
        initiator: str = "script",
        steps: int = 0,
        curve: str = "cosine",
    ) -> None:
        """Take a seed out: of its slot, of the monitor, and of the optimizer with its state.

        With ``steps`` a seed that is felt is faded out first: alpha goes to 0, and the seed is taken out at the end
        of the epoch in which it arrives there. Meanwhile the seed is frozen and no gate is asked; the host trains
        on, and still gets the gradient that reaches it through the seed. ``set_alpha_target`` keeps it after all.

        Args:
            slot: the slot's path in the model.
            reason: kept in the events and in the history.
            initiator: who wanted it, kept likewise: "script", "policy", ...
            steps: optimizer steps of the fade; 0 takes it out at once, as does an alpha of 0.
            curve: of the fade.

        Raises:
            ConfigurationError: no slot has this name, steps below 0, an unknown curve.
            WiringError: the slot has no living seed (a fossil is part of the host and stays), or it is already being
                faded out and this asks for a fade.
        """
        life = self._living(slot)
        AlphaSchedule(steps=steps, curve=curve)
        if steps == 0 or life.slot.alpha_value == 0.0:
            self._remove(life, reason, initiator)
            return
        if life.pruning is not None:
            raise WiringError(f"the seed in {slot!r} is already being faded out; steps=0 takes it out at once")
        life.pruning = (reason, initiator)
        life.alpha.halt()
        life.alpha.retarget(0.0, steps, curve)
        self._emit("prune_scheduled", slot, reason=reason, initiator=initiator, steps=steps, curve=curve)
        if life.slot.stage is Stage.HOLDING:
            self._move(life, Stage.BLENDING, reason, initiator)
        life.slot.freeze()

    def _remove(self, life: _Life, reason: str, initiator: str) -> None:
        self._groups.remove(life.slot)
        del self._lives[life.name]
        self._move(life, Stage.PRUNED, reason, initiator)
        # Once the slot is empty: while the seed is in the model, what is left of it would count as host.
        self.monitor.remove_seed(life.name)

    def probe(
        self, slot: str, evaluate: Evaluate | None = None, alphas: Sequence[float] | None = None
    ) -> BlendProbe:
        """The validation loss with the seed of ``slot`` blended in at several alphas; changes nothing.

        Args:
            slot: the slot's path in the model.
            evaluate: see ``probing.probe``; the controller's unless told.
            alphas: 0.1, 0.5 and 1 times the target of the seed's schedule unless told.

        Raises:
            ConfigurationError: no slot has this name, it is empty, an alpha outside (0, 1], or no ``evaluate``.
        """
        evaluate = evaluate or self.evaluate
        if evaluate is None:
            raise ConfigurationError("no validation function: GrowthController(..., evaluate=...) or probe(slot, f)")
        self._slot(slot)
        if alphas is None:
            target = self._lives[slot].schedule.target if slot in self._lives else 1.0
            alphas = [share * target for share in PROBE_AT]
        return probe(self.model, slot, evaluate, alphas)

    def evidence(self) -> dict[str, SeedEvidence]:
        """What the monitor says of every living seed now; copies to the host once."""
        return self.monitor.read()

    def state_dict(self) -> dict[str, Any]:
        """Where every seed is in its life: plain values and tensors, for ``torch.load(weights_only=True)``.

        Weights are the model's ``state_dict``, moments the optimizer's; thresholds and other arguments of the
        constructor are not in it.
        """
        names = {id(p): name for slot in self.slots.values() for name, p in slot.named_parameters()}
        groups = self.optimizer.param_groups
        return {
            "version": self.VERSION,
            "epoch": self.epoch,
            "step": self.step,
            "accuracy": self._accuracy,
            "group_sizes": [len(group["params"]) for group in groups],
            "slots": {
                name: {
                    "slot": slot.lifecycle_state(),
                    "groups": [[i, [names[id(p)] for p in groups[i]["params"]]] for i in self._groups.of(slot)],
                }
                for name, slot in self.slots.items()
            },
            "lives": [life.state_dict() for life in self._lives.values()],
            "monitor": self._monitor_state(),
        }

    def load_state_dict(
        self, state: object, seeds: Mapping[str, SeedOrFactory] = MappingProxyType({})
    ) -> None:
        """Take over ``state_dict`` in a new run, so that it goes on as if it had never stopped.

        Build model, optimizer, schedulers and controller as at the beginning, with empty slots. Then, in this order::

            growth.load_state_dict(saved["growth"], seeds={"block2": make_seed})
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])     # and the schedulers' and the random state

        Args:
            state: what ``state_dict`` returned.
            seeds: by slot, a module like the one that was there, or a factory of one. Those for slots that
                had none are not used.

        Raises:
            StateDictError: another version, a damaged state, or one of another model or optimizer.
            WiringError: the slots are not empty, or a seed is unfit.
            ConfigurationError: a slot's seed is missing, or an impossible value. In each case nothing has changed.
        """
        occupied = [name for name, slot in self.slots.items() if slot.stage is not Stage.DORMANT]
        if occupied:
            raise WiringError(f"slots {occupied} are not empty: load into a freshly built model and controller")
        keys = ("epoch", "step", "accuracy", "group_sizes", "slots", "lives", "monitor")
        values = check_state(state, "GrowthController", self.VERSION, keys)
        lives = self._check_state(values)
        unknown = sorted(set(seeds) - set(self.slots))
        missing = [name for name, entry in values["slots"].items() if _holds_seed(entry) and name not in seeds]
        if unknown or missing:
            raise ConfigurationError(
                f"load_state_dict needs a module or factory in seeds= for slots {missing}; unknown slots: {unknown}"
            )
        modules = {name: seed_module(seeds[name]) for name, entry in values["slots"].items() if _holds_seed(entry)}
        before = {name: slot.lifecycle_state() for name, slot in self.slots.items()}, self._monitor_state()
        try:
            self._restore(values, lives, modules)
        except Exception as error:
            self._undo(*before)
            if isinstance(error, SeedtritonError):
                raise
            raise StateDictError(f"GrowthController: the state does not fit these seeds: {error!r}") from error
        self.epoch, self.step, self._accuracy = values["epoch"], values["step"], values["accuracy"]
        self._lives = {life.name: life for life in lives}

    def _monitor_state(self) -> dict[str, Any]:
        # Copies: the buffers go on changing.
        return {key: own_value(value) for key, value in self.monitor.state_dict().items()}

    def _check_state(self, values: Mapping[str, Any]) -> list[_Life]:
        """The seeds' lives in a saved state; StateDictError unless it fits this model and optimizer."""
        kind, accuracy, sizes = "GrowthController", values["accuracy"], values["group_sizes"]
        whole = all(type(values[name]) is int and values[name] >= 0 for name in ("epoch", "step"))
        known = accuracy is None or (type(accuracy) in (int, float) and 0.0 <= accuracy <= 1.0)
        lists = isinstance(values["lives"], list) and isinstance(sizes, list)
        if not (whole and known and lists and isinstance(values["monitor"], dict)):
            raise StateDictError(f"{kind}: damaged epoch, step, accuracy, lives, group_sizes or monitor")
        slots = values["slots"]
        if not isinstance(slots, dict) or slots.keys() != self.slots.keys():
            found = sorted(slots) if isinstance(slots, dict) else slots
            raise StateDictError(f"{kind}: the state is of slots {found}, the model has {sorted(self.slots)}")
        for name, entry in slots.items():
            try:
                Lifecycle().load_state_dict(entry["slot"]["lifecycle"])
                groups = [(index, len(list(map(str, names)))) for index, names in entry["groups"]]
                fits = all(0 <= index < len(sizes) and sizes[index] == size for index, size in groups)
            except (KeyError, TypeError, ValueError) as error:
                raise StateDictError(f"{kind}: damaged entry of slot {name!r}: {error}") from error
            if not fits:
                raise StateDictError(f"{kind}: slot {name!r} has optimizer groups {groups}, sizes are {sizes}")
        of_seeds = [index for entry in slots.values() for index, _ in entry["groups"]]
        saved = [size for index, size in enumerate(sizes) if index not in of_seeds]
        own = [len(group["params"]) for group in self.optimizer.param_groups]
        if saved != own or len(set(of_seeds)) != len(of_seeds):
            raise StateDictError(
                f"{kind}: outside the seeds the saved optimizer had groups of {saved} parameters, this one has {own}: "
                "load before anything else, into an optimizer built as at the beginning"
            )
        lives = [_Life.from_state_dict(entry, self.slots) for entry in values["lives"]]
        living = [name for name, entry in slots.items() if _holds_seed(entry) and not _is_fossil(entry)]
        if sorted(life.name for life in lives) != sorted(living):
            raise StateDictError(f"{kind}: lives of {[life.name for life in lives]}, living seeds in {living}")
        return lives

    def _restore(
        self, values: Mapping[str, Any], lives: Sequence[_Life], modules: Mapping[str, nn.Module]
    ) -> None:
        device = next(p.device for p in self.model.parameters() if p.is_floating_point())
        for name, entry in values["slots"].items():
            module = modules.get(name)
            if module is not None:
                self._refuse_shared(name, module)
            self.slots[name].load_lifecycle_state(entry["slot"], module, device=device)
        groups = [(index, name, names) for name, entry in values["slots"].items() for index, names in entry["groups"]]
        if groups:
            self._groups.refuse_unknown_scheduler()
        for index, name, names in sorted(groups):
            self._groups.insert(self.slots[name], index, names)
        for life in lives:
            self.monitor.add_seed(life.name, life.slot.modules_of_seed(), alpha=life.slot)
        self.monitor.load_state_dict(values["monitor"])

    def _undo(self, slots: Mapping[str, dict[str, Any]], monitor: Mapping[str, Any]) -> None:
        """Back to empty slots, after a restoration that failed half-way."""
        for slot in self.slots.values():
            if slot.seed is not None:
                self._groups.remove(slot)
        for name, state in slots.items():
            self.slots[name].vacate()
            self.slots[name].load_lifecycle_state(state)
        for name in self.monitor.seeds:
            self.monitor.remove_seed(name)
        self.monitor.load_state_dict(monitor)

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
            handed_on=slot.handed_on,
            alpha=slot.alpha_value,
            alpha_target=life.alpha.target if life else 1.0,
            alpha_holds=life is None or life.alpha.mode == HOLD,
            progress=progress,
        )

    def _judge(self, life: _Life) -> Verdict:
        """The verdict on a living seed; the validation loss is probed if only the blend gain may stand against it."""
        target = FORWARD[life.slot.stage]
        status = self._status(life.name, life.slot, life)
        verdict = self.gates.judge(target, status)
        against = {check.question for check in verdict.failed} - {"blend_gain"}
        if not against and self.evaluate is not None and self.gates.asks_probe(target):
            alphas = None if target is Stage.BLENDING else [life.slot.alpha_value]
            verdict = self.gates.judge(target, dataclasses.replace(status, probe=self.probe(life.name, alphas=alphas)))
        self._emit_gate(life, verdict)
        self._warn(life, verdict)
        return verdict

    def _warn(self, life: _Life, verdict: Verdict) -> None:
        """To the log, whatever the sinks: what is no event of the run but probably a slip of who wrote it."""
        for check in verdict.warnings:
            if check.name not in life.warned:
                life.warned.add(check.name)
                logger.warning("slot %r: %s (%s)", life.name, check.label, check.reason)

    def _move(self, life: _Life, target: Stage, reason: str, initiator: str) -> None:
        source = life.slot.stage
        life.slot.move(target, reason, initiator)
        if target is Stage.TRAINING:
            life.training_accuracy = self._accuracy
        elif target is Stage.BLENDING and source is Stage.TRAINING:
            # Not when it comes back from HOLDING: the accuracy to be kept is the one before it was felt at all.
            life.blending_accuracy = self._accuracy
            life.alpha = AlphaController(life.schedule.start)
            life.alpha.retarget(life.schedule.target, life.schedule.steps, life.schedule.curve)
            life.slot.set_alpha(life.alpha.alpha)
        self._emit(
            "stage", life.name, source=str(source), target=str(target), reason=reason, initiator=initiator
        )
        if target is Stage.PRUNED:
            self._emit("pruned", life.name, reason=reason, initiator=initiator)
        elif target is Stage.FOSSILIZED:
            # From now on its parameters are the host's; they stay where they are in the optimizer.
            self.monitor.remove_seed(life.name)
            del self._lives[life.name]
            self._emit("fossilized", life.name, alpha=life.slot.alpha_value)
        else:
            # Evidence belongs to a stage: what the seed did behind the host says nothing of the blend.
            self.monitor.reset(life.name)

    def _rest(self, name: str, slot: SeedSlot) -> None:
        """One epoch of the rest after a prune; after the last the slot may be used again."""
        source = slot.stage
        slot.lifecycle.tick()
        if slot.lifecycle.epochs_in_stage >= self.rests[source]:
            slot.move(FORWARD[source], "rested", "time")
            self._emit(
                "stage", name, source=str(source), target=str(slot.stage), reason="rested", initiator="time"
            )

    def _epochs_of_rest(self, slot: SeedSlot) -> int:
        ahead = RESTING[RESTING.index(slot.stage) :]
        return sum(self.rests[stage] for stage in ahead) - slot.lifecycle.epochs_in_stage

    def _refuse_shared(self, slot: str, module: nn.Module) -> None:
        known = {id(parameter) for parameter in self.model.parameters()}
        shared = [name for name, parameter in module.named_parameters() if id(parameter) in known]
        if shared:
            raise WiringError(
                f"the seed for slot {slot!r} shares parameters with the model: {shared[:3]}; "
                "behind the host it must be a module of its own (copy.deepcopy)"
            )

    def _emit(self, event: str, name: str | None, **fields: Any) -> None:
        stage = None if name is None else str(self.slots[name].stage)
        self.telemetry.emit(
            {"event": event, "seed": name, "epoch": self.epoch, "step": self.step, "stage": stage, **fields}
        )

    def _emit_gate(self, life: _Life, verdict: Verdict) -> None:
        self._emit("gate", life.name, **gate_fields(verdict), **evidence_fields(life.evidence))

    def _emit_epoch(self, life: _Life, accuracy: float | None, loss: float | None) -> None:
        self._emit(
            "epoch", life.name, accuracy=accuracy, loss=loss, alpha=life.slot.alpha_value,
            **evidence_fields(life.evidence),
        )


def _saved_stage(entry: Mapping[str, Any]) -> Stage:
    return stage_named(entry["slot"]["lifecycle"]["stage"])


def _holds_seed(entry: Mapping[str, Any]) -> bool:
    return _saved_stage(entry) not in (Stage.DORMANT, *RESTING)


def _is_fossil(entry: Mapping[str, Any]) -> bool:
    return _saved_stage(entry) is Stage.FOSSILIZED


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
