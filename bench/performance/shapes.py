"""Gradient shapes of known architectures, from their dimensions alone, and who is host and who is seed."""

from math import prod


def resnet50():
    """161 tensors, 25.6 M elements."""
    shapes = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, inputs, 1, 1), (width,), (width,)]
            shapes += [(width, width, 3, 3), (width,), (width,)]
            shapes += [(4 * width, width, 1, 1), (4 * width,), (4 * width,)]
            if block == 0:
                shapes += [(4 * width, inputs, 1, 1), (4 * width,), (4 * width,)]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2():
    """148 tensors, 124.4 M elements."""
    d = 768
    shapes = [(50257, d), (1024, d)]
    for _ in range(12):
        shapes += [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,)]
        shapes += [(d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [*shapes, (d,), (d,)]


def llama8b_shard():
    """291 tensors, 1.00 B elements: Llama-3-8B as one of 8 ranks holds it, every first dimension cut in 8."""
    d, kv, hidden, vocabulary = 4096, 1024, 14336, 128256
    layer = [(d, d), (kv, d), (kv, d), (d, d), (hidden, d), (hidden, d), (d, hidden), (d,), (d,)]
    return [(rows // 8, *rest) for rows, *rest in [(vocabulary, d), *32 * layer, (d,), (vocabulary, d)]]


def odd():
    """289 tensors, 34.3 M elements: no size is a multiple of 4, and one tensor is empty."""
    return [*32 * [(size,) for size in (1, 3, 7, 63, 127, 1001, 4099, 65537, 1000003)], (0,)]


SHAPES = {
    "ResNet-50": resnet50,
    "GPT-2": gpt2,
    "Llama-3-8B / 8": llama8b_shard,
    "1000 x 64": lambda: 1000 * [(64,)],
    "1000 x 1K": lambda: 1000 * [(1024,)],
    "200M + 2000 x 1K": lambda: [(200_000_000,), *2000 * [(1024,)]],
    "one 1B": lambda: [(1_000_000_000,)],
    "odd": odd,
    "unaligned": odd,
}
# Elements by which every tensor misses the beginning of its memory, as views into somebody's buffer do.
OFFSETS = {"unaligned": 1}


def elements(shapes):
    return sum(map(prod, shapes))


def scaled(shapes, scale):
    """First dimensions times ``scale``, at least 1; what was odd stays odd, what was empty stays empty."""
    if scale == 1:
        return shapes
    return [(max(1, round(rows * scale)) | rows & 1 if rows else 0, *rest) for rows, *rest in shapes]


def segments_of(numels, num_segments, host_to_seeds=100.0):
    """A segment for every tensor: 0 is the host, and the seeds together have 1 / ``host_to_seeds`` of its elements.

    As near to that as whole tensors allow: the smallest ones go to the seeds, evenly.
    """
    seeds = num_segments - 1
    smallest = sorted(range(len(numels)), key=lambda index: (numels[index] == 0, numels[index]))
    if len(numels) < num_segments:
        raise ValueError(f"{len(numels)} tensors cannot be {num_segments} segments")
    segments = [0] * len(numels)
    if not seeds:
        return segments
    budget, taken = sum(numels) / (1 + host_to_seeds), []
    for index in smallest[:-1]:
        if len(taken) >= seeds and budget < numels[index]:
            break
        budget -= numels[index]
        taken.append(index)
    filled = [0] * seeds
    for count, index in enumerate(reversed(taken)):
        # The largest first, each to whoever has least; an empty seed is no seed.
        seed = count if count < seeds else min(range(seeds), key=filled.__getitem__)
        filled[seed] += numels[index]
        segments[index] = 1 + seed
    return segments
