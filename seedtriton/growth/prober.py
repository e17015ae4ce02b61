"""What a script may ask: where its training is, and what the validation loss would be with a seed blended in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from torch import nn

from ..core.errors import ConfigurationError
from ..core.evidence import SeedEvidence
from ..core.pairs import PairProbe
from ..core.probe import BlendProbe
from .following import Followers
from .life import Position
from .probing import PROBE_AT, Evaluate, Gather, probe, probe_pair
from .together import facts_of
from .wiring import Wiring


class Prober:
    """The part of a ``GrowthController`` that is asked and looks ahead, and changes nothing.

    Attributes:
        model: whose seeds are tried, on a twin of it.
        evaluate: validation loss of a model, see ``probing.probe``; None: none is known.
    """

    def __init__(self, wiring: Wiring, position: Position, evaluate: Evaluate | None) -> None:
        """Look at the slots of ``wiring`` and at the lives in ``position``."""
        self.model = wiring.model
        self.evaluate = evaluate
        self._wiring, self._position = wiring, position
        self._followers: Followers | None = None
        self._gather: Gather | None = None if wiring.joining is None else wiring.joining.gather

    @property
    def epoch(self) -> int:
        """Epochs counted by ``end_epoch``."""
        return self._position.epoch

    @property
    def step(self) -> int:
        """Optimizer steps before which ``measure`` was called."""
        return self._position.step

    @property
    def progress(self) -> float | None:
        """Share of ``total_epochs`` or ``total_steps`` that is done, at most 1; None when neither was told."""
        return self._position.progress

    def evidence(self) -> dict[str, SeedEvidence]:
        """What is known of every living seed: now, by a copy to the host; of many ranks, what they last agreed on."""
        return self._wiring.monitor.now()

    def follow(self, model: nn.Module) -> None:
        """Keep the slots of a copy of the model in step with its own: seeds, stages and alpha, not the weights.

        For an average of the weights (``AveragedModel``, an EMA of your own): made before a germination, it would miss
        the seed, and made after it, every move. A seed that comes later begins in the copy with its present weights.

        Args:
            model: a copy, made at any time, such as ``AveragedModel(model)``; held weakly.

        Raises:
            WiringError: it has other slots than the model, or is the model itself.
        """
        self._wiring.find()
        if self._followers is None:
            self._followers = Followers(self._wiring.slots)
            self._position.told.append(self._followers.step)
        self._followers.add(model)

    @overload
    def probe(
        self, slot: str, evaluate: Evaluate | None = None, alphas: Sequence[float] | None = None
    ) -> BlendProbe: ...

    @overload
    def probe(
        self,
        slot: list[str] | tuple[str, ...],
        evaluate: Evaluate | None = None,
        alphas: Sequence[float] | None = None,
    ) -> PairProbe: ...

    def probe(
        self,
        slot: str | list[str] | tuple[str, ...],
        evaluate: Evaluate | None = None,
        alphas: Sequence[float] | None = None,
    ) -> BlendProbe | PairProbe:
        """The validation loss with the seed of ``slot`` blended in at several alphas, or with two seeds.

        Of a pair each seed is tried alone, and both together. All other slots stay as they are: a seed behind the host
        is not felt, one that is blended in takes part at its alpha. Nothing changes.

        Args:
            slot: the slot's path in the model, or those of two slots, each with a seed in whatever stage.
            evaluate: see ``probing.probe``; the controller's unless told.
            alphas: of one seed 0.1, 0.5 and 1 times its target unless told; of a pair one for each seed, its target
                unless told. The target is that of the seed's schedule, also after ``set_alpha_target``, and of a
                fossil where it stands.

        Raises:
            ConfigurationError: no slot has this name, it is empty, an alpha outside (0, 1], or no ``evaluate``; of a
                pair also the same slot twice, or not two slots or alphas.
        """
        evaluate = evaluate or self.evaluate
        if evaluate is None:
            raise ConfigurationError("no validation function: GrowthController(..., evaluate=...) or probe(slot, f)")
        if not isinstance(slot, str):
            return self._probe_pair(tuple(slot), evaluate, None if alphas is None else tuple(alphas))
        self._wiring.slot(slot)
        if alphas is None:
            alphas = [share * self._target(slot) for share in PROBE_AT]
        return probe(self.model, slot, evaluate, alphas, self._gather)

    def probe_if_known(self, slot: str, alphas: Sequence[float] | None) -> BlendProbe | None:
        """``probe(slot, alphas=alphas)`` of one seed; None without a validation function."""
        return None if self.evaluate is None else self.probe(slot, alphas=alphas)

    def _facts(self) -> dict[str, object]:
        """What has to be the same on every rank: where the training is, and whether anybody probes."""
        told = {"a validation function": "evaluate" if self.evaluate is not None else None}
        return {**facts_of(self._position, self._wiring.slots), **told}

    def _probe_pair(
        self, slots: tuple[str, ...], evaluate: Evaluate, alphas: tuple[float, ...] | None
    ) -> PairProbe:
        if len(slots) != 2:
            raise ConfigurationError(f"a pair is two slots, got {list(slots)}; probe one seed by its name alone")
        for slot in slots:
            self._wiring.slot(slot)
        if alphas is None:
            alphas = tuple(map(self._target, slots))
        if len(alphas) != 2:
            raise ConfigurationError(f"a pair is probed at one alpha for each of {list(slots)}, got {alphas}")
        return probe_pair(self.model, (slots[0], slots[1]), evaluate, (alphas[0], alphas[1]), self._gather)

    def _target(self, name: str) -> float:
        life, slot = self._position.lives.get(name), self._wiring.slots[name]
        if life is not None:
            return life.schedule.target
        return slot.alpha_value or 1.0  # of an empty slot nothing is asked
