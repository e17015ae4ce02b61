"""Columns, and how what many ranks have measured becomes the window of one process; without any process."""

import math

import pytest
import torch

from seedtriton.gradients.progress import SeedFacts
from seedtriton.gradients.row import ELEMENTS, EXPLODING, EXTRA, LIVE, QUANTITIES, SUMSQ, TENSORS, VANISHING
from seedtriton.gradients.spread import Column, Way, columns_of, fold, laid_back, unfold

OWNERS = (None, "a", "b")


def test_alone_a_column_is_a_segment():
    columns, of_column, chosen = columns_of(OWNERS, (0, 0, 1, 2), None)
    assert columns == (Column(None), Column("a"), Column("b"))
    assert of_column == (0, 1, 2)
    assert chosen == (0, 0, 1, 2)


def test_every_way_of_a_segment_has_a_column_and_the_first_ones_are_the_segments():
    ways = [Way(2, 1), Way(1, 2), Way(1, 2), Way(2, 1)]
    columns, of_column, chosen = columns_of(OWNERS, (0, 0, 1, 0), ways)
    assert columns == (Column(None, Way(2, 1)), Column("a", Way(1, 2)), Column("b"), Column(None, Way(1, 2)))
    assert of_column == (0, 1, 2, 0)
    assert chosen == (0, 3, 1, 0)


class Held:
    """Tensors as ranks hold them: copies of each part on so many ranks, and the ring that each rank would write."""

    def __init__(self, world, seed=0):
        self.world, self.random = world, torch.Generator().manual_seed(seed)
        self.tensors = []  # segment, way, parts by rank

    def add(self, segment, size, copies, shards):
        whole = torch.randn(size, generator=self.random, dtype=torch.float64)
        parts = list(whole.tensor_split(shards))
        by_rank = [parts[rank // copies] if rank < copies * shards else None for rank in range(self.world)]
        self.tensors.append((segment, Way(copies, shards), whole, by_rank))

    def ring(self, rank, columns, gains, skipped):
        row = torch.zeros(len(columns), QUANTITIES, dtype=torch.float64)
        row[1:, EXTRA] = math.nan
        for segment, way, _, by_rank in self.tensors:
            part = by_rank[rank]
            if part is None:
                continue
            place = columns.index(Column(OWNERS[segment], way))
            row[place, SUMSQ] += part.square().sum()
            for quantity, value in ((ELEMENTS, part.numel()), (TENSORS, 1), (LIVE, 1), (VANISHING, 1), (EXPLODING, 1)):
                row[place, quantity] += value
        for segment, gain in gains.items():
            row[segment, EXTRA] = gain
        row[0, EXTRA] = float(skipped)
        return row.unsqueeze(0)


@pytest.mark.parametrize("world", [2, 4])
def test_the_sum_over_ranks_is_the_window_of_one_process(world):
    held = Held(world)
    for segment in range(3):
        held.add(segment, 12, world, 1)
        held.add(segment, 20, 1, world)
        if world == 4:
            held.add(segment, 8, 2, 2)
    segments = [segment for segment, *_ in held.tensors]
    columns, of_column, _ = columns_of(OWNERS, segments, [way for _, way, *_ in held.tensors])
    gains = [{1: 1.0 + rank} if rank % 2 == 0 else {1: 1.0 + rank, 2: 5.0} for rank in range(world)]
    rings = [held.ring(rank, columns, gains[rank], rank == 1) for rank in range(world)]
    window = unfold(sum(fold(ring, columns, of_column) for ring in rings))
    for segment in range(3):
        whole = [tensor for owner, _, tensor, _ in held.tensors if owner == segment]
        assert window[0, segment, SUMSQ].item() == pytest.approx(sum(float(t.square().sum()) for t in whole), rel=1e-12)
        assert window[0, segment, ELEMENTS].item() == sum(t.numel() for t in whole)
        for quantity in (TENSORS, LIVE, VANISHING, EXPLODING):
            assert window[0, segment, quantity].item() == len(whole)
    assert window[0, 1, EXTRA].item() == pytest.approx(sum(1.0 + rank for rank in range(world)) / world)
    assert window[0, 2, EXTRA].item() == 5.0  # of those that have one
    assert window[0, 0, EXTRA].item() == 1.0  # one rank is enough for a step to be skipped


def test_a_gain_that_nobody_has_is_none_and_one_that_is_not_finite_is_seen():
    columns, of_column, _ = columns_of(OWNERS, (0, 1, 2), [Way(2, 1)] * 3)
    held = Held(2)
    rings = [held.ring(rank, columns, {1: math.inf} if rank else {1: 1.0}, False) for rank in range(2)]
    window = unfold(sum(fold(ring, columns, of_column) for ring in rings))
    assert math.isinf(window[0, 1, EXTRA])
    assert math.isnan(window[0, 2, EXTRA])


@pytest.mark.parametrize("ways", [[Way(3, 1)] * 3, [Way(1, 3), Way(3, 1), Way(1, 2)]])
def test_a_window_that_is_laid_back_on_one_rank_is_folded_to_itself(ways):
    columns, of_column, _ = columns_of(OWNERS, (0, 1, 2), ways)
    window = torch.rand(5, 3, QUANTITIES, dtype=torch.float64)
    window[..., TENSORS] = 4.0
    window[:, 0, EXTRA] = 0.0
    window[2, 1, EXTRA] = math.nan
    rings = [laid_back(window, columns, mine=rank == 0) for rank in range(3)]
    again = unfold(sum(fold(ring, columns, of_column) for ring in rings))
    torch.testing.assert_close(again, window, rtol=1e-14, atol=0.0, equal_nan=True)


def test_what_ranks_know_of_a_seed_is_summed_or_the_worst_of_it():
    one = SeedFacts(1.0, 4.0, 10.0, 3.0, 0.0, 1.0, 8.0, 1.0, 8.0)
    other = SeedFacts(2.0, 5.0, 6.0, 4.0, 1.0, 0.0, 7.0, 3.0, 7.0)
    nothing = SeedFacts(0.0, 0.0, 0.0, *[math.nan] * 6)
    merged = SeedFacts.merged([one, nothing, other])
    assert merged == SeedFacts(3.0, 9.0, 16.0, 4.0, 1.0, 0.0, 7.0, 3.0, 7.0)
    assert merged.displacement == pytest.approx(math.sqrt(3.0) / 3.0)
    unknown = SeedFacts.merged([one, other._replace(moved=math.nan)])
    assert unknown.displacement is None
    assert math.isnan(SeedFacts.merged([nothing, nothing]).steps)
