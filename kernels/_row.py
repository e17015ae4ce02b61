"""Device code from partial sums to a row of the ring: tensors are judged, segments closed, the sample finished.

Called by the kernels of gradient_sums.py. What a row means is defined in seedtriton/gradients/row.py and
reference.py; nothing here decides anything.
"""

from __future__ import annotations

import triton
import triton.language as tl

from seedtriton.kernels import _plan

# Partial sums of one tensor read at a time, and sums of tensors: so many are one trip to memory.
TENSOR_BLOCK = tl.constexpr(1024)
SEGMENT_BLOCK = tl.constexpr(512)
# Halves of gradients that are not finite, or counters, overwritten at a time.
CLEAR_BLOCK = tl.constexpr(1024)
# A tensor's mark is 1 when it is live, plus these: one sum counts all three.
VANISHING_MARK = tl.constexpr(_plan.MOST_TENSORS + 1)
EXPLODING_MARK = tl.constexpr((_plan.MOST_TENSORS + 1) ** 2)
# Where the number of samples and the table of tensors are, and the other counters, before the facts of each tensor.
TABLE_ADDRESSES = tl.constexpr(_plan.TABLE_ADDRESSES)
NOTED_ADDRESSES = tl.constexpr(_plan.NOTED_ADDRESSES)


# What follows is a chain of waits: the last program of all has a tensor, a segment and the sample to close, while the
# rest of the GPU is idle. So whatever can be asked for is asked for before the next wait, and not when it is needed.


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
def _tensors_of(work, items, slots, num_segments):  # type: ignore[no-untyped-def]
    """Where the addresses of the table of tensors are, and of each tensor its elements, its mark and its sum."""
    table = work + items + 4 * num_segments
    elements = table + TABLE_ADDRESSES
    # The item of a plan without elements is of a tensor that is not there.
    marked = tl.maximum(slots, 1)
    marks = (elements + marked).to(tl.pointer_type(tl.int64))
    return table.to(tl.pointer_type(tl.int64)), elements, marks, elements + 2 * marked


@triton.jit
def _mark_of(sumsq, elements, scale, vanishing_rms, exploding_rms):  # type: ignore[no-untyped-def]
    """Whether a tensor is live, vanishing or exploding; as ``reference.columns_of_sums``."""
    # The sum still holds the loss scale, so the limits take it as well.
    low = vanishing_rms * scale
    high = exploding_rms * scale
    live = sumsq != 0.0
    vanishing = live & (sumsq < low * low * elements)
    # Not below infinity: infinite or NaN.
    exploding = (sumsq > high * high * elements) | ~(sumsq < float("inf"))
    return live.to(tl.int64) + vanishing.to(tl.int64) * VANISHING_MARK + exploding.to(tl.int64) * EXPLODING_MARK


@triton.jit
def facts_of_tensor(slot, meta, work, items, slots, num_segments, grad_scale, EPILOGUE: tl.constexpr):  # type: ignore[no-untyped-def]
    """What ``close_tensor`` has to know: elements, loss scale, entry in the table of tensors, and where that is."""
    table, elements, _, _ = _tensors_of(work, items, slots, num_segments)
    if EPILOGUE:
        entry = tl.load(meta + 6 * items + 2 * num_segments + 2 + slot)
        samples, sums, last, first = tl.load(table), tl.load(table + 1), tl.load(table + 2), tl.load(table + 3)
        facts = tl.load(elements + slot), _scalar_or(grad_scale, 1.0), entry, samples, sums, last, first
    else:
        facts = 0.0, 1.0, -1, 0, 0, 0, 0
    return facts


@triton.jit
def close_tensor(  # type: ignore[no-untyped-def]
    slot, sumsq, facts, work, items, slots, num_segments, vanishing_rms, exploding_rms, EPILOGUE: tl.constexpr
):
    """Keep the sum of a tensor; for a row also mark it, and note it as ``reference.note_tensors_``."""
    _, _, marks, sums = _tensors_of(work, items, slots, num_segments)
    publish(sums + slot, sumsq)
    if EPILOGUE:
        elements, scale, entry, samples, kept, last, first = facts
        # Whoever finishes the sample, and changes that number, waits for every tensor.
        sample = (tl.load(samples.to(tl.pointer_type(tl.int64))) + 1).to(tl.int32)
        publish(marks + slot, _mark_of(sumsq, elements, scale, vanishing_rms, exploding_rms))
        noted = entry >= 0
        tl.store(kept.to(tl.pointer_type(tl.float64)) + entry, sumsq, mask=noted)
        tl.store(last.to(tl.pointer_type(tl.int32)) + entry, sample, mask=noted)
        cell = first.to(tl.pointer_type(tl.int32)) + entry
        known = tl.load(cell, mask=noted & ~(sumsq < float("inf")), other=1)
        tl.store(cell, sample, mask=known == 0)


@triton.jit
def close_segment(  # type: ignore[no-untyped-def]
    segment, first, last, work, items, slots, num_segments, EPILOGUE: tl.constexpr
):
    """Add up a segment, of which the tensors are ``first`` to ``last``, in their order; for a row their marks too."""
    _, _, marks, sums = _tensors_of(work, items, slots, num_segments)
    lane = tl.arange(0, SEGMENT_BLOCK)
    total = tl.zeros([SEGMENT_BLOCK], tl.float64)
    marked = tl.zeros([SEGMENT_BLOCK], tl.int64)
    for block in range(first, last, SEGMENT_BLOCK):
        inside = block + lane < last
        if EPILOGUE:
            mark = tl.load(marks + block + lane, mask=inside, other=0, cache_modifier=".cg")
            total += tl.load(sums + block + lane, mask=inside, other=0.0, cache_modifier=".cg")
            marked += mark
        else:
            total += tl.load(sums + block + lane, mask=inside, other=0.0, cache_modifier=".cg")
    sumsq = tl.sum(total)
    publish(work + items + segment, sumsq)
    if EPILOGUE:
        publish((work + items + num_segments).to(tl.pointer_type(tl.int64)) + segment, tl.sum(marked))
    return sumsq


@triton.jit
def _clear(address, halves, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write zeros over ``halves`` times two bytes at ``address``; a zero has the same bits in every dtype."""
    lane = tl.arange(0, BLOCK)
    cell = address.to(tl.pointer_type(tl.int16)) + lane
    for block in range(0, halves, BLOCK):
        tl.store(cell + block, tl.zeros([BLOCK], tl.int16), mask=block + lane < halves)


# It runs in the rare sample that is not finite. One program writes what all have read, which takes its time and saves
# every other sample a second launch.
@triton.jit
def clear_segment(  # type: ignore[no-untyped-def]
    segment, sumsq, mode, addresses, meta, items, base, outside, GUARDED: tl.constexpr, MEASURED: tl.constexpr,
    SUMSQ: tl.constexpr,
):  # fmt: skip
    """Write zeros over the gradients of a segment that is closed, if it is guarded and not finite."""
    if (mode & GUARDED) != 0:
        elsewhere = outside.to(tl.pointer_type(tl.float64)) + segment * MEASURED + SUMSQ
        sumsq += tl.load(elsewhere, mask=outside != 0, other=0.0)
        if ~(sumsq < float("inf")):
            item_starts = meta + 6 * items
            for item in range(tl.load(item_starts + segment), tl.load(item_starts + segment + 1)):
                halves = tl.where(tl.load(meta + 2 * items + item) == 0, 2, 1)
                _clear(base + tl.load(addresses + item), tl.load(meta + item) * halves, CLEAR_BLOCK)


@triton.jit
def clear_other_counters(both, counters, slots, num_segments):  # type: ignore[no-untyped-def]
    """Zeros over the counters of the launch before, where one that was stopped half way has left something else.

    In a CUDA graph it is the launch before in the same replay.
    """
    lane = tl.arange(0, CLEAR_BLOCK)
    count = num_segments + 1 + tl.maximum(slots, 1)
    cell = (both - counters.to(tl.int64)).to(tl.pointer_type(tl.int32)) + lane
    for block in range(0, count, CLEAR_BLOCK):
        tl.store(cell + block, tl.zeros([CLEAR_BLOCK], tl.int32), mask=block + lane < count)


@triton.jit
def report_item(  # type: ignore[no-untyped-def]
    item, partial, addresses, meta, work, counters, items, slots, num_segments, busy_segments,
    base, outside, grad_scale, vanishing_rms, exploding_rms, EPILOGUE: tl.constexpr, GUARDED: tl.constexpr,
    MEASURED: tl.constexpr, SUMSQ: tl.constexpr,
):  # fmt: skip
    """Report an item, of which ``partial`` is the sum, and close what it completes; whether all segments are closed.

    Items report to their tensor and tensors to their segment: one atomic for most items, two for a tensor of one.
    """
    segment = tl.load(meta + items + item)
    slot = tl.load(meta + 3 * items + item)
    parts = tl.load(meta + 5 * items + item)
    slot_starts = meta + 6 * items + num_segments + 1
    first_slot = tl.load(slot_starts + segment)
    last_slot = tl.load(slot_starts + segment + 1)
    facts = facts_of_tensor(slot, meta, work, items, slots, num_segments, grad_scale, EPILOGUE)
    whole = parts == 1
    sumsq = partial
    # Release: whoever sees a count sees this thread's stores before it. Acquire: the last one sees the stores of all
    # others (without it, sums went wrong on 8 GPUs: pytorch#128455).
    if parts > 1:
        arrived = counters + num_segments + 1 + slot
        first = item - tl.load(meta + 4 * items + item)
        publish(work + item, partial)
        whole = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == parts - 1
        if whole:
            tl.store(arrived, 0)
            sumsq = sum_range(work, first, first + parts, TENSOR_BLOCK)
    complete = parts < 0
    if whole:
        close_tensor(
            slot, sumsq, facts, work, items, slots, num_segments, vanishing_rms, exploding_rms, EPILOGUE
        )
        done = tl.atomic_add(counters + segment, 1, sem="acq_rel", scope="gpu")
        # The item of a plan without elements has no tensor, so that none is expected of it.
        if done >= last_slot - first_slot - 1:
            tl.store(counters + segment, 0)
            if EPILOGUE:
                mode = tl.load(addresses + items + num_segments + segment)
                total = close_segment(segment, first_slot, last_slot, work, items, slots, num_segments, EPILOGUE)
                clear_segment(segment, total, mode, addresses, meta, items, base, outside, GUARDED, MEASURED, SUMSQ)
            else:
                close_segment(segment, first_slot, last_slot, work, items, slots, num_segments, EPILOGUE)
            # Only segments that have items ever close, so only those are counted.
            complete = tl.atomic_add(counters + num_segments, 1, sem="acq_rel", scope="gpu") == busy_segments - 1
            if complete:
                tl.store(counters + num_segments, 0)
                table, _, _, _ = _tensors_of(work, items, slots, num_segments)
                clear_other_counters(tl.load(table + NOTED_ADDRESSES), counters, slots, num_segments)
    return complete


@triton.jit
def _sums_of(segment, inside, work, slot_starts, items, outside, MEASURED: tl.constexpr, SUMSQ: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of each segment its sum of squares, and whether it has tensors: an empty one never closes, its cells are old."""
    sumsq = tl.load(work + items + segment, mask=inside, other=0.0, cache_modifier=".cg")
    first = tl.load(slot_starts + segment, mask=inside, other=0)
    busy = tl.load(slot_starts + segment + 1, mask=inside, other=0) > first
    added = outside.to(tl.pointer_type(tl.float64)) + segment * MEASURED
    return tl.where(busy, sumsq, 0.0) + tl.load(added + SUMSQ, mask=inside & (outside != 0), other=0.0), busy


@triton.jit
def _marks_of(segment, inside, busy, work, items, num_segments):  # type: ignore[no-untyped-def]
    """Of each segment the sum of its tensors' marks."""
    marked = (work + items + num_segments).to(tl.pointer_type(tl.int64)) + segment
    return tl.where(busy, tl.load(marked, mask=inside, other=0, cache_modifier=".cg"), 0)


@triton.jit
def _left_by(cell, replaced, SUMSQ: tl.constexpr, EXTRA: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gains that a replaced row leaves, to be added to, NaN of a segment that was not finite; which were finite."""
    old = tl.load(cell + EXTRA, mask=replaced, other=float("nan"))
    finite = tl.load(cell + SUMSQ, mask=replaced, other=0.0) < float("inf")
    return tl.where(finite, old, float("nan")), finite


@triton.jit
def _write_marks(  # type: ignore[no-untyped-def]
    segment, inside, marks, cell, outside, LIVE: tl.constexpr, VANISHING: tl.constexpr, EXPLODING: tl.constexpr,
    MEASURED: tl.constexpr,
):  # fmt: skip
    """How many tensors of each segment are live, vanishing and exploding."""
    added = outside.to(tl.pointer_type(tl.float64)) + segment * MEASURED
    has_added = inside & (outside != 0)
    live = (marks & (VANISHING_MARK - 1)).to(tl.float64)
    vanishing = ((marks & (EXPLODING_MARK - 1)) // VANISHING_MARK).to(tl.float64)
    exploding = (marks // EXPLODING_MARK).to(tl.float64)
    tl.store(cell + LIVE, live + tl.load(added + LIVE, mask=has_added, other=0.0), mask=inside)
    tl.store(cell + VANISHING, vanishing + tl.load(added + VANISHING, mask=has_added, other=0.0), mask=inside)
    tl.store(cell + EXPLODING, exploding + tl.load(added + EXPLODING, mask=has_added, other=0.0), mask=inside)


@triton.jit
def _write_summary(  # type: ignore[no-untyped-def]
    segment, inside, sumsq, mode, num_segments, summary_cell, max_norm, eps, CLIP_EPS: tl.constexpr,
    APART: tl.constexpr, GUARDED: tl.constexpr, TOTAL_NORM: tl.constexpr, CLIP_COEFFICIENT: tl.constexpr,
    SUMMARY_HEAD: tl.constexpr,
):  # fmt: skip
    """Total norm, and of each segment its ratio of this sample, its clip coefficient and whether it is kept."""
    norms = tl.sqrt(sumsq)
    host = tl.sum(tl.where(segment == 0, norms, 0.0))
    cell = summary_cell + SUMMARY_HEAD + segment
    # Each fp64 division is a call, so there is one per scalar and a product per lane.
    tl.store(cell, norms * (1.0 / (host + eps)), mask=inside)
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


@triton.jit
def _finish_row(  # type: ignore[no-untyped-def]
    work, slot_starts, places, items, num_segments, summary, outside, grad_scale, gain_scale, found_inf, max_norm, eps,
    CLIP_EPS: tl.constexpr, SEGMENTS: tl.constexpr, SUMSQ: tl.constexpr, LIVE: tl.constexpr,
    VANISHING: tl.constexpr, EXPLODING: tl.constexpr, MEASURED: tl.constexpr, TENSORS: tl.constexpr,
    ELEMENTS: tl.constexpr, EXTRA: tl.constexpr, QUANTITIES: tl.constexpr, TOTAL_NORM: tl.constexpr,
    CLIP_COEFFICIENT: tl.constexpr, GRAD_SCALE: tl.constexpr, SUMMARY_HEAD: tl.constexpr, APART: tl.constexpr,
    GUARDED: tl.constexpr,
):  # fmt: skip
    """The count, the row and the summary. Three waits: for addresses, for the count and the gains, for the old row."""
    segment = tl.arange(0, SEGMENTS)  # all vectors below are [SEGMENTS]
    inside = segment < num_segments
    fixed = places + 2 * num_segments
    samples_cell = tl.load(fixed + 1).to(tl.pointer_type(tl.int64))
    before_cell = tl.load(fixed + 3).to(tl.pointer_type(tl.int64))
    row = tl.load(fixed).to(tl.pointer_type(tl.float64))
    window = tl.load(fixed + 2)
    numbers = tl.load(fixed + 4).to(tl.pointer_type(tl.int64))
    address = tl.load(places + segment, mask=inside, other=0)
    mode = tl.load(places + num_segments + segment, mask=inside, other=0)
    sumsq, busy = _sums_of(segment, inside, work, slot_starts, items, outside, MEASURED, SUMSQ)
    scale = _scalar_or(grad_scale, 1.0)
    gain_factor = -1.0 / _scalar_or(gain_scale, 1.0)
    skipped = tl.where(_scalar_or(found_inf, 0.0) != 0.0, 1.0, 0.0)

    before = tl.load(before_cell)
    replaced = before < tl.load(samples_cell)
    present = address != 0
    gain_cell = address.to(tl.pointer_type(tl.float32))
    gain = tl.load(gain_cell, mask=present, other=0.0).to(tl.float64) * gain_factor

    row += (before % window) * num_segments * QUANTITIES
    cell = row + segment * QUANTITIES
    old, finite = _left_by(cell, inside & replaced, SUMSQ, EXTRA)
    guarded = (mode & GUARDED) != 0
    # Everybody has read the count and the row before anybody writes.
    tl.debug_barrier()
    tl.store(samples_cell, before + 1)
    tl.store(numbers, before)
    # The blend gain of every seed, read, negated and set to zero; of the host, whether the step will be skipped.
    tl.store(gain_cell, 0.0, mask=present)
    extra = tl.where(present, gain + tl.where(old == old, old, 0.0), tl.where(segment == 0, skipped, old))
    tl.store(cell + EXTRA, extra, mask=inside)
    sumsq *= 1.0 / (scale * scale)
    # What was gone in an earlier micro-batch is so in the row; the summary is of the gradients that are there now.
    tl.store(cell + SUMSQ, tl.where(finite | ~guarded, sumsq, float("nan")), mask=inside)
    # How many samples come before one that replaces this row if it is usable: of no step to be skipped, and finite, as
    # far as nothing that is not is guarded: that keeps no optimizer from its step.
    bad = tl.where((sumsq < float("inf")) | guarded, tl.where(segment == 0, extra, 0.0), 1.0)
    tl.store(numbers + 1, before + tl.max(bad).to(tl.int64))
    summary_cell = summary.to(tl.pointer_type(tl.float64))
    tl.store(summary_cell + GRAD_SCALE, scale)  # the sums of single tensors still hold it
    _write_summary(
        segment, inside, sumsq, mode, num_segments, summary_cell, max_norm, eps, CLIP_EPS, APART, GUARDED, TOTAL_NORM,
        CLIP_COEFFICIENT, SUMMARY_HEAD,
    )  # fmt: skip
    marks = _marks_of(segment, inside, busy, work, items, num_segments)
    _write_marks(segment, inside, marks, cell, outside, LIVE, VANISHING, EXPLODING, MEASURED)
    counts = work + items + 2 * num_segments + segment
    tl.store(cell + TENSORS, tl.load(counts, mask=inside, other=0.0), mask=inside)
    tl.store(cell + ELEMENTS, tl.load(counts + num_segments, mask=inside, other=0.0), mask=inside)


@triton.jit
def _write_sums(  # type: ignore[no-untyped-def]
    work, slot_starts, items, num_segments, summary, outside, SEGMENTS: tl.constexpr, MEASURED: tl.constexpr,
    SUMSQ: tl.constexpr,
):  # fmt: skip
    """The sums alone."""
    segment = tl.arange(0, SEGMENTS)
    inside = segment < num_segments
    sumsq, _ = _sums_of(segment, inside, work, slot_starts, items, outside, MEASURED, SUMSQ)
    tl.store(summary.to(tl.pointer_type(tl.float64)) + segment, sumsq, mask=inside)


@triton.jit
def finish(  # type: ignore[no-untyped-def]
    work, slot_starts, places, items, num_segments, summary, outside, grad_scale, gain_scale, found_inf, max_norm, eps,
    CLIP_EPS: tl.constexpr, EPILOGUE: tl.constexpr, SEGMENTS: tl.constexpr, SUMSQ: tl.constexpr, LIVE: tl.constexpr,
    VANISHING: tl.constexpr, EXPLODING: tl.constexpr, MEASURED: tl.constexpr, TENSORS: tl.constexpr,
    ELEMENTS: tl.constexpr, EXTRA: tl.constexpr, QUANTITIES: tl.constexpr, TOTAL_NORM: tl.constexpr,
    CLIP_COEFFICIENT: tl.constexpr, GRAD_SCALE: tl.constexpr, SUMMARY_HEAD: tl.constexpr, APART: tl.constexpr,
    GUARDED: tl.constexpr,
):  # fmt: skip
    """By the last program: the count, the row of the ring and the summary; or the sums alone."""
    if EPILOGUE:
        _finish_row(
            work, slot_starts, places, items, num_segments, summary, outside, grad_scale, gain_scale, found_inf,
            max_norm, eps, CLIP_EPS, SEGMENTS, SUMSQ, LIVE, VANISHING, EXPLODING, MEASURED, TENSORS, ELEMENTS, EXTRA,
            QUANTITIES, TOTAL_NORM, CLIP_COEFFICIENT, GRAD_SCALE, SUMMARY_HEAD, APART, GUARDED,
        )  # fmt: skip
    else:
        _write_sums(work, slot_starts, items, num_segments, summary, outside, SEGMENTS, MEASURED, SUMSQ)
