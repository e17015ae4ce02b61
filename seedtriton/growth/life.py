"""What is known of one seed beyond its slot, and where a training is: all that changes as it goes on."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

from ..core.errors import ConfigurationError, StateDictError, WiringError
from ..core.evidence import SeedEvidence
from ..core.harm import Watch
from ..core.lifecycle import Stage
from ..core.probe import ROUNDING, BlendProbe
from ..core.schedules import HOLD, STEEPNESS, AlphaController, AlphaSchedule
from ..core.state import check_state
from ..core.verdict import Verdict
from .digest import Unchecked
from .slot import SeedSlot

logger = logging.getLogger("seedtriton")

LOSSES_KEPT = 16  # epochs of which the loss is remembered, to know what is usual


@dataclass
class Life:
    """One living seed: its slot, its alpha on the way, and what its gates compare with."""

    name: str
    slot: SeedSlot
    schedule: AlphaSchedule  # of the first ramp; later ones take steps and curve from it unless told
    alpha: AlphaController = field(default_factory=AlphaController)
    pruning: tuple[str, str] | None = None  # reason and initiator, while alpha is on its way down to the end
    training_accuracy: float | None = None  # when TRAINING began
    blending_accuracy: float | None = None  # when BLENDING began
    blending_loss: float | None = None  # told, when BLENDING began
    usual_change: float | None = None  # of the told loss from epoch to epoch, before that
    watch: Watch = field(default_factory=Watch)
    probe_due: int = 0  # epoch before which the gate does not probe again
    probe_refusals: int = 0  # in a row, by the probe alone
    probe: BlendProbe | None = None  # the last one
    evidence: SeedEvidence | None = None
    warned: set[str] = field(default_factory=set)  # names of warnings that were said

    VERSION: ClassVar[int] = 1
    LATER: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"blending_loss": None, "usual_change": None, "watch": None, "probe_due": 0, "probe_refusals": 0}
    )

    def enter(self, target: Stage, reason: str, initiator: str, position: Position) -> None:
        """Move the slot, remember how the model does when the stage begins, and begin alpha's first ramp.

        Raises:
            TransitionError: the table does not allow it; nothing has changed.
        """
        source, usual = self.slot.stage, usual_change(position.losses)
        self.slot.move(target, reason, initiator)
        if target is Stage.TRAINING:
            self.training_accuracy = position.accuracy
        elif target is Stage.BLENDING and source is Stage.TRAINING:
            # Not when it comes back from HOLDING: what is to be kept is what was before it was felt at all.
            self.blending_accuracy, self.blending_loss = position.accuracy, finite(position.loss)
            self.usual_change = usual
            self.alpha = AlphaController(self.schedule.start)
            self.retarget(self.schedule)

    def end_epoch(self, evidence: SeedEvidence, position: Position) -> None:
        """Count an epoch; what nobody had told when the stage began begins with the first that is told."""
        self.slot.lifecycle.tick()
        self.evidence = evidence
        if self.slot.stage is Stage.TRAINING:
            self.watch = self.watch.behind(evidence)
            if self.training_accuracy is None:
                self.training_accuracy = position.accuracy
        elif self.felt:
            if self.blending_accuracy is None:
                self.blending_accuracy = position.accuracy
            if self.blending_loss is None:
                self.blending_loss = finite(position.loss)
            if self.usual_change is None:
                # From the losses before this one, which is to be held against them.
                self.usual_change = usual_change(position.losses[:-1])

    @property
    def felt(self) -> bool:
        """Whether the model puts out something of the seed, and the seed may yet be taken out."""
        return self.slot.stage in (Stage.BLENDING, Stage.HOLDING)

    @property
    def bearable(self) -> bool:
        """Whether less of the seed would be less harm: not of one that puts out what is not finite."""
        return self.probe is None or self.probe.finite

    def loss_rise(self, loss: float | None) -> float | None:
        """Rise of the told loss since BLENDING began, in usual changes; None: not known, ``inf``: it has no size."""
        if loss is None or self.blending_loss is None:
            return None
        rise = loss - self.blending_loss
        if rise <= ROUNDING * abs(self.blending_loss):
            return 0.0
        return rise / self.usual_change if self.usual_change else math.inf

    def ramp(
        self, target: float, steps: int | None, curve: str | None, steepness: float | None
    ) -> AlphaSchedule:
        """The way to another target that the script asks for; what it does not tell is that of the first ramp.

        Raises:
            WiringError: alpha does not move in this stage.
            ConfigurationError: an impossible value.
        """
        if self.slot.stage not in (Stage.BLENDING, Stage.HOLDING):
            raise WiringError(f"alpha moves in BLENDING and HOLDING, the seed in {self.name!r} is in {self.slot.stage}")
        if not 0.0 < target <= 1.0:
            raise ConfigurationError(f"target must lie in (0, 1], got {target!r}; prune() ends a seed")
        steps = self.schedule.steps if steps is None else steps
        curve = self.schedule.curve if curve is None else curve
        if steepness is None:  # that of another curve is none of this one's
            steepness = self.schedule.steepness if curve == self.schedule.curve else STEEPNESS
        return AlphaSchedule(target=target, steps=steps, curve=curve, steepness=steepness)

    def retarget(self, ramp: AlphaSchedule) -> None:
        """Send alpha to the target of ``ramp`` from where it is; ConfigurationError when it is still on its way."""
        self.alpha.retarget(ramp.target, ramp.steps, ramp.curve, ramp.steepness)
        self.slot.set_alpha(self.alpha.alpha)

    def keep(self) -> None:
        """End a fade-out where it is: the seed may learn again."""
        self.pruning = None
        self.watch = self.watch.begun_anew()
        self.alpha.halt()
        self.slot.thaw()

    def fade(self, reason: str, initiator: str, ramp: AlphaSchedule) -> None:
        """Send alpha down to the end along ``ramp``, wherever it was going.

        Raises:
            WiringError: it is on its way there; nothing has changed.
        """
        if self.pruning is not None:
            raise WiringError(f"the seed in {self.name!r} is already being faded out; steps=0 takes it out at once")
        self.pruning = (reason, initiator)
        self.alpha.halt()
        self.alpha.retarget(ramp.target, ramp.steps, ramp.curve, ramp.steepness)

    def state_dict(self) -> dict[str, Any]:
        """Plain values. The slot saves its own state, and the evidence is the monitor's."""
        return {
            "version": self.VERSION,
            "slot": self.name,
            "schedule": self.schedule.state_dict(),
            "alpha": self.alpha.state_dict(),
            "pruning": None if self.pruning is None else list(self.pruning),
            "training_accuracy": self.training_accuracy,
            "blending_accuracy": self.blending_accuracy,
            "blending_loss": self.blending_loss,
            "usual_change": self.usual_change,
            "watch": self.watch.state_dict(),
            "probe_due": self.probe_due,
            "probe_refusals": self.probe_refusals,
        }

    @classmethod
    def from_state_dict(cls, state: object, slots: Mapping[str, SeedSlot]) -> Life:
        """The life saved by ``state_dict`` in one of these slots; StateDictError when it is damaged."""
        keys = ("slot", "schedule", "alpha", "pruning", "training_accuracy", "blending_accuracy")
        values = check_state(state, "GrowthController: life", cls.VERSION, (*keys, *cls.LATER), cls.LATER)
        pruning, accuracies = values["pruning"], (values["training_accuracy"], values["blending_accuracy"])
        told, waits = [values["blending_loss"], values["usual_change"]], [values["probe_due"], values["probe_refusals"]]
        if pruning is not None and not (isinstance(pruning, list) and [type(x) for x in pruning] == [str, str]):
            raise StateDictError(f"GrowthController: pruning must be a reason and an initiator, got {pruning!r}")
        known = type(values["slot"]) is str and values["slot"] in slots
        if not known or any(type(a) not in (int, float, type(None)) for a in accuracies):
            raise StateDictError(f"GrowthController: life of slot {values['slot']!r} with accuracies {accuracies}")
        numbers = all(type(n) in (int, float) and math.isfinite(n) for n in told if n is not None)
        if not numbers or (told[1] or 0) < 0 or not all(type(n) is int and n >= 0 for n in waits):
            raise StateDictError(f"GrowthController: life of slot {values['slot']!r} with losses {told}, waits {waits}")
        return cls(
            values["slot"],
            slots[values["slot"]],
            AlphaSchedule.from_state_dict(values["schedule"]),
            AlphaController.from_state_dict(values["alpha"]),
            None if pruning is None else (pruning[0], pruning[1]),
            *accuracies,
            blending_loss=told[0],
            usual_change=told[1],
            watch=_watch(values["watch"]),
            probe_due=waits[0],
            probe_refusals=waits[1],
        )


def _watch(state: object) -> Watch:
    try:
        return Watch() if state is None else Watch.from_state_dict(state)
    except ConfigurationError as error:
        raise StateDictError(f"GrowthController: {error}") from error


@dataclass
class Position:
    """Where a training is: what the controller counts, how long it will be, and the life of every living seed.

    Raises:
        ConfigurationError: a total that is no whole number of at least 1, or both of them.
    """

    epoch: int = 0
    step: int = 0
    accuracy: float | None = None  # of the last epoch
    loss: float | None = None  # of the last epoch
    losses: list[float] = field(default_factory=list)  # of the last epochs in which it was told, oldest first
    epoch_began: int = 0  # in which step
    epoch_steps: int = 0  # of the last epoch
    lives: dict[str, Life] = field(default_factory=dict)  # by slot, in the order of germination
    verdicts: list[str] = field(default_factory=list)  # of the last epoch, in words
    last: dict[str, tuple[int, Verdict]] = field(default_factory=dict)  # by slot, with the epoch; not saved
    told: list[Callable[[], None]] = field(default_factory=list)  # called whenever slots may have changed
    unchecked: Unchecked | None = None  # weights that are to be loaded before the next step
    total_epochs: int | None = None
    total_steps: int | None = None
    warned_of_mode: bool = False

    def __post_init__(self) -> None:
        for name in ("total_epochs", "total_steps"):
            require_count(name, 1 if getattr(self, name) is None else getattr(self, name))
        if self.total_epochs is not None and self.total_steps is not None:
            raise ConfigurationError(
                f"total_epochs={self.total_epochs} and total_steps={self.total_steps} would be two measures of one "
                "progress: give the one that the training ends by"
            )

    @property
    def progress(self) -> float | None:
        """Share of the training that is done, at most 1; None when nobody said how long it is."""
        if self.total_steps is not None:
            return min(1.0, self.step / self.total_steps)
        return None if self.total_epochs is None else min(1.0, self.epoch / self.total_epochs)

    def end_epoch(self, accuracy: float | None, loss: float | None) -> None:
        """Count an epoch, with how the model does in it."""
        self.epoch += 1
        self.accuracy, self.loss = accuracy, loss
        self.epoch_began, self.epoch_steps = self.step, self.step - self.epoch_began
        if loss is not None and math.isfinite(loss):
            self.losses = [*self.losses, loss][-LOSSES_KEPT:]

    def take_step(self) -> None:
        """Count an optimizer step, and move every alpha that is on its way; WiringError as from ``check_weights``."""
        self.check_weights()
        self.step += 1
        if not self.warned_of_mode:
            self.warn_of_mode()
        for life in self.lives.values():
            if life.alpha.mode != HOLD:
                life.slot.set_alpha(life.alpha.step())
        self.tell()

    def warn_of_mode(self) -> None:
        """Say once that a seed is measured in eval mode, in which it does not learn what it would in training."""
        still = [name for name, life in self.lives.items() if not life.slot.training]
        if still:
            self.warned_of_mode = True
            logger.warning(
                "slots %s are measured in eval mode, where Dropout is off and batch norms keep their statistics: call "
                "model.train() behind the validation, before the next step", still,
            )  # fmt: skip

    def check_weights(self) -> None:
        """WiringError, once, when somebody has loaded other weights than those that were saved; see ``digest``."""
        if self.unchecked is not None:
            self.unchecked.check()
            self.unchecked = None

    def tell(self) -> None:
        """Slots may have changed."""
        for call in self.told:
            call()


def usual_change(losses: Sequence[float]) -> float | None:
    """Root of the mean square of the changes from each of these losses to the next; None for fewer than two of them."""
    changes = [after - before for before, after in itertools.pairwise(losses)]
    return finite(math.hypot(*changes) / math.sqrt(len(changes))) if len(changes) > 1 else None


def finite(number: float | None) -> float | None:
    """The number; None for one that is not finite."""
    return number if number is not None and math.isfinite(number) else None


def require_count(name: str, count: object) -> None:
    """ConfigurationError for a number of epochs or steps that is none."""
    if type(count) is not int or count < 1:
        raise ConfigurationError(f"{name} must be a whole number of at least 1, got {count!r}")
