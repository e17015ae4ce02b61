"""Sums of squares taken while backward runs, for loops that step inside it and free each gradient at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Variable

from ..core.errors import WiringError
from . import ops
from .early import EarlySums


class _Found(NamedTuple):
    """The newest gradient of a parameter.

    Attributes:
        parameter: whose it is.
        sumsq: float64 [1], its sum of squares.
        seen: ``_state`` of the gradient then.
        run: the backward pass, while it is not known to have ended; None: it has, and used the gradient up.
    """

    parameter: Tensor
    sumsq: Tensor
    seen: tuple[int, int | None] | None
    run: int | None

    @property
    def used_up(self) -> bool:
        """Whether the sum is all that is left, now that the pass has ended."""
        return self.run is None or (self.run == _COMPILED and self.parameter.grad is None)


class BackwardCollector:
    """A hook per parameter that sums its gradient as soon as it is complete, before somebody steps and frees it.

    An operation per parameter, where a measurement after backward is one launch for all: only for loops that have no
    moment at which all gradients exist.

    Whether a sum counts is decided when the pass ends. A gradient that is still there as the hook saw it is measured
    later where it lies, with all that happens to it until then: accumulation, ``unscale_``, a batch that is dropped.
    Of one that was freed or written to inside the pass the sum is kept, until it is measured or there is a newer one:
    each step in backward uses its own gradient, so two of them are never added up.
    """

    def __init__(self, segment_of: Callable[[Tensor], int | None], lanes: torch.dtype) -> None:
        self._segment_of = weakref.WeakMethod(segment_of)
        self._lanes = lanes
        self._found: dict[int, _Found] = {}
        # By backward pass, which is what autograd calls a graph task: a reentrant one is a pass within a pass.
        self._runs: dict[int, list[int]] = {}
        self._buffers: dict[int, tuple[Tensor, int]] = {}  # whose gradient in each was summed last, and the version
        self._handles: dict[int, tuple[Tensor, Any]] = {}
        self._spent = False

    def watch(self, parameters: Sequence[Tensor], name_of: Callable[[Tensor], str]) -> None:
        """Put the hook on those that have none yet, and take it from others: order matters, so it stays where it is.

        Frozen ones get it too: once they are thawed, the hooks that step come behind it.

        Raises:
            WiringError: one of them, ``name_of`` it, is no leaf; no hook was put on or taken away.
        """
        for parameter in parameters:
            if not parameter.is_leaf:
                raise WiringError(
                    f"{name_of(parameter)} is no leaf: backward leaves it no gradient that could be collected; "
                    "give the monitor the parameters that it is computed from"
                )
        wanted = {id(parameter): parameter for parameter in parameters}
        for gone in self._handles.keys() - wanted.keys():
            self._handles.pop(gone)[1].remove()
        for key, parameter in wanted.items():
            if key not in self._handles and (parameter.requires_grad or _could_train(parameter)):
                self._handles[key] = parameter, self._hook(parameter)

    def _hook(self, parameter: Tensor) -> Any:
        frozen = not parameter.requires_grad
        # Torch takes a hook only from what requires a gradient, and keeps it when that changes.
        if frozen:
            parameter.requires_grad_(True)
        try:
            return parameter.register_post_accumulate_grad_hook(self)
        finally:
            if frozen:
                parameter.requires_grad_(False)

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
        """Sum one gradient; WiringError when somebody has already freed it."""
        method = self._segment_of()
        if method is None or method(parameter) is None:
            return
        gradient = parameter.grad
        if gradient is None:
            raise WiringError(
                f"the gradient of a parameter of shape {tuple(parameter.shape)} is gone before it was measured: call "
                "collect_in_backward() before you register the hooks that step and free it"
            )
        sumsq = ops.segmented_sumsq([gradient], [0], 1, lanes=self._lanes)
        self._spent = False
        if torch.compiler.is_compiling():
            self._found[id(parameter)] = _Found(parameter, sumsq, None, _COMPILED)
            return
        run = torch._C._current_graph_task_id()
        if run not in self._runs:
            self._runs[run] = []
            Variable._execution_engine.queue_callback(partial(self._end, run))
        self._runs[run].append(id(parameter))
        self._found[id(parameter)] = _Found(parameter, sumsq, _state(parameter), run)
        if gradient._is_view():
            self._follow_buffer(parameter, gradient)

    def _follow_buffer(self, parameter: Tensor, gradient: Tensor) -> None:
        """Notice that a hook wrote to the gradient before this one in their buffer, whose views count together.

        Between the two, backward itself has written once: this gradient.
        """
        buffer = gradient.untyped_storage().data_ptr()
        before, version = self._buffers.get(buffer, (parameter, gradient._version - 1))
        if gradient._version != version + 1:
            self._mark_written(before)
        self._buffers[buffer] = parameter, gradient._version

    def _mark_written(self, parameter: Tensor) -> None:
        found = self._found.get(id(parameter))
        if found is not None:
            self._found[id(parameter)] = found._replace(seen=_WRITTEN)

    def _end(self, run: int) -> None:
        """A backward pass has ended: of what it left alone no sum is needed."""
        for last, version in self._buffers.values():
            if last.grad is None or last.grad._version != version:
                self._mark_written(last)
        self._buffers.clear()
        for key in self._runs.pop(run, ()):
            found = self._found.get(key)
            if found is not None and _state(found.parameter) == found.seen:
                del self._found[key]
            elif found is not None:
                self._found[key] = found._replace(run=None)

    def used_up(self) -> bool:
        """Whether there are sums of gradients that a backward pass has used up."""
        # Measured inside backward, as a hook at its end would, the pass is as good as over. Outside, a pass that has
        # not ended has failed, and its batch with it.
        for run in list(self._runs):
            if torch._C._current_graph_task_id() != _NO_RUN:
                self._end(run)
        self._runs.clear()
        self._buffers.clear()
        self._found = {key: found for key, found in self._found.items() if found.used_up}
        return bool(self._found)

    def refuse_clipping(self, gradients: Sequence[Tensor]) -> None:
        """WiringError when there are no gradients because all of this step were used up in backward."""
        if not gradients and (self._spent or self.used_up()):
            raise WiringError(
                "backward has stepped with the gradients and freed them, so none is left to clip: clip in the hook "
                "that steps, before the step and after collect_in_backward() put its own"
            )

    def clear(self) -> None:
        """Forget all that was collected so far."""
        self._runs.clear()
        self._buffers.clear()
        self._found.clear()

    def take(self, early: EarlySums, scale: Tensor | None) -> None:
        """Move what was used up to ``early``; it is ``scale`` times too large, as backward left it. Starts afresh."""
        if self.used_up():
            self._spent = True
            found = [found for found in self._found.values() if found.parameter not in early]
            device = found[0].sumsq.device if found else None
            sums = [one.sumsq.to(device) for one in found]
            early.add([one.parameter for one in found], torch.cat(sums) if sums else torch.empty(0), scale)
        self.clear()


_WRITTEN = (-1, None)  # no state of a gradient
_NO_RUN = -1  # what torch calls the backward pass outside of one
_COMPILED = -2  # one under compiled autograd, of which nobody says when it ends


def _state(parameter: Tensor) -> tuple[int, int | None] | None:
    """Which gradient it has, and how often that was written to. No reference: it must not live longer for it.

    Views of one buffer, as flat gradients are, count their writes together: see ``_follow_buffer``.
    """
    gradient = parameter.grad
    return None if gradient is None else (id(gradient), None if gradient._is_view() else gradient._version)


def _could_train(parameter: Tensor) -> bool:
    """Whether it could be thawed: no integers, as of quantised weights, and nothing made in inference mode."""
    return (parameter.is_floating_point() or parameter.is_complex()) and not parameter.is_inference()
