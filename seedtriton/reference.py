"""Every op in eager torch: its definition, the CPU path and the oracle of the kernels' tests.

Sums of squares are fp32 over rows of a few hundred elements and fp64 across rows. `torch._foreach_norm`
on a CPU is off by 1e-3 and more for large fp32 tensors, and rounds to the gradients' dtype for bf16
and fp16; this stays within 1e-6 of fp64.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

# Squares summed in fp32 before fp64 takes over. Equal elements, and squares of the 8-bit mantissas of bf16,
# round the same way again and again: the worst relative error of a row of equal elements is 6e-7 at 256,
# 2e-6 at 1024 and 7e-6 at 4096 (torch 2.13 CPU).
ROW = 256
# Tensors of at most this many elements are copied behind each other and summed as one: what an operation costs
# whatever it does (2 µs, 10 µs once a few MB have gone through the caches) is more than a copy of so few.
SMALL = 1 << 14
# Elements copied or converted at a time (4 MiB of fp32). Smaller blocks, which would stay in the L2 cache, lose more
# to the operations than they gain: bf16 takes 20 % longer at 1 << 18. vector_norm(dtype=float32) of a bf16 tensor
# takes ten times as long, because it converts element by element.
BLOCK = 1 << 20
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


@lru_cache(maxsize=256)
def _constant(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor of host-known numbers, made once per signature instead of once per call."""
    # inference_mode(False): a tensor cached inside somebody's inference block could not be used outside.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def _segment_sum(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums of consecutive runs of ``values`` (fp64, [n] or [n, columns]), in order: the same bits on every call."""
    # unsafe=True only skips the check that lengths are non-negative and add up, which would synchronise.
    return torch.segment_reduce(values, "sum", lengths=lengths, initial=0.0, unsafe=True)


# map() over these and over unbound methods takes half the time of a loop.
_device_of, _dtype_of, _is_sparse = attrgetter("device"), attrgetter("dtype"), attrgetter("is_sparse")


def tensor_sumsq(tensors: Sequence[Tensor], lanes: torch.dtype, device: torch.device) -> Tensor:
    """Sum of squares of each tensor, float64 [len(tensors)] on ``device``; tensors may lie on several."""
    devices = tuple(map(_device_of, tensors))
    if len(set(devices)) == 1:
        return _sumsq_on(devices[0], tensors, lanes).to(device)
    sums = torch.empty(len(tensors), dtype=torch.float64, device=device)
    for place in dict.fromkeys(devices):
        mine = tuple(index for index, other in enumerate(devices) if other == place)
        found = _sumsq_on(place, [tensors[index] for index in mine], lanes).to(device)
        sums.index_copy_(0, _constant(mine, torch.int64, device), found)
    return sums


class _Run(NamedTuple):
    """A tensor, or several small ones of one dtype that are copied behind each other."""

    indices: tuple[int, ...]
    pads: tuple[Tensor, ...]  # zeros behind each, up to a whole row; () when all of them are whole rows
    size: int  # elements, pads included


class _Plan(NamedTuple):
    """How tensors on one device are summed. It depends on their signature and holds none of them."""

    direct: list[_Run]
    converted: list[_Run]
    lengths: Tensor  # int64, rows of each tensor in the order of the runs, the direct ones first
    places: Tensor | None  # int64, where in that order each tensor is; None: it is the order of the tensors


@lru_cache(maxsize=256)
def _plan(numels: tuple[int, ...], dtypes: tuple[torch.dtype, ...], lanes: torch.dtype, device: torch.device) -> _Plan:
    """Small tensors share runs of one dtype and at most BLOCK elements, each of the others is a run."""
    runs: list[list[int]] = []
    small: dict[torch.dtype, list[int]] = {}
    for index, (size, dtype) in enumerate(zip(numels, dtypes)):
        if size > SMALL:
            runs.append([index])
        else:
            small.setdefault(dtype, []).append(index)
    rows = [-(-size // ROW) for size in numels]
    for indices in small.values():
        used = BLOCK + 1  # none is open
        for index in indices:
            used += rows[index] * ROW
            if used > BLOCK:
                used = rows[index] * ROW
                runs.append([])
            runs[-1].append(index)

    def is_converted(run: list[int]) -> bool:
        dtype = dtypes[run[0]]
        return dtype not in (lanes, torch.float64) and (device.type == "cpu" or dtype.itemsize == 1)

    zeros = {dtype: torch.zeros(ROW, dtype=dtype, device=device) for dtype in small}
    pads = {key: zeros[key[0]][: -key[1] % ROW] for key in set(zip(dtypes, numels)) if key[1] <= SMALL}

    def planned(run: list[int]) -> _Run:
        fill = tuple(pads[dtypes[index], numels[index]] for index in run) if len(run) > 1 else ()
        return _Run(tuple(run), fill if any(map(len, fill)) else (), ROW * sum(rows[index] for index in run))

    runs.sort(key=is_converted)
    order = [index for run in runs for index in run]
    places = tuple(sorted(range(len(order)), key=order.__getitem__))
    return _Plan(
        [planned(run) for run in runs if not is_converted(run)],
        [planned(run) for run in runs if is_converted(run)],
        _constant(tuple(rows[index] for index in order), torch.int64, device),
        None if order == sorted(order) else _constant(places, torch.int64, device),
    )


def _sumsq_on(device: torch.device, tensors: Sequence[Tensor], lanes: torch.dtype) -> Tensor:
    """``tensor_sumsq`` for tensors that all lie on ``device``."""
    dtypes = tuple(map(_dtype_of, tensors))
    if any(map(_is_sparse, tensors)) or any(dtype.is_complex for dtype in set(dtypes)):
        tensors = [flat_values(tensor) if tensor.is_sparse or tensor.is_complex() else tensor for tensor in tensors]
        dtypes = tuple(map(_dtype_of, tensors))
    plan = _plan(tuple(map(Tensor.numel, tensors)), dtypes, lanes, device)
    norms = [_row_norms(_values(run, tensors), lanes) for run in plan.direct]
    if plan.converted:
        norms += _converted_row_norms((_values(run, tensors) for run in plan.converted), lanes, device)
    # Where lanes are fp32, the rows of an fp64 gradient are fp64 all the same: cat promotes.
    sums = _segment_sum(torch.cat(norms).double().square_(), plan.lengths)
    return sums if plan.places is None else sums.index_select(0, plan.places)


def _values(run: _Run, tensors: Sequence[Tensor]) -> Tensor:
    """The elements of a run, contiguous: of several tensors 1-D behind each other, each filled up to whole rows.

    They lie in the buffer of their dtype, until the next run of that dtype.
    """
    if len(run.indices) == 1:
        alone = tensors[run.indices[0]]
        return alone if alone.is_contiguous() else flat_values(alone)
    parts = [tensors[index].flatten() for index in run.indices]
    if run.pads:
        parts = [part for pair in zip(parts, run.pads) for part in pair]
    buffer = _buffer(parts[0].dtype, parts[0].device)[: run.size]
    torch.cat(parts, out=buffer)
    return buffer


def _row_norms(values: Tensor, lanes: torch.dtype) -> Tensor:
    """L2 norms of rows of ROW elements, the last may be shorter, of contiguous values: ``lanes`` or fp64, 1-D."""
    wide = torch.float64 if values.dtype == torch.float64 else lanes
    rest = values.numel() % ROW
    if not rest:
        norms: Tensor = torch.linalg.vector_norm(values.view(-1, ROW), dim=1, dtype=wide)
        return norms
    values = values.view(-1)
    whole = torch.linalg.vector_norm(values[:-rest].view(-1, ROW), dim=1, dtype=wide)
    last = torch.linalg.vector_norm(values[-rest:], dim=0, keepdim=True, dtype=wide)
    return torch.cat([whole, last])


def _converted_row_norms(tensors: Iterable[Tensor], lanes: torch.dtype, device: torch.device) -> list[Tensor]:
    """As ``_row_norms`` of each, for dtypes that vector_norm would convert one by one: they fill a buffer in turn."""
    buffer = _buffer(lanes, device)
    norms = []
    used = 0
    for values in tensors:
        values = values.view(-1)
        size = len(values)
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
                norms.append(_row_norms(buffer, lanes))
                used = 0
    norms.append(_row_norms(buffer[:used], lanes))
    return norms


_local = threading.local()


def _buffer(dtype: torch.dtype, device: torch.device) -> Tensor:
    """BLOCK elements; on the CPU one buffer per thread and dtype: fresh memory costs a page fault every 4 KiB."""
    if device.type != "cpu":
        return torch.empty(BLOCK, dtype=dtype, device=device)
    found: Tensor | None = getattr(_local, str(dtype), None)
    if found is None:
        with torch.inference_mode(False):
            found = torch.empty(BLOCK, dtype=dtype)
        setattr(_local, str(dtype), found)
    return found


@lru_cache(maxsize=256)
def _grouping(segments: tuple[int, ...], num_segments: int, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """The order that sorts tensors by segment (None: sorted already), and how many each segment has; int64."""
    order = tuple(sorted(range(len(segments)), key=segments.__getitem__))
    counts = Counter(segments)
    return (
        None if order == tuple(range(len(order))) else _constant(order, torch.int64, device),
        _constant(tuple(counts[segment] for segment in range(num_segments)), torch.int64, device),
    )


def _sum_by_segment(values: Tensor, segments: Sequence[int], num_segments: int) -> Tensor:
    """Sums of ``values`` (one or one row per tensor) by segment, in tensor order within each."""
    order, lengths = _grouping(tuple(segments), num_segments, values.device)
    return _segment_sum(values if order is None else values.index_select(0, order), lengths)


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
