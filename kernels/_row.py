"""Device code from partial sums to a row of the ring: tensors are judged, segments closed, the sample finished.

Called by the kernels of gradient_sums.py. What a row means is defined in seedtriton/gradients/row.py and
reference.py; nothing here decides anything.
"""

from __future__ import annotations

import triton
import triton.language as tl

from seedtriton.kernels import _plan

# Items of one tensor read at a time, many programs at a time.
TENSOR_BLOCK = tl.constexpr(256)
# A tensor's mark is 1 when it is live, plus these: one sum counts all three.
VANISHING_MARK = tl.constexpr(_plan.MOST_TENSORS + 1)
EXPLODING_MARK = tl.constexpr((_plan.MOST_TENSORS + 1) ** 2)
# Where the number of samples and the table of tensors are, before the marks. Read there and not among the arguments,
# and the sums left with their loss scale: either way sm_100 would take 74 registers instead of 60.
TABLE_ADDRESSES = tl.constexpr(_plan.TABLE_ADDRESSES)


@triton.jit
def sum_range(values, first, last, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum of fp64 or int64 ``values[first:last]``, in an order that depends on the range alone."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], values.dtype.element_ty)
    for block in range(first, last, BLOCK):
        # .cg reads in L2, where the other programs' stores are; L1 may hold what was there before.
        total += tl.load(values + block + lane, mask=block + lane < last, other=0, cache_modifier=".cg")
    return tl.sum(total)


@triton.jit
def publish(cell, value):  # type: ignore[no-untyped-def]
    """Store what another program reads in the same launch, behind an atomic add.

    Written through all caches: on gfx942, LLVM drops the wait between a release's write-back of the L2 cache and its
    atomic wherever no store is under way (llvm-project#178316), so that nothing may be left to write back.
    """
    tl.store(cell, value, cache_modifier=".wt")


@triton.jit
def _scalar_or(address, default):  # type: ignore[no-untyped-def]
    """The fp32 number at ``address`` (int64) as fp64, or ``default`` when the address is 0."""
    return tl.load(address.to(tl.pointer_type(tl.float32)), mask=address != 0, other=default).to(tl.float64)


@triton.jit
def marks_of(work, items, num_segments):  # type: ignore[no-untyped-def]
    """Where the marks of the tensors are."""
    return (work + items + 5 * num_segments + TABLE_ADDRESSES).to(tl.pointer_type(tl.int64))


@triton.jit
def _note_tensor(slot, sumsq, table, entries):  # type: ignore[no-untyped-def]
    """A tensor into the table of tensors, as ``reference.note_tensors_``.

    ``table`` holds the addresses of the number of samples before this one, of sums, of last and of first samples;
    ``entries`` the place of each slot in them, -1 for the item that is of no tensor.
    """
    entry = tl.load(entries + slot)
    # Whoever finishes the sample, and changes that number, waits for every tensor.
    sample = (tl.load(tl.load(table).to(tl.pointer_type(tl.int64))) + 1).to(tl.int32)
    tl.store(tl.load(table + 1).to(tl.pointer_type(tl.float64)) + entry, sumsq, mask=entry >= 0)
    tl.store(tl.load(table + 2).to(tl.pointer_type(tl.int32)) + entry, sample, mask=entry >= 0)
    first = tl.load(table + 3).to(tl.pointer_type(tl.int32)) + entry
    known = tl.load(first, mask=(entry >= 0) & ~(sumsq < float("inf")), other=1)
    tl.store(first, sample, mask=known == 0)


@triton.jit
def judge_tensor(  # type: ignore[no-untyped-def]
    item, sumsq, meta, marks, items, num_segments, chunk, grad_scale, vanishing_rms, exploding_rms
):
    """Mark a tensor, of which ``item`` is any, as live, vanishing or exploding; as ``reference.columns_of_sums``.

    And note it in the table of tensors.
    """
    pieces = tl.load(meta + 5 * items + item) - 1
    final = item - tl.load(meta + 4 * items + item) + pieces
    # A chunk in bytes is a power of two; fp32 has four of them, what else there is two.
    most = chunk >> tl.where(tl.load(meta + 2 * items + item) == 0, 2, 1)
    elements = pieces.to(tl.float64) * most + tl.load(meta + final)
    # The sum still holds the loss scale, so the limits take it as well.
    scale = _scalar_or(grad_scale, 1.0)
    low = vanishing_rms * scale
    high = exploding_rms * scale
    live = sumsq != 0.0
    vanishing = live & (sumsq < low * low * elements)
    # Not below infinity: infinite or NaN.
    exploding = (sumsq > high * high * elements) | ~(sumsq < float("inf"))
    mark = live.to(tl.int64) + vanishing.to(tl.int64) * VANISHING_MARK + exploding.to(tl.int64) * EXPLODING_MARK
    slot = tl.load(meta + 3 * items + item)
    publish(marks + slot, mark)
    _note_tensor(slot, sumsq, marks - TABLE_ADDRESSES, meta + 6 * items + 2 * num_segments + 2)


@triton.jit
def close_segment(segment, work, item_starts, items, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add up a segment whose items are all done."""
    sumsq = sum_range(work, tl.load(item_starts + segment), tl.load(item_starts + segment + 1), BLOCK)
    publish(work + items + segment, sumsq)
    return sumsq


@triton.jit
def _clear(address, halves, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write zeros over ``halves`` times two bytes at ``address``; a zero has the same bits in every dtype."""
    lane = tl.arange(0, BLOCK)
    cell = address.to(tl.pointer_type(tl.int16)) + lane
    for block in range(0, halves, BLOCK):
        tl.store(cell + block, tl.zeros([BLOCK], tl.int16), mask=block + lane < halves)


# Not inlined, for the reason given below.
@triton.jit(noinline=True)
def close_row_segment(  # type: ignore[no-untyped-def]
    segment, work, item_starts, items, num_segments, BLOCK: tl.constexpr
):
    """The same for a row, with the marks of the segment's tensors."""
    sumsq = close_segment(segment, work, item_starts, items, BLOCK)
    slot_starts = item_starts + num_segments + 1
    marks = marks_of(work, items, num_segments)
    total = sum_range(marks, tl.load(slot_starts + segment), tl.load(slot_starts + segment + 1), BLOCK)
    publish((work + items + num_segments).to(tl.pointer_type(tl.int64)) + segment, total)
    return sumsq


# Not inlined: it runs in the rare sample that is not finite. One program writes what all have read, which takes its
# time and saves every other sample a second launch.
@triton.jit(noinline=True)
def clear_segment(  # type: ignore[no-untyped-def]
    segment, sumsq, addresses, slots, meta, items, num_segments, chunk, base, outside, GUARDED: tl.constexpr,
    MEASURED: tl.constexpr, SUMSQ: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write zeros over the gradients of a segment that is closed, if it is guarded and not finite."""
    if (tl.load(addresses + slots + num_segments + segment) & GUARDED) != 0:
        elsewhere = outside.to(tl.pointer_type(tl.float64)) + segment * MEASURED + SUMSQ
        sumsq += tl.load(elsewhere, mask=outside != 0, other=0.0)
        if ~(sumsq < float("inf")):
            item_starts = meta + 6 * items
            for item in range(tl.load(item_starts + segment), tl.load(item_starts + segment + 1)):
                halves = tl.where(tl.load(meta + 2 * items + item) == 0, 2, 1)
                offset = tl.load(meta + 4 * items + item).to(tl.int64) * chunk
                address = base + tl.load(addresses + tl.load(meta + 3 * items + item)) + offset
                _clear(address, tl.load(meta + item) * halves, BLOCK)


@triton.jit
def _row_before(places, num_segments, QUANTITIES: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many samples come before this one, whether it replaces the newest row, and where its own begins."""
    # Addresses that stay are read here: as arguments they would take registers from the start.
    fixed = places + 2 * num_segments
    before = tl.load(tl.load(fixed + 3).to(tl.pointer_type(tl.int64)))
    replaced = before < tl.load(tl.load(fixed + 1).to(tl.pointer_type(tl.int64)))
    row = tl.load(fixed).to(tl.pointer_type(tl.float64))
    return before, replaced, row + (before % tl.load(fixed + 2)) * num_segments * QUANTITIES


# The steps of ``finish`` are not inlined: the compiler would compute their addresses at the start of every program and
# keep them in registers across the loads, 128 of them on sm_90 instead of 48; and what one step holds is free for the
# next, so that 256 segments fit into 64 registers on sm_100.
@triton.jit(noinline=True)
def _note_gone(  # type: ignore[no-untyped-def]
    places, work, items, num_segments, SEGMENTS: tl.constexpr, SUMSQ: tl.constexpr, QUANTITIES: tl.constexpr,
    GUARDED: tl.constexpr,
):  # fmt: skip
    """NaN of each segment that is guarded and not finite in a row that is replaced, 0 of all others."""
    segment = tl.arange(0, SEGMENTS)
    inside = segment < num_segments
    _, replaced, row = _row_before(places, num_segments, QUANTITIES)
    sumsq = tl.load(row + segment * QUANTITIES + SUMSQ, mask=inside & replaced, other=0.0)
    mode = tl.load(places + num_segments + segment, mask=inside & ~(sumsq < float("inf")), other=0)
    tl.store(work + items + 4 * num_segments + segment, tl.where((mode & GUARDED) != 0, float("nan"), 0.0), mask=inside)


@triton.jit(noinline=True)
def _write_gone(  # type: ignore[no-untyped-def]
    row, work, items, num_segments, SEGMENTS: tl.constexpr, SUMSQ: tl.constexpr, QUANTITIES: tl.constexpr
):
    """What was gone in an earlier micro-batch is so in the row; the summary is of the gradients that are there now."""
    segment = tl.arange(0, SEGMENTS)
    inside = segment < num_segments
    cell = row + segment * QUANTITIES + SUMSQ
    gone = tl.load(work + items + 4 * num_segments + segment, mask=inside, other=0.0)
    sumsq = tl.load(cell, mask=inside, other=0.0) + gone
    # Everybody has read the sums, here and in the step before, before anybody writes.
    tl.debug_barrier()
    tl.store(cell, sumsq, mask=inside)


@triton.jit(noinline=True)
def _open_row(  # type: ignore[no-untyped-def]
    places, num_segments, SEGMENTS: tl.constexpr, SUMSQ: tl.constexpr, EXTRA: tl.constexpr, QUANTITIES: tl.constexpr
):
    """Count the row and say where it goes; a row that it replaces leaves its gains there, else they are NaN.

    So they are of a segment that was not finite.
    """
    segment = tl.arange(0, SEGMENTS)
    inside = segment < num_segments
    before, replaced, row = _row_before(places, num_segments, QUANTITIES)
    cell = row + segment * QUANTITIES + EXTRA
    sumsq = tl.load(row + segment * QUANTITIES + SUMSQ, mask=inside & replaced, other=float("inf"))
    extra = tl.load(cell, mask=sumsq < float("inf"), other=float("nan"))
    # Everybody has read the count and the row before anybody writes.
    tl.debug_barrier()
    fixed = places + 2 * num_segments
    tl.store(tl.load(fixed + 1).to(tl.pointer_type(tl.int64)), before + 1)
    tl.store(tl.load(fixed + 4).to(tl.pointer_type(tl.int64)), before)
    tl.store(cell, extra, mask=inside)
    return row


@triton.jit(noinline=True)
def _write_gains(  # type: ignore[no-untyped-def]
    row, places, num_segments, gain_scale, found_inf, SEGMENTS: tl.constexpr, EXTRA: tl.constexpr,
    QUANTITIES: tl.constexpr,
):  # fmt: skip
    """The blend gain of every seed, read, negated and set to zero; of the host, whether the step will be skipped.

    It is added to what ``_open_row`` has left in its place: NaN, or the gain before it in the same step.
    """
    segment = tl.arange(0, SEGMENTS)
    inside = segment < num_segments
    cell = row + segment * QUANTITIES + EXTRA
    before = tl.load(cell, mask=inside, other=0.0)
    address = tl.load(places + segment, mask=inside, other=0)
    present = address != 0
    gain_cell = address.to(tl.pointer_type(tl.float32))
    gain = tl.load(gain_cell, mask=present, other=0.0).to(tl.float64) * (-1.0 / _scalar_or(gain_scale, 1.0))
    tl.store(gain_cell, 0.0, mask=present)
    gain += tl.where(before == before, before, 0.0)
    skipped = tl.where(_scalar_or(found_inf, 0.0) != 0.0, 1.0, 0.0)
    absent = tl.where(segment == 0, skipped, before)
    tl.store(cell, tl.where(present, gain, absent), mask=inside)


@triton.jit
def _sums_of(  # type: ignore[no-untyped-def]
    segment, work, item_starts, items, num_segments, outside, MEASURED: tl.constexpr, SUMSQ: tl.constexpr
):  # fmt: skip
    """Of each segment its sum of squares, and whether it has items: an empty one never closes, its cells are old."""
    inside = segment < num_segments
    first = tl.load(item_starts + segment, mask=inside, other=0)
    busy = inside & (tl.load(item_starts + segment + 1, mask=inside, other=0) > first)
    sumsq = tl.load(work + items + segment, mask=busy, other=0.0, cache_modifier=".cg")
    added = outside.to(tl.pointer_type(tl.float64)) + segment * MEASURED
    return sumsq + tl.load(added + SUMSQ, mask=inside & (outside != 0), other=0.0), busy


@triton.jit(noinline=True)
def _write_row(  # type: ignore[no-untyped-def]
    row, work, item_starts, items, num_segments, summary, outside, grad_scale, SEGMENTS: tl.constexpr,
    SUMSQ: tl.constexpr, LIVE: tl.constexpr, VANISHING: tl.constexpr, EXPLODING: tl.constexpr,
    MEASURED: tl.constexpr, TENSORS: tl.constexpr, ELEMENTS: tl.constexpr, QUANTITIES: tl.constexpr,
    GRAD_SCALE: tl.constexpr,
):  # fmt: skip
    """All of the row but its gains, and the loss scale, which the sums of single tensors still hold."""
    segment = tl.arange(0, SEGMENTS)  # all vectors below are [SEGMENTS]
    inside = segment < num_segments
    sumsq, busy = _sums_of(segment, work, item_starts, items, num_segments, outside, MEASURED, SUMSQ)
    cell = row + segment * QUANTITIES
    # Each fp64 division is a call, so there is one per scalar and a product per lane.
    scale = _scalar_or(grad_scale, 1.0)
    tl.store(summary.to(tl.pointer_type(tl.float64)) + GRAD_SCALE, scale)
    tl.store(cell + SUMSQ, sumsq * (1.0 / (scale * scale)), mask=inside)
    added = outside.to(tl.pointer_type(tl.float64)) + segment * MEASURED
    has_added = inside & (outside != 0)
    marked = (work + items + num_segments + segment).to(tl.pointer_type(tl.int64))
    marks = tl.load(marked, mask=busy, other=0, cache_modifier=".cg")
    live = (marks & (VANISHING_MARK - 1)).to(tl.float64)
    live += tl.load(added + LIVE, mask=has_added, other=0.0)
    tl.store(cell + LIVE, live, mask=inside)
    vanishing = ((marks & (EXPLODING_MARK - 1)) // VANISHING_MARK).to(tl.float64)
    vanishing += tl.load(added + VANISHING, mask=has_added, other=0.0)
    tl.store(cell + VANISHING, vanishing, mask=inside)
    exploding = (marks // EXPLODING_MARK).to(tl.float64)
    exploding += tl.load(added + EXPLODING, mask=has_added, other=0.0)
    tl.store(cell + EXPLODING, exploding, mask=inside)
    counts = work + items + 2 * num_segments
    tl.store(cell + TENSORS, tl.load(counts + segment, mask=inside, other=0.0), mask=inside)
    tl.store(cell + ELEMENTS, tl.load(counts + num_segments + segment, mask=inside, other=0.0), mask=inside)


@triton.jit(noinline=True)
def _close_row(  # type: ignore[no-untyped-def]
    row, places, num_segments, SEGMENTS: tl.constexpr, SUMSQ: tl.constexpr, EXTRA: tl.constexpr,
    QUANTITIES: tl.constexpr, GUARDED: tl.constexpr,
):  # fmt: skip
    """How many samples come before one that replaces this row if it is usable; ``_open_row`` said it for any row."""
    segment = tl.arange(0, SEGMENTS)
    inside = segment < num_segments
    sumsq = tl.load(row + segment * QUANTITIES + SUMSQ, mask=inside, other=0.0)
    # What is not finite in a guarded segment keeps no optimizer from its step.
    mode = tl.load(places + num_segments + segment, mask=inside & ~(sumsq < float("inf")), other=GUARDED)
    # What the host has in the place of a gain: 1 if the step will be skipped, else 0.
    bad = tl.where((mode & GUARDED) != 0, tl.load(row + EXTRA), 1.0)
    numbers = tl.load(places + 2 * num_segments + 4).to(tl.pointer_type(tl.int64))
    tl.store(numbers + 1, tl.load(numbers) + tl.max(bad).to(tl.int64))


@triton.jit(noinline=True)
def _write_summary(  # type: ignore[no-untyped-def]
    row, modes, num_segments, summary, max_norm, eps, SEGMENTS: tl.constexpr, SUMSQ: tl.constexpr,
    QUANTITIES: tl.constexpr, CLIP_EPS: tl.constexpr, APART: tl.constexpr, GUARDED: tl.constexpr,
    TOTAL_NORM: tl.constexpr, CLIP_COEFFICIENT: tl.constexpr, SUMMARY_HEAD: tl.constexpr,
):  # fmt: skip
    """Total norm, and of each segment its ratio of this sample, its clip coefficient and whether it is kept."""
    segment = tl.arange(0, SEGMENTS)
    inside = segment < num_segments
    sumsq = tl.load(row + segment * QUANTITIES + SUMSQ, mask=inside, other=0.0)
    summary_cell = summary.to(tl.pointer_type(tl.float64))
    norms = tl.sqrt(sumsq)
    host = tl.sum(tl.where(segment == 0, norms, 0.0))
    cell = summary_cell + SUMMARY_HEAD + segment
    tl.store(cell, norms * (1.0 / (host + eps)), mask=inside)
    mode = tl.load(modes + segment, mask=inside, other=0)
    kept = (sumsq < float("inf")) | ((mode & GUARDED) == 0)
    counted = tl.where(kept, sumsq, 0.0)
    apart = (mode & APART) != 0
    total = tl.sqrt(tl.sum(tl.where(apart, 0.0, counted)))
    coefficient = max_norm / (tl.where(apart, tl.sqrt(counted), total) + CLIP_EPS)
    # Comparing and not minimum(): IEEE's minimum drops NaN, and a NaN norm has to make NaN gradients.
    coefficient = tl.where(coefficient > 1.0, 1.0, coefficient)
    tl.store(summary_cell + TOTAL_NORM, total)
    tl.store(summary_cell + CLIP_COEFFICIENT + segment * 0, coefficient, mask=segment == 0)
    tl.store(cell + num_segments, tl.where(kept, coefficient, -1.0), mask=inside)
    tl.store(cell + 2 * num_segments, tl.where(kept, 1.0, -1.0), mask=inside)


@triton.jit(noinline=True)
def _write_sums(  # type: ignore[no-untyped-def]
    work, item_starts, items, num_segments, summary, outside, SEGMENTS: tl.constexpr, MEASURED: tl.constexpr,
    SUMSQ: tl.constexpr,
):  # fmt: skip
    """The sums alone."""
    segment = tl.arange(0, SEGMENTS)
    sumsq, _ = _sums_of(segment, work, item_starts, items, num_segments, outside, MEASURED, SUMSQ)
    tl.store(summary.to(tl.pointer_type(tl.float64)) + segment, sumsq, mask=segment < num_segments)


@triton.jit
def finish(  # type: ignore[no-untyped-def]
    work, item_starts, places, items, num_segments, summary, outside, grad_scale, gain_scale, found_inf, max_norm, eps,
    CLIP_EPS: tl.constexpr, EPILOGUE: tl.constexpr, SEGMENTS: tl.constexpr, SUMSQ: tl.constexpr, LIVE: tl.constexpr,
    VANISHING: tl.constexpr, EXPLODING: tl.constexpr, MEASURED: tl.constexpr, TENSORS: tl.constexpr,
    ELEMENTS: tl.constexpr, EXTRA: tl.constexpr, QUANTITIES: tl.constexpr, TOTAL_NORM: tl.constexpr,
    CLIP_COEFFICIENT: tl.constexpr, GRAD_SCALE: tl.constexpr, SUMMARY_HEAD: tl.constexpr, APART: tl.constexpr,
    GUARDED: tl.constexpr,
):  # fmt: skip
    """By the last program: the count, the row of the ring and the summary; or the sums alone."""
    if EPILOGUE:
        _note_gone(places, work, items, num_segments, SEGMENTS, SUMSQ, QUANTITIES, GUARDED)
        row = _open_row(places, num_segments, SEGMENTS, SUMSQ, EXTRA, QUANTITIES)
        # Different threads may read in one step what others have written in the step before; so below.
        tl.debug_barrier()
        _write_gains(row, places, num_segments, gain_scale, found_inf, SEGMENTS, EXTRA, QUANTITIES)
        _write_row(
            row, work, item_starts, items, num_segments, summary, outside, grad_scale, SEGMENTS, SUMSQ, LIVE,
            VANISHING, EXPLODING, MEASURED, TENSORS, ELEMENTS, QUANTITIES, GRAD_SCALE,
        )  # fmt: skip
        tl.debug_barrier()
        _close_row(row, places, num_segments, SEGMENTS, SUMSQ, EXTRA, QUANTITIES, GUARDED)
        _write_summary(
            row, places + num_segments, num_segments, summary, max_norm, eps, SEGMENTS, SUMSQ, QUANTITIES, CLIP_EPS,
            APART, GUARDED, TOTAL_NORM, CLIP_COEFFICIENT, SUMMARY_HEAD,
        )  # fmt: skip
        _write_gone(row, work, items, num_segments, SEGMENTS, SUMSQ, QUANTITIES)
    else:
        _write_sums(work, item_starts, items, num_segments, summary, outside, SEGMENTS, MEASURED, SUMSQ)


@triton.jit(noinline=True)
def clear_other_counters(work, counters, items, slots, num_segments, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Zeros over the counters of the launch before, where one that was stopped half way has left something else."""
    lane = tl.arange(0, BLOCK)
    count = num_segments + 1 + tl.maximum(slots, 1)
    both = tl.load(marks_of(work, items, num_segments) - 1)
    cell = (both - counters.to(tl.int64)).to(tl.pointer_type(tl.int32)) + lane
    for block in range(0, count, BLOCK):
        tl.store(cell + block, tl.zeros([BLOCK], tl.int32), mask=block + lane < count)


# Not inlined, like the steps above: their registers are needed one after the other and not beside the main loop's.
@triton.jit(noinline=True)
def complete_tensor(  # type: ignore[no-untyped-def]
    item, partial, meta, work, arrivals, items, num_segments, chunk, grad_scale, vanishing_rms, exploding_rms
):
    """Report an item of which ``partial`` is the sum; whether its tensor is complete, which is then marked."""
    parts = tl.load(meta + 5 * items + item)
    whole = parts == 1
    sumsq = partial
    if parts > 1:
        arrived = arrivals + tl.load(meta + 3 * items + item)
        whole = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == parts - 1
        if whole:
            tl.store(arrived, 0)
            first = item - tl.load(meta + 4 * items + item)
            sumsq = sum_range(work, first, first + parts, TENSOR_BLOCK)
    if whole:
        marks = marks_of(work, items, num_segments)
        judge_tensor(item, sumsq, meta, marks, items, num_segments, chunk, grad_scale, vanishing_rms, exploding_rms)
    return whole
