"""What is known of one seed beyond its slot, and where a training is: all that changes as it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..core.errors import ConfigurationError, StateDictError, WiringError
from ..core.evidence import SeedEvidence
from ..core.lifecycle import Stage
from ..core.schedules import HOLD, STEEPNESS, AlphaController, AlphaSchedule
from ..core.state import check_state
from .slot import SeedSlot


@dataclass
class Life:
    """One living seed: its slot, its alpha on the way, and the accuracies that its gates compare with."""

    name: str
    slot: SeedSlot
    schedule: AlphaSchedule  # of the first ramp; later ones take steps and curve from it unless told
    alpha: AlphaController = field(default_factory=AlphaController)
    pruning: tuple[str, str] | None = None  # reason and initiator, while alpha is on its way down to the end
    training_accuracy: float | None = None  # when TRAINING began
    blending_accuracy: float | None = None  # when BLENDING began
    evidence: SeedEvidence | None = None
    warned: set[str] = field(default_factory=set)  # names of warnings that were said

    VERSION: ClassVar[int] = 1

    def enter(self, target: Stage, reason: str, initiator: str, accuracy: float | None) -> None:
        """Move the slot, remember the accuracy with which the stage begins, and begin alpha's first ramp.

        Raises:
            TransitionError: the table does not allow it; nothing has changed.
        """
        source = self.slot.stage
        self.slot.move(target, reason, initiator)
        if target is Stage.TRAINING:
            self.training_accuracy = accuracy
        elif target is Stage.BLENDING and source is Stage.TRAINING:
            # Not when it comes back from HOLDING: the accuracy to be kept is the one before it was felt at all.
            self.blending_accuracy = accuracy
            self.alpha = AlphaController(self.schedule.start)
            self.retarget(self.schedule)

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
        }

    @classmethod
    def from_state_dict(cls, state: object, slots: Mapping[str, SeedSlot]) -> Life:
        """The life saved by ``state_dict`` in one of these slots; StateDictError when it is damaged."""
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


@dataclass
class Position:
    """Where a training is: what the controller counts, how long it will be, and the life of every living seed.

    Raises:
        ConfigurationError: a total that is no whole number of at least 1, or both of them.
    """

    epoch: int = 0
    step: int = 0
    accuracy: float | None = None  # of the last epoch
    lives: dict[str, Life] = field(default_factory=dict)  # by slot, in the order of germination
    total_epochs: int | None = None
    total_steps: int | None = None

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

    def take_step(self) -> None:
        """Count an optimizer step, and move every alpha that is on its way."""
        self.step += 1
        for life in self.lives.values():
            if life.alpha.mode != HOLD:
                life.slot.set_alpha(life.alpha.step())


def require_count(name: str, count: object) -> None:
    """ConfigurationError for a number of epochs or steps that is none."""
    if type(count) is not int or count < 1:
        raise ConfigurationError(f"{name} must be a whole number of at least 1, got {count!r}")
