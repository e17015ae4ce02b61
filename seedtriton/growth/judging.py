"""What a gate is told of a seed, and its verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch import nn
from torch.nn.parameter import is_lazy

from ..core.evidence import BlendProbe
from ..core.gates import QualityGates
from ..core.lifecycle import FORWARD, Stage
from ..core.schedules import HOLD
from ..core.tensors import NAMING, TensorReading
from ..core.verdict import SeedStatus, Verdict
from .life import Life, Position
from .slot import SeedSlot


def status_of(
    name: str,
    slot: SeedSlot,
    life: Life | None,
    position: Position,
    parameters: int | None = None,
) -> SeedStatus:
    """Everything that the gates may ask about a slot; ``parameters`` are those of the seed in it unless told."""
    return SeedStatus(
        seed=name,
        stage=slot.stage,
        epochs_in_stage=slot.lifecycle.epochs_in_stage,
        parameters=trainable(*slot.modules_of_seed()) if parameters is None else parameters,
        preserves_shape=slot.preserves_shape,
        evidence=life.evidence if life else None,
        improvement=_points(life.training_accuracy if life else None, position.accuracy),
        accuracy_change=_points(life.blending_accuracy if life else None, position.accuracy),
        isolation_violations=slot.isolation_violations,
        handed_on=slot.handed_on,
        alpha=slot.alpha_value,
        alpha_target=life.alpha.target if life else 1.0,
        alpha_holds=life is None or life.alpha.mode == HOLD,
        progress=position.progress,
    )


def judge(
    gates: QualityGates,
    life: Life,
    status: SeedStatus,
    probe: Callable[..., BlendProbe] | None,
    tensors: Callable[[str], Sequence[TensorReading]],
) -> Verdict:
    """The verdict on a living seed; the validation loss is probed if only the blend gain may stand against it.

    A refusal for its gradients names tensors, which are read for it alone.

    Args:
        gates: who judges.
        life: of the seed.
        status: ``status_of`` it.
        probe: ``probe(name, alphas=None)``, called at most once; None: the loss is not asked for.
        tensors: ``tensors(name)``, the readings of the host and the seed; called at most once.
    """
    target = FORWARD[life.slot.stage]
    verdict = gates.judge(target, status)
    against = {check.question for check in verdict.failed} - {"blend_gain"}
    if not against and probe is not None and gates.asks_probe(target):
        alphas = None if target is Stage.BLENDING else [life.slot.alpha_value]
        status = dataclasses.replace(status, probe=probe(life.name, alphas=alphas))
        verdict = gates.judge(target, status)
    if any(check.question in NAMING for check in verdict.failed):
        verdict = gates.judge(target, dataclasses.replace(status, tensors=tuple(tensors(life.name))))
    return verdict


def trainable(*modules: nn.Module) -> int:
    """Elements of the parameters that require a gradient; a lazy one, which waits for features, counts as one."""
    learning = [p for module in modules for p in module.parameters() if p.requires_grad]
    return sum(1 if is_lazy(p) else p.numel() for p in learning)


def _points(before: float | None, now: float | None) -> float | None:
    """Rise of an accuracy in percentage points."""
    return None if before is None or now is None else 100.0 * (now - before)
