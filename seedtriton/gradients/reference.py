"""Every op in eager torch: its definition, the CPU path and the oracle of the kernels' tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .tensor_sums import constant, segment_sum, tensor_sumsq

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

# The summary holds what the training step itself can use, fp64 [SUMMARY_HEAD + segments].
TOTAL_NORM = 0  # root of the sum over all segments
CLIP_COEFFICIENT = 1  # min(1, max_norm / (total norm + CLIP_EPS))
SUMMARY_HEAD = 2  # then the ratio of each segment to the host, of this sample alone


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


@torch.no_grad()
def measured_columns(
    tensors: Sequence[Tensor],
    segments: Sequence[int],
    num_segments: int,
    lanes: torch.dtype,
    device: torch.device,
    vanishing_rms: float = VANISHING_RMS,
    exploding_rms: float = EXPLODING_RMS,
    grad_scale: Tensor | None = None,
) -> Tensor:
    """The first MEASURED columns of one row of the ring, the sums still with their loss scale."""
    sums = tensor_sumsq(tensors, lanes, device) if tensors else torch.empty(0, dtype=torch.float64, device=device)
    elements = tuple(map(Tensor.numel, tensors))
    return columns_of_sums(sums, elements, segments, num_segments, vanishing_rms, exploding_rms, grad_scale)


@torch.no_grad()
def columns_of_sums(
    sums: Tensor,
    elements: Sequence[int],
    segments: Sequence[int],
    num_segments: int,
    vanishing_rms: float,
    exploding_rms: float,
    grad_scale: Tensor | None,
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
        vanishing_rms: a live tensor is vanishing when its root mean square is below this; 0 counts none.
        exploding_rms: a tensor is exploding when its root mean square is above this or not finite; inf counts
            only what is not finite.
        grad_scale: 0-dim or [1], on whatever device; None is 1.
    """
    if not len(elements):
        return torch.zeros(num_segments, MEASURED, dtype=torch.float64, device=sums.device)
    scale = 1.0 if grad_scale is None else grad_scale.to(sums.device).double().reshape(())
    sizes = constant(tuple(elements), torch.float64, sums.device)
    # Squares are compared, in the order of operations of the kernel: no root, and no other rounding.
    low, high = vanishing_rms * scale, exploding_rms * scale
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
def record_(
    gradients: Sequence[Tensor],
    segments: Sequence[int],
    gains: Sequence[Tensor],
    gain_segments: Sequence[int],
    ring: Tensor,
    count: Tensor,
    summary: Tensor,
    max_norm: float,
    eps: float,
    grad_scale: Tensor | None = None,
    gain_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    lanes: torch.dtype = torch.float32,
    vanishing_rms: float = VANISHING_RMS,
    exploding_rms: float = EXPLODING_RMS,
) -> None:
    """Measure one sample: write row ``count % window`` of the ring, the summary, and add 1 to ``count``.

    Args:
        gradients: the gradients that exist in this step, any shapes and floating dtypes.
        segments: the segment of each; 0 is the host.
        gains: gradients of the blend factors alpha (0-dim). The blend gain is -alpha.grad; each is set to
            zero once read, so that the next step starts afresh.
        gain_segments: the seed segment of each of them.
        ring: float64 [window, segments, QUANTITIES], one row overwritten.
        count: int64 0-dim, samples ever written.
        summary: float64 [SUMMARY_HEAD + segments], overwritten.
        max_norm: for the clip coefficient; inf leaves it at 1.
        eps: added to the host's norm in the ratio of this sample.
        grad_scale: 0-dim or [1]; the gradients are this many times too large (loss scaling).
        gain_scale: the same for ``gains``, which ``GradScaler.unscale_`` never reaches.
        found_inf: 0-dim or [1]; not zero means the optimizer will skip this step.
        lanes: dtype in which squares are summed inside a row: float32, or float64 for magnitudes
            outside 1e-19 .. 1e17.
        vanishing_rms: see ``columns_of_sums``.
        exploding_rms: see ``columns_of_sums``.
    """
    num_segments = ring.shape[1]
    elements = tuple(map(Tensor.numel, gradients))
    columns = measured_columns(
        gradients, segments, num_segments, lanes, ring.device, vanishing_rms, exploding_rms, grad_scale
    )
    finish_(
        columns, count_by_segment(elements, segments, num_segments), gains, gain_segments, ring, count, summary,
        max_norm, eps, grad_scale, gain_scale, found_inf,
    )


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
def finish_(
    columns: Tensor,
    counts: Sequence[tuple[int, int]],
    gains: Sequence[Tensor],
    gain_segments: Sequence[int],
    ring: Tensor,
    count: Tensor,
    summary: Tensor,
    max_norm: float,
    eps: float,
    grad_scale: Tensor | None,
    gain_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """The epilogue: from the first columns (float64 [segments, MEASURED]) to the row and the summary.

    ``counts`` has the tensors and elements of every segment; the other arguments are ``record_``'s.
    """
    device = ring.device
    if grad_scale is not None:
        columns = columns.clone()
        columns[:, SUMSQ] /= grad_scale.to(device).double().reshape(()).square()
    known = _known_columns(tuple(counts), device)
    if gains or found_inf is not None:
        known = known.clone()
        extra = known[:, EXTRA - MEASURED]
        if found_inf is not None:
            extra[0] = found_inf.to(device).reshape(()).ne(0)
        if gains:
            slopes = torch.stack([gain.to(device).reshape(()) for gain in gains]).double().neg_()
            if gain_scale is not None:
                slopes /= gain_scale.to(device).double().reshape(())
            extra.index_copy_(0, constant(tuple(gain_segments), torch.int64, device), slopes)
            for gain in gains:
                gain.zero_()
    row = torch.cat([columns, known], dim=1)
    ring.index_copy_(0, count.remainder(ring.shape[0]).view(1), row.unsqueeze(0))
    count.add_(1)

    norms = row[:, SUMSQ].sqrt()
    total = row[:, SUMSQ].sum(dim=0, keepdim=True).sqrt_()
    # As torch.nn.utils.clip_grad_norm_: clamp keeps NaN, so a NaN norm makes NaN gradients, not silence.
    coefficient = (max_norm / (total + CLIP_EPS)).clamp_(max=1.0)
    torch.cat([total, coefficient, norms / (norms[0] + eps)], out=summary)


@lru_cache(maxsize=256)
def _known_columns(counts: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """TENSORS, ELEMENTS and EXTRA where there is no gain and no step is skipped: float64 [segments, 3]."""
    rows = [(tensors, elements, float("nan") if index else 0.0) for index, (tensors, elements) in enumerate(counts)]
    with torch.inference_mode(False):  # as in ``constant``
        return torch.tensor(rows, dtype=torch.float64, device=device)
