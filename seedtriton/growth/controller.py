"""GrowthController: slots, optimizer, monitor and gates of one training script.

It moves seeds through their life, and only where a gate says so. Without a germinated seed it changes
nothing that the script does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..core.copying import DeepCopied
from ..core.errors import WiringError
from ..core.gates import QualityGates
from ..core.harm import FADE
from ..core.lifecycle import RESTING, Stage
from ..core.schedules import STEEPNESS, AlphaSchedule
from ..core.thresholds import GateThresholds
from ..core.verdict import STRICT, Gate, Verdict
from ..gradients.clipping import Limit
from ..gradients.monitor import WINDOW, GradientMonitor
from ..gradients.parameters import Gradients
from ..report.events import Event
from ..report.sinks import Sink, Telemetry
from . import checkpoint
from .arguments import check_model, check_optimizer, check_schedule, check_settings
from .blending import ADD
from .isolation import Isolation
from .judging import Judge, trainable
from .life import Life, Position
from .moving import MOVING_GATES, Mover, check_moving_gates, check_on_harm, check_rests, check_told
from .probing import Evaluate
from .telling import Teller
from .together import sinks_of, taken, told_of
from .trying import normal_tensors, seed_module
from .wiring import Wiring, ranks_of, slots_of, unwrap

if TYPE_CHECKING:
    from ..parallel.ranks import Ranks


class GrowthController(DeepCopied, Teller):
    """Grows a model while it trains: ``germinate``, then ``measure`` per step and ``end_epoch`` per epoch.

    Args:
        model: contains one ``SeedSlot`` or more; DDP and compiled wrappers are looked through.
        optimizer: what trains the host; a seed gets a parameter group of its own in it. Wrappers (accelerate, Trainer,
            Lightning, schedule-free, Lookahead) are looked through.
        thresholds: limits of the gates.
        mode: "strict" or "permissive", see ``QualityGates``.
        schedule: the first ramp of alpha, in optimizer steps.
        schedulers: learning-rate schedulers of the optimizer; they must learn of every new group. Wrappers are looked
            through; see ``add_scheduler`` for one that is made later.
        total_epochs: length of the whole training, for thresholds that depend on its progress.
        total_steps: the same in optimizer steps, for a training that ends by them; one of both.
        auto_advance: gates that move a seed by themselves in ``end_epoch`` (G1 in ``germinate``); the others only
            report, and ``advance`` moves.
        pruned_epochs: epochs that a slot rests in PRUNED after a prune, at least 1.
        embargoed_epochs: the same in EMBARGOED.
        resetting_epochs: the same in RESETTING.
        window: samples that the monitor keeps.
        quarantine: gradients of a seed behind the host that are not finite become zeros when they are measured, so that
            they cost the host no step and no NaN; see ``GradientMonitor``.
        tag: the loss whose gradients count, in a loop with several (GAN, RL), see ``GradientMonitor``.
        evaluate: validation loss of a model, see ``probing.probe``. G2 asks what blending would do to it, four passes
            over the data, when nothing else stands against the seed; then every epoch asks what the seed in its place
            does to it, two passes.
        on_harm: about a seed that is felt and harms, see ``core.harm``: "fade" fades it out, frozen, and prunes it,
            "halt" stops alpha where it is, "report" tells of it.
        sinks: take every event; a log at level INFO unless told. Of many ranks the first alone tells.
        ranks: the processes that train the model together: all of them unless told; None: each for itself. Then
            construction, ``germinate``, ``end_epoch``, ``advance``, ``prune`` and ``state_dict`` are called on all.

    Raises:
        WiringError: the model has no slot, an optimizer that cannot be watched, a scheduler of another optimizer.
        ConfigurationError: something of another kind than said here (a dict of thresholds, a list of optimizers, the
            path of a file as ``sinks``), an impossible number of epochs or steps, both totals, a gate that moves no
            seed, or an unknown ``on_harm``.
    """

    VERSION = checkpoint.VERSION

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
        total_steps: int | None = None,
        auto_advance: Iterable[Gate] = MOVING_GATES,
        pruned_epochs: int = 1,
        embargoed_epochs: int = 1,
        resetting_epochs: int = 1,
        window: int = WINDOW,
        quarantine: bool = True,
        tag: str | None = None,
        evaluate: Evaluate | None = None,
        on_harm: str = FADE,
        sinks: Iterable[Sink | Callable[[Event], None]] | None = None,
        ranks: Ranks | Literal["auto"] | None = "auto",
    ) -> None:
        """Find the slots and wire monitor and gates to them."""
        check_model(model)
        check_optimizer(optimizer)
        check_settings(thresholds, schedule, schedulers, auto_advance, evaluate)
        ranks = ranks_of(ranks, model)
        telemetry = Telemetry(sinks_of(sinks, ranks))
        slots = slots_of(unwrap(model), ranks)
        self.rests: Mapping[Stage, int] = dict(zip(RESTING, (pruned_epochs, embargoed_epochs, resetting_epochs)))
        check_rests(self.rests)
        position = Position(total_epochs=total_epochs, total_steps=total_steps)
        self.auto_advance = check_moving_gates(auto_advance)
        self.on_harm = check_on_harm(on_harm)
        self.gates = QualityGates(thresholds or GateThresholds(), mode)
        self.schedule = schedule or AlphaSchedule()
        wiring = Wiring(model, slots, optimizer, schedulers, window, quarantine, tag, ranks)
        super().__init__(wiring, position, evaluate, telemetry)
        self.optimizer = self._wiring.optimizer
        self.monitor: GradientMonitor = self._wiring.monitor
        self.monitor.at_each_step(self._position.take_step)
        self._mover = Mover(self._wiring, self._position, self.rests, self.telemetry)
        self._move = self._mover.move
        tensors = partial(self.monitor.tensors, together=True)
        self._judge = Judge(self.gates, self._position, self.probe_if_known, tensors)

    @normal_tensors()
    def germinate(
        self,
        slot: str,
        seed: nn.Module | Callable[[], nn.Module],
        *,
        probe: Tensor | None = None,
        isolation: Isolation | None = None,
        blend: str = ADD,
        gate_dims: Sequence[int] | None = None,
        channel_dim: int | None = None,
        isolate_blending: bool = False,
        add_to_optimizer: bool = True,
        schedule: AlphaSchedule | None = None,
        **group: Any,
    ) -> Verdict:
        """Put a seed into a slot, its parameters into the optimizer, and let it train behind the host.

        Args:
            slot: the slot's path in the model, such as "block2".
            seed: a module that keeps shape and dtype, or a factory of one; moved to the model's device and dtype.
            probe: features as the slot sees them, to try the seed on now; otherwise the first forward pass does.
            isolation: how it trains, ``TrustRegion()`` unless told.
            blend: how it is blended in: "add", "multiply", or "gate", which learns how much of the seed each
                position of each sample gets and needs a ``probe``.
            gate_dims: dimensions over which a gate is one value, (2, 3) for one per image; none unless told.
            channel_dim: where a gate finds the channels: 1 for Conv1d; unless told 1 in 4-D features, else the last.
            isolate_blending: send the host no gradient through the seed in BLENDING: it gets its own, times 1 - alpha.
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
        check_schedule(schedule)
        place = self._mover.dormant(slot, schedule or self.schedule)
        module = seed_module(seed)
        dormant = self._judge.status_of(slot, place, None, trainable(module))
        blending = {"blend": blend, "gate_dims": gate_dims, "channel_dim": channel_dim}
        how = {"probe": probe, "isolation": isolation, "isolate_blending": isolate_blending, **blending}
        self._wiring.put_in(slot, module, how, group if add_to_optimizer else None)
        self._lives[slot] = life = Life(slot, place, schedule or self.schedule)
        parameters = trainable(*place.modules_of_seed())
        fields = {"in_optimizer": add_to_optimizer, "isolate_blending": isolate_blending, **blending}
        self._mover.emit("germinated", slot, parameters=parameters, **fields)
        self._mover.emit_gate(life, self.gates.judge(Stage.GERMINATED, dormant))
        verdict = self._verdict(life)
        if verdict.passed and verdict.gate in self.auto_advance:
            self._move(life, Stage.TRAINING, str(verdict), "gate")
        return verdict

    def add_scheduler(self, scheduler: Any) -> None:
        """Tell of a learning-rate scheduler that was made later; it is refused as ``Schedulers.add`` does."""
        self._wiring.groups.add_scheduler(scheduler)

    def measure(
        self,
        scaler: torch.amp.GradScaler | None = None,
        *,
        gradients: Gradients | None = None,
        tag: str | None = None,
        every: int = 1,
    ) -> None:
        """Measure the gradients of this step: after backward, before a GradScaler's unscale_, clipping and the step.

        Also moves every alpha on its way, once per optimizer step, as does a hook of ``monitor.attach``. Only counts
        while no slot holds a living seed. ``scaler``, ``gradients``, ``tag``, ``every``: ``GradientMonitor.measure``'s.
        """
        if self._lives:
            self.monitor.measure(scaler, gradients=gradients, tag=tag, every=every)
        else:
            self.monitor.pass_over(tag=tag, every=every)

    def clip_grad_norm_(self, max_norm: Limit, error_if_nonfinite: bool = False, *, reuse: bool = True) -> Tensor:
        """Clip the host, with all that is blended, by its norm, and every seed behind it by its own; the host's norm.

        ``max_norm``, ``error_if_nonfinite`` and ``reuse`` are those of ``GradientMonitor.clip_grad_norm_``.
        """
        return self.monitor.clip_grad_norm_(max_norm, error_if_nonfinite, apart=True, reuse=reuse)

    @normal_tensors()
    def end_epoch(
        self, accuracy: float | None = None, loss: float | None = None, *, strict: bool = False
    ) -> list[Verdict]:
        """Count one epoch, read the evidence once, and let the gates decide about every seed.

        Args:
            accuracy: validation accuracy as a share in [0, 1].
            loss: validation loss, which G3 and G5 ask for where no accuracy is told; without either: ``evaluate``.
            strict: raise when a living seed was never measured, instead of only refusing it.

        Returns:
            One verdict per living seed, in the order of germination, except for seeds on their way out. Those
            that passed have moved, where ``auto_advance`` has the gate.

        Raises:
            ConfigurationError: an accuracy outside [0, 1], or a loss that is no number; nothing has changed.
            WiringError: with ``strict``, a seed that was never measured; nothing has changed.
            Exception: what ``evaluate`` raises passes through; the epoch has been counted by then.
        """
        self._wiring.find()
        told = told_of(*check_told(accuracy, loss), self.slots)
        evidence, everybody = self._wiring.read("end_epoch()", self._facts(), told, strict=strict)
        accuracy, loss = taken(everybody, self.slots)
        self._position.end_epoch(accuracy, loss)
        told_now = {"accuracy": accuracy, "loss": loss, "progress": self.progress}
        self._mover.emit("epoch", None, **told_now, **self._mover.largest_tensors())
        verdicts = []
        for name in [name for name, slot in self.slots.items() if slot.stage in RESTING]:
            self._mover.rest(name)
        for name, life in list(self._lives.items()):
            self._mover.end_epoch(life, evidence[name], loss)
        for life in list(self._lives.values()):
            if life.pruning is None and (harm := self._judge.watch(life)) is not None:
                self._mover.act_on(harm, life, self.on_harm)
            if life.pruning is not None or life.name not in self._lives:
                continue
            verdict = self._verdict(life)
            verdicts.append(verdict)
            if verdict.passed and verdict.gate in self.auto_advance:
                self._move(life, verdict.target, str(verdict), "gate")
            elif life.slot.stage is Stage.TRAINING:
                self._mover.stay(life, self.gates.overshoots(verdict))
        self._position.verdicts = list(map(str, verdicts))
        return verdicts

    @normal_tensors()
    def advance(self, slot: str) -> Verdict:
        """Ask the gate before a seed now, and move the seed if it passes; reads the evidence, which waits for a copy.

        Raises:
            ConfigurationError: no slot has this name.
            WiringError: the slot has no living seed, or it is on its way out.
        """
        life = self._mover.living(slot)
        if life.pruning is not None:
            raise WiringError(f"the seed in {slot!r} is being pruned ({life.pruning[0]}); set_alpha_target() keeps it")
        life.evidence = self._wiring.read("advance()", self._facts())[0][slot]
        verdict = self._verdict(life, now=True)
        if verdict.passed:
            self._move(life, verdict.target, str(verdict), "script")
        return verdict

    def set_alpha_target(
        self,
        slot: str,
        target: float,
        *,
        steps: int | None = None,
        curve: str | None = None,
        steepness: float | None = None,
    ) -> None:
        """Send alpha of a blending or held seed to another target; a held seed goes back to BLENDING.

        A seed that is being faded out is kept: it learns again, and its evidence begins anew.

        Args:
            slot: the slot's path in the model.
            target: in (0, 1].
            steps: optimizer steps it takes, 0 for a jump; those of the seed's schedule unless told.
            curve: "linear", "cosine" or "sigmoid"; the one of the seed's schedule unless told.
            steepness: of a sigmoid; that of the seed's schedule, if it is one, unless told.

        Raises:
            ConfigurationError: no slot has this name, alpha is still on its way, or a value is impossible;
                nothing has changed.
            WiringError: the slot has no seed in BLENDING or HOLDING.
        """
        life = self._mover.living(slot)
        self._mover.retarget(life, life.ramp(target, steps, curve, steepness))

    @normal_tensors()
    def prune(
        self,
        slot: str,
        reason: str = "pruned by the script",
        *,
        initiator: str = "script",
        steps: int = 0,
        curve: str = "cosine",
        steepness: float = STEEPNESS,
    ) -> None:
        """Take a seed out: of its slot, of the monitor, and of the optimizer with its state.

        With ``steps`` a seed that is felt is faded out first: alpha goes to 0, and the seed is taken out at the end
        of the epoch in which it arrives there. Meanwhile the seed is frozen and no gate is asked; the host trains
        on, and still gets the gradient that reaches it through the seed. ``set_alpha_target`` keeps it after all.

        Args:
            slot: the slot's path in the model.
            reason: kept in the events and in the history, as the initiator: "script", "policy", ...
            initiator: who wanted it.
            steps: optimizer steps of the fade; 0 takes it out at once, as does an alpha of 0.
            curve: of the fade.
            steepness: of the fade, if its curve is "sigmoid".

        Raises:
            ConfigurationError: no slot has this name, or what ``AlphaSchedule`` refuses.
            WiringError: the slot has no living seed (a fossil stays), or this asks for a fade a second time.
        """
        life = self._mover.living(slot)
        ramp = AlphaSchedule(target=0.0, steps=steps, curve=curve, steepness=steepness)
        if steps == 0 or life.slot.alpha_value == 0.0:
            self._mover.remove(life, reason, initiator)
        else:
            self._mover.fade(life, reason, initiator, ramp)

    def state_dict(self) -> dict[str, Any]:
        """Where every seed is in its life: plain values and tensors, for ``torch.load(weights_only=True)``.

        Weights are the model's ``state_dict``, moments the optimizer's; arguments of the constructor are not in it.
        """
        return checkpoint.save(self._wiring, self._position)

    @normal_tensors()
    def load_state_dict(
        self,
        state: object,
        seeds: Mapping[str, checkpoint.SeedOrFactory] = MappingProxyType({}),
        *,
        check_weights: bool = True,
    ) -> None:
        """Take over ``state_dict`` in a new run, so that it goes on as if it had never stopped.

        Build model, optimizer, schedulers and controller as at the beginning, with empty slots, or with seeds that
        ``restore_slots`` has put there. Then, in this order::

            growth.load_state_dict(saved["growth"], seeds={"block2": make_seed})
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])     # and the schedulers' and the random state

        Args:
            state: what ``state_dict`` returned.
            seeds: by slot, a module like the one that was there, or a factory; not used for slots that had none, nor
                after ``restore_slots``.
            check_weights: whether the first measurement is to raise WiringError when the weights of a seed are not
                those that were saved, because a loader had no place for them; it waits for the device, once.

        Raises:
            StateDictError: another version, a damaged state, or one of another model or optimizer.
            WiringError: the slots are not empty, or a seed is unfit.
            ConfigurationError: a slot's seed is missing, or an impossible value. In each case nothing has changed.
        """
        checkpoint.load(self._wiring, self._position, state, seeds, check_weights)

    @property
    def _lives(self) -> dict[str, Life]:
        return self._position.lives

    def _verdict(self, life: Life, *, now: bool = False) -> Verdict:
        verdict = self._judge.verdict(life, now=now)
        self._mover.emit_gate(life, verdict)
        return verdict
