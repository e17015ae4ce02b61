"""The stages of a seed and every move between them.

All transitions live in one table; nothing here knows who asks or why. The order of entries means
nothing: which move is the successful one is said by ``FORWARD``. Diagrams are drawn from the table.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType

from .errors import StateDictError, TransitionError
from .state import check_state

HISTORY_LIMIT = 100  # entries kept; older ones are forgotten first


class Stage(enum.IntEnum):
    """Where a seed is in its life. The values are stable; 5 is reserved and never valid."""

    DORMANT = 1  # the slot is empty
    GERMINATED = 2  # a seed is in the slot, not yet part of the forward pass
    TRAINING = 3  # learns behind the host, which does not feel it
    BLENDING = 4  # alpha moves the output from the host's to the seed's
    HOLDING = 6  # alpha stands at its target
    FOSSILIZED = 7  # permanent
    PRUNED = 8  # removed; the slot rests before it may be used again
    EMBARGOED = 9
    RESETTING = 10

    def __str__(self) -> str:
        """The name alone, as it stands in events and messages."""
        return self.name


TRANSITIONS: Mapping[Stage, frozenset[Stage]] = MappingProxyType(
    {
        Stage.DORMANT: frozenset({Stage.GERMINATED}),
        Stage.GERMINATED: frozenset({Stage.TRAINING, Stage.PRUNED}),
        Stage.TRAINING: frozenset({Stage.BLENDING, Stage.PRUNED}),
        Stage.BLENDING: frozenset({Stage.HOLDING, Stage.PRUNED}),
        Stage.HOLDING: frozenset({Stage.FOSSILIZED, Stage.BLENDING, Stage.PRUNED}),
        Stage.FOSSILIZED: frozenset(),
        Stage.PRUNED: frozenset({Stage.EMBARGOED}),
        Stage.EMBARGOED: frozenset({Stage.RESETTING}),
        Stage.RESETTING: frozenset({Stage.DORMANT}),
    }
)

# The move that a passed gate, or time alone after a prune, makes.
FORWARD: Mapping[Stage, Stage] = MappingProxyType(
    {
        Stage.DORMANT: Stage.GERMINATED,
        Stage.GERMINATED: Stage.TRAINING,
        Stage.TRAINING: Stage.BLENDING,
        Stage.BLENDING: Stage.HOLDING,
        Stage.HOLDING: Stage.FOSSILIZED,
        Stage.PRUNED: Stage.EMBARGOED,
        Stage.EMBARGOED: Stage.RESETTING,
        Stage.RESETTING: Stage.DORMANT,
    }
)


# A pruned seed's slot rests here, an epoch or more in each, before it may be used again.
RESTING = (Stage.PRUNED, Stage.EMBARGOED, Stage.RESETTING)


class Lifecycle:
    """One seed's position in the table, with its epochs and a bounded history of moves."""

    VERSION = 1

    def __init__(self) -> None:
        """Begin DORMANT, with no epochs and no history."""
        self.stage = Stage.DORMANT
        self.epochs_in_stage = 0
        self.epochs_total = 0
        self.history: list[dict[str, str | int]] = []

    def __repr__(self) -> str:
        """Stage and epochs, and why it came there."""
        last = self.history[-1] if self.history else None
        why = "" if last is None or not last["reason"] else f"; {str(last['reason']).partition(':')[0]}"
        return f"Lifecycle({self.stage}, {self.epochs_in_stage} epochs there, {self.epochs_total} in all{why})"

    def can_move(self, target: Stage) -> bool:
        """Whether the table allows a move to ``target`` from here; a bare number is no stage."""
        return isinstance(target, Stage) and target in TRANSITIONS[self.stage]

    def move(self, target: Stage, reason: str = "", initiator: str = "script") -> None:
        """Move to ``target`` and start counting its epochs at 0; ``reason`` and ``initiator`` go into the history.

        Raises:
            TransitionError: when the table does not allow it; nothing has changed then.
        """
        if not self.can_move(target):
            allowed = sorted(TRANSITIONS[self.stage])
            raise TransitionError(str(self.stage), str(target), [str(stage) for stage in allowed])
        self.history.append(
            {
                "source": str(self.stage),
                "target": str(target),
                "epochs_in_source": self.epochs_in_stage,
                "epoch": self.epochs_total,
                "reason": reason,
                "initiator": initiator,
            }
        )
        del self.history[:-HISTORY_LIMIT]
        self.stage = target
        self.epochs_in_stage = 0

    def tick(self) -> None:
        """Count one epoch spent in the present stage."""
        self.epochs_in_stage += 1
        self.epochs_total += 1

    def state_dict(self) -> dict[str, object]:
        """Plain, JSON-safe values."""
        return {
            "version": self.VERSION,
            "stage": str(self.stage),
            "epochs_in_stage": self.epochs_in_stage,
            "epochs_total": self.epochs_total,
            "history": [dict(entry) for entry in self.history],
        }

    def load_state_dict(self, state: object) -> None:
        """Take over a saved state.

        Raises:
            StateDictError: another version, a missing or unknown key, an impossible value; nothing has
                changed then.
        """
        keys = ("stage", "epochs_in_stage", "epochs_total", "history")
        values = check_state(state, "Lifecycle", self.VERSION, keys)
        stage = stage_named(values["stage"])
        in_stage, total, history = values["epochs_in_stage"], values["epochs_total"], values["history"]
        if not (type(in_stage) is int and type(total) is int and 0 <= in_stage <= total):
            raise StateDictError(
                "Lifecycle: epochs must be whole numbers with 0 <= epochs_in_stage <= epochs_total, "
                f"got {in_stage!r} and {total!r}"
            )
        entry_keys = {"source", "target", "epochs_in_source", "epoch", "reason", "initiator"}
        if not isinstance(history, list) or len(history) > HISTORY_LIMIT:
            raise StateDictError(f"Lifecycle: history must be a list of at most {HISTORY_LIMIT} moves")
        for entry in history:
            if not isinstance(entry, dict) or entry.keys() != entry_keys:
                raise StateDictError(f"Lifecycle: a history entry must have keys {sorted(entry_keys)}")
        self.stage, self.epochs_in_stage, self.epochs_total = stage, in_stage, total
        self.history = [dict(entry) for entry in history]


def stage_named(name: object) -> Stage:
    """The stage of this name, as it stands in a saved state.

    Raises:
        StateDictError: no stage has this name.
    """
    try:
        return Stage[name]  # type: ignore[misc]
    except (KeyError, TypeError):
        known = [str(stage) for stage in Stage]
        raise StateDictError(f"unknown stage {name!r}; known stages: {known}") from None


def diagram() -> str:
    """The table as a Mermaid state diagram; the one in the README is this text."""
    lines = ["stateDiagram-v2", "    [*] --> DORMANT"]
    for source, targets in TRANSITIONS.items():
        lines += [f"    {source} --> {target}" for target in sorted(targets)]
        if not targets:
            lines.append(f"    {source} --> [*]")
    return "\n".join(lines)
