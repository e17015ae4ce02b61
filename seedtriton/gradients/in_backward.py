"""Sums of squares taken while backward runs, for loops that step inside it and free each gradient at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import WiringError
from . import ops


class BackwardCollector:
    """A hook per parameter that adds its gradient to its segment as soon as it is complete.

    An operation per parameter, where a measurement after backward is one launch for all: only for loops that
    have no moment at which all gradients exist.
    """

    def __init__(self, segment_of: Callable[[Tensor], int | None], lanes: torch.dtype) -> None:
        self._segment_of = weakref.WeakMethod(segment_of)
        self._lanes = lanes
        # Per tensor, because what its size and the loss scale say of it is judged when the sample is closed. By
        # segment and the parameter's id: sum of squares (float64 [1]) and elements.
        self._found: dict[tuple[int, int], tuple[Tensor, int]] = {}
        # By id, with a weak reference that tells whether the id is still this parameter's.
        self._handles: dict[int, tuple[weakref.ref[Tensor], Any]] = {}

    def watch(self, parameters: Sequence[Tensor]) -> None:
        """Put the hook on those that have none yet: order matters, so it is never put on again."""
        for parameter in parameters:
            known = self._handles.get(id(parameter))
            if parameter.requires_grad and (known is None or known[0]() is not parameter):
                handle = parameter.register_post_accumulate_grad_hook(self)
                self._handles[id(parameter)] = weakref.ref(parameter), handle

    @property
    def active(self) -> bool:
        """Whether it has hooks: False after ``remove()``."""
        return bool(self._handles)

    def remove(self) -> None:
        """End it."""
        for _, handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def __call__(self, parameter: Tensor) -> None:
        """Add one gradient; WiringError when somebody has already freed it."""
        method = self._segment_of()
        segment = None if method is None else method(parameter)
        if segment is None:
            return
        gradient = parameter.grad
        if gradient is None:
            raise WiringError(
                f"the gradient of a parameter of shape {tuple(parameter.shape)} is gone before it was measured: call "
                "collect_in_backward() before you register the hooks that step and free it"
            )
        sumsq = ops.segmented_sumsq([gradient], [0], 1, lanes=self._lanes)
        before = self._found.get((segment, id(parameter)))
        if before is not None:
            sumsq = before[0] + sumsq.to(before[0].device)
        self._found[segment, id(parameter)] = sumsq, gradient.numel()

    def take(self, device: torch.device) -> tuple[Tensor, tuple[list[int], list[int]], list[int]]:
        """Of each so far: sum of squares (float64 [n]); elements, segment; its parameter's ``id``. Starts afresh."""
        found, self._found = self._found, {}
        sums = [sumsq.to(device) for sumsq, _ in found.values()]
        elements = [size for _, size in found.values()]
        none = torch.empty(0, dtype=torch.float64, device=device)
        return torch.cat([none, *sums]), (elements, [segment for segment, _ in found]), [key for _, key in found]
