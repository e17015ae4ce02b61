"""A controller's state as torch.distributed.checkpoint takes it: one entry, whatever seeds there are."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import nn

from ..core.errors import StateDictError

ENTRY = "growth"


class _Growth(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: object, seeds: Mapping[str, Any] = ...) -> None: ...


class Checkpointed:
    """For ``dcp.save``, ``dcp.async_save`` and ``dcp.load``, which take what has a ``state_dict`` (``Stateful``).

    They fill a template of the state that is there; a controller that has no seeds yet would have a template without
    them, and they would be lost without a word. So the state is one entry, of bytes::

        dcp.save({"growth": Checkpointed(growth), "model": model}, checkpoint_id=folder)
        dcp.load({"growth": Checkpointed(growth, seeds={"block2": make_seed})}, checkpoint_id=folder)

    The seeds are in their slots after that: load the model and the optimizer in a second ``dcp.load``.

    Args:
        growth: a ``GrowthController``.
        seeds: for loading: see ``GrowthController.load_state_dict``.
    """

    def __init__(
        self, growth: _Growth, seeds: Mapping[str, nn.Module | Callable[[], nn.Module]] = MappingProxyType({})
    ) -> None:
        """Take the controller; nothing is read yet."""
        self._growth, self._seeds = growth, seeds

    def state_dict(self) -> dict[str, Any]:
        """Give the state as bytes; on every rank."""
        written = io.BytesIO()
        torch.save(self._growth.state_dict(), written)
        return {ENTRY: written.getvalue()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it over; on every rank.

        Raises:
            StateDictError: it is no such state, or what ``GrowthController.load_state_dict`` refuses.
        """
        written = state.get(ENTRY)
        if not isinstance(written, bytes):
            raise StateDictError(f"Checkpointed: entry {ENTRY!r} is no state of bytes, got {type(written).__name__}")
        self._growth.load_state_dict(torch.load(io.BytesIO(written), weights_only=True), seeds=self._seeds)
