"""One reading of what many ranks have measured, the same bits on each: one header, one sum.

A rank takes part with what it holds; of a seed that is on other ranks alone, with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.errors import WiringError
from . import ops
from .noticing import is_shard
from .parameters import Watched
from .progress import SeedFacts
from .reading import Unpacked
from .row import QUANTITIES
from .spread import Ranks, fold, unfold

# Sums of squares of weights that every rank holds whole may differ by as much: another order of additions.
SAME = 1e-6


class Agreed(NamedTuple):
    """What all ranks know.

    Attributes:
        found: the window of one process, and of each seed what all know together.
        told: of each rank, what it told beside.
    """

    found: Unpacked
    told: list[list[float]]


@torch.no_grad()
def agree(
    ranks: Ranks, watched: Watched, ring: Tensor, found: Unpacked, call: str, facts: Mapping[str, object],
    told: Sequence[float],
) -> Agreed:  # fmt: skip
    """What all ranks know together; on every rank.

    Args:
        ranks: who takes part.
        watched: what this rank holds.
        ring: what it has measured.
        found: what it knows.
        call: what it is in, for errors.
        facts: what has to be the same on every rank, by what to call it; see ``Ranks.headers``.
        told: what need not be.

    Raises:
        WiringError: ranks differ in ``facts``, in their samples or in weights that each holds whole, on all ranks; or
            not every rank is in ``call``.
    """
    own = {
        **facts,
        "the samples measured": found.written,
        "the seeds": list(watched.names),
        "where windows begin": list(found.since),
        "the length of the window": len(ring),
    }
    news = ranks.headers(call, own, watched.unexchanged)
    folded = fold(ring, watched.columns, watched.column_segments)  # the columns that it was measured in
    if news:
        watched.exchange(call)
    # Of what is not to be summed each rank fills a row of its own, and the others zeros: a sum is a gather as well.
    segments, seeds = folded.shape[1], len(found.facts)
    weights = torch.zeros(ranks.world, segments, dtype=torch.float64, device=ring.device)
    weights[ranks.rank] = _whole_weights(watched, segments, ranks.world)
    known = [*(number for seed in found.facts.values() for number in seed), *told]
    told_of = torch.zeros(ranks.world, len(known), dtype=torch.float64, device="cpu")
    told_of[ranks.rank] = torch.tensor(known, dtype=torch.float64, device="cpu")
    total = ranks.total(torch.cat([folded.flatten(), weights.flatten(), told_of.flatten().to(ring.device)]), call)
    summed, weighed, rest = total.split([folded.numel(), weights.numel(), told_of.numel()])
    _refuse_apart(weighed.view(ranks.world, segments).tolist(), ("the host", *watched.names))
    by_rank = rest.view(ranks.world, -1).tolist()
    size = len(SeedFacts._fields)
    merged = {
        name: SeedFacts.merged([SeedFacts(*row[index * size : (index + 1) * size]) for row in by_rank])
        for index, name in enumerate(found.facts)
    }
    window = unfold(summed.view(len(ring), segments, QUANTITIES + 1))
    found = found._replace(facts=merged, rows=window.flatten().tolist())
    return Agreed(found, [row[seeds * size :] for row in by_rank])


def _whole_weights(watched: Watched, segments: int, world: int) -> Tensor:
    """Sum of squares of the weights that every rank holds whole, by segment: float64 [segments]."""
    chosen = [
        (p.detach(), watched.column_segments[column])
        for p, column in zip(watched.tracked, watched.chosen)
        if not is_shard(p) and watched.columns[column].way.copies == world and p.is_floating_point()
    ]
    return ops.segmented_sumsq([p for p, _ in chosen], [segment for _, segment in chosen], segments)


def _refuse_apart(weights: Sequence[Sequence[float]], owners: Sequence[str]) -> None:
    for owner, sums in zip(owners, zip(*weights)):
        known = [value for value in sums if math.isfinite(value)]
        if known and max(known) - min(known) > SAME * max(known):
            raise WiringError(
                f"the weights of {owner if owner == 'the host' else f'seed {owner!r}'} are not the same on every rank: "
                f"sums of squares by rank {[float(f'{value:.9g}') for value in sums][:8]}. Whole parameters have to be "
                "averaged in each step: give GrowthController the model inside DistributedDataParallel, so that it "
                "averages seeds that come after the wrap; or average all gradients yourself before measure()"
            )
