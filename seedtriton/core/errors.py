"""The error classes. Every message names the value, the limit and the way out.

A refusal by a gate is not here: it is data (``verdict.Verdict``), never an exception.
"""

from __future__ import annotations

from collections.abc import Iterable


class SeedtritonError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigurationError(SeedtritonError, ValueError):
    """A value that can never be right: a negative threshold, an unknown name, an unusable tensor."""


class WiringError(SeedtritonError, RuntimeError):
    """Parts that do not fit together: an occupied slot, an overlap of seeds, a seed that changes shapes."""


class StateDictError(SeedtritonError, ValueError):
    """A saved state of another version, or with a missing, unknown or damaged entry."""


class TransitionError(SeedtritonError, RuntimeError):
    """A move that the table of stages does not allow; the life cycle is where it was."""

    def __init__(self, source: str, target: str, allowed: Iterable[str]) -> None:
        """Keep the names of the stages, so that a caller can act on them without parsing text."""
        self.source = source
        self.target = target
        self.allowed = tuple(allowed)
        ways = ", ".join(self.allowed) or "nothing: it is a terminal stage"
        super().__init__(f"cannot move from {source} to {target}; allowed from {source}: {ways}")

    def __reduce__(self) -> tuple[type[TransitionError], tuple[str, str, tuple[str, ...]]]:
        """Survive pickling, which would otherwise call ``__init__`` with the message alone."""
        return type(self), (self.source, self.target, self.allowed)
