"""What a script may ask of its validation loss: what it would be with a seed blended in."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.errors import ConfigurationError
from ..core.evidence import BlendProbe
from .life import Position
from .probing import PROBE_AT, Evaluate, probe
from .wiring import Wiring


class Prober:
    """The part of a ``GrowthController`` that looks ahead: it asks, and changes nothing.

    Attributes:
        model: whose seeds are tried, on a twin of it.
        evaluate: validation loss of a model, see ``probing.probe``; None: none is known.
    """

    def __init__(self, wiring: Wiring, position: Position, evaluate: Evaluate | None) -> None:
        """Look at the slots of ``wiring`` and at the lives in ``position``."""
        self.model = wiring.model
        self.evaluate = evaluate
        self._wiring, self._position = wiring, position

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
        self._wiring.slot(slot)
        if alphas is None:
            alphas = [share * self._target(slot) for share in PROBE_AT]
        return probe(self.model, slot, evaluate, alphas)

    def _target(self, name: str) -> float:
        life = self._position.lives.get(name)
        return 1.0 if life is None else life.schedule.target
