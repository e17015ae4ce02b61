"""What a controller says of itself: where every seed is, what has happened, and why a gate refused.

Everything is what is known on the host already: nothing here waits for a device, or asks another rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, TextIO

from ..core.lifecycle import Stage
from ..report.live import LiveTable
from ..report.sinks import Telemetry
from ..report.summary import Summary, explained, verdict_in_short
from .life import Position
from .prober import Prober
from .probing import Evaluate
from .slot import SeedSlot
from .wiring import Wiring


class Teller(Prober):
    """The part of a ``GrowthController`` that people look at.

    Attributes:
        telemetry: takes every event.
    """

    def __init__(self, wiring: Wiring, position: Position, evaluate: Evaluate | None, telemetry: Telemetry) -> None:
        """Tell of the slots of ``wiring``, of where the training is, and of the events in ``telemetry``."""
        super().__init__(wiring, position, evaluate)
        self.telemetry = telemetry

    @property
    def slots(self) -> Mapping[str, SeedSlot]:
        """All slots that are known, by name; those that come or go later are in the next mapping, not in this one."""
        return MappingProxyType(dict(self._wiring.slots))

    def summary(self) -> Summary:
        """A table of all slots: stage, alpha, epochs in the stage, samples, ratio, t of the blend gain, last verdict.

        Numbers are those of the last read (``end_epoch`` or ``advance``). ``print`` it, or let a notebook show it.
        """
        where = f"epoch {self.epoch}, step {self.step}"
        share = "" if self.progress is None else f", {self.progress:.0%} of the training"
        return Summary(f"Growth, {where}{share}", self._rows())

    def history(self) -> list[dict[str, Any]]:
        """What has happened since this controller was made: one flat record per event, oldest first.

        All have the columns of ``report.history.COLUMNS``, so that ``pandas.DataFrame(growth.history())`` is a table:
        the rows of event "epoch" are curves, those of "gate" verdicts, those of "stage" moves. The newest 20 000 are
        kept; a sink has all of them, with every check.
        """
        return self.telemetry.history.records()

    def why(self, slot: str) -> str:
        """The last verdict on the seed of a slot in plain words, with what to do about each refusal.

        Raises:
            ConfigurationError: no slot has this name.
        """
        place, last = self._wiring.slot(slot), self._position.last.get(slot)
        cycle = place.lifecycle
        alpha = f", alpha {place.alpha_value:.3g}" if place.seed is not None else ""
        lines = [f"{slot}: {cycle.stage}{alpha}, {cycle.epochs_in_stage} epochs there."]
        moved = cycle.history[-1] if cycle.history else None
        if moved is not None and cycle.stage not in (Stage.DORMANT, Stage.GERMINATED) and last is None:
            lines.append(f"It came there because: {moved['reason'] or 'nobody said why'}.")
        pruned = [entry for entry in cycle.history if entry["target"] == str(Stage.PRUNED)]
        if place.seed is None and pruned:
            lines.append(f"Its last seed was pruned by {pruned[-1]['initiator']}: {pruned[-1]['reason']}.")
        if cycle.stage is Stage.DORMANT:
            lines.append(f"The slot is empty: growth.germinate({slot!r}, seed) begins a life in it.")
        elif last is None:
            lines.append("No gate was asked since this controller was made: end_epoch(...) and advance(slot) ask.")
        if last is not None:
            lines.append(f"The last verdict, of epoch {last[0]}: {explained(last[1])}")
        return "\n".join(lines)

    @contextmanager
    def live(self, file: TextIO | None = None) -> Iterator[bool]:
        """Keep ``summary()`` in sight while the training runs: ``with growth.live(): ...`` around the loop.

        It is drawn at most four times a second, by rich and into a terminal; without either there is nothing to see,
        and what the script prints goes on above it. Of many ranks the first alone draws. (``growth.progress`` is how
        far the training is.)

        Args:
            file: where to draw; the standard output unless told.

        Yields:
            Whether there is something to see.
        """
        if self._wiring.ranks is not None and not self._wiring.ranks.tells:
            yield False
            return
        with LiveTable(self.summary, file) as table:
            self._position.told.append(table.refresh)
            try:
                yield table.draws
            finally:
                self._position.told.remove(table.refresh)

    def __repr__(self) -> str:
        """Every slot in a line: stage, alpha, samples and the last verdict."""
        lines = [f"{type(self).__name__}(epoch {self.epoch}, step {self.step})"]
        for row in self._rows():
            alpha = "" if row["alpha"] is None else f", alpha {row['alpha']:.3g}"
            samples = "" if row["samples"] is None else f", {row['samples']} samples"
            said = "" if row["last verdict"] is None else f", {row['last verdict']}"
            lines.append(f"  {row['slot']}: {row['stage']}{alpha}{samples}{said}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    def _rows(self) -> list[dict[str, Any]]:
        self._wiring.find()
        return [self._row(name) for name in self._wiring.slots]

    def _row(self, name: str) -> dict[str, Any]:
        slot, life = self._wiring.slots[name], self._position.lives.get(name)
        known = None if life is None else life.evidence
        # Of an empty slot it would be the verdict on a seed that is gone; why() has it.
        last = None if slot.stage is Stage.DORMANT else self._position.last.get(name)
        return {
            "slot": name,
            "stage": str(slot.stage),
            "alpha": None if slot.seed is None else slot.alpha_value,
            "epochs": slot.lifecycle.epochs_in_stage,
            "samples": None if known is None else known.samples,
            "ratio": None if known is None else known.ratio,
            "t": None if known is None else known.blend_gain_t,
            "last verdict": None if last is None else verdict_in_short(last[1]),
        }
