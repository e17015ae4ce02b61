"""Every op in eager torch: its definition, the CPU path and the oracle of the kernels' tests.

Sums of squares are fp32 over rows of a few thousand elements and fp64 across rows. `torch._foreach_norm`
on a CPU is off by 1e-3 and more for large fp32 tensors, and rounds to the gradients' dtype for bf16
and fp16; this stays within 1e-6 of fp64.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

# Squares summed in fp32 before fp64 takes over. Equal elements, and squares of the 8-bit mantissas of bf16,
# round the same way again and again: the worst relative error of a row of equal elements is 6e-7 at 256,
# 2e-6 at 1024 and 7e-6 at 4096 (torch 2.13 CPU).
ROW = 256
# Tensors of at most this many elements, of one size and dtype, are summed as one matrix.
SMALL = 1 << 12
# Elements converted at a time on a CPU (2 MiB of fp32, which stays in cache): vector_norm(dtype=float32) of a
# bf16 tensor takes ten times as long, because it converts element by element.
BLOCK = 1 << 19
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


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one run of storage without holes and overlaps, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(tensor.stride(), tensor.shape) if sz != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def dense_view(tensor: Tensor) -> Tensor | None:
    """All elements as a contiguous 1-D view in storage order, or None when there is no such view.

    Covers contiguous, channels_last and every other dense layout; the order of the elements is the storage's,
    which a sum over all of them does not care about.
    """
    if tensor.is_contiguous():
        return tensor.view(-1)
    return tensor.as_strided((tensor.numel(),), (1,)) if is_dense(tensor) else None


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements certainly share memory (an expanded dimension)."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape))


def flat_values(tensor: Tensor) -> Tensor:
    """The values whose squares count, as a contiguous 1-D real tensor.

    Complex numbers become pairs (|z|² = re² + im²), sparse COO tensors their coalesced values; what has
    no dense view (expanded, strided) is copied.
    """
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce().values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    view = dense_view(tensor)
    return tensor.contiguous().view(-1) if view is None else view


def _row_norms(matrix: Tensor, lanes: torch.dtype) -> Tensor:
    """L2 norms of pieces of at most ``ROW`` columns: [k, n] -> [k, ceil(n / ROW)], dtype ``lanes``."""
    whole = matrix.shape[1] // ROW * ROW
    norms = []
    if whole:
        norms.append(torch.linalg.vector_norm(matrix[:, :whole].unflatten(1, (-1, ROW)), dim=2, dtype=lanes))
    if whole < matrix.shape[1]:
        norms.append(torch.linalg.vector_norm(matrix[:, whole:], dim=1, keepdim=True, dtype=lanes))
    return norms[0] if len(norms) == 1 else torch.cat(norms, dim=1)


@lru_cache(maxsize=256)
def _constant(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor of host-known numbers, made once per signature instead of once per call."""
    # inference_mode(False): a tensor cached inside somebody's inference block could not be used outside.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def _segment_sum(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sums of consecutive runs of ``values`` (fp64, [n] or [n, columns]), in order: the same bits on every call."""
    counts = _constant(tuple(lengths), torch.int64, values.device)
    # unsafe=True only skips the check that lengths are non-negative and add up, which would synchronise.
    return torch.segment_reduce(values, "sum", lengths=counts, initial=0.0, unsafe=True)


_Sums = Callable[[Sequence[Tensor], torch.dtype], Tensor]


def tensor_sumsq(tensors: Sequence[Tensor], lanes: torch.dtype, device: torch.device) -> Tensor:
    """Sum of squares of each tensor, float64 [len(tensors)] on ``device``; tensors may lie on several."""
    batches: dict[tuple[torch.device, _Sums], list[int]] = {}
    for index, tensor in enumerate(tensors):
        batches.setdefault((tensor.device, _way(tensor, lanes)), []).append(index)
    found = []
    for (_, sums), indices in batches.items():
        found.append(sums([tensors[index] for index in indices], lanes).to(device))
    if len(found) == 1:
        return found[0]
    order = [index for indices in batches.values() for index in indices]
    sums_in_order = torch.empty(len(tensors), dtype=torch.float64, device=device)
    return sums_in_order.index_copy_(0, _constant(tuple(order), torch.int64, device), torch.cat(found))


def _way(tensor: Tensor, lanes: torch.dtype) -> _Sums:
    """Which of the three ways below sums this tensor best."""
    if tensor.is_floating_point() and tensor.layout == torch.strided and tensor.numel() <= SMALL:
        return _small_sumsq
    if tensor.dtype in (lanes, torch.float64, torch.complex128):
        return _large_sumsq
    return _converted_sumsq if tensor.device.type == "cpu" or tensor.dtype.itemsize == 1 else _large_sumsq


def _small_sumsq(tensors: Sequence[Tensor], lanes: torch.dtype) -> Tensor:
    """Sums of squares of tensors of at most SMALL elements; those of one size make one matrix.

    Networks have few sizes of biases and norms but many of each, and an operation of its own for each
    tensor costs several times what its elements cost.
    """
    sizes: dict[tuple[int, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        sizes.setdefault((tensor.numel(), tensor.dtype), []).append(index)
    found = []
    for (size, dtype), indices in sizes.items():
        wide = torch.float64 if dtype == torch.float64 else lanes
        step = max(1, BLOCK // max(1, size))
        for begin in range(0, len(indices), step):
            part = [tensors[index].reshape(-1) for index in indices[begin : begin + step]]
            if size:
                found.append(_row_norms(torch.stack(part).to(wide), wide).double().square_().sum(dim=1))
            else:
                found.append(torch.zeros(len(part), dtype=torch.float64, device=part[0].device))
    order = [index for indices in sizes.values() for index in indices]
    sums = torch.cat(found)
    if order == list(range(len(order))):
        return sums
    return torch.empty_like(sums).index_copy_(0, _constant(tuple(order), torch.int64, sums.device), sums)


def _large_sumsq(tensors: Sequence[Tensor], lanes: torch.dtype) -> Tensor:
    rows: list[Tensor] = []
    lengths = []
    for tensor in tensors:
        values = flat_values(tensor)
        # An fp64 gradient keeps fp64 lanes, so rows of two dtypes may meet here.
        wide = torch.float64 if values.dtype == torch.float64 else lanes
        norms = _row_norms(values.view(1, -1), wide).view(-1) if len(values) else values.new_zeros(0, dtype=wide)
        rows.append(norms)
        lengths.append(len(norms))
    if len({norm.dtype for norm in rows}) > 1:
        rows = [norm.double() for norm in rows]
    return _segment_sum(torch.cat(rows).double().square_(), lengths)


def _converted_sumsq(tensors: Sequence[Tensor], lanes: torch.dtype) -> Tensor:
    """As ``_large_sumsq``, for dtypes that vector_norm would convert one by one: rows fill one buffer in turn."""
    device = tensors[0].device
    buffer = _buffer(lanes) if device.type == "cpu" else torch.empty(BLOCK, dtype=lanes, device=device)
    rows = []
    lengths = []
    used = 0
    for tensor in tensors:
        values = flat_values(tensor)
        size = len(values)
        lengths.append(-(-size // ROW))
        begin = 0
        while begin < size:
            end = min(size, begin + BLOCK - used)
            filled = used + end - begin
            buffer[used:filled].copy_(values if end - begin == size else values[begin:end])
            # A tensor's last row is filled up with zeros, so that the next begins a row of its own.
            used = -(-filled // ROW) * ROW
            if used > filled:
                buffer[filled:used].zero_()
            begin = end
            if used == BLOCK:
                rows.append(torch.linalg.vector_norm(buffer.view(-1, ROW), dim=1))
                used = 0
    if used:
        rows.append(torch.linalg.vector_norm(buffer[:used].view(-1, ROW), dim=1))
    if not rows:
        return torch.zeros(len(tensors), dtype=torch.float64, device=device)
    return _segment_sum(torch.cat(rows).double().square_(), lengths)


_local = threading.local()


def _buffer(lanes: torch.dtype) -> Tensor:
    """BLOCK elements on the CPU, one buffer per thread and dtype: fresh memory costs a page fault every 4 KiB."""
    found: Tensor | None = getattr(_local, str(lanes), None)
    if found is None:
        with torch.inference_mode(False):
            found = torch.empty(BLOCK, dtype=lanes)
        setattr(_local, str(lanes), found)
    return found


def _sum_by_segment(values: Tensor, segments: Sequence[int], num_segments: int) -> Tensor:
    """Sums of ``values`` (one or one row per tensor) by segment, in tensor order within each."""
    order = sorted(range(len(segments)), key=segments.__getitem__)
    if order != list(range(len(segments))):
        values = values.index_select(0, _constant(tuple(order), torch.int64, values.device))
    lengths = [0] * num_segments
    for segment in segments:
        lengths[segment] += 1
    return _segment_sum(values, lengths)


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
    elements = [tensor.numel() for tensor in tensors]
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
    sizes = _constant(tuple(elements), torch.float64, sums.device)
    # Squares are compared, in the order of operations of the kernel: no root, and no other rounding.
    low, high = vanishing_rms * scale, exploding_rms * scale
    live = sums.ne(0.0)
    vanishing = live & sums.lt(low * low * sizes)
    exploding = sums.gt(high * high * sizes) | sums.isfinite().logical_not()
    columns = torch.stack([sums, live.double(), vanishing.double(), exploding.double()], dim=1)
    return _sum_by_segment(columns, segments, num_segments)


@torch.no_grad()
def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """Multiply every tensor in place by a 0-dim ``coefficient``, in fp32 or wider, rounded once.

    At exactly 1 nothing is touched, if that can be seen: on a CPU the value is looked at; elsewhere looking
    would wait for the device, and this eager form multiplies always (the Triton kernel looks on the device).
    """
    if coefficient.device.type == "cpu":
        value = coefficient.item()
        if value == 1.0:
            return
        for tensor in tensors:
            if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1:
                tensor.copy_(tensor.float() * value)  # torch has no arithmetic for fp8
            else:
                tensor.mul_(value)
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
            outside 1e-19 .. 1e19.
        vanishing_rms: see ``columns_of_sums``.
        exploding_rms: see ``columns_of_sums``.
    """
    num_segments = ring.shape[1]
    columns = measured_columns(
        gradients, segments, num_segments, lanes, ring.device, vanishing_rms, exploding_rms, grad_scale
    )
    elements = [gradient.numel() for gradient in gradients]
    finish_(
        columns, count_by_segment(elements, segments, num_segments), gains, gain_segments, ring, count, summary,
        max_norm, eps, grad_scale, gain_scale, found_inf,
    )


def count_by_segment(
    elements: Sequence[int], segments: Sequence[int], num_segments: int
) -> list[tuple[int, int]]:
    """How many tensors every segment has, and how many elements in all; ``elements`` is of each tensor."""
    counts = [(0, 0)] * num_segments
    for size, segment in zip(elements, segments):
        number, total = counts[segment]
        counts[segment] = number + 1, total + size
    return counts


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
    num_segments = ring.shape[1]
    device = ring.device
    sumsq = columns[:, SUMSQ]
    if grad_scale is not None:
        sumsq = sumsq / grad_scale.to(device).double().reshape(()).square()

    extra = torch.full((num_segments,), float("nan"), dtype=torch.float64, device=device)
    extra[0] = 0.0 if found_inf is None else found_inf.to(device).reshape(()).ne(0).double()
    for gain, segment in zip(gains, gain_segments):
        value = -gain.to(device).double().reshape(())
        extra[segment] = value if gain_scale is None else value / gain_scale.to(device).double().reshape(())
        gain.zero_()
    row = torch.stack(
        [
            sumsq,
            columns[:, LIVE],
            columns[:, VANISHING],
            columns[:, EXPLODING],
            _constant(tuple(tensors for tensors, _ in counts), torch.float64, device),
            _constant(tuple(elements for _, elements in counts), torch.float64, device),
            extra,
        ],
        dim=1,
    )
    ring.index_copy_(0, count.remainder(ring.shape[0]).view(1), row.unsqueeze(0))
    count.add_(1)

    total = sumsq.sum().sqrt()
    summary[TOTAL_NORM] = total
    # As torch.nn.utils.clip_grad_norm_: clamp keeps NaN, so a NaN norm makes NaN gradients, not silence.
    summary[CLIP_COEFFICIENT] = (max_norm / (total + CLIP_EPS)).clamp(max=1.0)
    summary[SUMMARY_HEAD:] = sumsq.sqrt() / (sumsq[0].sqrt() + eps)
