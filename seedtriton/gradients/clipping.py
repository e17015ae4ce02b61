"""Clipping by the norm of a measurement, as long as the gradients are still those that were measured."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.errors import ConfigurationError
from . import ops, reference
from .row import SUMMARY_HEAD, SUMSQ, TOTAL_NORM, Listed, Rules, Window
from .spread import Ranks
from .tensor_sums import constant

if TYPE_CHECKING:
    from .parameters import Watched

Limit = float | Tensor  # of a norm

_version_of = attrgetter("_version")


def _versions(gradients: Sequence[Tensor]) -> int | None:
    """Another number after a write to one of them; None where nobody counts: one was made in inference mode."""
    try:
        return int(sum(map(_version_of, gradients)))
    except RuntimeError:
        return None


class MeasuredGradients:
    """Which gradients the last measurement was of, so that clipping knows whether its sums are still true."""

    def __init__(self) -> None:
        self._asked = False  # whether anybody clips
        self.forget()

    def forget(self) -> None:
        """After an optimizer step or clipping: what was measured is gone."""
        # Emptied, because even a weak reference to a gradient stands in the way of torch.utils.swap_tensors.
        self._witnesses: list[weakref.ref[Tensor]] = []
        self._versions: int | None = 0

    def remember(self, gradients: Sequence[Tensor], scaled: bool) -> None:
        """Note what was measured, and whether it still had its loss scale."""
        self.forget()
        # Not while compiling: what is set there is set for good, and clipping then makes its own pass.
        if torch.compiler.is_compiling():
            return
        # A note of every gradient is a sixth of a measurement, and stands in the way of torch.utils.swap_tensors: not
        # for those who never clip. With a loss scale only the measurement knows the norm, from the first step on.
        if self._asked or scaled:
            # Weak: no gradient may live longer because it was measured.
            self._versions = _versions(gradients)
            self._witnesses = [] if self._versions is None else list(map(weakref.ref, gradients))

    def are(self, gradients: Sequence[Tensor]) -> bool:
        """Whether the last measurement was of these very gradients, in their present state.

        The first time that it is asked nobody may have noted them, and clipping makes a pass of its own.
        """
        self._asked = True
        return (
            len(gradients) == len(self._witnesses) > 0
            and all(seen() is gradient for seen, gradient in zip(self._witnesses, gradients))
            and _versions(gradients) == self._versions
        )


def checked_max_norm(max_norm: Limit) -> float:
    """The limit as a number, of a tensor by a wait for its device; ConfigurationError unless it is one, above 0."""
    number = max_norm if not isinstance(max_norm, Tensor) else float(max_norm) if max_norm.numel() == 1 else math.nan
    if not number > 0.0:
        raise ConfigurationError(f"max_norm must be above 0, got {max_norm!r}")
    return number


@torch.no_grad()
def sums_for_clipping(gradients: Listed, window: Window, rules: Rules, *, measured: bool) -> Tensor:
    """Sums of squares by column: from the newest row, if it is of these gradients, or by a pass of its own."""
    if measured:
        newest = (window.written - 1).remainder(window.ring.shape[0]).view(1)
        return window.ring.index_select(0, newest)[0, :, SUMSQ]
    columns = window.ring.shape[1]
    if not gradients.tensors:
        return torch.zeros(columns, dtype=torch.float64, device=window.ring.device)
    return ops.segmented_sumsq(gradients.tensors, gradients.segments, columns, lanes=rules.lanes)


@torch.no_grad()
def summary_of_all(sums: Tensor, watched: Watched, ranks: Ranks, rules: Rules) -> Tensor:
    """The summary by the norms of whole tensors, of which each rank has summed its parts. On every rank, one exchange.

    Args:
        sums: float64 [columns], of this rank.
        watched: knows the columns.
        ranks: who has the other parts; a rank without gradients takes part with zeros.
        rules: by column.

    Returns:
        As ``reference.summarize``, with the coefficients of each segment in all of its columns.
    """
    segments = 1 + len(watched.names)
    place = constant(watched.column_segments, torch.int64, sums.device)
    held = sums.clone()
    for column, (_, way) in enumerate(watched.columns):
        held[column] /= way.copies
    own = held.new_zeros(segments).index_add_(0, place, held)
    total = ranks.few(own, "clip_grad_norm_()")
    found = reference.summarize(total, rules._replace(modes=rules.modes[:segments]))
    blocks = [block.index_select(0, place) for block in found[SUMMARY_HEAD:].view(3, segments)]
    return torch.cat([found[:SUMMARY_HEAD], *blocks])


def refuse_nonfinite(summary: Tensor) -> None:
    """RuntimeError, before anything is scaled, when the total norm is NaN or infinite; waits for the device."""
    if not bool(torch.isfinite(summary[TOTAL_NORM])):
        raise RuntimeError(
            f"the total norm of the gradients is {float(summary[TOTAL_NORM])}, so it cannot be "
            "clipped; set error_if_nonfinite=False to scale them all the same"
        )
