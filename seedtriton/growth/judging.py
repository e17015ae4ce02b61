"""What a gate is told of a seed, and its verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch import nn
from torch.nn.parameter import is_lazy

from ..core.gates import QualityGates
from ..core.harm import worst_gain_t
from ..core.lifecycle import FORWARD, Stage
from ..core.probe import BlendProbe
from ..core.questions import ACCURACY_LOST, BY_PROBE, LOSS_RISEN, performance_kept
from ..core.schedules import HOLD
from ..core.tensors import NAMING, TensorReading
from ..core.verdict import SeedStatus, Verdict
from .life import Life, Position
from .slot import SeedSlot

# Epochs until the next probe of a seed that nothing but the probe refuses: 1, 2, and 2 from then on. With 4 a seed that
# had become ready waited too long: 3 of the 8 wrong verdicts of 870 seeds in bench.readiness were such.
LONGEST_WAIT = 2


class Judge:
    """Asks the gates about living seeds, and probes the validation loss where its answer decides.

    Args:
        gates: who judges.
        position: where the training is.
        probe: ``probe(name, alphas)`` at some alphas, None for those before a blend; returns None where nobody knows
            the validation loss.
        tensors: ``tensors(name)``, the readings of the host and the seed, for refusals to name.
    """

    def __init__(
        self,
        gates: QualityGates,
        position: Position,
        probe: Callable[[str, Sequence[float] | None], BlendProbe | None],
        tensors: Callable[[str], Sequence[TensorReading]],
    ) -> None:
        self._gates, self._position = gates, position
        self._probe, self._tensors = probe, tensors

    def status_of(self, name: str, slot: SeedSlot, life: Life | None, parameters: int | None = None) -> SeedStatus:
        """Everything that the gates may ask about a slot; ``parameters`` are those of the seed in it unless told."""
        position = self._position
        return SeedStatus(
            seed=name,
            stage=slot.stage,
            epochs_in_stage=slot.lifecycle.epochs_in_stage,
            parameters=trainable(*slot.modules_of_seed()) if parameters is None else parameters,
            preserves_shape=slot.preserves_shape,
            evidence=life.evidence if life else None,
            improvement=_points(life.training_accuracy if life else None, position.accuracy),
            accuracy_change=_points(life.blending_accuracy if life else None, position.accuracy),
            loss_rise=life.loss_rise(position.loss) if life else None,
            isolation_violations=slot.isolation_violations,
            handed_on=slot.handed_on,
            alpha=slot.alpha_value,
            alpha_target=life.alpha.target if life else 1.0,
            alpha_holds=life is None or life.alpha.mode == HOLD,
            progress=position.progress,
            watch=life.watch if life else None,
        )

    def watch(self, life: Life) -> str | None:
        """One look at a seed, at the end of an epoch: the harm that it does, in words, or None; also if it is not felt.

        Probes the validation loss at the present alpha, which ``verdict`` then knows.
        """
        if not life.felt:
            return None
        if self._gates.asks_probe(FORWARD[life.slot.stage]):
            life.probe = self._at_present(life)
        if life.evidence is None:
            return None
        limits = self._gates.thresholds
        kept = performance_kept(self.status_of(life.name, life.slot, life), limits)
        lost = kept.name in (ACCURACY_LOST, LOSS_RISEN)
        life.watch = life.watch.look(life.evidence, life.probe, limits, lost=lost, alone=self._first_suspect(life))
        return life.watch.harm(limits)

    def _first_suspect(self, life: Life) -> bool:
        """Whether of all seeds that are felt this one is blamed most, and none is on its way out: it is one's doing."""
        t = None if life.evidence is None else worst_gain_t(life.evidence)
        for other in self._position.lives.values():
            if other is not life and other.felt and other.evidence is not None:
                theirs = worst_gain_t(other.evidence)
                if other.pruning is not None or (t is not None and theirs is not None and theirs < t):
                    return False
        return True

    def verdict(self, life: Life, *, now: bool = False) -> Verdict:
        """The verdict on a living seed.

        Before it blends the validation loss is probed when nothing else stands against the seed, and after a refusal
        by the probe alone not in every epoch. A refusal for gradients names tensors, which are read for it alone.

        Args:
            life: of the seed.
            now: probe whatever was found before; otherwise what ``watch`` has found in this epoch is taken.
        """
        target = FORWARD[life.slot.stage]
        status = self.status_of(life.name, life.slot, life)
        if target is Stage.BLENDING:
            verdict, status = self._before_blending(life, status, now)
        else:
            if self._gates.asks_probe(target):
                status = dataclasses.replace(status, probe=self._at_present(life) if now else life.probe)
            verdict = self._gates.judge(target, status)
        if any(check.question in NAMING for check in verdict.failed):
            verdict = self._gates.judge(target, dataclasses.replace(status, tensors=tuple(self._tensors(life.name))))
        return verdict

    def _before_blending(self, life: Life, status: SeedStatus, now: bool) -> tuple[Verdict, SeedStatus]:
        gates, target, epoch = self._gates, Stage.BLENDING, self._position.epoch
        verdict = gates.judge(target, status)
        against = {check.question for check in verdict.failed}
        if life.probe is None or life.probe.precise:
            # A probe that knows its noise asks less of the blend gain.
            against -= {"blend_gain"}
        if against or not gates.asks_probe(target):
            return verdict, status
        if epoch < life.probe_due and not now:
            status = dataclasses.replace(status, probe_due=life.probe_due)
            return gates.judge(target, status), status
        life.probe = self._probe(life.name, None)
        if life.probe is None:
            return verdict, status
        status = dataclasses.replace(status, probe=life.probe)
        verdict = gates.judge(target, status)
        alone = all(check.question in BY_PROBE for check in verdict.failed)
        if not now:
            life.probe_refusals = life.probe_refusals + 1 if verdict.failed and alone else 0
            life.probe_due = epoch + min(2 ** max(0, life.probe_refusals - 1), LONGEST_WAIT)
        if verdict.passed:
            life.watch = life.watch.admitted(life.probe.loss)
        return verdict, status

    def _at_present(self, life: Life) -> BlendProbe | None:
        alpha = life.slot.alpha_value
        return None if alpha == 0.0 else self._probe(life.name, [alpha])


def trainable(*modules: nn.Module) -> int:
    """Elements of the parameters that require a gradient; a lazy one, which waits for features, counts as one."""
    learning = [p for module in modules for p in module.parameters() if p.requires_grad]
    return sum(1 if is_lazy(p) else p.numel() for p in learning)


def _points(before: float | None, now: float | None) -> float | None:
    """Rise of an accuracy in percentage points."""
    return None if before is None or now is None else 100.0 * (now - before)
