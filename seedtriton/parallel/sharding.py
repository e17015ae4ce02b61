"""FSDP2 (``torch.distributed.fsdp.fully_shard``): a seed that is sharded like its host, and what is registered when.

A module that is fully_sharded has two sets of parameters: the sharded ones, DTensors that optimizer and monitor hold,
and the unsharded ones, made of them for a forward pass, which are the leaves of its graph. Which of them
``parameters()`` yields depends on what ran last. What says so is private in torch; everything that reads it is here.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.errors import WiringError

_BY_HAND = "shard it yourself: fully_shard(seed, mesh=..., mp_policy=...) and give it to germinate"


def fully_sharded(module: nn.Module) -> bool:
    """Whether it or a part of it is."""
    return any(True for _ in _sharded(module))


def settle(module: nn.Module) -> None:
    """Register the sharded parameters again, without communication; nothing where nothing is fully_sharded.

    FSDP2 leaves the unsharded ones behind in its root, and wherever ``reshard_after_forward`` is False, after every
    forward pass without a backward pass. Whoever lists, converts, freezes or steps parameters then has the wrong ones:
    what is set on them is lost, and the next forward pass computes with weights from before the optimizer's step.
    Gradients that were not reduced yet (``set_requires_gradient_sync(False)``) stay where they are, for the next
    backward pass; between forward and backward pass it costs one all-gather.
    """
    kinds = _loaded("torch.distributed.fsdp", "FSDPModule")
    if not kinds:
        return
    for part in _sharded(module):
        part.reshard()
    if isinstance(module, kinds):
        return
    sharded = _loaded("torch.distributed.tensor", "DTensor")
    for part in module.modules():
        # What is sharded with a module around it cannot name that. For a state_dict FSDP2 reshards it all the same.
        if vars(part).get("_is_fsdp_managed_module") and any(
            parameter is not None and not isinstance(parameter, sharded) for parameter in part._parameters.values()
        ):
            nn.Module.state_dict(part)


def shard_like(seed: nn.Module, model: nn.Module, slot: str, *, returns: torch.dtype | None = None) -> bool:
    """``fully_shard`` a seed as the module around its slot is: mesh, mixed precision, offloading and resharding.

    That is the nearest one that is fully_sharded and has parameters of its own; where there is none, what all such
    modules of the model have in common. Call it on every rank, with a seed whose weights are the same on all of them
    and that has run on its probe, before the optimizer and the monitor learn of its parameters: they are others after
    it. The seed is gathered once, so that it has its unsharded parameters even if it runs first in inference mode, or
    not at all while gradients are accumulated.

    Args:
        seed: a module; left as it is where it is fully_sharded, or all of its parameters are DTensors.
        model: the host, with the slot.
        slot: path of the slot in the model.
        returns: the dtype of the host's features, which a seed returns whatever it computes in; that of the
            computation unless told.

    Returns:
        Whether the seed is fully_sharded now; False in a model where nothing is.

    Raises:
        WiringError: the modules of the model differ, torch does not say how they are sharded, or the seed cannot be.
    """
    if not fully_sharded(model):
        return False
    already = _loaded("torch.distributed.tensor", "DTensor")
    if not any(seed is part for part in _sharded(seed)) and not all(isinstance(p, already) for p in seed.parameters()):
        _shard(seed, _like_host(model, slot), slot, returns)
    gather_once(seed)
    return fully_sharded(seed)


def gather_once(module: nn.Module) -> None:
    """Make the unsharded parameters that were never needed yet: one all-gather each, on every rank."""
    for part in _sharded(module):
        if any(getattr(p, "_unsharded_param", None) is None for group in _groups(part) for p in group.fsdp_params):
            with torch.inference_mode(False), torch.no_grad():
                part.unshard()
                part.reshard()


def own_unsharded(modules: Iterable[nn.Module]) -> list[Tensor]:
    """The unsharded parameters of what is fully_sharded among ``modules`` and inside them: leaves of its graph."""
    held = (getattr(p, "_unsharded_param", None) for module in modules for p in _held(module))
    return [tensor for tensor in held if tensor is not None]


def unreduced(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """The sharded parameters of what is fully_sharded among ``modules`` whose gradients wait for their reduction."""
    kinds = _loaded("torch.distributed.fsdp", "FSDPModule")
    for group in (group for part in modules if kinds and isinstance(part, kinds) for group in _groups(part)):
        waiting = getattr(group, "_partial_reduce_output", None) is not None
        for held in group.fsdp_params:
            own = getattr(held, "_unsharded_param", None)
            kept = own is not None and own.grad is not None
            if waiting or kept or getattr(held, "unsharded_accumulated_grad", None) is not None:
                yield held.sharded_param


def forget_unreduced(module: nn.Module) -> None:
    """Drop gradients of frozen parameters that wait for their reduction, in what is fully_sharded inside ``module``.

    It would come with the next backward pass that synchronizes, and the optimizer would step them once more.
    """
    for held in _held(module):
        if not held.sharded_param.requires_grad:
            held.unsharded_accumulated_grad = None
            if getattr(held, "_unsharded_param", None) is not None:
                held._unsharded_param.grad = None
    for group in (group for part in _sharded(module) for group in _groups(part)):
        if not any(held.sharded_param.requires_grad for held in group.fsdp_params):
            group._partial_reduce_output = None


def learn_again(module: nn.Module) -> None:
    """Let what was frozen in its first forward pass have gradients: only then does FSDP2 ask for their dtype."""
    for group in (group for part in _sharded(module) for group in _groups(part)):
        ask = getattr(group, "_init_mp_dtypes", None)
        if ask is not None and getattr(group, "_orig_dtype", ask) is None:
            ask()


def interrupted(model: nn.Module) -> bool:
    """Whether something that is fully_sharded stands in the middle of a pass, as after an exception there."""
    parts = list(_sharded(model))
    states = [part._get_fsdp_state() for part in parts]
    return any(each._training_state.name != "IDLE" for each in (*states, *chain.from_iterable(map(_groups, parts))))


def recover(model: nn.Module) -> None:
    """After an exception inside a forward pass: let the next one begin, with the gradients that wait for reduction."""
    if not interrupted(model):
        return
    parts = list(_sharded(model))
    groups = list(chain.from_iterable(map(_groups, parts)))
    waiting = [group._partial_reduce_output for group in groups]
    for part in parts:
        if part._get_fsdp_state()._is_root and hasattr(part, "reset_iter_state"):  # torch 2.13
            part.reset_iter_state()
    for group, partial in zip(groups, waiting):
        group._partial_reduce_output = partial


def refuse_wrappers(model: nn.Module, optimizer: object) -> None:
    """WiringError for what takes parameters apart in a way that hides them: FSDP1 and ZeroRedundancyOptimizer."""
    for name, module in model.named_modules():
        if _is_a(module, "FullyShardedDataParallel", "torch.distributed.fsdp"):
            where = f"{name!r} of the model" if name else "the model"
            raise WiringError(
                f"{where} is wrapped in FullyShardedDataParallel (FSDP1), which flattens its parameters: a seed's "
                "cannot be told from the host's; use torch.distributed.fsdp.fully_shard"
            )
    if _is_a(optimizer, "ZeroRedundancyOptimizer", "torch.distributed.optim"):
        raise WiringError(
            "ZeroRedundancyOptimizer has each rank step a share of the parameters, and knows of none that come later; "
            "use a plain optimizer, with torch.distributed.fsdp.fully_shard where its state is too large"
        )


class _Sharding(NamedTuple):
    """How a module is fully_sharded, as far as a seed shall be alike."""

    mesh: Any
    mp_policy: Any
    offload_policy: Any
    reshard_after_forward: bool | int
    synchronizes: bool
    divides_by: float | None


def _like_host(model: nn.Module, slot: str) -> _Sharding:
    around: list[nn.Module] = [model]
    for name in slot.split("."):
        around.append(around[-1].get_submodule(name))
    sharded = {id(part) for part in _sharded(model)}
    for module in reversed(around[:-1]):
        if id(module) in sharded and _groups(module):
            return _sharding_of(module, slot)
    found = [_sharding_of(part, slot) for part in _sharded(model) if _groups(part)]
    if not found or any(other[:3] != found[0][:3] for other in found):
        raise WiringError(
            f"nothing around slot {slot!r} is fully_sharded with parameters of its own, and what is so elsewhere in "
            f"the model differs in mesh or policies; the seed could be like any of it: {_BY_HAND}"
        )
    return found[0]


def _sharding_of(part: Any, slot: str) -> _Sharding:
    try:
        state, groups = part._get_fsdp_state(), _groups(part)
        group = groups[0]
        mesh, after = group.mesh_info, group.post_forward_mesh_info
        if any(other.mesh_info.mesh != mesh.mesh for other in groups) or mesh.shard_mesh_dim is None:
            raise AttributeError("one mesh to shard on")
        # FSDP2 decides for a root that nobody told, to keep its parameters after a forward pass. A seed is none.
        if getattr(state, "_auto_reshard_after_forward", state._is_root):
            reshard: bool | int = True
        elif after is None or after.mesh == mesh.mesh:
            reshard = after is not None
        else:
            reshard = int(after.shard_mesh_size)
        return _Sharding(
            mesh.mesh, group.mp_policy, group.offload_policy, reshard,
            group.reduce_grads, getattr(group, "gradient_divide_factor", None),
        )  # fmt: skip
    except (AttributeError, IndexError) as error:
        raise WiringError(
            f"how the host of slot {slot!r} is fully_sharded cannot be found in torch {torch.__version__} ({error}); "
            f"{_BY_HAND}"
        ) from error


def _shard(seed: nn.Module, like: _Sharding, slot: str, returns: torch.dtype | None) -> None:
    from torch.distributed.fsdp import fully_shard

    # The host's output dtype is what it returns at its end, not in the middle where the slot is.
    policy = dataclasses.replace(like.mp_policy, output_dtype=returns)
    scalars = [name for name, parameter in seed.named_parameters() if parameter.dim() == 0]
    if scalars:
        raise WiringError(
            f"the seed for slot {slot!r} has parameters without a dimension, which cannot be sharded: {scalars[:3]}; "
            "give them one, nn.Parameter(torch.zeros(1))"
        )
    try:
        made: Any = fully_shard(
            seed, mesh=like.mesh, mp_policy=policy, offload_policy=like.offload_policy,
            reshard_after_forward=like.reshard_after_forward,
        )  # fmt: skip
        made.set_requires_gradient_sync(like.synchronizes)
        if like.divides_by is not None:
            made.set_gradient_divide_factor(like.divides_by)
    except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise WiringError(
            f"the seed for slot {slot!r} cannot be fully_sharded like its host: {error}; {_BY_HAND}"
        ) from error


def _loaded(module: str, name: str) -> tuple[type, ...]:
    """A class of torch as what ``isinstance`` takes; without a process group, or its module, it has no instance."""
    if not (dist.is_available() and dist.is_initialized()):
        return ()
    found = getattr(sys.modules.get(module), name, None)
    return () if found is None else (found,)


def _sharded(module: nn.Module) -> Iterator[Any]:
    kinds = _loaded("torch.distributed.fsdp", "FSDPModule")
    return (part for part in module.modules() if isinstance(part, kinds)) if kinds else iter(())


def _groups(part: Any) -> list[Any]:
    """The parameter groups of what is fully_sharded; earlier versions of torch know one at most."""
    state = part._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        only = getattr(state, "_fsdp_param_group", None)
        groups = [] if only is None else [only]
    return list(groups)


def _held(module: nn.Module) -> Iterator[Any]:
    """What FSDP2 knows of every parameter of what is fully_sharded inside ``module``."""
    return (held for part in _sharded(module) for group in _groups(part) for held in group.fsdp_params)


def _is_a(thing: object, name: str, module: str) -> bool:
    return any(kind.__name__ == name and kind.__module__.startswith(module) for kind in type(thing).__mro__)
