"""Addresses on the way to the device: of every item, through pinned buffers that events guard."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seedtriton.kernels import _plan

# Pinned buffers per table. An upload waits only for the one that was made this many uploads ago.
STAGES = 8


class AddressTable:
    """int64 [items + extras] on the device: where each item begins, so that a program has one wait before its data.

    A pinned buffer must not change while a copy of it is under way, and the copy is asynchronous: each is
    used again only after the event behind its copy has passed.
    """

    def __init__(self, plan: _plan.Plan, extras: int, device: torch.device, module: Any, pin: bool) -> None:
        """``module`` is torch's for the device, or None where there is nothing to upload to."""
        self.slots, self.items, self._extras = len(plan.tensors), plan.items, extras
        self.values = torch.zeros(self.items + extras, dtype=torch.int64, device=device)
        self._staged: list[tuple[Tensor, Any]] = []
        self._turn = 0
        self._module = module
        self._pin = pin
        # device="cpu" said: whoever called torch.set_default_device would otherwise be asked.
        host: dict[str, Any] = {"device": "cpu", "dtype": torch.int64}
        self._starts = torch.zeros(max(self.slots, 1), **host)
        self._slots = torch.tensor(plan.slots, **host)
        self._offsets = torch.tensor(plan.pieces, **host).mul_(plan.chunk)

    def write(self, addresses: Sequence[int], extras: Sequence[int]) -> None:
        """``addresses`` is of each slot; the others come behind those of the items as they are."""
        if self._module is None:
            self._fill(self.values, addresses, extras)
            return
        buffer, event = self._next_buffer()
        self._fill(buffer, addresses, extras)
        self.values.copy_(buffer, non_blocking=True)
        event.record()

    def _fill(self, buffer: Tensor, addresses: Sequence[int], extras: Sequence[int]) -> None:
        if self.items == self.slots:
            _view(buffer, 0, self.items)[:] = addresses
        else:
            _view(self._starts, 0, self.slots)[:] = addresses
            torch.add(self._starts.index_select(0, self._slots), self._offsets, out=buffer[: self.items])
        _view(buffer, self.items, self._extras)[:] = extras

    def _next_buffer(self) -> tuple[Tensor, Any]:
        if len(self._staged) < STAGES:
            size = self.items + self._extras
            buffer = torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=self._pin)
            self._staged.append((buffer, self._module.Event()))
            return self._staged[-1]
        staged = self._staged[self._turn]
        self._turn = (self._turn + 1) % STAGES
        staged[1].synchronize()
        return staged


def _view(buffer: Tensor, start: int, size: int) -> Any:
    """The host memory of an int64 tensor as a ctypes array: written without a temporary tensor."""
    return (ctypes.c_int64 * size).from_address(buffer.data_ptr() + 8 * start)
