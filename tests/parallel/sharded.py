"""Hosts and seeds under FSDP2, and how far gradients are from those of one process."""

import torch
from parallel.harness import Block, Host, batches, gradients_of, host, loss_of, mine
from torch.distributed.device_mesh import init_device_mesh

from seedtriton import TrustRegion
from seedtriton.parallel.sharding import shard_like

F64 = torch.float64


def mesh_of(world, shape=None):
    return init_device_mesh("cpu", shape or (world,), mesh_dim_names=("copies", "shards") if shape else ("shards",))


def wrap(model, mesh, blocks=False, **options):
    from torch.distributed.fsdp import fully_shard

    for part in (model.first, model.before, model.after, model.last) if blocks else ():
        fully_shard(part, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def germinate(model, seed, isolation=None, blend="add"):
    dtype = next(seed.parameters()).dtype
    probe = torch.ones(2, model.width, dtype=dtype)
    torch.manual_seed(4)
    model.slot.germinate(seed, isolation=isolation or TrustRegion(), probe=probe, blend=blend)


def seed_of(model, dtype=F64):
    torch.manual_seed(2)
    return Block(model.width).to(dtype)


def prepared(rank, world, when, blocks=False, shape=None, make=Host, options=None, dtype=F64, **how):
    """A host with a seed that has germinated, sharded as told.

    When the seed comes: "whole": with its host, in one group; "own": sharded by the script before the host; "given":
    sharded by the script before it germinates, in a host that has not run yet; "early" and "late": by shard_like,
    before and after the first forward pass.
    """
    from torch.distributed.fsdp import fully_shard

    model, mesh, options = host(dtype, make), mesh_of(world, shape), options or {}
    seed = seed_of(model, dtype)
    if when in ("whole", "own"):
        germinate(model, seed, **how)
        if when == "own":
            fully_shard(seed, mesh=mesh, **options)
        wrap(model, mesh, blocks, **options)
    else:
        wrap(model, mesh, blocks, **options)
        if when == "late":
            loss_of(model, mine(batches(1, dtype=dtype)[0], rank, world)).backward()
            model.zero_grad()
        if when == "given":
            fully_shard(seed, mesh=mesh, **options)
        germinate(model, seed, **how)
        for module in model.slot.modules_of_seed():
            assert shard_like(module, model, "slot")
    return model


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def distance(found, wanted):
    """Of gradients by name, relative to the largest; a gradient that only one of them has is infinitely far."""
    if found.keys() != wanted.keys() or any((found[name] is None) != (wanted[name] is None) for name in found):
        return float("inf")
    pairs = [(full(found[name]).double(), wanted[name]) for name in found if wanted[name] is not None]
    return max(float((got - want).abs().max() / want.abs().max().clamp(min=1e-30)) for got, want in pairs)


def one_step(model, part):
    model.zero_grad()
    model.slot.alpha.grad = None
    loss_of(model, mine(batches(1, dtype=F64)[0], *part)).backward()
    return gradients_of(model)
