"""How parameters are spread: over the columns of a row, and where there are many ranks over those.

A rank sums what it holds. Of a parameter that several ranks hold whole each sum is of all of it, of one that is cut
each is of a part: a column is of one such way, so that sums over the ranks come out right (``fold``).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .row import ELEMENTS, EXPLODING, EXTRA, LIVE, QUANTITIES, SUMSQ, TENSORS, VANISHING


class Way(NamedTuple):
    """How a parameter is held.

    Attributes:
        copies: ranks that hold each of its elements.
        shards: parts that it is cut into, those without an element left out.
    """

    copies: int = 1
    shards: int = 1


WHOLE = Way()


class Holding(NamedTuple):
    """What ranks have told each other of the parameters of one monitor.

    Attributes:
        ways: in which each is held, by its name and kind.
        replicated: each rank holds all of every parameter, as under DDP.
    """

    ways: dict[tuple[str, str], Way]
    replicated: bool


class Column(NamedTuple):
    """A column of the ring's rows: of a seed by its name, or of the host (None)."""

    owner: str | None
    way: Way = WHOLE


class Places(Protocol):
    """What ``Watched`` knows of single parameters, for those who are not to know it."""

    def column_of(self, parameter: Tensor) -> int | None:
        """Its column; None for a parameter that is not watched."""
        ...

    def part_of(self, tensor: Tensor) -> Tensor:
        """What of a parameter or gradient this rank holds."""
        ...

    def waits(self, parameter: Tensor) -> bool:
        """Whether its gradient is not there yet because ranks add it up later."""
        ...

    def copies_of(self, parameters: Sequence[Tensor]) -> list[int]:
        """How many ranks hold each of these; 1 of one that is not watched."""
        ...


class _Alone:
    """``Places`` of parameters that one process has for itself, and of which nothing else is known."""

    def column_of(self, parameter: Tensor) -> int | None:
        return None

    def part_of(self, tensor: Tensor) -> Tensor:
        return tensor

    def waits(self, parameter: Tensor) -> bool:
        return False

    def copies_of(self, parameters: Sequence[Tensor]) -> list[int]:
        return [1] * len(parameters)


ALONE: Places = _Alone()


class Ranks(Protocol):
    """What the monitor asks of ``parallel.Ranks``; the methods marked so are to be called on every rank."""

    rank: int
    world: int

    def local(self, tensor: Tensor) -> Tensor:
        """Give the part of a tensor that this rank holds; itself where it is not cut."""
        ...

    def waits(self, parameter: Tensor, modules: Iterable[nn.Module]) -> bool:
        """Whether its gradient is not there yet because these modules have the ranks add it up later."""
        ...

    def ways(self, named: Sequence[tuple[str, Tensor]], holding: Holding) -> list[Way]:
        """How each of these is held, by what was exchanged last."""
        ...

    def exchange(self, named: Sequence[tuple[str, Tensor]], call: str) -> Holding:
        """Tell every rank what this one holds. On every rank."""
        ...

    def headers(self, call: str, facts: Mapping[str, object], flag: bool) -> bool:
        """Whether any has raised the ``flag``; WiringError on all where ``call`` or ``facts`` differ. On every rank."""
        ...

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a tensor that may be cut. On every rank."""
        ...

    def cut(self, tensor: Tensor, like: Tensor) -> Tensor:
        """A whole tensor, cut as another is; communicates nothing."""
        ...

    def total(self, numbers: Tensor, call: str) -> Tensor:
        """The sum over all ranks, the same bits on each. On every rank."""
        ...

    def few(self, numbers: Tensor, call: str) -> Tensor:
        """The same of a few numbers, float64 1-D, in a step: it waits for no GPU. On every rank."""
        ...

    def objects(self, found: Any, call: str) -> list[Any]:
        """What each rank has found. On every rank."""
        ...


def columns_of(
    owners: Sequence[str | None], segments: Sequence[int], ways: Sequence[Way] | None
) -> tuple[tuple[Column, ...], tuple[int, ...], tuple[int, ...]]:
    """The columns of a row, the segment of each, and the column of each parameter.

    The first columns are one for each segment, in their order: in its EXTRA is what is of the whole segment.

    Args:
        owners: of each segment, the host (None) first.
        segments: of each parameter.
        ways: in which each is held; None: this is the only process.
    """
    if ways is None:
        return tuple(Column(owner) for owner in owners), tuple(range(len(owners))), tuple(segments)
    first: dict[int, Way] = {}
    for segment, way in zip(segments, ways):
        first.setdefault(segment, way)
    columns = [Column(owner, first.get(segment, WHOLE)) for segment, owner in enumerate(owners)]
    of_column = list(range(len(owners)))
    places = {(segment, column.way): segment for segment, column in enumerate(columns)}
    chosen = []
    for segment, way in zip(segments, ways):
        if (segment, way) not in places:
            places[segment, way] = len(columns)
            columns.append(Column(owners[segment], way))
            of_column.append(segment)
        chosen.append(places[segment, way])
    return tuple(columns), tuple(of_column), tuple(chosen)


def number_of(value: object) -> float:
    """A number by which ranks can compare plain values, exact in float64."""
    return float(zlib.crc32(repr(value).encode()))


# Quantities of a row that add up over elements, and those that count tensors.
_OF_ELEMENTS, _OF_TENSORS = (SUMSQ, ELEMENTS), (LIVE, VANISHING, EXPLODING, TENSORS)


def _divisors(way: Way) -> dict[int, int]:
    """What a sum over ranks has to be divided by, to be that of one process: by quantity."""
    of_tensors = way.copies * way.shards
    return {**dict.fromkeys(_OF_ELEMENTS, way.copies), **dict.fromkeys(_OF_TENSORS, of_tensors)}


@torch.no_grad()
def fold(ring: Tensor, columns: Sequence[Column], segments: Sequence[int]) -> Tensor:
    """What this rank has measured, so that the sum over all ranks is the window of one process.

    Args:
        ring: float64 [window, columns, QUANTITIES].
        columns: of the ring.
        segments: of each column.

    Returns:
        float64 [window, segments, QUANTITIES + 1]: in the last place how many ranks have the gain in EXTRA, a mean
        over those; in the host's EXTRA how many ranks will skip this step.
    """
    count = 1 + max(segments)
    folded = ring.new_zeros(ring.shape[0], count, QUANTITIES + 1)
    for column, (segment, (_, way)) in enumerate(zip(segments, columns)):
        for quantity, divisor in _divisors(way).items():
            folded[:, segment, quantity] += ring[:, column, quantity] / divisor
    gains = ring[:, 1:count, EXTRA]
    there = gains.isnan().logical_not()
    # A gain that is not finite has been measured, and is to be seen: only where there is none it counts for nothing.
    folded[:, 1:, EXTRA] = gains.where(there, torch.zeros_like(gains))
    folded[:, 1:, QUANTITIES] = there.double()
    folded[:, 0, EXTRA] = ring[:, 0, EXTRA]
    return folded


@torch.no_grad()
def unfold(total: Tensor) -> Tensor:
    """From the sum of ``fold`` over all ranks to the window of one process: float64 [window, segments, QUANTITIES]."""
    window = total[..., :QUANTITIES].clone()
    # Divided by the ranks and summed over them, whole numbers may be off by a rounding.
    for quantity in (ELEMENTS, *_OF_TENSORS):
        near = window[..., quantity].round()
        window[..., quantity] = torch.where((window[..., quantity] - near).abs() < 1e-6, near, window[..., quantity])
    having = total[:, 1:, QUANTITIES]
    window[:, 1:, EXTRA] = torch.where(having > 0, window[:, 1:, EXTRA] / having, torch.nan)
    window[:, 0, EXTRA] = window[:, 0, EXTRA].ne(0).double()
    return window


@torch.no_grad()
def laid_back(window: Tensor, columns: Sequence[Column], *, mine: bool) -> Tensor:
    """A ring of which ``unfold(total(fold(ring)))`` is ``window`` again, if it is ``mine`` on one rank alone.

    Args:
        window: float64 [window, segments, QUANTITIES], of one process.
        columns: of the ring.
        mine: False: a ring of zeros, without gains.
    """
    ring = window.new_zeros(window.shape[0], len(columns), QUANTITIES)
    ring[:, 1:, EXTRA] = torch.nan
    if mine:
        for segment in range(window.shape[1]):
            ring[:, segment] = window[:, segment]
            for quantity, divisor in _divisors(columns[segment].way).items():
                ring[:, segment, quantity] *= divisor
    return ring
