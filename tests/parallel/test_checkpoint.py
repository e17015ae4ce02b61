"""A state that is the same on every rank, and that any other number of ranks in any wrapping goes on from."""

import copy
import tempfile

import pytest
import torch
import torch.distributed as dist
from parallel.harness import block, host, values, wrapped
from parallel.test_ranks import alone, germinate, grow, learn, near, told
from torch import nn

from seedtriton import GradientMonitor, Ranks, StateDictError
from seedtriton.parallel import Checkpointed

HALF = 6
SGD = {"lr": 0.05, "momentum": 0.5}


def whole(model):
    """The model's state as one process would have it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def save(rank, world, path, kind):
    model = host()
    model = wrapped(model, kind)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    growth = grow(model, optimizer)
    germinate(growth, block(rank=rank))
    learn(model, growth, optimizer, (rank, world), steps=HALF)
    state = growth.state_dict()
    weights = whole(getattr(model, "module", model))
    if rank == 0:
        torch.save({"growth": state, "model": weights}, path)
    dist.barrier()
    learn(model, growth, optimizer, (rank, world), steps=HALF, skip=HALF)
    return told(growth), _plain(state)


def _plain(value):
    """What can be compared with ``==``, of tensors as well."""
    if isinstance(value, torch.Tensor):
        return value.nan_to_num(-1.0).tolist() if value.is_floating_point() else value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def load(rank, world, path, kind):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    saved = torch.load(path, weights_only=True)
    model = host()
    inner, model = model, wrapped(model, kind)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    growth = grow(model, optimizer)
    growth.load_state_dict(saved["growth"], seeds={"slot": block(rank=9 + rank)})
    set_model_state_dict(inner, saved["model"], options=StateDictOptions(full_state_dict=True))
    learn(model, growth, optimizer, (rank, world), steps=HALF, skip=HALF)
    return told(growth)


WAYS = [("ddp", 2, "ddp", 2), ("ddp", 2, None, 1), (None, 1, "fsdp", 4), ("fsdp", 2, "ddp", 4), ("fsdp", 4, "fsdp", 2)]


@pytest.mark.parametrize("before, of, after, on", WAYS)
def test_it_goes_on_with_any_number_of_ranks_in_any_wrapping(before, of, after, on):
    [want] = values(alone, 1, steps=2 * HALF)
    with tempfile.TemporaryDirectory() as folder:
        saved = values(save, of, path=f"{folder}/state", kind=before)
        assert all(state == saved[0][1] for _, state in saved)
        found = values(load, on, path=f"{folder}/state", kind=after)
    assert all(one == found[0] for one in found)
    near(found[0], want)
    if (before, of) == (after, on):
        assert found[0] == saved[0][0]  # bit for bit


def distributed(rank, world, folder, how, asynchronous=False):
    """Through torch.distributed.checkpoint: with DDP the state of a model is whole, with FSDP2 in shards."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model = host()
    inner, model = model, wrapped(model, "ddp" if world == 2 else "fsdp")
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    growth = grow(model, optimizer)
    if how == "save":
        germinate(growth, block(rank=rank))
        learn(model, growth, optimizer, (rank, world), steps=HALF)
        state = {"growth": Checkpointed(growth), "model": get_model_state_dict(inner)}
        if asynchronous:
            dcp.async_save(state, checkpoint_id=folder).result()
        else:
            dcp.save(state, checkpoint_id=folder)
        return None
    dcp.load({"growth": Checkpointed(growth, {"slot": block(rank=7)})}, checkpoint_id=folder)
    weights = get_model_state_dict(inner)
    dcp.load({"model": weights}, checkpoint_id=folder)
    set_model_state_dict(inner, weights)
    learn(model, growth, optimizer, (rank, world), steps=HALF, skip=HALF)
    return told(growth)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["save", "async_save"])
def test_it_goes_through_distributed_checkpoint(asynchronous):
    [want] = values(alone, 1, steps=2 * HALF)
    with tempfile.TemporaryDirectory() as folder:
        values(distributed, 2, folder=folder, how="save", asynchronous=asynchronous)
        for world in (2, 4):
            found = values(distributed, world, folder=folder, how="load")
            assert all(one == found[0] for one in found)
            near(found[0], want)


def resumed(rank, world):
    """A run that goes on, and a new one with its states, of which torch makes a step to load the optimizer's."""
    from torch.distributed.checkpoint import state_dict as of_torch

    full = of_torch.StateDictOptions(full_state_dict=True)

    def begun():
        model = host()
        model = wrapped(model, "fsdp")
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        return model, optimizer, grow(model, optimizer)

    model, optimizer, growth = begun()
    germinate(growth, block(rank=rank))
    learn(model, growth, optimizer, (rank, world), steps=HALF)
    weights, moments = copy.deepcopy(of_torch.get_state_dict(model, optimizer, options=full))
    state = growth.state_dict()
    learn(model, growth, optimizer, (rank, world), steps=HALF, skip=HALF)
    again, later, restored = begun()
    restored.load_state_dict(state, seeds={"slot": block(rank=7)})
    of_torch.set_model_state_dict(again, weights, options=full)
    of_torch.set_optimizer_state_dict(again, later, moments, options=full)
    learn(again, restored, later, (rank, world), steps=HALF, skip=HALF)
    return told(growth), told(restored), restored.monitor.steps_taken()


def test_a_step_that_torch_makes_to_load_an_optimizer_is_none():
    for wanted, found, steps in values(resumed, 2):
        assert found == wanted
        assert (found["steps"], steps) == (2 * HALF, 2 * HALF)


def warmed(rank, world):
    """Rates that begin at zero, a seed of which the second rank holds nothing, and a step of torch for a state."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    torch.manual_seed(0)
    model = wrapped(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), "fsdp")
    optimizers = [torch.optim.AdamW(part.parameters(), 1e-2) for part in model]
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 3) for optimizer in optimizers]
    monitor = GradientMonitor(model[0], {"a": model[1]}, optimizers=optimizers, ranks=Ranks())
    monitor.attach(*optimizers)
    steps = []
    get_optimizer_state_dict(model, optimizers[1])
    steps.append(monitor.steps_taken())
    optimizers[1].state.clear()
    for _ in range(3):
        model(torch.ones(2, 4)).sum().backward()
        for optimizer, scheduler in zip(optimizers, schedulers):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        steps.append(monitor.steps_taken())
    known = monitor.read()["a"]
    return [p.to_local().numel() for p in model[1].parameters()], steps, known.samples, known.optimizer_steps


def test_every_rank_counts_the_same_steps_from_a_rate_of_zero_on():
    (first, *counted), (second, *others) = values(warmed, 2)
    assert (first, second) == ([4, 1], [0, 0])
    assert counted == others == [[0, 2, 4, 6], 3, 3]


def test_another_entry_is_refused():
    with pytest.raises(StateDictError, match="entry 'growth' is no state of bytes, got dict"):
        Checkpointed(None).load_state_dict({"growth": {}})
