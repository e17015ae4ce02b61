"""What ranks tell each other of an epoch, and what all of them then take for true; alone, what one tells itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..report.events import Event
from ..report.sinks import LogSink, Sink
from .arguments import listed_sinks
from .life import Position
from .slot import SeedSlot

if TYPE_CHECKING:
    from ..parallel.ranks import Ranks

_OF_EPOCH, _OF_SLOT = 4, 4


def sinks_of(
    sinks: Iterable[Sink | Callable[[Event], None]] | None, ranks: Ranks | None
) -> list[Sink | Callable[[Event], None]]:
    """Who takes the events: a log unless told; nobody on ranks that do not tell. ConfigurationError for no sinks."""
    found: list[Sink | Callable[[Event], None]] = [LogSink()] if sinks is None else listed_sinks(sinks)
    if ranks is not None and not ranks.tells:
        return []
    return found


def facts_of(position: Position, slots: Mapping[str, SeedSlot]) -> dict[str, object]:
    """What has to be the same on every rank, by what to call it."""
    return {
        "the epoch": position.epoch,
        "the steps": position.step,
        "the stages of the slots": [str(slot.stage) for slot in slots.values()],
        "alpha": [slot.alpha_value for slot in slots.values()],
        "the verdicts of the last epoch": list(position.verdicts),
    }


def told_of(accuracy: float | None, loss: float | None, slots: Mapping[str, SeedSlot]) -> list[float]:
    """What one rank was told of an epoch, and has seen of its slots, as numbers."""
    numbers = [*_optional(accuracy), *_optional(loss)]
    for slot in slots.values():
        seen = float(bool(slot.preserves_shape))
        numbers += [float(slot.isolation_violations), seen, *_optional(slot.handed_on)]
    return numbers


def taken(told: Sequence[Sequence[float]], slots: Mapping[str, SeedSlot]) -> tuple[float | None, float | None]:
    """What all ranks take for true of what each told: accuracy and loss; the slots are told what all have seen.

    Accuracy and loss are means over the ranks that were given one; violations of the isolation the most that any rank
    has seen; what seeds hand on a mean; and one look is enough to know that a seed keeps the shape.
    """
    columns = list(zip(*told))
    accuracy, loss = _mean(columns[0], columns[1]), _mean(columns[2], columns[3])
    for index, slot in enumerate(slots.values()):
        begin = _OF_EPOCH + index * _OF_SLOT
        violations, seen, there, handed_on = columns[begin : begin + _OF_SLOT]
        slot.agree(int(max(violations)), True if any(seen) else None, _mean(there, handed_on))
    return accuracy, loss


def _optional(number: float | None) -> tuple[float, float]:
    """Whether there is one, and it."""
    return (0.0, 0.0) if number is None else (1.0, number)


def _mean(there: Sequence[float], numbers: Sequence[float]) -> float | None:
    known = [number for number, one in zip(numbers, there) if one]
    return sum(known) / len(known) if known else None
