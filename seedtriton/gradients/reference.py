"""Every op in eager torch: its definition, the CPU path and the oracle of the kernels' tests."""

from __future__ import annotations

import ctypes
import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .row import (
    APART,
    APPEND,
    CLIP_EPS,
    EXTRA,
    GRAD_SCALE,
    GUARDED,
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


@lru_cache(maxsize=256)
def _grouping(segments: tuple[int, ...], num_segments: int, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """The order that sorts tensors by segment (None: sorted already), and how many each segment has; int64."""
    order = tuple(sorted(range(len(segments)), key=segments.__getitem__))
    counts = Counter(segments)
    return (
        None if order == tuple(range(len(order))) else constant(order, torch.int64, device),
        constant(tuple(counts[segment] for segment in range(num_segments)), torch.int64, device),
    )


def _sum_by_segment(values: Tensor, segments: Sequence[int], num_segments: int) -> Tensor:
    """Sums of ``values`` (one or one row per tensor) by segment, in tensor order within each."""
    order, lengths = _grouping(tuple(segments), num_segments, values.device)
    return segment_sum(values if order is None else values.index_select(0, order), lengths)


@torch.no_grad()
def segmented_sumsq(
    tensors: Sequence[Tensor],
    segments: Sequence[int],
    num_segments: int,
    lanes: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """``out[k]`` = sum of g² over all elements g of the tensors of segment k; float64 [num_segments].

    A segment without tensors is 0. The result lies on ``device`` (the first tensor's, unless told).
    """
    if device is None:
        device = tensors[0].device if tensors else torch.device("cpu")
    if not tensors:
        return torch.zeros(num_segments, dtype=torch.float64, device=device)
    return _sum_by_segment(tensor_sumsq(tensors, lanes, device), segments, num_segments)


def sums_of(listed: Listed, rules: Rules, device: torch.device) -> Tensor:
    """The sum of squares of each tensor, float64 [n] on ``device``. Under no_grad."""
    if not listed.tensors:
        return torch.empty(0, dtype=torch.float64, device=device)
    return tensor_sumsq(listed.tensors, rules.lanes, device)


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
    # Nothing but plain tensors has memory that can be looked at.
    if type(columns) is Tensor and columns.device.type == "cpu" and _are_finite(columns):
        window.table.newest = sums, entries
    else:
        note_tensors_(window.table, window.written, sums, entries)


def settle_(table: TensorTable, written: Tensor) -> None:
    """Write what was only kept; ``written`` is the number of samples, that one too."""
    if table.newest is not None:
        note_tensors_(table, written, *table.newest)


def _are_finite(columns: Tensor) -> bool:
    """Whether each segment's sum of squares is: a look at the memory of a CPU, which takes less than an operation."""
    values = (ctypes.c_double * columns.numel()).from_address(columns.data_ptr())
    return all(map(math.isfinite, values[SUMSQ::MEASURED]))


@torch.no_grad()
def columns_of_sums(
    sums: Tensor,
    elements: Sequence[int],
    segments: Sequence[int],
    num_segments: int,
    rules: Rules,
    grad_scale: Tensor | None = None,
) -> Tensor:
    """SUMSQ, LIVE, VANISHING and EXPLODING by segment, from what each tensor adds: float64 [num_segments, MEASURED].

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
    scale = 1.0 if grad_scale is None else grad_scale.to(sums.device).double().reshape(())
    sizes = constant(tuple(elements), torch.float64, sums.device)
    # Squares are compared, in the order of operations of the kernel: no root, and no other rounding.
    low, high = rules.vanishing_rms * scale, rules.exploding_rms * scale
    live = sums.ne(0.0)
    vanishing = sums.lt(low * low * sizes).logical_and_(live)
    # At most the largest number, so that infinity is above it and inf times no elements is not NaN.
    most = high * high
    most = min(most, _LARGEST) if isinstance(most, float) else most.clamp(max=_LARGEST)
    exploding = sums.le((most * sizes).clamp_(max=_LARGEST)).logical_not_()
    return _sum_by_segment(torch.stack([sums, live, vanishing, exploding], dim=1), segments, num_segments)


_LARGEST = torch.finfo(torch.float64).max


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
    sums = sums_of(gradients, rules, window.ring.device)
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


@torch.no_grad()
def finish_(sums: Outside, gains: Listed, window: Window, rules: Rules, scale: LossScale = UNSCALED) -> None:
    """The epilogue: from the first columns to the row and the summary; arguments as ``record_``'s."""
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
        replaced = _is_replaced(newest, count, replace)
        before = newest[1:, EXTRA].masked_fill(replaced.logical_not(), math.nan)
        told = constant(tuple(index in slope_segments for index in range(1, len(row))), torch.bool, device)
        added = row[1:, EXTRA] + before.nan_to_num(0.0, math.inf, -math.inf)
        row[1:, EXTRA] = torch.where(told, added, before)
        count.sub_(replaced.long())
    ring.index_copy_(0, count.remainder(ring.shape[0]).view(1), row.unsqueeze(0))
    count.add_(1)
    table.numbered = False

    summary.copy_(summarize(row[:, SUMSQ], rules))
    if factor is not None:
        summary[GRAD_SCALE] = factor


@torch.no_grad()
def summarize(sumsq: Tensor, rules: Rules) -> Tensor:
    """The summary of a sample, float64 [SUMMARY_HEAD + 3 * segments], from the sum of squares of each segment.

    ``coefficient = min(1, max_norm / (norm + CLIP_EPS))``: the norm is that of the segment where it is apart, and that
    of all the others together where it is not. What is guarded and not finite counts as zero; its coefficient is -1.
    """
    norms, one = sumsq.sqrt(), constant((1,), torch.float64, sumsq.device)
    ratios = norms / (norms[0] + rules.eps)
    if not any(rules.modes):
        total = sumsq.sum(dim=0, keepdim=True).sqrt_()
        # As torch.nn.utils.clip_grad_norm_: clamp keeps NaN, so a NaN norm makes NaN gradients, not silence.
        coefficient = (rules.max_norm / (total + CLIP_EPS)).clamp_(max=1.0)
        return torch.cat([total, coefficient, one, ratios, coefficient.expand_as(norms), torch.ones_like(norms)])
    apart, unguarded = _modes(rules.modes, sumsq.device)
    kept = sumsq.isfinite().logical_or_(unguarded)
    counted = sumsq.where(kept, sumsq.new_zeros(()))
    total = counted.masked_fill(apart, 0.0).sum(dim=0, keepdim=True).sqrt_()
    coefficients = (rules.max_norm / (counted.sqrt().where(apart, total) + CLIP_EPS)).clamp_(max=1.0)
    gone = kept.logical_not()
    by_segment = coefficients.masked_fill(gone, -1.0), torch.ones_like(norms).masked_fill_(gone, -1.0)
    return torch.cat([total, coefficients[:1], one, ratios, *by_segment])


@lru_cache(maxsize=256)
def _modes(modes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Which segments are apart, and which are not guarded: bool [segments] each."""
    with torch.inference_mode(False):  # as in ``constant``
        return (
            torch.tensor([bool(mode & APART) for mode in modes], device=device),
            torch.tensor([not mode & GUARDED for mode in modes], device=device),
        )


def _is_replaced(newest: Tensor, count: Tensor, replace: int) -> Tensor:
    """Whether the newest row, float64 [segments, QUANTITIES], gives way to another: bool 0-dim."""
    there = count.gt(0)
    if replace == REPLACE:
        return there
    return there & newest[:, SUMSQ].isfinite().all() & newest[0, EXTRA].eq(0.0)


@torch.no_grad()
def number_(window: Window) -> None:
    """Write the table's ``numbers`` from the newest row of the ring."""
    ring, written, _, table, _ = window
    newest = ring.index_select(0, (written - 1).remainder(ring.shape[0]).view(1))[0]
    replaced = torch.stack([_is_replaced(newest, written, replace) for replace in (REPLACE, REPLACE_USABLE)])
    table.numbers.copy_(written - replaced.long())
    table.numbered = True


@lru_cache(maxsize=256)
def _known_columns(counts: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """TENSORS, ELEMENTS and EXTRA where there is no gain and no step is skipped: float64 [segments, 3]."""
    rows = [(tensors, elements, float("nan") if index else 0.0) for index, (tensors, elements) in enumerate(counts)]
    with torch.inference_mode(False):  # as in ``constant``
        return torch.tensor(rows, dtype=torch.float64, device=device)
