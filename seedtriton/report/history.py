"""What has happened, as a table: one flat record per event, all with the same columns."""

from __future__ import annotations

from collections import deque
from typing import Any

from ..core.state import plain
from .events import Event

KEPT = 20_000  # records; older ones are forgotten first
COLUMNS = (
    "epoch", "step", "slot", "event", "stage", "alpha", "accuracy", "loss", "samples", "ratio", "blend_gain_t", "gate",
    "passed", "reason",
)  # fmt: skip


class History:
    """The newest events of a run as records."""

    def __init__(self) -> None:
        """Begin empty."""
        self._records: deque[dict[str, Any]] = deque(maxlen=KEPT)

    def take(self, event: Event) -> None:
        """Note one event."""
        self._records.append(record_of(event))

    def records(self) -> list[dict[str, Any]]:
        """Copies of the records, oldest first."""
        return [dict(record) for record in self._records]


def record_of(event: Event) -> dict[str, Any]:
    """An event by ``COLUMNS``; None where it does not say, NaN and infinities too.

    The slot is the event's ``seed``; the stage that it had moved to, or was in; of a gate's verdict the reason names
    the answers that were no.
    """
    known = {**event, "slot": event.get("seed")}
    if event.get("event") == "gate":
        known["reason"] = ", ".join(check["name"] for check in event.get("checks") or () if check["passed"] is False)
    return {column: plain(known.get(column)) for column in COLUMNS}
