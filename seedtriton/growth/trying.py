"""What can be known of a seed before it lives: is it a module, can it learn, does it keep shape and dtype?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..core.errors import ConfigurationError, WiringError
from ..gradients.noticing import is_shard
from ..parallel.sharding import fully_sharded
from .arguments import made_by
from .isolation import handed_on, leaks, uses_group_norm
from .randomness import undisturbed

# What a mistake in a seed's forward raises; of exactly these types.
_FAILURES = (
    RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, AssertionError, NameError,
    NotImplementedError, ZeroDivisionError, UnboundLocalError,
)  # fmt: skip


class Tried(NamedTuple):
    """What a trial run of a seed has shown; the defaults are those of one that was not tried.

    Attributes:
        group_norm: it may have a group norm, see ``isolation.given_to``.
        writes: it may write into its input.
        leaky: it reaches outside itself.
        handed_on: see ``isolation.handed_on``.
        ran: it was tried, and keeps shape and dtype.
    """

    group_norm: bool = True
    writes: bool = True
    leaky: bool = False
    handed_on: Tensor | None = None
    ran: bool = False


def seed_module(seed: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """The seed itself, or what its factory makes; ConfigurationError when that is no module, or wants arguments.

    Parameters and buffers that were made in inference mode could never learn: the module gets copies that can.
    """
    module = seed if isinstance(seed, nn.Module) or not callable(seed) else made_by(seed, "a seed")
    if not isinstance(module, nn.Module):
        raise ConfigurationError(f"a seed is a module or a factory of one, got {type(module).__name__}")
    _leave_inference_mode(module)
    return module


def is_unfinished(module: nn.Module) -> bool:
    """Whether a parameter or buffer waits for the first features (nn.LazyLinear and its like)."""
    return any(is_lazy(tensor) for tensor in own_tensors(module))


def slot_named(name: str | None) -> str:
    """How an error names a slot."""
    return "a slot" if name is None else f"slot {name!r}"


@contextmanager
def normal_tensors() -> Iterator[None]:
    """Inside of torch.inference_mode too, what is made here can be trained, and no graph is built."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def check_features(features: object, name: str | None) -> None:
    """Raise WiringError, which names the slot, unless a seed can be given these features."""
    if not isinstance(features, Tensor):
        raise WiringError(
            f"{slot_named(name)} takes one tensor while it holds a seed, got {_described(features)}; "
            "put the slot where a single tensor passes, or hand it the part that the seed should see"
        )
    if features.is_nested or features.layout is not torch.strided:
        kind = "a nested tensor" if features.is_nested else f"a tensor of layout {features.layout}"
        raise WiringError(
            f"{slot_named(name)} takes a dense tensor while it holds a seed, got {kind}; pad it, or use to_dense()"
        )
    if is_shard(features):
        raise WiringError(
            f"{slot_named(name)} was given a DTensor, {features.placements}, of which each rank holds a part "  # type: ignore[attr-defined]
            "(sequence parallel): put the slot where features are whole, behind a layer with output_layouts=Replicate()"
        )
    if not features.is_floating_point():
        way = "torch.view_as_real(features)" if features.is_complex() else "features.float()"
        raise WiringError(
            f"{slot_named(name)} takes real floating features while it holds a seed, got {features.dtype}; "
            f"give it {way}"
        )


def check_output(features: Tensor, output: object, name: str | None) -> None:
    """Raise WiringError, which names the slot, unless a seed's output can take the place of these features.

    Under autocast the dtype may differ; whoever calls converts it.
    """
    if not isinstance(output, Tensor):
        raise WiringError(f"{slot_named(name)}: a seed returns one tensor, this one returned {_described(output)}")
    if output.is_nested or output.layout is not torch.strided:
        raise WiringError(f"{slot_named(name)}: a seed returns a dense tensor, this one returned {output.layout}")
    if output.shape != features.shape or (
        output.dtype != features.dtype and not _autocasting(features.device)
    ):
        raise WiringError(
            f"{slot_named(name)}: a seed must keep shape and dtype: features {tuple(features.shape)} {features.dtype}, "
            f"seed's output {tuple(output.shape)} {output.dtype}; change the seed, or prune it"
        )


def prepare(
    seed: nn.Module, probe: Tensor | None, device: torch.device | None, dtype: torch.dtype | None, name: str | None
) -> Tried:
    """Bring a seed to its place and try it.

    Args:
        seed: the module; moved and converted, and layers that wait for their first features are finished.
        probe: features to try it on; without them nobody knows, and it is taken for one that has, and that writes.
            What is fully_sharded is not tried: run alone, before its host, it would take itself for FSDP2's root.
        device: where it goes; to the probe unless told.
        dtype: of its floating parameters; the probe's unless told, and under autocast its own.
        name: the slot's path in the model, for errors.

    Raises:
        WiringError: it has no trainable parameter, waits for features that nobody gave, or changes the shape or dtype.
    """
    if is_unfinished(seed) and probe is None:
        raise WiringError(
            f"the seed for {slot_named(name)} has layers that wait for their first features (nn.LazyLinear and its "
            "like): germinate(..., probe=features) finishes them"
        )
    if probe is not None:
        device = device or probe.device
        if dtype is None and not _autocasting(probe.device):
            dtype = probe.dtype
    seed.to(device=device, dtype=dtype)
    tried = Tried() if probe is None or fully_sharded(seed) else _try(seed, probe, dtype, name)
    if not any(p.numel() for p in seed.parameters() if p.requires_grad):
        raise WiringError("the seed has no trainable parameter: it could never learn")
    return tried


def _try(seed: nn.Module, probe: Tensor, dtype: torch.dtype | None, name: str | None) -> Tried:
    with undisturbed(seed, probe.device), torch.enable_grad():
        features = probe.detach().to(dtype, copy=True)
        version = features._version
        try:
            output = seed(features)
        except Exception as error:
            raise_named(error, seed, features, name)
    check_output(features, output, name)
    wrote = features._version != version or may_write(seed)
    leaky = leaks(output, own_tensors(seed)) > 0
    return Tried(uses_group_norm(output), wrote, leaky, handed_on(probe.detach().to(output.dtype), output), True)


def raise_named(error: Exception, seed: nn.Module, features: Tensor, name: str | None) -> NoReturn:
    """Raise what a seed's forward pass has raised again, as the cause of a WiringError that names the slot.

    An error of a kind of its own goes on as it is: it tells somebody outside that memory has run out, or that a
    checkpoint has recomputed enough.
    """
    if type(error) not in _FAILURES:
        raise error
    raise WiringError(
        f"{slot_named(name)}: its seed, {type(seed).__name__}, failed on features {tuple(features.shape)} "
        f"{features.dtype}: {type(error).__name__}: {error}. A seed takes the features that its slot is called with, "
        "and returns features of the same shape"
    ) from error


def _autocasting(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def own_tensors(seed: nn.Module) -> list[Tensor]:
    """Parameters and buffers of a module."""
    return [*seed.parameters(), *seed.buffers()]


def may_write(seed: nn.Module) -> bool:
    """Whether a layer says so itself: Dropout(inplace=True) writes in training and not in eval mode."""
    return any(getattr(module, "inplace", False) is True for module in seed.modules())


def _described(value: Any) -> str:
    kind = type(value).__name__
    return f"{kind} of {len(value)}" if isinstance(value, (tuple, list, dict)) else kind


def _is_inference(tensor: Tensor) -> bool:
    with torch._C.DisableTorchFunctionSubclass():  # one that waits for its shape answers nothing
        return tensor.is_inference()


def _leave_inference_mode(module: nn.Module) -> None:
    if not any(_is_inference(tensor) for tensor in own_tensors(module)):
        return
    made: dict[int, Tensor] = {}
    with normal_tensors(), torch.no_grad():
        for part in module.modules():
            for store in (part._parameters, part._buffers):
                for name, tensor in store.items():
                    if tensor is None or not _is_inference(tensor):
                        continue
                    if id(tensor) not in made:
                        made[id(tensor)] = _normal(tensor)
                    store[name] = made[id(tensor)]  # type: ignore[assignment]


def _normal(tensor: Tensor) -> Tensor:
    if is_lazy(tensor):
        made: Any = type(tensor)
        fresh: Tensor = made(tensor.requires_grad, tensor.device, tensor.dtype)
        return fresh
    return nn.Parameter(tensor.clone(), tensor.requires_grad) if isinstance(tensor, nn.Parameter) else tensor.clone()
