"""One launch for every gradient: sums of squares by segment, and from them one row of the ring.

Each byte is read once. Programs write partial sums; the last one of a segment adds them in index order, the
last one of all finishes the sample. Equal input at equal alignment gives equal bits, on any grid. What a row
means is defined in seedtriton/gradients/row.py and reference.py; nothing here decides anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from seedtriton.kernels import _launch, _row
from seedtriton.kernels._launch import Noted, Unsupported, release, unsupported

if TYPE_CHECKING:
    from seedtriton.gradients.row import Flat, Listed, LossScale, Outside, RowLayout, Rules, Window

__all__ = ["Unsupported", "record_", "release", "segmented_sumsq", "unsupported"]

# Bytes that a program reads per block, by lanes and by the width of its 4 warps: 32 bytes per thread, two 128-bit
# loads. Four blocks are read before any is squared, so that 128 bytes per thread are in flight. fp64 lanes take twice
# the registers, hence half of that, but never less than one 128-bit load; fp32 lanes have one size, for one order of
# additions.
BLOCK_BYTES = {
    (torch.float32, 32): 4096,
    (torch.float32, 64): 4096,
    (torch.float64, 32): 2048,
    (torch.float64, 64): 4096,
}
LANES = {torch.float32: tl.float32, torch.float64: tl.float64}
# Smallest block of segments; larger ones are powers of two, so that few variants are ever compiled.
MIN_SEGMENTS = 32
# ``layout`` of ``segmented_sumsq``: ``outside`` has one column, and there is no row.
SUMS_LAYOUT = (0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


@triton.jit
def _group(a, b, c, d, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum of the squares of four blocks, in pairs: half as many roundings in a row as one after the other."""
    a, b, c, d = a.to(LANES), b.to(LANES), c.to(LANES), d.to(LANES)
    return (a * a + b * b) + (c * c + d * d)


@triton.jit
def _square_words(  # type: ignore[no-untyped-def]
    address, length, DTYPE: tl.constexpr, LANES: tl.constexpr, BYTES: tl.constexpr
):
    """Sums of x² over ``length`` elements at ``address`` (int64, a multiple of the element's size), [BYTES // 16].

    The body from the first 16-byte boundary to the last is read by 128-bit loads, whole groups of four blocks without
    a mask; at most 15 bytes before it and 15 after it, the edge, by one masked load. What a thread has read is summed
    in fp32, where fp64 is 64 times slower on some GPUs: never more than 27 additions in a row for 256 KiB.
    """
    SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
    WORD: tl.constexpr = 16 // SIZE
    # Blocks of equal bytes, hence of different shapes: accesses of one shape share one layout, and the eight
    # bf16 of a word would make each thread read 32 bytes of fp32, every warp-wide load half coalesced.
    WORDS: tl.constexpr = BYTES // 16
    BLOCK: tl.constexpr = BYTES // SIZE
    head = tl.minimum(((-address & 15) // SIZE).to(tl.int32), length)
    words = (length - head) // WORD
    groups = words // (4 * WORDS)
    word = tl.arange(0, WORDS)
    # The edge is asked for before the body, so that nobody waits for it at the end.
    edge = tl.where(word < head, word, word + words * WORD)
    z = tl.load(address.to(tl.pointer_type(DTYPE)) + edge, mask=word < length - words * WORD, other=0.0).to(LANES)
    cell = word[:, None] * WORD + tl.arange(0, WORD)[None, :]
    squares = tl.zeros([WORDS, WORD], LANES)
    # The promise of alignment counts only on the pointer: on the integer the compiler forgets it.
    body = tl.multiple_of((address + head * SIZE).to(tl.pointer_type(DTYPE)), 16)
    for group in range(groups):
        at = body + group * (4 * BLOCK) + cell
        squares += _group(tl.load(at), tl.load(at + BLOCK), tl.load(at + 2 * BLOCK), tl.load(at + 3 * BLOCK), LANES)
    rest = words - groups * (4 * WORDS)
    if rest > 0:
        at = body + groups * (4 * BLOCK) + cell
        # A mask of whole words lets vector loads be.
        left = rest - word[:, None]
        squares += _group(
            tl.load(at, mask=left > 0, other=0.0), tl.load(at + BLOCK, mask=left > WORDS, other=0.0),
            tl.load(at + 2 * BLOCK, mask=left > 2 * WORDS, other=0.0),
            tl.load(at + 3 * BLOCK, mask=left > 3 * WORDS, other=0.0), LANES,
        )  # fmt: skip
    return tl.sum(squares, axis=1) + z * z


@triton.jit
def _sum_item(item, addresses, meta, items, base, LANES: tl.constexpr, BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of squares of an item."""
    length = tl.load(meta + item)
    dtype = tl.load(meta + 2 * items + item)
    address = base + tl.load(addresses + item)
    # A uniform branch: all threads of a program take the same side. One helper call per dtype, because a
    # variable cannot hold pointers of two types.
    if dtype == 0:
        sums = _square_words(address, length, tl.float32, LANES, BYTES)
    elif dtype == 1:
        sums = _square_words(address, length, tl.bfloat16, LANES, BYTES)
    else:
        sums = _square_words(address, length, tl.float16, LANES, BYTES)
    return tl.sum(sums.to(tl.float64))


@triton.jit
def _run_item(  # type: ignore[no-untyped-def]
    item, addresses, meta, work, counters, items, slots, num_segments, busy_segments, base, outside, grad_scale,
    vanishing_rms, exploding_rms, LANES: tl.constexpr, BYTES: tl.constexpr, EPILOGUE: tl.constexpr,
    COUNTERS: tl.constexpr, GUARDED: tl.constexpr, MEASURED: tl.constexpr, SUMSQ: tl.constexpr,
):  # fmt: skip
    """Sum an item; whoever completes its segment closes it. Whether that was the last one."""
    partial = _sum_item(item, addresses, meta, items, base, LANES, BYTES)
    complete = item < 0
    if COUNTERS:
        complete = _row.report_item(
            item, partial, addresses, meta, work, counters, items, slots, num_segments, busy_segments, base, outside,
            grad_scale, vanishing_rms, exploding_rms, EPILOGUE, GUARDED, MEASURED, SUMSQ,
        )  # fmt: skip
    else:
        tl.store(work + item, partial)
    return complete


# Nothing is specialised on values: one compiled kernel then serves every call, and can be called directly.
_RUNTIME = (
    "addresses", "meta", "work", "counters", "items", "slots", "num_segments", "busy_segments", "base",
    "summary", "outside", "grad_scale", "gain_scale", "found_inf", "max_norm", "eps", "vanishing_rms",
    "exploding_rms",
)  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def _sums_kernel(  # type: ignore[no-untyped-def]
    addresses: tl.int64, meta: tl.int64, work: tl.int64, counters: tl.int64,
    items: tl.int32, slots: tl.int32, num_segments: tl.int32, busy_segments: tl.int32, base: tl.int64,
    summary: tl.int64, outside: tl.int64, grad_scale: tl.int64, gain_scale: tl.int64,
    found_inf: tl.int64, max_norm: tl.float64, eps: tl.float64, vanishing_rms: tl.float64,
    exploding_rms: tl.float64,
    LANES: tl.constexpr, BYTES: tl.constexpr, SEGMENTS: tl.constexpr,
    EPILOGUE: tl.constexpr, COUNTERS: tl.constexpr, PERSISTENT: tl.constexpr, CLIP_EPS: tl.constexpr,
    SUMSQ: tl.constexpr, LIVE: tl.constexpr, VANISHING: tl.constexpr, EXPLODING: tl.constexpr,
    MEASURED: tl.constexpr, TENSORS: tl.constexpr, ELEMENTS: tl.constexpr, EXTRA: tl.constexpr,
    QUANTITIES: tl.constexpr, TOTAL_NORM: tl.constexpr, CLIP_COEFFICIENT: tl.constexpr,
    GRAD_SCALE: tl.constexpr, SUMMARY_HEAD: tl.constexpr, APART: tl.constexpr, GUARDED: tl.constexpr,
):  # fmt: skip
    """sumsq[k] = sum of x² over segment k; with EPILOGUE a row of the ring and the summary, else the sums.

    addresses: int64 [items], relative to ``base``; for a row also [num_segments] of the gains (0:
        none), then the modes [num_segments], the addresses of the ring and the count, the window itself, and the
        addresses of the number of samples before this one and of those numbers for the next
    meta: int32, columns of the plan: 6 x [items], item and slot starts 2 x [num_segments + 1], and the entry of each
        tensor in the table of tensors [slots]
    work: 8 bytes each, partial sums [items], sums and (int64) marks of closed segments [2, num_segments], tensors and
        elements [2, num_segments], (int64) the addresses of that number and of the table of tensors [4] and the sum of
        those of this launch's counters and of the other ones, elements, (int64) marks and sums of tensors [3, slots]
    counters: int32 [num_segments + 1 + slots], zero between calls
    """
    # Addresses come as integers, so that nothing depends on how a pointer argument happens to be aligned.
    address_table = addresses.to(tl.int64).to(tl.pointer_type(tl.int64))
    meta_table = meta.to(tl.int64).to(tl.pointer_type(tl.int32))
    work_table = work.to(tl.int64).to(tl.pointer_type(tl.float64))
    counter_table = counters.to(tl.int64).to(tl.pointer_type(tl.int32))
    first = tl.program_id(0)
    # One program, one item, unless a smaller grid is asked for: the partial sums are the items' either way.
    if PERSISTENT:
        complete = first < 0
        for item in range(first, items, tl.num_programs(0)):
            complete = complete | _run_item(
                item, address_table, meta_table, work_table, counter_table, items, slots, num_segments, busy_segments,
                base.to(tl.int64), outside.to(tl.int64), grad_scale.to(tl.int64), vanishing_rms, exploding_rms, LANES,
                BYTES, EPILOGUE, COUNTERS, GUARDED, MEASURED, SUMSQ,
            )  # fmt: skip
    else:
        complete = _run_item(
            first, address_table, meta_table, work_table, counter_table, items, slots, num_segments, busy_segments,
            base.to(tl.int64), outside.to(tl.int64), grad_scale.to(tl.int64), vanishing_rms, exploding_rms, LANES,
            BYTES, EPILOGUE, COUNTERS, GUARDED, MEASURED, SUMSQ,
        )  # fmt: skip
    # Behind the loop: in it, what finishing needs would be registers of every turn.
    if COUNTERS:  # noqa: SIM102 - decided by the compiler, the other one by the program
        if complete:
            _row.finish(
                work_table, meta_table + 6 * items + num_segments + 1, address_table + items, items, num_segments,
                summary.to(tl.int64), outside.to(tl.int64), grad_scale.to(tl.int64), gain_scale.to(tl.int64),
                found_inf.to(tl.int64), max_norm, eps, CLIP_EPS, EPILOGUE, SEGMENTS, SUMSQ, LIVE, VANISHING, EXPLODING,
                MEASURED, TENSORS, ELEMENTS, EXTRA, QUANTITIES, TOTAL_NORM, CLIP_COEFFICIENT, GRAD_SCALE, SUMMARY_HEAD,
                APART, GUARDED,
            )  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def _finish_kernel(  # type: ignore[no-untyped-def]
    addresses: tl.int64, meta: tl.int64, work: tl.int64, counters: tl.int64,
    items: tl.int32, slots: tl.int32, num_segments: tl.int32, busy_segments: tl.int32, base: tl.int64,
    summary: tl.int64, outside: tl.int64, grad_scale: tl.int64, gain_scale: tl.int64,
    found_inf: tl.int64, max_norm: tl.float64, eps: tl.float64, vanishing_rms: tl.float64,
    exploding_rms: tl.float64,
    LANES: tl.constexpr, BYTES: tl.constexpr, SEGMENTS: tl.constexpr,
    EPILOGUE: tl.constexpr, COUNTERS: tl.constexpr, PERSISTENT: tl.constexpr, CLIP_EPS: tl.constexpr,
    SUMSQ: tl.constexpr, LIVE: tl.constexpr, VANISHING: tl.constexpr, EXPLODING: tl.constexpr,
    MEASURED: tl.constexpr, TENSORS: tl.constexpr, ELEMENTS: tl.constexpr, EXTRA: tl.constexpr,
    QUANTITIES: tl.constexpr, TOTAL_NORM: tl.constexpr, CLIP_COEFFICIENT: tl.constexpr,
    GRAD_SCALE: tl.constexpr, SUMMARY_HEAD: tl.constexpr, APART: tl.constexpr, GUARDED: tl.constexpr,
):  # fmt: skip
    """The second of two launches, one program: closes every segment and finishes, without any counter.

    Takes what the first took. The oracle of the single launch: same partial sums, same order, same bits.
    """
    address_table = addresses.to(tl.int64).to(tl.pointer_type(tl.int64))
    work_table = work.to(tl.int64).to(tl.pointer_type(tl.float64))
    meta_table = meta.to(tl.int64).to(tl.pointer_type(tl.int32))
    for item in range(items):
        if tl.load(meta_table + 4 * items + item) == 0:
            parts = tl.load(meta_table + 5 * items + item)
            sumsq = _row.sum_range(work_table, item, item + parts, _row.TENSOR_BLOCK)
            slot = tl.load(meta_table + 3 * items + item)
            facts = _row.facts_of_tensor(
                slot, meta_table, work_table, items, slots, num_segments, grad_scale.to(tl.int64), EPILOGUE
            )
            _row.close_tensor(
                slot, sumsq, facts, work_table, items, slots, num_segments, vanishing_rms, exploding_rms, EPILOGUE
            )
    # Different threads read below what one thread stored above.
    tl.debug_barrier()
    slot_starts = meta_table + 6 * items + num_segments + 1
    for segment in range(num_segments):
        first, last = tl.load(slot_starts + segment), tl.load(slot_starts + segment + 1)
        total = _row.close_segment(segment, first, last, work_table, items, slots, num_segments, EPILOGUE)
        if EPILOGUE:
            mode = tl.load(address_table + items + num_segments + segment)
            _row.clear_segment(
                segment, total, mode, address_table, meta_table, items, base.to(tl.int64), outside.to(tl.int64),
                GUARDED, MEASURED, SUMSQ,
            )  # fmt: skip
    tl.debug_barrier()
    _row.finish(
        work_table, slot_starts, address_table + items, items, num_segments, summary.to(tl.int64),
        outside.to(tl.int64), grad_scale.to(tl.int64), gain_scale.to(tl.int64), found_inf.to(tl.int64), max_norm, eps,
        CLIP_EPS, EPILOGUE, SEGMENTS, SUMSQ, LIVE, VANISHING, EXPLODING, MEASURED, TENSORS, ELEMENTS, EXTRA,
        QUANTITIES, TOTAL_NORM, CLIP_COEFFICIENT, GRAD_SCALE, SUMMARY_HEAD, APART, GUARDED,
    )  # fmt: skip


def _arguments(
    tables: _launch.Tables,
    flat: Tensor | None,
    summary: Tensor,
    outside: Tensor | None,
    scalars: tuple[int, ...],
    numbers: tuple[float, float, float, float],
) -> tuple[Any, ...]:
    """The run-time arguments of both kernels."""
    return (
        tables.addresses, tables.meta, tables.work_address, tables.turn(), tables.items, tables.slots,
        tables.plan.num_segments, tables.busy_segments, _address(flat), summary.data_ptr(),
        _address(outside), *scalars, *numbers,
    )  # fmt: skip


@lru_cache(maxsize=64)
def _constants(
    num_segments: int,
    lanes: torch.dtype,
    epilogue: bool,
    counters: bool,
    persistent: bool,
    clip_eps: float,
    layout: tuple[int, ...],
    warp_size: int,
) -> tuple[Any, ...]:
    """The compile-time arguments of both kernels."""
    segments = max(MIN_SEGMENTS, triton.next_power_of_2(num_segments))
    return (
        LANES[lanes], BLOCK_BYTES[lanes, max(warp_size, 32)], segments, epilogue,
        counters, persistent, clip_eps, *layout,
    )  # fmt: skip


def _launch_sums(
    tables: _launch.Tables,
    arguments: tuple[Any, ...],
    lanes: torch.dtype,
    epilogue: bool,
    clip_eps: float,
    layout: tuple[int, ...],
    programs: int | None,
    two_launches: bool,
) -> None:
    grid = tables.items if programs is None else min(programs, tables.items)
    constants = _constants(
        tables.plan.num_segments, lanes, epilogue, not two_launches, grid < tables.items, clip_eps, layout,
        _launch.warp_size(tables.kind),
    )  # fmt: skip
    tables.launch(_sums_kernel, grid, arguments, constants)
    if two_launches:
        tables.launch(_finish_kernel, 1, arguments, constants)


def segmented_sumsq(
    tensors: Sequence[Tensor],
    segments: Sequence[int],
    num_segments: int,
    lanes: torch.dtype = torch.float32,
    outside: Tensor | None = None,
    *,
    flat: Tensor | None = None,
    programs: int | None = None,
    two_launches: bool = False,
) -> Tensor:
    """``out[k]`` = sum of g² over the tensors of segment k, float64 [num_segments], in one launch.

    Args:
        tensors: at least one; all on the first one's device, float32, bfloat16 or float16, dense.
        segments: the segment of each.
        num_segments: length of the result.
        lanes: dtype in which squares are first summed, float32 or float64.
        outside: float64 [num_segments, 1], sums of squares of what went elsewhere.
        flat: a buffer of which all ``tensors`` are views that never move within it.
        programs: size of the grid; the result does not depend on it.
        two_launches: without counters, the oracle of the single launch; the same bits.

    Raises:
        Unsupported: a tensor that the kernel cannot take.
        ValueError: no tensors, or ``outside`` of another shape.
        Uncapturable: a new address while a CUDA graph is captured.
    """
    if not tensors:
        raise ValueError("segmented_sumsq got no tensors, so it knows no device: return zeros without it")
    device = tensors[0].device
    out = torch.empty(num_segments, dtype=torch.float64, device=device)
    outside = _outside(outside, (num_segments, 1), device)
    with _launch.guard(device), _launch.lock():
        tables = _launch.find_tables(tensors, segments, num_segments, device, ("sums",), flat=flat)
        arguments = _arguments(tables, flat, out, outside, (0, 0, 0), (0.0, 0.0, 0.0, 0.0))
        _launch_sums(tables, arguments, lanes, False, 0.0, SUMS_LAYOUT, programs, two_launches)
    return out


def record_(
    gradients: Listed,
    gains: Listed,
    window: Window,
    rules: Rules,
    scale: LossScale,
    *,
    layout: RowLayout,
    clip_eps: float,
    outside: Outside | None = None,
    flat: Flat | None = None,
    programs: int | None = None,
    two_launches: bool = False,
) -> None:
    """``seedtriton.gradients.reference.record_`` in one launch: a row of the ring, the summary, ``count`` + 1.

    Gradients of guarded segments that are not finite become zeros, as by ``reference.quarantine_``.

    What is passed together is described in seedtriton/gradients/row.py.

    Args:
        gradients: on the ring's device, float32, bfloat16 or float16, dense.
        gains: float32 with one element each, on the ring's device, all of different segments; read and set to zero.
        window: contiguous.
        rules: by what the sample is summed and judged.
        scale: numbers of one element; anything but float32 on the ring's device is converted first.
        layout: the columns of a row and the places in the summary.
        clip_eps: CLIP_EPS of ``row``.
        outside: what of the sample was summed elsewhere.
        flat: a buffer of which all gradients are views.
        programs: size of the grid; the result does not depend on it.
        two_launches: without counters, the oracle of the single launch; the same bits.

    Raises:
        Unsupported: a gradient that the kernel cannot take.
        ValueError: a gain that it cannot take, two gains for one segment, ``outside`` of another shape.
        Uncapturable: a new address while a CUDA graph is captured.
    """
    ring, count, summary, *_ = window
    device, num_segments = ring.device, ring.shape[1]
    columns = _outside(None if outside is None else outside.columns, (num_segments, layout.measured), device)
    # Held until the launch: a converted number lives in memory that nobody else refers to.
    scalars = [None if number is None else _number(number, device) for number in scale]
    _check_gains(gains.tensors, gains.segments, device)
    gain_pointers = tuple(map(Tensor.data_ptr, gains.tensors))
    gain_table = dict(zip(gains.segments, gain_pointers))
    size, row = ring.shape[0], (ring.data_ptr(), count.data_ptr())
    buffer, settled = (None, True) if flat is None else flat
    modes = rules.modes or (0,) * num_segments
    noted = _noted(window, gradients.entries)
    numbered = noted.addresses[0], window.table.numbers.data_ptr()
    with _launch.guard(device), _launch.lock():
        tables = _launch.find_tables(
            *gradients[:2], num_segments, device, ("record", size, *row, tuple(gains.segments), modes, noted),
            gain_pointers, (*(gain_table.get(k, 0) for k in range(num_segments)), *modes, *row, size, *numbered),
            () if outside is None else outside.counts, buffer, settled, noted=noted,
        )  # fmt: skip
        numbers = (rules.max_norm, rules.eps, rules.vanishing_rms, rules.exploding_rms)
        arguments = _arguments(tables, buffer, summary, columns, tuple(map(_address, scalars)), numbers)
        _launch_sums(tables, arguments, rules.lanes, True, clip_eps, layout, programs, two_launches)


def _noted(window: Window, entries: Sequence[int] | None) -> Noted:
    addresses = map(Tensor.data_ptr, (window.before, *window.table.columns))
    return Noted(tuple(addresses), None if entries is None else tuple(entries))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _number(number: Tensor, device: torch.device) -> Tensor:
    """One float32 on ``device``; the tensor itself when it already is that, as GradScaler's are."""
    if number.dtype is torch.float32 and number.device == device:
        return number
    return number.detach().to(device=device, dtype=torch.float32, non_blocking=True)


def _outside(outside: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor | None:
    if outside is None:
        return None
    if outside.shape != shape or outside.dtype != torch.float64 or outside.device != device:
        raise ValueError(
            f"outside must be float64 {list(shape)} on {device}, got {outside.dtype} "
            f"{list(outside.shape)} on {outside.device}"
        )
    return outside.contiguous()


def _check_gains(gains: Sequence[Tensor], segments: Sequence[int], device: torch.device) -> None:
    if len(gains) != len(segments) or len(set(segments)) != len(segments):
        raise ValueError(f"{len(gains)} gains for segments {list(segments)}: give one for each, and none twice")
    for index, gain in enumerate(gains):
        if gain.dtype != torch.float32 or gain.device != device or gain.numel() != 1:
            raise ValueError(
                f"gain {index} is {gain.dtype} {list(gain.shape)} on {gain.device}; keep alpha a float32 "
                f"tensor with one element on {device}"
            )
