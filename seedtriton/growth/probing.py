"""The gate-time probe: what the validation loss would be with a seed blended in, before anything is blended.

It runs on a twin of the model: the same parameters, everything else its own. Nothing that another thread, a
compiled graph or the next training step could see is changed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..core.errors import ConfigurationError
from ..core.evidence import BlendProbe
from ..core.pairs import PairProbe
from .slot import SeedSlot

Evaluate = Callable[[nn.Module], "float | Tensor"]

# Shares of the target at which G2 looks: 0.1, where the blend begins, and the end. Between them a loss
# that is lower at both can hardly be higher (the blend is linear in alpha, the loss mostly convex along it).
PROBE_AT = (0.1, 0.5, 1.0)


def probe(
    model: nn.Module, slot: str, evaluate: Evaluate, alphas: Sequence[float] = PROBE_AT
) -> BlendProbe:
    """The validation loss at alpha 0 and at ``alphas``, the seed in its present state.

    Args:
        model: contains the slot; not changed.
        slot: path of the slot in the model, which holds a seed.
        evaluate: takes a model (a twin of yours, in eval mode) and returns its validation loss, the mean as a
            number, or the loss of each sample as a 1-D tensor, in the same order on every call: then the noise of
            the validation set is known too, and a change within it counts as none. Runs without gradient and
            leaves the random state as it was.
        alphas: blend factors to try, in (0, 1].

    Raises:
        ConfigurationError: an alpha outside (0, 1], no alpha, or losses that are neither of both.
    """
    _check_alphas(alphas)
    found = _losses_at(model, [slot], [(alpha,) for alpha in (0.0, *alphas)], evaluate)
    return _compare(slot, tuple(alphas), found)


def probe_pair(
    model: nn.Module, slots: tuple[str, str], evaluate: Evaluate, alphas: tuple[float, float]
) -> PairProbe:
    """The validation loss with neither seed, each alone, and both; every other slot stays as it is.

    Args:
        model: contains the slots; not changed.
        slots: paths of two slots in the model, each with a seed, whatever its stage.
        evaluate: as for ``probe``; called four times.
        alphas: the blend factor of each seed where it is blended in, in (0, 1].

    Raises:
        ConfigurationError: what ``probe`` refuses, or the same slot twice.
    """
    if slots[0] == slots[1]:
        raise ConfigurationError(f"a pair is two different slots, got {slots[0]!r} twice; probe one seed by its name")
    _check_alphas(alphas)
    one, two = alphas
    found = _losses_at(model, slots, [(0.0, 0.0), (one, 0.0), (0.0, two), (one, two)], evaluate)
    apart = _compare(slots[0], (one, two, max(alphas)), found)
    # Against what both alone add up to, sample by sample: what all four losses share is in no error of it.
    neither, first, second, both = found
    beyond = _compare(slots[0], (max(alphas),), [first + second - neither, both])
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


def _losses_at(
    model: nn.Module, slots: Sequence[str], tried: Sequence[Sequence[float]], evaluate: Evaluate
) -> list[Tensor]:
    """Losses of a twin of the model for each row of ``tried``, the alphas of these slots."""
    twin = twin_of(model)
    places = []
    for slot in slots:
        place = twin.get_submodule(slot)
        if not isinstance(place, SeedSlot) or place.alpha is None:
            raise ConfigurationError(f"{slot!r} is no slot with a seed: germinate one first")
        places.append(place)
    devices = {tensor.device for tensor in (*twin.parameters(), *twin.buffers())}
    accelerators = sorted((d for d in devices if d.type not in ("cpu", "meta")), key=str)
    kind = accelerators[0].type if accelerators else "cuda"
    found = []
    for alphas in tried:
        for place, alpha in zip(places, alphas):
            place.blend_at(alpha)
        # Forked for each row: an evaluation that draws sees the same numbers every time.
        with torch.no_grad(), torch.random.fork_rng(devices=accelerators, device_type=kind):
            twin.eval()
            found.append(_losses(evaluate(twin)))
    return found


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


def _losses(found: object) -> Tensor:
    """Losses of samples as float64 [n] on the CPU; a mean alone is one."""
    losses = torch.as_tensor(found, dtype=torch.float64, device="cpu") if isinstance(found, (int, float)) else found
    if not isinstance(losses, Tensor) or losses.dim() > 1 or not losses.numel():
        what = tuple(losses.shape) if isinstance(losses, Tensor) else type(found).__name__
        raise ConfigurationError(
            f"evaluate(model) must return the mean loss or the loss of each sample as a 1-D tensor, got {what}"
        )
    return losses.detach().double().cpu().reshape(-1)


def _compare(slot: str, alphas: tuple[float, ...], found: Sequence[Tensor]) -> BlendProbe:
    base, samples = found[0], len(found[0])
    if any(len(losses) != samples for losses in found):
        raise ConfigurationError(
            f"evaluate(model) returned {[len(losses) for losses in found]} losses on calls with the same data; "
            "they must be of the same samples in the same order"
        )
    changes = [losses - base for losses in found[1:]]
    errors = None
    if samples > 1:
        errors = tuple((change.std() / math.sqrt(samples)).item() for change in changes)
    return BlendProbe(
        seed=slot,
        loss=base.mean().item(),
        alphas=alphas,
        changes=tuple(change.mean().item() for change in changes),
        errors=errors,
    )
