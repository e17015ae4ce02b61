"""What the last sample says of single gradient tensors, and which of them stand behind a refusal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

FINITE = "finite"
ZERO = "zero"
VANISHING = "vanishing"
EXPLODING = "exploding"
NO_GRADIENT = "no gradient"
FROZEN = "frozen"
NEVER_MEASURED = "never measured"
# Tensors that a refusal names.
NAMED = 3


class TensorReading(NamedTuple):
    """One parameter's gradient in the last sample.

    Attributes:
        name: of the parameter: its path in the host, or the seed's name and its path in the seed.
        shape: of the parameter.
        segment: 0 is the host, 1 the first seed.
        norm: of its gradient, without the loss scale; None where it has none.
        rms: norm / sqrt(elements).
        state: "finite", "zero", "vanishing", "exploding" (by the monitor's limits for root mean squares), "not finite,
            first in sample N", "no gradient" in this sample, "frozen" (none, and it requires none), or "never measured"
            since it is watched.
        sample: number of the last sample, counted from 1; of micro-batches that are measured one by one, what an
            earlier one noted of a tensor stays if a later one has no gradient of it.
        first_not_finite: the first sample in which it was not finite, even if it is now, since a window last began: its
            seed's, for the host any seed's; None: in none.
    """

    name: str
    shape: tuple[int, ...]
    segment: int
    norm: float | None
    rms: float | None
    state: str
    sample: int
    first_not_finite: int | None

    @property
    def finite(self) -> bool:
        """Whether it has a gradient that is finite."""
        return self.norm is not None and math.isfinite(self.norm)

    def largest_first(self) -> tuple[bool, float]:
        """Sorts by norm: what is not finite before all others, what has no gradient behind them."""
        return self.norm is None, 0.0 if self.norm is None else -self.norm if self.finite else -math.inf


def read_tensor(
    name: str,
    shape: tuple[int, ...],
    segment: int,
    *,
    sumsq: float,
    last: int,
    first: int | None,
    sample: int,
    trained: bool,
    limits: tuple[float | None, float | None],
) -> TensorReading:
    """The reading of one tensor.

    Args:
        name: as in ``TensorReading``, as are shape and segment.
        shape: of the parameter.
        segment: of the parameter.
        sumsq: its last sum of squares, without the loss scale.
        last: the sample of that sum; -1 - n where there is none since it is watched, from behind the n-th sample on.
        first: the first sample in which it was not finite.
        sample: number of the last sample.
        trained: the parameter requires a gradient.
        limits: root mean squares below which a tensor vanishes and above which it explodes; None: not asked.
    """
    elements = math.prod(shape)
    norm = rms = None
    if last != sample:
        state = FROZEN if not trained else NEVER_MEASURED if last == -1 - sample else NO_GRADIENT
    else:
        norm = math.sqrt(sumsq)
        rms = norm / math.sqrt(max(elements, 1))  # some free a parameter that they gather again later
        # Where the window began behind this sample, it is the first that is known.
        state = _state(sumsq, elements, first or sample, limits)
    return TensorReading(name, shape, segment, norm, rms, state, sample, first)


def _state(sumsq: float, elements: int, first: int, limits: tuple[float | None, float | None]) -> str:
    if not math.isfinite(sumsq):
        return f"not finite, first in sample {first}"
    low, high = limits
    # Squares are compared, as where they are counted.
    if sumsq == 0.0:
        return ZERO
    if low is not None and sumsq < low * low * elements:
        return VANISHING
    return EXPLODING if high is not None and sumsq > high * high * elements else FINITE


# Which tensors of the seed stand behind a refused question, by their state in the last sample.
_STATES = {
    "exploding_tensors": (EXPLODING,),
    "vanishing": (VANISHING,),
    "live_share": (ZERO, NO_GRADIENT),
    "health": (ZERO, VANISHING, EXPLODING),
}
_NOT_FINITE = ("measured", "finite")
# Questions whose refusal names tensors.
NAMING = frozenset({*_STATES, *_NOT_FINITE, "exploding"})


def name_tensors(question: str, readings: Sequence[TensorReading]) -> str:
    """The first three tensors behind a refused question, and the sample, in words; empty where none is to be named.

    Args:
        question: of a gate.
        readings: of the host and one seed, largest first.
    """
    if question in _NOT_FINITE:
        # Of either side, because either drops the sample; those that were it first are nearest to the cause.
        found = sorted((r for r in readings if r.first_not_finite), key=lambda r: r.first_not_finite or 0)
        return _listed("first not finite: ", [f"{_called(r)} in sample {r.first_not_finite}" for r in found])
    own = [reading for reading in readings if reading.segment > 0]
    if question == "exploding":
        found = [reading for reading in own if reading.norm]
    else:
        found = [reading for reading in own if reading.state in _STATES[question]]
    if question == "vanishing":
        found.reverse()
    head = f"in sample {own[0].sample}: " if own else ""
    return _listed(head, [f"{_called(r)}, {r.state if r.norm is None else f'rms {r.rms:.3g}'}" for r in found])


def _called(reading: TensorReading) -> str:
    return f"{reading.name!r} {list(reading.shape)}"


def _listed(head: str, words: Sequence[str]) -> str:
    if not words:
        return ""
    more = f"; and {len(words) - NAMED} more" if len(words) > NAMED else ""
    return head + "; ".join(words[:NAMED]) + more
