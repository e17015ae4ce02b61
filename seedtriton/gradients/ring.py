"""The window on the device: the buffers that a measurement writes and a read copies, a column per segment or more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import StateDictError
from .row import APPEND, EXTRA, QUANTITIES, SUMMARY_HEAD, Window
from .spread import Column
from .tensors import TensorNotes


class Ring(nn.Module):
    """Rows of samples, how many there were, and where the window of each segment begins.

    Attributes:
        ring: float64 [window, columns, QUANTITIES], see ``spread``.
        count: int64 0-dim, samples ever written.
        since: int64 [segments], the number of the first sample that counts for the segment.
        summary: float64 [SUMMARY_HEAD + 3 * columns], of the newest sample; not saved.

    What is known of each tensor lies beside them, and is not saved either.
    """

    ring: Tensor
    count: Tensor
    since: Tensor
    summary: Tensor

    def __init__(
        self, window: int, columns: tuple[Column, ...], tracked: list[Tensor], device: torch.device
    ) -> None:
        """Lay out an empty ring, and an empty table for the parameters ``tracked``."""
        super().__init__()
        self._columns = columns
        segments = len(_owners(columns))
        ring = torch.zeros(window, len(columns), QUANTITIES, dtype=torch.float64, device=device)
        self.register_buffer("ring", ring)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("since", torch.zeros(segments, dtype=torch.int64, device=device))
        self.register_buffer("summary", torch.zeros(SUMMARY_HEAD, dtype=torch.float64, device=device), persistent=False)
        self._resize_summary()
        self._noted = TensorNotes(tracked, self.count)

    def _window(self, replace: int = APPEND) -> Window:
        # A module's attributes are looked up in three dicts; its buffers in one.
        ring, count, summary = map(self._buffers.__getitem__, ("ring", "count", "summary"))
        return Window(ring, count, summary, self._noted.table, replace)  # type: ignore[arg-type]

    @torch.no_grad()
    def _lay_out(self, columns: tuple[Column, ...]) -> None:
        """From now on these columns; what is in those that were there stays, and of a new segment no sample counts."""
        before, self._columns = self._columns, columns
        if columns == before:
            return
        ring = self.ring.new_zeros(self.ring.shape[0], len(columns), QUANTITIES)
        for place, column in enumerate(columns):
            if column in before:
                ring[:, place] = self.ring[:, before.index(column)]
        # The first columns are those of the segments.
        owners, known = _owners(columns), {owner: place for place, owner in enumerate(_owners(before))}
        for place, owner in enumerate(owners):
            if owner in known:
                ring[:, place, EXTRA] = self.ring[:, known[owner], EXTRA]
        since = [self.since[known[owner]] if owner in known else self.count for owner in owners]
        self.ring, self.since = ring, torch.stack(since)
        self._resize_summary()

    def _begin_window(self, segment: int) -> None:
        """Samples so far no longer count for this segment."""
        self.since[segment : segment + 1].copy_(self.count.view(1))

    def _resize_summary(self) -> None:
        # The head is of the sample as a whole, which is still the newest one.
        head = self.summary[:SUMMARY_HEAD]
        self.summary = torch.cat([head, head.new_zeros(3 * self.ring.shape[1])])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Ring:
        # .half() and .to(dtype) are meant for models: sums of squares stay float64, only the device follows.
        # Nor do they go to, or come from, "meta" with a model that is filled later: there is nothing to come from.
        device = fn(torch.empty(0, device="cpu" if self.ring.is_meta else self.ring.device)).device
        self._noted.to(device, self.count)
        for name, buffer in self._buffers.items():
            if buffer is not None and device.type != "meta":
                self._buffers[name] = torch.zeros_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
        return self


def _owners(columns: tuple[Column, ...]) -> list[str | None]:
    return list(dict.fromkeys(column.owner for column in columns))


def check_entries(ring: Ring, state_dict: Mapping[str, Any], prefix: str, kind: str) -> None:
    """StateDictError unless the state has the ring's buffers, in their shapes, one extra state and nothing else."""
    buffers = ("ring", "count", "since")
    entries = {key[len(prefix) :] for key in state_dict if key.startswith(prefix)}
    expected = {*buffers, "_extra_state"}
    if entries != expected:
        raise StateDictError(
            f"{kind}: missing {sorted(expected - entries)}, unknown {sorted(entries - expected)} entries"
        )
    for name in buffers:
        saved, own = state_dict[prefix + name], getattr(ring, name)
        if not isinstance(saved, Tensor) or saved.shape != own.shape:
            raise StateDictError(f"{kind}: entry {name!r} is not a tensor of shape {tuple(own.shape)}")
