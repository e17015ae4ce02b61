"""The gate-time probe: what the validation loss would be with a seed blended in, before anything is blended.

It runs on a twin of the model: the same parameters, everything else its own. Nothing that another thread, a
compiled graph or the next training step could see is changed. What FSDP2 has sharded cannot be copied: it is
tried where it stands and put back, on every rank at once, and another thread could see that.
"""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core.errors import ConfigurationError
from ..core.pairs import PairProbe
from ..core.probe import BlendProbe
from ..parallel.sharding import fully_sharded, interrupted
from .restoring import restored
from .slot import SeedSlot


class BatchMeans(NamedTuple):
    """Validation losses of which only the means of batches are known; any pair of these two will do.

    Attributes:
        means: mean loss of each batch, 1-D, the batches in the same order on every call.
        counts: samples of each batch, 1-D, above 0.
    """

    means: Tensor | Sequence[float]
    counts: Tensor | Sequence[int]


# For each set of alphas: losses, and how many samples each of them is the mean of; float64 on the CPU, 1-D, or 0-dim
# where nothing but the mean is known.
Found = list[tuple[Tensor, Tensor]]
# Makes of what this rank has found what all have. Before that it is asked after every evaluation whether all have come
# through: with nothing found yet, or with the error of a rank that has not.
Gather = Callable[["Found | Exception"], Found]
Evaluate = Callable[[nn.Module], "float | Tensor | tuple[Tensor | Sequence[float], Tensor | Sequence[int]]"]

# Shares of the target at which G2 looks: 0.1, where the blend begins, and the end. Between them a loss
# that is lower at both can hardly be higher (the blend is linear in alpha, the loss mostly convex along it).
PROBE_AT = (0.1, 0.5, 1.0)


def probe(
    model: nn.Module,
    slot: str,
    evaluate: Evaluate,
    alphas: Sequence[float] = PROBE_AT,
    gather: Gather | None = None,
) -> BlendProbe:
    """The validation loss at alpha 0 and at ``alphas``, the seed in its present state.

    Args:
        model: contains the slot; not changed.
        slot: path of the slot in the model, which holds a seed.
        evaluate: takes a model (a twin of yours, in eval mode) and returns its validation loss: that of each sample as
            a 1-D tensor, in the same order on every call, or ``BatchMeans(means, counts)``: then the noise of the
            validation set is known too, and a change within it counts as none; or the mean alone, as a number.
            Runs without gradient and leaves the random state as it was.
        alphas: blend factors to try, in (0, 1].
        gather: brings together what several ranks have found, see ``parallel.losses.gather_losses``; each calls this.

    Raises:
        ConfigurationError: an alpha outside (0, 1], no alpha, or losses that are none of the three.
    """
    _check_alphas(alphas)
    found = _found(model, [slot], [(alpha,) for alpha in (0.0, *alphas)], evaluate, gather)
    return _compare(slot, tuple(alphas), found)


def probe_pair(
    model: nn.Module,
    slots: tuple[str, str],
    evaluate: Evaluate,
    alphas: tuple[float, float],
    gather: Gather | None = None,
) -> PairProbe:
    """The validation loss with neither seed, each alone, and both; every other slot stays as it is.

    Args:
        model: contains the slots; not changed.
        slots: paths of two slots in the model, each with a seed, whatever its stage.
        evaluate: as for ``probe``; called four times.
        alphas: the blend factor of each seed where it is blended in, in (0, 1].
        gather: as for ``probe``.

    Raises:
        ConfigurationError: what ``probe`` refuses, or the same slot twice.
    """
    if slots[0] == slots[1]:
        raise ConfigurationError(f"a pair is two different slots, got {slots[0]!r} twice; probe one seed by its name")
    _check_alphas(alphas)
    one, two = alphas
    found = _found(model, slots, [(0.0, 0.0), (one, 0.0), (0.0, two), (one, two)], evaluate, gather)
    apart = _compare(slots[0], (one, two, max(alphas)), found)
    # Against what both alone add up to, sample by sample: what all four losses share is in no error of it.
    neither, first, second, both = found
    sum_of_both = first[0] + second[0] - neither[0]
    beyond = _compare(slots[0], (max(alphas),), [(sum_of_both, neither[1]), both])
    return PairProbe(
        seeds=slots,
        alphas=alphas,
        loss=apart.loss,
        alone=(apart.changes[0], apart.changes[1]),
        together=apart.changes[2],
        interaction=beyond.changes[0],
        alone_errors=None if apart.errors is None else (apart.errors[0], apart.errors[1]),
        together_error=None if apart.errors is None else apart.errors[2],
        interaction_error=None if beyond.errors is None else beyond.errors[0],
    )


def _check_alphas(alphas: Sequence[float]) -> None:
    if not alphas or not all(0.0 < alpha <= 1.0 for alpha in alphas):
        raise ConfigurationError(f"alphas to probe must lie in (0, 1], got {tuple(alphas)}")


def _found(
    model: nn.Module,
    slots: Sequence[str],
    tried: Sequence[Sequence[float]],
    evaluate: Evaluate,
    gather: Gather | None,
) -> Found:
    """Losses and counts, all 1-D, for each row of ``tried``, the alphas of these slots; of all ranks, by ``gather``."""
    found: Found = []
    with trial_of(model) as subject:
        places = [_place(subject, slot) for slot in slots]
        for alphas in tried:
            for place, alpha in zip(places, alphas):
                place.blend_at(alpha)
            try:
                found.append(_losses_of(subject, evaluate))
                _check_samples(found)
            except Exception as error:
                # Where one rank has left a forward pass, the others are still in it: there is nobody to be told.
                if gather is not None and not interrupted(subject):
                    with suppress(Exception):  # this rank has its own error to raise
                        gather(error)
                raise
            if gather is not None:
                gather([])  # the next evaluation may communicate: begin it together or not at all
    if gather is not None:
        found = gather(found)
    return [(losses.reshape(-1), counts.reshape(-1)) for losses, counts in found]


def _place(subject: nn.Module, slot: str) -> SeedSlot:
    place = subject.get_submodule(slot)
    if not isinstance(place, SeedSlot) or place.alpha is None:
        raise ConfigurationError(f"{slot!r} is no slot with a seed: germinate one first")
    return place


def _losses_of(subject: nn.Module, evaluate: Evaluate) -> tuple[Tensor, Tensor]:
    """What an evaluation finds that draws the same numbers every time."""
    devices = {tensor.device for tensor in (*subject.parameters(), *subject.buffers())}
    accelerators = sorted((d for d in devices if d.type not in ("cpu", "meta")), key=str)
    kind = accelerators[0].type if accelerators else "cuda"
    with torch.no_grad(), torch.random.fork_rng(devices=accelerators, device_type=kind):
        subject.eval()
        return _losses(evaluate(subject))


@contextmanager
def trial_of(model: nn.Module) -> Iterator[nn.Module]:
    """What may be blended and run without a trace in the model: a twin, or itself, which is put back."""
    if fully_sharded(model):
        with restored(model):
            yield model
    else:
        yield twin_of(model)


def twin_of(model: nn.Module) -> nn.Module:
    """A copy of ``model`` that shares its parameters and nothing else; ConfigurationError if it cannot be copied."""
    # What is in the memo is taken as already copied.
    shared = {id(parameter): parameter for parameter in model.parameters()}
    try:
        return copy.deepcopy(model, shared)
    except (RuntimeError, TypeError) as error:
        raise ConfigurationError(
            f"the model cannot be copied for the probe: {error}; keep activations, files and locks out of its "
            "attributes, or leave out the validation function"
        ) from error


def _losses(found: object) -> tuple[Tensor, Tensor]:
    """Losses and how many samples each is the mean of, as float64 [n] on the CPU; a mean alone is 0-dim."""
    counted = isinstance(found, tuple) and len(found) == 2
    pair = found if isinstance(found, tuple) and counted else (found, 1.0)
    losses, counts = _numbers(pair[0]), _numbers(pair[1])
    # A list by itself is refused: nobody could tell samples from means of batches, which want their counts.
    if not (counted or isinstance(found, (Tensor, numbers.Real)) or hasattr(found, "__array__")):
        losses = None
    if losses is None or counts is None or losses.dim() > 1 or not losses.numel():
        what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ConfigurationError(
            "evaluate(model) must return the loss of each sample as a 1-D tensor, a pair of batch means and counts, or "
            f"the mean loss, got {what}"
        )
    losses = losses.reshape(-1) if counted else losses
    if counted and (counts.shape != losses.shape or not bool(((counts > 0) & counts.isfinite()).all())):
        raise ConfigurationError(
            f"evaluate(model) returned {len(losses)} batch means with the counts {counts.tolist()}: every batch needs "
            "one, above 0"
        )
    return losses, counts.expand_as(losses)


def _numbers(found: object) -> Tensor | None:
    if isinstance(found, (bool, str, bytes)):
        return None
    try:
        found = found.full_tensor() if hasattr(found, "full_tensor") else found  # a DTensor
        return torch.as_tensor(found).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError):
        return None


def _check_samples(found: Found) -> None:
    base, counts = found[0]
    if any(losses.shape != base.shape or not torch.equal(sizes, counts) for losses, sizes in found):
        raise ConfigurationError(
            f"evaluate(model) returned {[losses.numel() for losses, _ in found]} losses on calls with the same data; "
            "they must be of the same samples in the same order"
        )


def _compare(slot: str, alphas: tuple[float, ...], found: Sequence[tuple[Tensor, Tensor]]) -> BlendProbe:
    (base, counts), parts = found[0], len(found[0][0])
    weights = counts / counts.sum()
    loss = (weights * base).sum()
    changes = [losses - base for losses, _ in found[1:]]
    means = [(weights * change).sum() for change in changes]
    errors = spread = None
    if parts > 1:
        # Standard error of a weighted mean; with one sample a part, std / sqrt(n). A batch mean scatters by the root
        # of its count less than a sample does.
        inflation = parts / (parts - 1)
        errors = tuple(
            math.sqrt(inflation * (weights * (change - mean)).square().sum()) for change, mean in zip(changes, means)
        )
        spread = math.sqrt((counts * (base - loss).square()).sum() / (parts - 1))
    return BlendProbe(
        seed=slot,
        loss=loss.item(),
        alphas=alphas,
        changes=tuple(mean.item() for mean in means),
        errors=errors,
        spread=spread,
        degrees=None if errors is None else parts - 1,
    )
