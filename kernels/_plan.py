"""Gradients -> work items, in plain arithmetic: neither torch nor Triton is imported here.

An item is a piece of one tensor that one program sums. The plan depends on sizes, dtypes and segments
alone, never on addresses or on the machine, so that the same gradients give the same bits everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Bytes per element, by the dtype codes of the kernels.
WIDTHS = (4, 2, 2)
# Bytes per item. A program takes some four trips to memory before and after its item: 32 KiB are two trips' worth of
# loads beside them, and keep small models spread over all multiprocessors. Beyond 256 KiB larger items would only
# lengthen the tail of the launch, and the sums that a thread makes in fp32.
MIN_CHUNK = 32 * 1024
MAX_CHUNK = 256 * 1024
# Items aimed at between those bounds: about one wave on 132 multiprocessors with 7 programs each. Measured on an H200
# (bench/results/variants-*.json), ResNet-50 to Llama: fewer leave multiprocessors idle, more pay the trips more often.
TARGET_ITEMS = 1024
# Items beyond which the pieces of large seeds grow, whatever the size of the host.
MOST_ITEMS = 1 << 18
# Tensors that a segment may have: the kernel counts three kinds of them in 21 bits each of one number.
MOST_TENSORS = (1 << 21) - 1
# Addresses in the workspace: of the number of samples and the table of tensors, and the sum of those of the counters.
NOTED_ADDRESSES = 4
TABLE_ADDRESSES = NOTED_ADDRESSES + 1


@dataclass(frozen=True)
class Plan:
    """Work items as columns, sorted by (segment, tensor, offset).

    A *slot* is a tensor that is not empty; slots are numbered in item order, so that the slots of a segment
    are consecutive, like its items. Item i covers ``lengths[i]`` elements of slot ``slots[i]``, from byte
    ``pieces[i] * chunk`` on.
    """

    chunk: int  # bytes of every item but the last of its slot
    num_segments: int
    tensors: tuple[int, ...]  # [slots] index of the tensor in the list that was planned
    lengths: tuple[int, ...]  # [items] elements
    segments: tuple[int, ...]  # [items]
    dtypes: tuple[int, ...]  # [items] the caller's dtype codes
    slots: tuple[int, ...]  # [items]
    pieces: tuple[int, ...]  # [items]
    parts: tuple[int, ...]  # [items] items of the whole slot
    segment_starts: tuple[int, ...]  # [num_segments + 1] first item of each segment
    slot_starts: tuple[int, ...]  # [num_segments + 1] first slot of each segment
    slot_elements: tuple[int, ...]  # [slots]
    tensor_counts: tuple[int, ...]  # [num_segments] tensors, empty ones too
    element_counts: tuple[int, ...]  # [num_segments]

    @property
    def items(self) -> int:
        return len(self.lengths)

    @property
    def busy_segments(self) -> int:
        """Segments with at least one item: the number of times a segment reports that it is done."""
        return sum(a != b for a, b in zip(self.segment_starts, self.segment_starts[1:]))


def chunk_bytes(total: int) -> int:
    """Bytes per item for ``total`` bytes in all: a power of two, hence whole 16-byte words.

    So the items of a tensor are all aligned as the tensor itself is.
    """
    wanted = -(-total // TARGET_ITEMS)
    return min(max(1 << max(wanted - 1, 0).bit_length(), MIN_CHUNK), MAX_CHUNK)


def _chunk_for(sizes: Sequence[int], segments: Sequence[int]) -> int:
    """The host's bytes decide, if there is a host: its sums then have the same bits with seeds as without them.

    Only seeds of more than MOST_ITEMS * MIN_CHUNK bytes, eight thousand million, behind a host that is small beside
    them are taken in larger pieces.
    """
    total = sum(sizes)
    host = sum(size for size, segment in zip(sizes, segments) if not segment)
    chunk = chunk_bytes(host or total)
    while total > chunk * MOST_ITEMS and chunk < MAX_CHUNK:
        chunk *= 2
    return chunk


def make_plan(
    numels: Sequence[int],
    dtypes: Sequence[int],
    segments: Sequence[int],
    num_segments: int,
    chunk: int | None = None,
) -> Plan:
    """Plan the tensors with these numbers of elements, dtype codes and segments; ``chunk`` is in bytes.

    Empty tensors count in ``tensor_counts`` and get no item; a segment may be empty. A plan without
    elements still has one item, of length 0 in segment 0, so that a launch always has a program which
    finishes the sample. Raises ValueError when the columns disagree, a segment is out of range, or one has more
    than MOST_TENSORS tensors.
    """
    if not len(numels) == len(dtypes) == len(segments):
        raise ValueError(f"{len(numels)} sizes, {len(dtypes)} dtypes and {len(segments)} segments")
    tensor_counts, element_counts = _counts(numels, segments, num_segments)
    if chunk is None:
        chunk = _chunk_for([numel * WIDTHS[dtype] for numel, dtype in zip(numels, dtypes)], segments)

    # sorted() is stable: within a segment the tensors keep their order.
    tensors = tuple(i for i in sorted(range(len(numels)), key=segments.__getitem__) if numels[i])
    lengths: list[int] = []
    item_segments: list[int] = []
    item_dtypes: list[int] = []
    slots: list[int] = []
    pieces: list[int] = []
    parts: list[int] = []
    items_of, slots_of = [0] * num_segments, [0] * num_segments
    for slot, index in enumerate(tensors):
        most = chunk // WIDTHS[dtypes[index]]
        count = -(-numels[index] // most)
        lengths += [most] * (count - 1)
        lengths.append(numels[index] - (count - 1) * most)
        item_segments += [segments[index]] * count
        item_dtypes += [dtypes[index]] * count
        slots += [slot] * count
        pieces += range(count)
        parts += [count] * count
        items_of[segments[index]] += count
        slots_of[segments[index]] += 1
    if not lengths:
        lengths, item_segments, item_dtypes, slots, pieces, parts = [0], [0], [0], [0], [0], [1]
        items_of[0] = 1
    return Plan(
        chunk=chunk,
        num_segments=num_segments,
        tensors=tensors,
        lengths=tuple(lengths),
        segments=tuple(item_segments),
        dtypes=tuple(item_dtypes),
        slots=tuple(slots),
        pieces=tuple(pieces),
        parts=tuple(parts),
        segment_starts=_starts(items_of),
        slot_starts=_starts(slots_of),
        slot_elements=tuple(numels[index] for index in tensors),
        tensor_counts=tuple(tensor_counts),
        element_counts=tuple(element_counts),
    )


def _counts(numels: Sequence[int], segments: Sequence[int], num_segments: int) -> tuple[list[int], list[int]]:
    """Tensors and elements of each segment; ValueError for a segment that is none, or has too many tensors."""
    if num_segments < 1:
        raise ValueError(f"num_segments is {num_segments}; there has to be at least one")
    tensor_counts = [0] * num_segments
    element_counts = [0] * num_segments
    for index, (numel, segment) in enumerate(zip(numels, segments)):
        if not 0 <= segment < num_segments:
            raise ValueError(f"tensor {index} is in segment {segment}, outside 0..{num_segments - 1}")
        tensor_counts[segment] += 1
        element_counts[segment] += numel
    most = max(tensor_counts)
    if most > MOST_TENSORS:
        raise ValueError(
            f"segment {tensor_counts.index(most)} has {most} tensors, and the kernel counts {MOST_TENSORS} at most: "
            "measure with SEEDTRITON_BACKEND=torch"
        )
    return tensor_counts, element_counts


def _starts(counts: Sequence[int]) -> tuple[int, ...]:
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    return tuple(starts)
