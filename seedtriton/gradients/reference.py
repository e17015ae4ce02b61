"""Every op in eager torch: its definition, the CPU path and the oracle of the kernels' tests."""

from __future__ import annotations

import ctypes
import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .row import (
    APART,
    APPEND,
    CLIP_EPS,
    EXTRA,
    GRAD_SCALE,
    GUARDED,
    LIVE,
    MEASURED,
    REPLACE,
    REPLACE_USABLE,
    SUMSQ,
    UNSCALED,
    Listed,
    LossScale,
    Outside,
    Rules,
    TensorTable,
    Window,
    kept_of,
)
from .tensor_sums import constant, segment_sum, tensor_sumsq


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements certainly share memory (an expanded dimension)."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape))


class _Grouping(NamedTuple):
    """Which tensors make a segment.

    Attributes:
        order: int64, that which sorts tensors by segment; None: they are sorted already.
        lengths: int64, how many each segment has.
        unremarkable: float64 [segments, MEASURED] where all of them are live and none vanishes or explodes, without the
            sums of squares.
    """

    order: Tensor | None
    lengths: Tensor
    unremarkable: Tensor

    def sum(self, values: Tensor) -> Tensor:
        """Sums of ``values`` (one or one row per tensor) by segment, in tensor order within each."""
        return segment_sum(values if self.order is None else values.index_select(0, self.order), self.lengths)


@lru_cache(maxsize=256)
def _grouping(segments: tuple[int, ...], num_segments: int, device: torch.device) -> _Grouping:
    order = tuple(sorted(range(len(segments)), key=segments.__getitem__))
    counts = Counter(segments)
    lengths = constant(tuple(counts[segment] for segment in range(num_segments)), torch.int64, device)
    with torch.inference_mode(False):  # as in ``constant``
        unremarkable = torch.zeros(num_segments, MEASURED, dtype=torch.float64, device=device)
        unremarkable[:, LIVE] = lengths
    is_sorted = order == tuple(range(len(order)))
    return _Grouping(None if is_sorted else constant(order, torch.int64, device), lengths, unremarkable)


@torch.no_grad()
def segmented_sumsq(
    tensors: Sequence[Tensor],
    segments: Sequence[int],
    num_segments: int,
    lanes: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """``out[k]`` = sum of g² over all elements g of the ``tensors`` of segment k; float64 [num_segments].

    A segment without tensors is 0. The result lies on ``device`` (the first tensor's, unless told). ``segments`` and
    ``lanes`` are as for ``ops.segmented_sumsq``.
    """
    if device is None:
        device = tensors[0].device if tensors else torch.device("cpu")
    if not tensors:
        return torch.zeros(num_segments, dtype=torch.float64, device=device)
    return _grouping(tuple(segments), num_segments, device).sum(tensor_sumsq(tensors, lanes, device))


def sums_of(listed: Listed, rules: Rules, device: torch.device, sizes: tuple[int, ...] | None = None) -> Tensor:
    """The sum of squares of each tensor, float64 [n] on ``device``. Under no_grad; ``sizes`` as of ``tensor_sumsq``."""
    if not listed.tensors:
        return torch.empty(0, dtype=torch.float64, device=device)
    return tensor_sumsq(listed.tensors, rules.lanes, device, sizes)


@torch.no_grad()
def note_tensors_(table: TensorTable, sample: Tensor, sums: Tensor, entries: Sequence[int] | None) -> None:
    """Into the table of tensors: what each adds to a sample.

    Args:
        table: is written.
        sample: its number, int64 0-dim.
        sums: float64 [n], sum of squares of each tensor, with the loss scale.
        entries: of each; None: the i-th has entry i.
    """
    table.newest = None
    if not len(sums):
        return
    index = constant(tuple(range(len(sums)) if entries is None else entries), torch.int64, sums.device)
    table.sumsq.index_copy_(0, index, sums)
    table.last.index_fill_(0, index, sample)
    first = table.first.index_select(0, index)
    first = torch.where(sums.isfinite().logical_or_(first != 0), first, sample.to(first.dtype))
    table.first.index_copy_(0, index, first)


def record_sums_(
    sums: Tensor,
    entries: Sequence[int] | None,
    outside: Outside,
    gains: Listed,
    window: Window,
    rules: Rules,
    scale: LossScale,
) -> None:
    """The row of these sums (float64 [n]) and what they say of single tensors; ``outside`` is what was made of them."""
    if window.replace != APPEND:
        settle_(window.table, window.written)  # a sample that this one replaces has noted its tensors
    finish_(outside, gains, window, rules, scale)
    keep_tensors_(window, sums, outside.columns, entries)


def keep_tensors_(window: Window, sums: Tensor, columns: Tensor, entries: Sequence[int] | None) -> None:
    """``note_tensors_`` for the sample that was just counted; on a CPU its sums are only kept, if all are finite.

    Until ``settle_``, or until the next sample takes their place. ``columns`` is what was made of the sums.
    """
    if _on_host(columns) and _are_finite(columns):
        window.table.newest = sums, entries
    else:
        note_tensors_(window.table, window.written, sums, entries)


def settle_(table: TensorTable, written: Tensor) -> None:
    """Write what was only kept; ``written`` is the number of samples, that one too."""
    if table.newest is not None:
        note_tensors_(table, written, *table.newest)


def _on_host(tensor: Tensor) -> bool:
    """Whether its numbers can be looked at without a wait: nothing but plain tensors has memory."""
    return type(tensor) is Tensor and tensor.device.type == "cpu"


def _are_finite(columns: Tensor) -> bool:
    """Whether each segment's sum of squares is: a look at the memory of a CPU, which takes less than an operation."""
    values = (ctypes.c_double * columns.numel()).from_address(columns.data_ptr())
    return all(map(math.isfinite, values[SUMSQ::MEASURED]))


def columns_of_sums(
    sums: Tensor,
    elements: Sequence[int],
    segments: Sequence[int],
    num_segments: int,
    rules: Rules,
    grad_scale: Tensor | None = None,
) -> Tensor:
    """SUMSQ, LIVE, VANISHING and EXPLODING by segment, from what each tensor adds: float64 [num_segments, MEASURED].

    Under no_grad.

    A tensor is live when its sum of squares is not zero; NaN counts as live, it is not silence. The limits are
    absolute and not relative to the whole model: in proportion to its own norm, a model whose every gradient
    vanishes or explodes looks healthy, one tensor that explodes makes all others vanish, and a bias, whose
    gradient is a sum over positions, is an outlier by nature. What makes absolute numbers depend on the setup is
    the loss scale, which is divided out here, and the loss itself, for which the limits are arguments.

    Args:
        sums: float64 [n], sum of squares of each tensor, ``grad_scale`` squared times too large.
        elements: of each tensor.
        segments: of each tensor.
        num_segments: rows of the result.
        rules: its limits for vanishing and exploding tensors.
        grad_scale: 0-dim or [1], on whatever device; None is 1.
    """
    if not len(elements):
        return torch.zeros(num_segments, MEASURED, dtype=torch.float64, device=sums.device)
    elements, grouping = tuple(elements), _grouping(tuple(segments), num_segments, sums.device)
    if grad_scale is None:
        least, most, live = _limits(elements, rules.vanishing_rms, rules.exploding_rms, sums.device)
        # Where all are between the limits, which is usual, their numbers are known: a tenth of the operations.
        if _on_host(sums) and torch.equal(sums.clamp(live, most), sums):
            columns = grouping.unremarkable.clone()
            columns.select(1, SUMSQ).copy_(grouping.sum(sums))
            return columns
    else:
        scale = grad_scale.to(sums.device).double().reshape(())
        sizes = constant(elements, torch.float64, sums.device)
        least, most = _limits_of(sizes, rules.vanishing_rms * scale, rules.exploding_rms * scale)
    live = sums.ne(0.0)
    vanishing, exploding = sums.lt(least).logical_and_(live), sums.le(most).logical_not_()
    return grouping.sum(torch.stack([sums, live, vanishing, exploding], dim=1))


_LARGEST = torch.finfo(torch.float64).max


def _limits_of(sizes: Tensor, vanishing_rms: Tensor, exploding_rms: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of squares of each tensor below which it is vanishing, and above which it is exploding."""
    # Squares are compared, in the order of operations of the kernel: no root, and no other rounding. At most the
    # largest number, so that infinity is above it and inf times no elements is not NaN.
    most = exploding_rms.square().clamp_(max=_LARGEST)
    return vanishing_rms.square() * sizes, (most * sizes).clamp_(max=_LARGEST)


@lru_cache(maxsize=256)
def _limits(
    elements: tuple[int, ...], vanishing_rms: float, exploding_rms: float, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """``_limits_of`` without a loss scale, and a third, between which and the second all is live, too.

    NaN, which nothing is equal to, where there is nothing in between: of a tensor without elements.
    """
    with torch.inference_mode(False):  # as in ``constant``
        rms = (torch.full((), value, dtype=torch.float64, device=device) for value in (vanishing_rms, exploding_rms))
        least, most = _limits_of(constant(elements, torch.float64, device), *rms)
        live = least.clamp(min=torch.finfo(torch.float64).tiny)
        return least, most, live.masked_fill_(live > most, math.nan)


@torch.no_grad()
def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """Multiply every tensor in place by a 0-dim ``coefficient``, in fp32 or wider, rounded once.

    At exactly 1 nothing is touched, if that can be seen: on a CPU the value is looked at; elsewhere looking
    would wait for the device, and this eager form multiplies always (the Triton kernel looks on the device).
    """
    if coefficient.device.type == "cpu":
        if coefficient.item() == 1.0:
            return
        # Not a number, nor a tensor of another dtype: torch would convert it again for each tensor.
        single, double = coefficient.float(), coefficient.double()
        for tensor in tensors:
            if tensor.dtype in (torch.float64, torch.complex128):
                tensor.mul_(double)
            elif tensor.dtype.itemsize == 1:
                tensor.copy_(tensor.float() * single)  # torch has no arithmetic for fp8
            else:
                tensor.mul_(single)
        return
    by_place: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    for tensor in tensors:
        wide = tensor.dtype in (torch.float64, torch.complex128)
        place = (tensor.device, torch.float64 if wide else torch.float32)
        if place not in by_place:
            by_place[place] = coefficient.to(device=place[0], dtype=place[1])
        if tensor.is_floating_point() and tensor.dtype.itemsize < 4:
            tensor.copy_(tensor.float() * by_place[place])
        else:
            tensor.mul_(by_place[place])


@torch.no_grad()
def scale_segments_(listed: Listed, coefficients: Tensor, clear: bool = False) -> None:
    """``scale_`` each tensor by the coefficient of its segment, float64 [segments].

    With ``clear`` a coefficient below 0 writes zeros, whatever was there: 0 * NaN is NaN.
    """
    # A gradient that was made in inference mode can be written to in there alone, and any other one as well.
    if any(map(Tensor.is_inference, listed.tensors)) and not torch.is_inference_mode_enabled():
        with torch.inference_mode():
            scale_segments_(listed, coefficients, clear)
        return
    if coefficients.device.type == "cpu":
        values = coefficients.tolist()
        if all(value == 1.0 for value in values):
            return
        by_segment: dict[int, list[Tensor]] = {}
        for tensor, segment in zip(listed.tensors, listed.segments):
            if values[segment] != 1.0:
                by_segment.setdefault(segment, []).append(tensor)
        for segment, tensors in by_segment.items():
            if clear and values[segment] < 0.0:
                for tensor in tensors:
                    tensor.zero_()
            else:
                scale_(tensors, coefficients[segment])
        return
    for tensor, segment in zip(listed.tensors, listed.segments):
        coefficient = coefficients[segment]
        if clear:
            gone = coefficient.lt(0.0).to(tensor.device)
            # where() has no kernel for sparse tensors.
            elements = tensor._values() if tensor.layout == torch.sparse_coo else tensor
            elements.copy_(torch.where(gone, torch.zeros_like(elements), elements))
        scale_([tensor], coefficient)


def quarantine_(gradients: Listed, summary: Tensor, rules: Rules) -> None:
    """Write zeros into the gradients of guarded segments that are not finite; nothing is touched where all are."""
    guarded = [bool(mode & GUARDED) for mode in rules.modes]
    if any(guarded):
        chosen = [index for index, segment in enumerate(gradients.segments) if guarded[segment]]
        listed = Listed([gradients.tensors[i] for i in chosen], [gradients.segments[i] for i in chosen])
        scale_segments_(listed, kept_of(summary), clear=True)


@torch.no_grad()
def record_(
    gradients: Listed, gains: Listed, window: Window, rules: Rules, scale: LossScale = UNSCALED
) -> None:
    """Measure one sample: write its row of the ring, the summary, and add 1 to the count.

    Args:
        gradients: those that exist in this step, any shapes and floating dtypes; segment 0 is the host. Those of
            guarded segments become zeros where one of the segment is not finite.
        gains: gradients of the blend factors alpha. The blend gain is -alpha.grad; each is set to zero once read, so
            that the next step starts afresh.
        window: where it is written.
        rules: by what it is summed and judged.
        scale: what is divided out of gradients and gains.
    """
    num_segments, segments = window.ring.shape[1], gradients.segments
    elements = tuple(map(Tensor.numel, gradients.tensors))
    sums = sums_of(gradients, rules, window.ring.device, elements)
    columns = columns_of_sums(sums, elements, segments, num_segments, rules, scale.gradients)
    counts = count_by_segment(elements, segments, num_segments)
    record_sums_(sums, gradients.entries, Outside(columns, counts), gains, window, rules, scale)
    quarantine_(gradients, window.summary, rules)


def count_by_segment(
    elements: Sequence[int], segments: Sequence[int], num_segments: int
) -> tuple[tuple[int, int], ...]:
    """How many tensors every segment has, and how many elements in all; ``elements`` is of each tensor."""
    return _counts(tuple(elements), tuple(segments), num_segments)


@lru_cache(maxsize=256)
def _counts(elements: tuple[int, ...], segments: tuple[int, ...], num_segments: int) -> tuple[tuple[int, int], ...]:
    counts = [(0, 0)] * num_segments
    for size, segment in zip(elements, segments):
        number, total = counts[segment]
        counts[segment] = number + 1, total + size
    return tuple(counts)


def finish_(sums: Outside, gains: Listed, window: Window, rules: Rules, scale: LossScale = UNSCALED) -> None:
    """The epilogue: from the first columns to the row and the summary; arguments as ``record_``'s. Under no_grad."""
    columns, counts = sums
    ring, count, summary, table, replace = window
    device = ring.device
    factor = None if scale.gradients is None else scale.gradients.to(device).double().reshape(())
    if factor is not None:
        columns = columns.clone()
        columns[:, SUMSQ] /= factor.square()
    known = _known_columns(tuple(counts), device)
    slopes, slope_segments = gains.tensors, gains.segments
    if slopes or scale.found_inf is not None:
        known = known.clone()
        extra = known[:, EXTRA - MEASURED]
        if scale.found_inf is not None:
            extra[0] = scale.found_inf.to(device).reshape(()).ne(0)
        if slopes:
            negated = torch.stack([slope.to(device).reshape(()) for slope in slopes]).double().neg_()
            if scale.gains is not None:
                negated /= scale.gains.to(device).double().reshape(())
            extra.index_copy_(0, constant(tuple(slope_segments), torch.int64, device), negated)
            for slope in slopes:
                slope.zero_()
    row = torch.cat([columns, known], dim=1)
    if replace:
        newest = ring.index_select(0, (count - 1).remainder(ring.shape[0]).view(1))[0]
        replaced = _is_replaced(newest, count, replace, rules.modes)
        # What was in quarantine is so for all of the step: its gradients are not those of its loss.
        gone = newest[:, SUMSQ].isfinite().logical_or_(_unguarded(rules.modes, newest)).logical_not_()
        row[:, SUMSQ].masked_fill_(gone.logical_and_(replaced), math.nan)
        kept = newest[1:, SUMSQ].isfinite().logical_and_(replaced)
        before = newest[1:, EXTRA].masked_fill(kept.logical_not(), math.nan)
        told = constant(tuple(index in slope_segments for index in range(1, len(row))), torch.bool, device)
        added = row[1:, EXTRA] + before.nan_to_num(0.0, math.inf, -math.inf)
        row[1:, EXTRA] = torch.where(told, added, before)
        count.sub_(replaced.long())
    if _on_host(count):  # a look instead of three operations
        ring.select(0, int(count) % ring.shape[0]).copy_(row)
    else:
        ring.index_copy_(0, count.remainder(ring.shape[0]).view(1), row.unsqueeze(0))
    count.add_(1)
    table.numbered = False

    summary.copy_(summarize(columns.select(1, SUMSQ), rules))
    if factor is not None:
        summary[GRAD_SCALE] = factor


def summarize(sumsq: Tensor, rules: Rules) -> Tensor:
    """The summary of a sample, float64 [SUMMARY_HEAD + 3 * segments], from the sum of squares of each segment.

    The norm that a coefficient is of is that of the segment where it is apart, and that of all the others together
    where it is not. What is guarded and not finite counts as zero; its coefficient is -1. Under no_grad.
    """
    if _on_host(sumsq):
        squares = sumsq.tolist()
        bad = not all(map(math.isfinite, squares))
        if not any(mode & APART or (mode & GUARDED and bad) for mode in rules.modes):
            return torch.tensor(_summary_of(squares, rules), dtype=torch.float64, device="cpu")
    apart, unguarded = _modes(rules.modes or (0,) * len(sumsq), sumsq.device)
    norms, ones = sumsq.sqrt(), torch.ones_like(sumsq)
    kept = sumsq.isfinite().logical_or_(unguarded)
    counted = sumsq.where(kept, sumsq.new_zeros(()))
    total = counted.masked_fill(apart, 0.0).sum(dim=0, keepdim=True).sqrt_()
    coefficients = _coefficient(counted.sqrt().where(apart, total), rules)
    gone = kept.logical_not()
    by_segment = coefficients.masked_fill(gone, -1.0), ones.masked_fill(gone, -1.0)
    return torch.cat([total, coefficients[:1], ones[:1], _ratio(norms, norms[0], rules), *by_segment])


def _summary_of(squares: list[float], rules: Rules) -> list[float]:
    """The same where nothing is apart or gone: in numbers of Python, which takes a fifth of the time on a CPU."""
    roots, total = list(map(math.sqrt, squares)), math.sqrt(sum(squares))
    coefficients, ones = [_coefficient(total, rules)] * len(roots), [1.0] * len(roots)
    return [total, coefficients[0], 1.0, *(_ratio(root, roots[0], rules) for root in roots), *coefficients, *ones]


_Number = TypeVar("_Number", float, Tensor)


def _ratio(norm: _Number, host: _Number, rules: Rules) -> _Number:
    return norm / (host + rules.eps)


def _coefficient(norm: _Number, rules: Rules) -> _Number:
    """``min(1, max_norm / (norm + CLIP_EPS))``, of NaN NaN: as torch.nn.utils.clip_grad_norm_, no silence."""
    quotient = rules.max_norm / (norm + CLIP_EPS)
    return quotient.clamp(max=1.0) if isinstance(quotient, Tensor) else 1.0 if quotient > 1.0 else quotient


@lru_cache(maxsize=256)
def _modes(modes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Which segments are apart, and which are not guarded: bool [segments] each."""
    with torch.inference_mode(False):  # as in ``constant``
        return (
            torch.tensor([bool(mode & APART) for mode in modes], device=device),
            torch.tensor([not mode & GUARDED for mode in modes], device=device),
        )


def _unguarded(modes: tuple[int, ...], row: Tensor) -> Tensor:
    return _modes(modes or (0,) * len(row), row.device)[1]


def _is_replaced(newest: Tensor, count: Tensor, replace: int, modes: tuple[int, ...]) -> Tensor:
    """Whether the newest row, float64 [segments, QUANTITIES], gives way to another: bool 0-dim."""
    there = count.gt(0)
    if replace == REPLACE:
        return there
    stepped = newest[:, SUMSQ].isfinite().logical_or_(_unguarded(modes, newest).logical_not())
    return there & stepped.all() & newest[0, EXTRA].eq(0.0)


@torch.no_grad()
def number_(window: Window, modes: tuple[int, ...]) -> None:
    """Write the table's ``numbers`` from the newest row of the ring; ``modes`` as in ``Rules``."""
    ring, written, _, table, _ = window
    newest = ring.index_select(0, (written - 1).remainder(ring.shape[0]).view(1))[0]
    replaced = torch.stack([_is_replaced(newest, written, replace, modes) for replace in (REPLACE, REPLACE_USABLE)])
    table.numbers.copy_(written - replaced.long())
    table.numbered = True


@lru_cache(maxsize=256)
def _known_columns(counts: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """TENSORS, ELEMENTS and EXTRA where there is no gain and no step is skipped: float64 [segments, 3]."""
    rows = [(tensors, elements, float("nan") if index else 0.0) for index, (tensors, elements) in enumerate(counts)]
    with torch.inference_mode(False):  # as in ``constant``
        return torch.tensor(rows, dtype=torch.float64, device=device)
