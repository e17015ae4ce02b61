"""Validation losses of several ranks as those of one: the same bits on each, and no sample counted twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.errors import WiringError

Found = list[tuple[Tensor, Tensor]]


def gather_losses(found: Found | Exception, exchange: Callable[[Any], list[Any]]) -> Found:
    """The losses that every rank has found, brought together; every rank calls it.

    Losses of samples or of batches are joined in the order of the ranks. Ranks that have looked at the same samples
    count once, or errors would shrink with the number of ranks: all of them, as where each looks at the whole
    validation set, or some, as where a part of the ranks shares a model. Of means alone the mean is taken.

    Args:
        found: for each set of alphas the losses, float64 on the CPU, and how many samples each is the mean of; 1-D,
            or 0-dim where a rank knows nothing but its mean. Or the error that this rank has met instead, or an empty
            list: so far it has met none.
        exchange: what each rank has found, in the order of the ranks, from what this one has; of plain values.

    Returns:
        Such a list, the same bits on every rank; empty as long as every rank has given an empty one.

    Raises:
        WiringError: on all other ranks when one has met an error; on all ranks when some know the mean alone and
            others more, or they have tried other alphas.
        Exception: the error that was given, once the others know.
    """
    # One exchange for what went wrong and for what was found: nobody waits for somebody who has nothing to say.
    if isinstance(found, Exception):
        exchange(f"{type(found).__name__}: {found}")
        raise found
    said = exchange([(losses.clone(), counts.clone()) for losses, counts in found])
    for rank, theirs in enumerate(said):
        if isinstance(theirs, str):
            raise WiringError(
                f"evaluate(model) failed on rank {rank}, and without its losses no rank knows a probe: {theirs}"
            )
    _check_kinds(said)
    if not found or found[0][0].dim() == 0:
        return [(torch.stack(losses).mean(), counts[0]) for losses, counts in _by_row(said)]
    return [(torch.cat(losses), torch.cat(counts)) for losses, counts in _by_row(_once(said))]


def _by_row(ranks: list[Found]) -> list[tuple[list[Tensor], list[Tensor]]]:
    return [([losses for losses, _ in row], [counts for _, counts in row]) for row in zip(*ranks)]


def _check_kinds(ranks: list[Found]) -> None:
    kinds = [(len(theirs), theirs[0][0].dim() if theirs else 0) for theirs in ranks]
    for rank, kind in enumerate(kinds):
        if kind != kinds[0]:
            words = [f"{rows} times {'losses' if dim else 'a mean alone'}" for rows, dim in (kinds[0], kind)]
            raise WiringError(
                f"evaluate(model) returned {words[0]} on rank 0, {words[1]} on rank {rank}: every rank must return "
                "losses of its samples or batches, or every rank a mean, at the same alphas"
            )


def _once(ranks: list[Found]) -> list[Found]:
    """Each rank whose samples no rank before it had."""
    if all(_same(ranks[0], theirs) for theirs in ranks[1:]):
        return ranks[:1]
    kept: list[Found] = []
    for theirs in ranks:
        if not (_telling(theirs) and any(_same(known, theirs) for known in kept)):
            kept.append(theirs)
    return kept


def _same(one: Found, two: Found) -> bool:
    """Whether both are of the same samples: as many, with losses that agree at every alpha, not only before the blend,
    where whole validation sets may have a loss of 0.

    They agree up to rounding, or up to a hundredth of what they scatter by: ranks may sum in another order, and two
    sets of samples differ by as much as they scatter.
    """
    for (losses, counts), (others, their_counts) in zip(one, two):
        if losses.shape != others.shape or not torch.equal(counts, their_counts):
            return False
        apart = (losses - others).abs()
        rounding = bool((apart <= 1e-6 * losses.abs()).all())
        scatter = losses.std() if len(losses) > 2 else losses.new_zeros(())
        if not rounding and not bool(apart.square().mean().sqrt() < 0.01 * scatter):
            return False
    return True


def _telling(found: Found) -> bool:
    """Whether its losses could hardly be those of other samples by chance, as counts of errors could, or zeros."""
    losses = found[0][0]
    return len(losses) > 2 and 2 * len(losses.unique()) > len(losses)
