"""In-place scaling of many tensors in one launch, by segment, which leaves at once where a coefficient is exactly 1.

For clipping: the coefficient stays on the device, and the common step that is not clipped costs a launch
and no traffic, where torch's `_foreach_mul_` reads and writes every gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from seedtriton.kernels import _launch
from seedtriton.kernels._launch import Unsupported, release, unsupported

__all__ = ["Unsupported", "release", "scale_", "scale_segments_", "unsupported"]

# As in gradient_sums: blocks of equal bytes, two independent 128-bit loads and stores per thread.
BLOCK_BYTES = 8192
# Programs at most, which go from item to item: about as many as large GPUs hold at once. One for each item would take
# tens of microseconds to come and go where nothing is scaled.
PROGRAMS = 2048
# Coefficients read at a time by every program, to leave when all are 1.
COEFFICIENTS = tl.constexpr(128)


@triton.jit
def _scaled(x, coefficient, cleared):  # type: ignore[no-untyped-def]
    """``x * coefficient`` in fp32, or zeros where ``cleared``: of what is not finite a product would make NaN."""
    return tl.where(cleared, 0.0, x.to(tl.float32) * coefficient)


@triton.jit
def _scale_run(  # type: ignore[no-untyped-def]
    address, length, coefficient, cleared, DTYPE: tl.constexpr, BYTES: tl.constexpr
):
    """Set x to round(fp32(x) * coefficient) for ``length`` elements at ``address`` (int64); edges are masked."""
    SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
    WORD: tl.constexpr = 16 // SIZE
    BLOCK: tl.constexpr = BYTES // SIZE
    head = tl.minimum(((-address & 15) // SIZE).to(tl.int32), length)
    words = (length - head) // WORD
    blocks = words // (BLOCK // WORD)
    lane = tl.arange(0, BLOCK)
    # The promise of alignment counts only on the pointer: on the integer the compiler forgets it.
    body = tl.multiple_of((address + head * SIZE).to(tl.pointer_type(DTYPE)), 16)
    for block in range(blocks):
        x = _scaled(tl.load(body + block * BLOCK + lane), coefficient, cleared)  # [BLOCK]
        tl.store(body + block * BLOCK + lane, x.to(DTYPE))
    last = body + blocks * BLOCK + lane
    inside = lane < words * WORD - blocks * BLOCK
    y = _scaled(tl.load(last, mask=inside, other=0.0), coefficient, cleared)  # [BLOCK]
    tl.store(last, y.to(DTYPE), mask=inside)

    edge = tl.arange(0, 16)
    cell = address.to(tl.pointer_type(DTYPE)) + tl.where(edge < head, edge, edge + words * WORD)
    rest = edge < length - words * WORD
    z = _scaled(tl.load(cell, mask=rest, other=0.0), coefficient, cleared)  # [16]
    tl.store(cell, z.to(DTYPE), mask=rest)


@triton.jit
def _any_scales(coefficients, num_segments):  # type: ignore[no-untyped-def]
    """Whether any of them, in fp32, is not exactly 1."""
    lane = tl.arange(0, COEFFICIENTS)
    scales = tl.zeros([COEFFICIENTS], tl.int32)
    for block in range(0, num_segments, COEFFICIENTS):
        factor = tl.load(coefficients + block + lane, mask=block + lane < num_segments, other=1.0).to(tl.float32)
        scales |= (factor != 1.0).to(tl.int32)
    return tl.max(scales) != 0


@triton.jit
def _scale_item(  # type: ignore[no-untyped-def]
    item, addresses, meta, items, coefficients, clear, BYTES: tl.constexpr
):
    """Scale an item, unless the coefficient of its segment is 1."""
    columns = meta + item
    factor = tl.load(coefficients + tl.load(columns + items)).to(tl.float32)
    cleared = (clear != 0) & (factor < 0.0)
    if factor != 1.0:
        length = tl.load(columns)
        dtype = tl.load(columns + 2 * items)
        address = tl.load(addresses + item)
        if dtype == 0:
            _scale_run(address, length, factor, cleared, tl.float32, BYTES)
        elif dtype == 1:
            _scale_run(address, length, factor, cleared, tl.bfloat16, BYTES)
        else:
            _scale_run(address, length, factor, cleared, tl.float16, BYTES)


_RUNTIME = (
    "addresses", "meta", "items", "num_segments", "coefficients", "norm", "norm_copy", "clear"
)  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def _scale_kernel(  # type: ignore[no-untyped-def]
    addresses: tl.int64, meta: tl.int64, items: tl.int32, num_segments: tl.int32, coefficients: tl.int64,
    norm: tl.int64, norm_copy: tl.int64, clear: tl.int32,
    WIDE: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Scale x by its segment's coefficient, item after item; nothing is read or written where that is 1.

    addresses: int64 [items]
    meta: int32, columns of the plan, 3 x [items] and more
    coefficients: [num_segments], fp32, or fp64 with WIDE, rounded to fp32
    clear: unless 0, a coefficient below 0 writes zeros
    norm, norm_copy: one fp64 and, unless 0, the fp32 that becomes its copy
    """
    first = tl.program_id(0)
    if (first == 0) & (norm_copy.to(tl.int64) != 0):
        value = tl.load(norm.to(tl.int64).to(tl.pointer_type(tl.float64))).to(tl.float32)
        tl.store(norm_copy.to(tl.int64).to(tl.pointer_type(tl.float32)), value)
    if WIDE:
        table = coefficients.to(tl.int64).to(tl.pointer_type(tl.float64))
    else:
        table = coefficients.to(tl.int64).to(tl.pointer_type(tl.float32))
    if _any_scales(table, num_segments):
        for item in range(first, items, tl.num_programs(0)):
            _scale_item(
                item, addresses.to(tl.int64).to(tl.pointer_type(tl.int64)),
                meta.to(tl.int64).to(tl.pointer_type(tl.int32)), items, table, clear, BYTES,
            )  # fmt: skip


def programs_for(items: int) -> int:
    """Programs that scale so many items: each takes as many as the others, or one less."""
    return -(-items // -(-items // PROGRAMS))


def scale_(
    tensors: Sequence[Tensor],
    coefficient: Tensor,
    *,
    copy: tuple[Tensor, Tensor] | None = None,
) -> None:
    """``scale_segments_`` of one segment: ``coefficient`` has one element."""
    if coefficient.numel() != 1:
        raise ValueError(f"coefficient must be one number, got {list(coefficient.shape)}")
    scale_segments_(tensors, (0,) * len(tensors), coefficient.reshape(1), copy=copy)


def scale_segments_(
    tensors: Sequence[Tensor],
    segments: Sequence[int],
    coefficients: Tensor,
    *,
    clear: bool = False,
    copy: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Multiply every tensor in place by its segment's coefficient, in fp32, rounded once to the tensor's dtype.

    Args:
        tensors: float32, bfloat16 or float16, dense, on the coefficients' device, no two sharing memory.
        segments: the segment of each.
        coefficients: [segments], contiguous, float32 or float64 (rounded to float32).
        clear: a coefficient below 0 writes zeros, also over NaN and infinities, of which a product would make NaN.
        copy: a float64 and a float32 of one element each, on the same device: the first is copied to the
            second in the same launch, for whoever clips and wants the norm. Needs a tensor with elements.

    Raises:
        Unsupported: a tensor that the kernel cannot take.
        ValueError: coefficients of another dtype or shape.
        Uncapturable: a new address while a CUDA graph is captured.
    """
    if coefficients.dtype not in (torch.float32, torch.float64) or coefficients.dim() != 1:
        raise ValueError(
            f"coefficients must be float32 or float64 of one dimension, got {coefficients.dtype} "
            f"{list(coefficients.shape)}"
        )
    if not any(map(Tensor.numel, tensors)):
        return
    device, num_segments = coefficients.device, coefficients.shape[0]
    with _launch.guard(device), _launch.lock():
        tables = _launch.find_tables(tensors, segments, num_segments, device, ("scale",), distinct=True)
        tables.launch(
            _scale_kernel,
            programs_for(tables.items),
            (
                tables.addresses, tables.meta, tables.items, num_segments, coefficients.data_ptr(),
                0 if copy is None else copy[0].data_ptr(), 0 if copy is None else copy[1].data_ptr(), int(clear),
            ),
            (coefficients.dtype == torch.float64, BLOCK_BYTES),
        )  # fmt: skip
    # The kernel writes behind autograd's back; whoever saved one of these for a backward has to hear of it.
    torch.autograd.graph.increment_version(tensors)
