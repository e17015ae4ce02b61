"""The table of tensors: what each measurement notes of every parameter by the way, and how it is read."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..core.tensors import TensorReading, read_tensor
from .reference import settle_
from .row import GRAD_SCALE, TensorTable
from .tensor_sums import constant

if TYPE_CHECKING:
    from .parameters import Watched


class TensorNotes:
    """The table, and whose entries are in it."""

    def __init__(self, tracked: list[Tensor], count: Tensor) -> None:
        self._tracked: list[Tensor] = tracked
        self.table = _empty(len(tracked), count)

    def follow(self, tracked: list[Tensor], count: Tensor) -> None:
        """From now on an entry for each of these; what is known of those that were there stays.

        Both lists are alive, so that an ``id`` is that of one parameter alone. The table stays where it is as long as
        the parameters are the same: a CUDA graph knows it by its address.
        """
        if tracked is self._tracked:
            return
        if len(tracked) == len(self._tracked) and all(map(operator.is_, tracked, self._tracked)):
            self._tracked = tracked
        else:
            self._lay_out(tracked, count)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _lay_out(self, tracked: list[Tensor], count: Tensor) -> None:
        settle_(self.table, count)
        before = {id(parameter): entry for entry, parameter in enumerate(self._tracked)}
        kept = [(entry, before[id(p)]) for entry, p in enumerate(tracked) if id(p) in before]
        table = _empty(len(tracked), count)
        if kept:
            new, old = torch.tensor(kept, dtype=torch.int64, device="cpu").to(count.device).unbind(1)
            for column, known in zip(table.columns, self.table.columns):
                column.index_copy_(0, new, known.to(count.device).index_select(0, old))
        self._tracked, self.table = tracked, table

    @torch.no_grad()
    def begin(self, segments: Sequence[int], chosen: Collection[int]) -> None:
        """A window begins for these segments: what was not finite before it is forgotten."""
        entries = tuple(entry for entry, segment in enumerate(segments) if segment in chosen)
        self.table.first.index_fill_(0, constant(entries, torch.int64, self.table.first.device), 0)

    def to(self, device: torch.device, count: Tensor) -> None:
        """Move it; ``count`` is where it was."""
        if self.table.sumsq.is_meta:
            self.table = _empty(len(self._tracked), torch.zeros((), dtype=torch.int64, device=device))
        elif device.type != "meta":
            settle_(self.table, count)
            sumsq, last, first = (column.to(device) for column in self.table.columns)
            self.table = TensorTable(sumsq, last, first, self.table.numbers.to(device), self.table.numbered)

    @torch.no_grad()
    def forget(self, count: Tensor) -> None:
        """Everything, in place: samples so far were of another run."""
        self.table.newest = None
        for column, nothing in zip(self.table.columns, _empty(len(self._tracked), count).columns):
            column.copy_(nothing)


def _empty(size: int, count: Tensor) -> TensorTable:
    last = (-1 - count).to(torch.int32).expand(size).contiguous()
    sumsq = torch.zeros(size, dtype=torch.float64, device=count.device)
    first = torch.zeros(size, dtype=torch.int32, device=count.device)
    return TensorTable(sumsq, last, first, torch.zeros(2, dtype=torch.int64, device=count.device))


class Noted(NamedTuple):
    """What is known of one parameter's gradient; see ``core.tensors.read_tensor``."""

    name: str
    shape: tuple[int, ...]
    segment: int
    sumsq: float
    last: int
    first: int | None
    sample: int
    trained: bool

    @classmethod
    def merged(cls, found: Sequence[Noted]) -> Noted:
        """What ranks that hold parts of one tensor know together."""
        firsts = [noted.first for noted in found if noted.first is not None]
        return found[0]._replace(
            sumsq=sum(noted.sumsq for noted in found),
            last=max(noted.last for noted in found),
            first=min(firsts, default=None),
            trained=any(noted.trained for noted in found),
        )


@torch.no_grad()
def noted_of(
    noted: TensorNotes, watched: Watched, count: Tensor, summary: Tensor, *, shared: bool = False
) -> list[Noted]:
    """What is noted of all tensors, by one copy.

    Args:
        noted: follows ``watched``.
        watched: who they are.
        count: of the ring.
        summary: of the newest sample.
        shared: sums are this rank's share of those of one process; otherwise they are of all that it holds.
    """
    settle_(noted.table, count)
    parts = [count.view(1), summary[GRAD_SCALE : GRAD_SCALE + 1], *noted.table.columns]
    sample, scale, *columns = torch.cat([part.double() for part in parts]).tolist()
    size, square = len(watched.tracked), scale**2 or 1.0  # before the first sample nothing is there to be divided
    sumsq, last, first = columns[:size], columns[size : 2 * size], columns[2 * size :]
    copies = watched.copies_of(watched.tracked) if shared else [1] * size
    return [
        Noted(
            name,
            tuple(parameter.shape),
            segment,
            sumsq[entry] / square / copies[entry],
            int(last[entry]),
            int(first[entry]) or None,
            int(sample),
            parameter.requires_grad,
        )
        for entry, (name, parameter, segment) in enumerate(zip(watched.paths(), watched.tracked, watched.segments))
    ]


def readings_of(found: Iterable[Noted], limits: tuple[float | None, float | None]) -> list[TensorReading]:
    """The readings of these, largest first.

    Args:
        found: of each tensor, one or more.
        limits: root mean squares below which a tensor vanishes and above which it explodes; None: not asked.
    """
    by_name: dict[tuple[str, int], list[Noted]] = {}
    for noted in found:
        by_name.setdefault((noted.name, noted.segment), []).append(noted)
    readings = [read_tensor(**Noted.merged(parts)._asdict(), limits=limits) for parts in by_name.values()]
    return sorted(readings, key=TensorReading.largest_first)
