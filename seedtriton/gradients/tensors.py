"""The table of tensors: what each measurement notes of every parameter by the way, and how it is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.tensors import TensorReading, read_tensor
from .reference import settle_
from .row import UNSCALE, TensorTable

if TYPE_CHECKING:
    from .parameters import Watched


class TensorNotes:
    """The table, and whose entries are in it."""

    def __init__(self, tracked: list[Tensor], count: Tensor) -> None:
        self._tracked: list[Tensor] = tracked
        self.table = _empty(len(tracked), count)

    def follow(self, tracked: list[Tensor], count: Tensor) -> None:
        """From now on an entry for each of these; what is known of those that were there stays.

        Both lists are alive, so that an ``id`` is that of one parameter alone.
        """
        if tracked is not self._tracked:
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

    def to(self, device: torch.device, count: Tensor) -> None:
        """Move it; ``count`` is where it was."""
        settle_(self.table, count)
        sumsq, last, first = self.table.columns
        self.table = TensorTable(sumsq.to(device), last.to(device), first.to(device))

    @torch.no_grad()
    def forget(self, count: Tensor) -> None:
        """Everything, in place: samples so far were of another run."""
        self.table.newest = None
        for column, nothing in zip(self.table.columns, _empty(len(self._tracked), count).columns):
            column.copy_(nothing)


def _empty(size: int, count: Tensor) -> TensorTable:
    last = (-1 - count).to(torch.int32).expand(size).contiguous()
    sumsq = torch.zeros(size, dtype=torch.float64, device=count.device)
    return TensorTable(sumsq, last, torch.zeros(size, dtype=torch.int32, device=count.device))


@torch.no_grad()
def read_tensors(
    noted: TensorNotes,
    watched: Watched,
    counters: tuple[Tensor, Tensor, Tensor],
    limits: tuple[float | None, float | None],
    segment: int | None,
) -> list[TensorReading]:
    """The readings of all tensors, or of those of the host and one other segment, by one copy.

    Args:
        noted: follows ``watched``.
        watched: who they are.
        counters: count, since and summary of the ring.
        limits: root mean squares below which a tensor vanishes and above which it explodes; None: not asked.
        segment: of a seed; what was not finite before its window is not told then.
    """
    count, since, summary = counters
    settle_(noted.table, count)
    parts = [count.view(1), since, summary[UNSCALE : UNSCALE + 1], *noted.table.columns]
    packed = torch.cat([part.double() for part in parts]).tolist()
    sample, scale = int(packed[0]), packed[1 + len(since)]
    begun = 0 if segment is None else int(packed[1 + segment])
    columns = packed[2 + len(since) :]
    size = len(watched.tracked)
    readings = []
    for entry, (name, parameter, own) in enumerate(zip(watched.paths(), watched.tracked, watched.segments)):
        if segment is not None and own not in (0, segment):
            continue
        first = int(columns[2 * size + entry])
        readings.append(
            read_tensor(
                name,
                tuple(parameter.shape),
                own,
                sumsq=columns[entry] * scale,
                last=int(columns[size + entry]),
                first=first if first > begun else None,
                sample=sample,
                trained=parameter.requires_grad,
                limits=limits,
            )
        )
    return sorted(readings, key=TensorReading.largest_first)
