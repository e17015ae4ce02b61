"""One measurement: what is listed, where its row goes, by what rules it is summed, and how its numbers are laid out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.evidence import RATIO_EPS

# A value at which torch.nn.utils.clip_grad_norm_ keeps a zero norm from dividing by zero.
CLIP_EPS = 1e-6

# The ring holds one row per sample, fp64 [window, segments, QUANTITIES]; segment 0 is the host.
SUMSQ = 0  # sum of squares of the segment's gradients
LIVE = 1  # gradient tensors of the segment that are not all zero
VANISHING = 2  # live ones whose root mean square is below VANISHING_RMS
EXPLODING = 3  # those whose root mean square is above EXPLODING_RMS, or not finite
MEASURED = 4  # so many columns come from the values of the gradients, and may be added to
TENSORS = 4  # gradient tensors of the segment
ELEMENTS = 5  # their elements
EXTRA = 6  # seeds: the blend gain (NaN: none); host: 1.0 when the optimizer will skip this step
QUANTITIES = 7

# Root mean squares, norm / sqrt(elements), so that a tensor's size does not matter; of true gradients, without the
# loss scale; exactly at a limit is neither. The first is Adam's usual eps, below which the optimizer's steps shrink
# with the gradient; at the second, a step of SGD at a rate of 0.01 is as large as a weight usually is.
VANISHING_RMS = 1e-8
EXPLODING_RMS = 10.0

# The summary holds what the training step itself can use, fp64 [SUMMARY_HEAD + 3 * segments]: behind its head three
# numbers of each segment: the ratio to the host, of this sample alone; the clip coefficient; 1. Where a guarded segment
# is not finite, the last two are -1, which writes zeros.
TOTAL_NORM = 0  # root of the sum over all segments that are not apart
CLIP_COEFFICIENT = 1  # of the host, and of whatever is not apart
GRAD_SCALE = 2  # the loss scale: the square of it is still in the sums of squares of the table of tensors
SUMMARY_HEAD = 3

# What becomes of the newest row: it stays; it is replaced; it is replaced unless it is one to drop (not finite, or of a
# step that was skipped), which stays and is counted. What is not finite in a guarded segment alone keeps no optimizer
# from its step: the row is replaced, and that segment is not finite in the new one either.
APPEND, REPLACE, REPLACE_USABLE = 0, 1, 2

# How a segment is clipped, added up; 0: with the host.
APART = 1  # by its own norm, with the same limit
GUARDED = 2  # gradients that are not finite count as zeros, and become zeros


class RowLayout(NamedTuple):
    """The columns of a row and the places in the summary, in the order in which the kernels take them."""

    sumsq: int = SUMSQ
    live: int = LIVE
    vanishing: int = VANISHING
    exploding: int = EXPLODING
    measured: int = MEASURED
    tensors: int = TENSORS
    elements: int = ELEMENTS
    extra: int = EXTRA
    quantities: int = QUANTITIES
    total_norm: int = TOTAL_NORM
    clip_coefficient: int = CLIP_COEFFICIENT
    grad_scale: int = GRAD_SCALE
    summary_head: int = SUMMARY_HEAD
    apart: int = APART
    guarded: int = GUARDED


LAYOUT = RowLayout()


class Listed(NamedTuple):
    """Tensors and the segment of each: gradients, or the gradients of blend factors alpha (0-dim).

    ``entries`` is the place of each in the table of tensors; None: the i-th has entry i.
    """

    tensors: Sequence[Tensor]
    segments: Sequence[int]
    entries: Sequence[int] | None = None


NO_GAINS = Listed((), ())


@dataclass
class TensorTable:
    """What is known of each parameter's gradient, 16 bytes of it, [parameters] each. Samples are counted from 1.

    Attributes:
        sumsq: float64, its last sum of squares, still with the loss scale: see GRAD_SCALE.
        last: int32, the sample of that sum; below 0 where there is none yet: -1 - those written before it was watched.
        first: int32, the first sample in which it was not finite; 0: none.
        numbers: int64 [2], samples before one that replaces the newest row, by REPLACE and by REPLACE_USABLE.
        numbered: whether ``numbers`` is of the newest row: the kernel writes it with each, else ``reference.number_``.
        newest: sums and entries of the newest sample, where they are not written yet; see ``reference.settle_``.
    """

    sumsq: Tensor
    last: Tensor
    first: Tensor
    numbers: Tensor
    numbered: bool = False
    newest: tuple[Tensor, Sequence[int] | None] | None = None

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three that have an entry for each parameter."""
        return self.sumsq, self.last, self.first


class Window(NamedTuple):
    """Where a measurement writes.

    Attributes:
        ring: float64 [window, segments, QUANTITIES]; row ``count % window`` is overwritten.
        written: int64 0-dim, samples ever written; 1 is added, unless a row was replaced.
        summary: float64 [SUMMARY_HEAD + 3 * segments], overwritten.
        table: entries of what is listed are overwritten.
        replace: APPEND, REPLACE or REPLACE_USABLE: what becomes of the newest row, which is of the same optimizer step.
            A blend gain is added to the one in the row that is replaced, because measuring took it away; not where the
            seed's gradients were not finite there: quarantine has written zeros over them.
    """

    ring: Tensor
    written: Tensor
    summary: Tensor
    table: TensorTable
    replace: int = APPEND

    @property
    def before(self) -> Tensor:
        """The number of samples before the next one, int64 0-dim; one that it replaces is not among them."""
        return self.written if self.replace == APPEND else self.table.numbers[self.replace - 1]


class Rules(NamedTuple):
    """By what a sample is summed and judged.

    Attributes:
        max_norm: for the clip coefficient; inf leaves it at 1.
        eps: added to the host's norm in the ratio of this sample.
        vanishing_rms: a live tensor is vanishing when its root mean square is below this; 0 counts none.
        exploding_rms: a tensor is exploding when its root mean square is above this or not finite; inf counts only what
            is not finite.
        lanes: dtype in which squares are summed inside a row: float32, or float64 for magnitudes outside 1e-19 .. 1e17.
        modes: of each segment APART and GUARDED, added up, never of the host; empty: 0 for all.
    """

    max_norm: float = math.inf
    eps: float = RATIO_EPS
    vanishing_rms: float = VANISHING_RMS
    exploding_rms: float = EXPLODING_RMS
    lanes: torch.dtype = torch.float32
    modes: tuple[int, ...] = ()


class LossScale(NamedTuple):
    """By what to divide, and whether the step will be skipped; None: by nothing, nobody knows.

    Attributes:
        gradients: 0-dim or [1]; the gradients are this many times too large (loss scaling).
        gains: the same for the gradients of the blend factors, which no optimizer holds and nobody unscales.
        found_inf: 0-dim or [1]; not zero means the optimizer will skip this step.
    """

    gradients: Tensor | None = None
    gains: Tensor | None = None
    found_inf: Tensor | None = None


UNSCALED = LossScale()


def coefficients_of(summary: Tensor) -> Tensor:
    """The clip coefficient of each segment, or -1; float64 [segments], a view of the summary."""
    segments = (summary.shape[0] - SUMMARY_HEAD) // 3
    return summary[SUMMARY_HEAD + segments : SUMMARY_HEAD + 2 * segments]


def kept_of(summary: Tensor) -> Tensor:
    """1 for each segment, -1 for one that is guarded and not finite; float64 [segments], a view of the summary."""
    segments = (summary.shape[0] - SUMMARY_HEAD) // 3
    return summary[SUMMARY_HEAD + 2 * segments :]


class Outside(NamedTuple):
    """What of a sample was summed elsewhere.

    Attributes:
        columns: float64 [segments, MEASURED], the first columns of those gradients, on the ring's device.
        counts: (tensors, elements) of those, for every segment.
    """

    columns: Tensor
    counts: Sequence[tuple[int, int]]


class Flat(NamedTuple):
    """A buffer of which all gradients are views: no address is uploaded while it moves as a whole.

    Attributes:
        buffer: one dtype, 1-D.
        settled: they never move within it, and on a GPU nobody looks at their addresses; otherwise their places are
            compared in every call.
    """

    buffer: Tensor
    settled: bool = True
