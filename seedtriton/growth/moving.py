"""How a seed moves from stage to stage, in every place that knows of it, and what is told of that."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from ..core.errors import ConfigurationError, WiringError
from ..core.evidence import SeedEvidence
from ..core.harm import FADE, HALT, ON_HARM
from ..core.lifecycle import FORWARD, RESTING, Stage
from ..core.schedules import HOLD, AlphaSchedule
from ..core.verdict import Gate, Verdict
from ..report.events import evidence_fields, gate_fields, tensor_fields
from ..report.sinks import Telemetry
from .isolation import TrustRegion
from .life import Life, Position, require_count
from .slot import SeedSlot
from .wiring import Wiring

logger = logging.getLogger("seedtriton")

TENSORS = 8  # of the host and of each seed that an event tells of
# G0 is asked when the script germinates a seed; these lead from one stage of its life to the next.
MOVING_GATES = (Gate.G1, Gate.G2, Gate.G3, Gate.G5)


class Mover:
    """Moves seeds where it is told to, rests slots after a prune, and emits an event for each.

    Args:
        wiring: slots, optimizer groups and monitor.
        position: where the training is; the controller counts in it.
        rests: epochs in each stage of the rest.
        telemetry: takes the events.
    """

    def __init__(
        self, wiring: Wiring, position: Position, rests: Mapping[Stage, int], telemetry: Telemetry
    ) -> None:
        self._wiring, self._position, self._rests, self._telemetry = wiring, position, rests, telemetry

    def dormant(self, name: str, schedule: AlphaSchedule) -> SeedSlot:
        """The empty slot of this name; WiringError when it rests or is occupied, ConfigurationError for no target."""
        if schedule.target == 0.0:
            raise ConfigurationError("the target of a seed's schedule must lie in (0, 1], got 0: it would never blend")
        slot = self._wiring.slot(name)
        if slot.stage in RESTING:
            ahead = RESTING[RESTING.index(slot.stage) :]
            left = sum(self._rests[stage] for stage in ahead) - slot.lifecycle.epochs_in_stage
            raise WiringError(f"slot {name!r} is resting (stage {slot.stage}), {left} more epochs; use another")
        if slot.stage is not Stage.DORMANT:
            raise WiringError(f"slot {name!r} is occupied (stage {slot.stage}); prune it first, or use another")
        return slot

    def living(self, name: str) -> Life:
        """The life of the seed in this slot; WiringError when there is none."""
        slot, life = self._wiring.slot(name), self._position.lives.get(name)
        if life is None:
            raise WiringError(f"slot {name!r} has no living seed (stage {slot.stage}); a fossil stays as it is")
        return life

    def move(self, life: Life, target: Stage, reason: str, initiator: str) -> None:
        """Move a seed by the table.

        Raises:
            TransitionError: the table does not allow it; nothing has changed.
        """
        source, monitor = life.slot.stage, self._wiring.monitor
        life.enter(target, reason, initiator, self._position)
        self._emit_stage(life.name, source, reason, initiator)
        if target is Stage.PRUNED:
            self.emit("pruned", life.name, reason=reason, initiator=initiator)
        elif target is Stage.FOSSILIZED:
            # From now on its parameters are the host's; they stay where they are in the optimizer.
            monitor.remove_seed(life.name)
            del self._position.lives[life.name]
            self._wiring.find()
            self.emit("fossilized", life.name, alpha=life.slot.alpha_value)
        else:
            # Evidence belongs to a stage: what the seed did behind the host says nothing of the blend.
            monitor.reset(life.name)

    def remove(self, life: Life, reason: str, initiator: str) -> None:
        """Take a seed out of the optimizer, its slot and the monitor.

        Raises:
            WiringError: others wait for it in every step, see ``Wiring.refuse_leaving``; nothing has changed.
        """
        self._wiring.refuse_leaving(life.name)
        self._wiring.settle()
        self._wiring.monitor.refresh()
        self._wiring.groups.remove(life.slot)
        del self._position.lives[life.name]
        self.move(life, Stage.PRUNED, reason, initiator)
        self._wiring.leave(life.name)
        # Once the slot is empty: while the seed is in the model, what is left of it would count as host.
        self._wiring.monitor.remove_seed(life.name)

    def retarget(self, life: Life, ramp: AlphaSchedule) -> None:
        """Send alpha elsewhere, and keep the seed if it was on its way out."""
        if life.pruning is not None:
            life.keep()
            self._wiring.monitor.accept()
            self._wiring.monitor.reset(life.name)
            self.emit("prune_cancelled", life.name)
        life.retarget(ramp)
        now = life.alpha
        how = {"steps": now.steps_total, "curve": now.curve, "steepness": now.steepness}
        self.emit("alpha_target", life.name, target=now.target, **how)
        if life.slot.stage is Stage.HOLDING:
            self.move(life, Stage.BLENDING, f"alpha target {ramp.target:.3g}", "script")

    def fade(self, life: Life, reason: str, initiator: str, ramp: AlphaSchedule) -> None:
        """Send alpha to 0 with the seed frozen; it is taken out at the end of the epoch in which it arrives.

        Raises:
            WiringError: as from ``remove``.
        """
        self._wiring.refuse_leaving(life.name)
        life.fade(reason, initiator, ramp)
        how = {"steps": ramp.steps, "curve": ramp.curve, "steepness": ramp.steepness}
        self.emit("prune_scheduled", life.name, reason=reason, initiator=initiator, **how)
        if life.slot.stage is Stage.HOLDING:
            self.move(life, Stage.BLENDING, reason, initiator)
        life.slot.freeze()
        self._wiring.monitor.accept()

    def act_on(self, harm: str, life: Life, action: str) -> None:
        """What ``GrowthController(on_harm=...)`` says is done about a seed that harms, and tell of it.

        One that cannot be faded out is halted.
        """
        if action == FADE:
            try:
                self._wiring.refuse_leaving(life.name)
            except WiringError as error:
                harm, action = f"{harm} ({error})", HALT
        self.emit("harm", life.name, reason=harm, action=action, alpha=life.slot.alpha_value)
        if action == HALT:
            life.alpha.halt()
        elif action == FADE:
            # In two epochs at most, however slowly it came: each further one costs the host.
            steps = min(life.schedule.steps, 2 * self._position.epoch_steps)
            if steps and life.bearable and life.slot.alpha_value > 0.0:
                ramp = dataclasses.replace(life.schedule, start=0.0, target=0.0, steps=steps)
                self.fade(life, harm, "watch", ramp)
            else:
                self.remove(life, harm, "watch")

    def stay(self, life: Life, overshoots: bool) -> None:
        """A seed that was refused trains on, and one that goes the right way too far in a smaller trust region."""
        life.slot.check_isolation_again()
        isolation = life.slot.isolation
        if overshoots and isinstance(isolation, TrustRegion) and isolation.narrower() is not isolation:
            life.slot.isolation = isolation.narrower()
            self.emit("narrowed", life.name, rho=life.slot.isolation.rho, before=isolation.rho)

    def end_epoch(self, life: Life, evidence: SeedEvidence, loss: float | None) -> None:
        """Count an epoch of a seed's life, with the evidence that was found in it; take out one that has faded."""
        life.end_epoch(evidence, self._position)
        told = {"accuracy": self._position.accuracy, "loss": loss}
        self.emit("epoch", life.name, **told, alpha=life.slot.alpha_value, **evidence_fields(evidence))
        if life.pruning is not None and life.alpha.mode == HOLD:
            self.remove(life, *life.pruning)

    def largest_tensors(self) -> dict[str, Any]:
        """The largest gradient tensors of host and seeds, as a field of an event that somebody keeps whole.

        Copied from the device. On many ranks all would have to be asked, and there is none.
        """
        if self._wiring.ranks is not None or not self._position.lives or not self._telemetry.kept:
            return {}
        left = dict.fromkeys(range(1 + len(self._wiring.monitor.seeds)), TENSORS)
        found = []
        for reading in self._wiring.monitor.tensors():
            if left[reading.segment]:
                left[reading.segment] -= 1
                found.append(tensor_fields(reading))
        return {"tensors": found}

    def rest(self, name: str) -> None:
        """One epoch of the rest after a prune; after the last the slot may be used again."""
        slot = self._wiring.slots[name]
        source = slot.stage
        slot.lifecycle.tick()
        if slot.lifecycle.epochs_in_stage >= self._rests[source]:
            slot.move(FORWARD[source], "rested", "time")
            self._emit_stage(name, source, "rested", "time")

    def emit(self, event: str, name: str | None, **fields: Any) -> None:
        """Tell the sinks, with where the training and the slot are; ``name`` None: of no seed."""
        stage = None if name is None else str(self._wiring.slots[name].stage)
        self._position.tell()
        epoch, step = self._position.epoch, self._position.step
        where = {"seed": name, "epoch": epoch, "step": step, "stage": stage, "run": self._telemetry.run}
        self._telemetry.emit({"event": event, **where, **fields})

    def emit_gate(self, life: Life, verdict: Verdict) -> None:
        """Tell what a gate said of a seed, and of what evidence."""
        self._position.last[life.name] = self._position.epoch, verdict
        self.emit("gate", life.name, **gate_fields(verdict), **evidence_fields(life.evidence))
        # To the log, whatever the sinks: no event of the run, but probably a slip of who wrote it.
        for check in verdict.warnings:
            if check.name not in life.warned:
                life.warned.add(check.name)
                logger.warning("slot %r: %s (%s)", life.name, check.label, check.reason)

    def _emit_stage(self, name: str, source: Stage, reason: str, initiator: str) -> None:
        target = str(self._wiring.slots[name].stage)
        self.emit("stage", name, source=str(source), target=target, reason=reason, initiator=initiator)


def check_rests(rests: Mapping[Stage, int]) -> None:
    """ConfigurationError for a number of epochs in a stage of the rest that is none."""
    for stage, rest in rests.items():
        require_count(f"{str(stage).lower()}_epochs", rest)


def check_moving_gates(gates: Iterable[Gate]) -> frozenset[Gate]:
    """The gates as a set; ConfigurationError for one that does not move a seed."""
    chosen = frozenset(gates)
    unknown = [gate for gate in chosen if gate not in MOVING_GATES or not isinstance(gate, Gate)]
    if unknown:
        known = ", ".join(f"Gate.{gate}" for gate in MOVING_GATES)
        raise ConfigurationError(f"auto_advance takes gates that move a seed, {known}; got {unknown}")
    return chosen


def check_on_harm(action: str) -> str:
    """The action; ConfigurationError for an unknown one."""
    if action not in ON_HARM:
        raise ConfigurationError(f"on_harm must be one of {list(ON_HARM)}, got {action!r}")
    return action


def check_told(accuracy: object, loss: object) -> tuple[float | None, float | None]:
    """What the script tells of an epoch, as numbers, a loss also if it is not finite; ConfigurationError otherwise."""
    share, mean = _number("accuracy", accuracy), _number("loss", loss)
    if share is not None and not 0.0 <= share <= 1.0:
        raise ConfigurationError(f"accuracy must be a share in [0, 1], got {accuracy}; divide percentages by 100")
    return share, mean


def _number(name: str, told: object) -> float | None:
    if told is None:
        return None
    try:
        if isinstance(told, (bool, str)):
            raise TypeError(f"{type(told).__name__} is no number")
        return float(told)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ConfigurationError(f"{name} must be a number, got {told!r}: give the mean") from error
