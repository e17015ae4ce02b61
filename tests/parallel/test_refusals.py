"""What is refused among ranks, in words that say what to do."""

import pytest
import torch
import torch.distributed as dist
from parallel.harness import Host, batches, block, host, loss_of, mine, spawn, values
from parallel.test_ranks import germinate, grow, learn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from seedtriton import ConfigurationError, FlatGradients, GradientMonitor, GrowthController, Ranks


def sharded(model):
    from torch.distributed.fsdp import fully_shard

    fully_shard(model)
    return model


def fsdp1(rank, world):
    from torch.distributed.fsdp import FullyShardedDataParallel

    inner = host()
    model = FullyShardedDataParallel(inner, device_id=torch.device("cpu"), use_orig_params=True)
    GrowthController(model, torch.optim.SGD(model.parameters(), 0.05), sinks=[])


def zero(rank, world):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DistributedDataParallel(host())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.05)
    GrowthController(model, optimizer, sinks=[])


def joined(rank, world):
    model = DistributedDataParallel(host())
    growth = grow(model, torch.optim.SGD(model.parameters(), 0.05))
    with model.join():
        germinate(growth, block())


def read_while_joined(rank, world):
    model = DistributedDataParallel(host())
    growth = grow(model, torch.optim.SGD(model.parameters(), 0.05))
    germinate(growth, block())
    with model.join():
        growth.end_epoch(loss=1.0)


def partial(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = init_device_mesh("cpu", (world,))
    host_of, seed = nn.Linear(4, 4), nn.Linear(4, 4)
    weight = DTensor.from_local(host_of.weight.detach(), mesh, [Replicate()])
    host_of.weight = nn.Parameter(weight)
    monitor = GradientMonitor(host_of, {"a": seed}, ranks=Ranks())
    host_of.weight.grad = DTensor.from_local(torch.ones(4, 4), mesh, [Partial()])
    seed.weight.grad = torch.ones(4, 4)
    monitor.measure()


def without_a_wrapper(rank, world):
    """Nobody averages anything: after a step the hosts are apart."""
    model = host()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    growth = grow(model, optimizer)
    germinate(growth, block())
    learn(model, growth, optimizer, (rank, world), steps=2)
    growth.end_epoch()


def sequence_parallel(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = host()
    growth = grow(model, torch.optim.SGD(model.parameters(), 0.05))
    germinate(growth, block())
    mesh = init_device_mesh("cpu", (world,))
    model.slot(distribute_tensor(torch.zeros(4, Host.width), mesh, [Shard(0)]))


def flat(rank, world):
    FlatGradients(sharded(host()))


def in_backward(rank, world):
    monitor = GradientMonitor(host(), {"a": block()}, ranks=Ranks())
    monitor.collect_in_backward()


def another_group(rank, world):
    GrowthController(host(), torch.optim.SGD(host().parameters(), 0.05), ranks="all")


def other_seeds(rank, world):
    """Each rank germinates a seed of another size."""
    model = DistributedDataParallel(host())
    growth = grow(model, torch.optim.SGD(model.parameters(), 0.05))
    seed = block() if rank == 0 else nn.Linear(Host.width, Host.width)
    growth.germinate("slot", seed)
    growth.end_epoch()


def other_ways(rank, world):
    """Cut on one rank, whole on the other."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    seed = nn.Linear(4, 4)
    mesh = init_device_mesh("cpu", (world,))
    if rank:
        seed.weight = nn.Parameter(distribute_tensor(seed.weight.detach(), mesh, [Replicate()]))
    else:
        distribute_tensor(seed.weight.detach(), mesh, [Replicate()])
    GradientMonitor(nn.Linear(4, 4), {"a": seed}, ranks=Ranks())


REFUSED = {
    fsdp1: "FullyShardedDataParallel (FSDP1), which flattens its parameters",
    zero: "ZeroRedundancyOptimizer",
    joined: "inside of DDP's join() ranks with fewer batches stop measuring",
    read_while_joined: "inside of DDP's join() ranks with fewer batches stop measuring",
    partial: "is a DTensor of partial sums",
    without_a_wrapper: "the weights of the host are not the same on every rank",
    sequence_parallel: "put the slot where features are whole",
    flat: "DTensor",
    in_backward: "between ranks a gradient is complete only after backward",
    another_group: 'ranks must be seedtriton.Ranks(...), "auto" or None, got \'all\'',
    other_ways: "wrap the model in the same way on every rank",
}


@pytest.mark.parametrize("scenario", REFUSED, ids=lambda scenario: scenario.__name__)
def test_it_is_refused_on_every_rank(scenario):
    found = spawn(scenario, 2, timeout=5)
    for one in found:
        assert one.error is not None
        assert one.error.startswith(("WiringError", "ConfigurationError")), one.error
        assert REFUSED[scenario] in one.error


def test_ranks_with_other_seeds_do_not_go_on():
    """Their weights do not even have the same sizes; whatever breaks, it breaks within the timeout on both."""
    found = spawn(other_seeds, 2, timeout=3, limit=20)
    assert all(one.error is not None for one in found)
    assert not any("still running" in one.error for one in found)


def each_for_itself(rank, world):
    """``ranks=None``: independent trainings in one group, which never meet."""
    model = host()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    growth = grow(model, optimizer, ranks=None)
    if rank == 0:
        germinate(growth, block())
        learn(model, growth, optimizer, (rank, world))
        growth.end_epoch()
        return growth.evidence()["slot"].samples
    return None


def test_each_process_may_be_for_itself():
    assert values(each_for_itself, 2) == [12, None]


def told(rank, world, ranks):
    model = DistributedDataParallel(host())
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    events = []
    options = {"ranks": Ranks(all_tell=True)} if ranks == "all" else {}
    growth = GrowthController(model, optimizer, sinks=[events.append], **options)
    germinate(growth, block())
    return len(events)


def test_the_first_rank_alone_tells_unless_asked():
    first, other = values(told, 2, ranks="first")
    assert (first > 0, other) == (True, 0)
    first, other = values(told, 2, ranks="all")
    assert first == other > 0


def test_ranks_without_a_group_are_refused():
    assert not dist.is_initialized()
    with pytest.raises(ConfigurationError, match=r"init_process_group\(\) first"):
        Ranks()


def bare(rank, world):
    """A monitor without a controller, on ranks that were told; the gradients of the seed are averaged by hand."""
    model, seed = host(), block()
    model = DistributedDataParallel(model)
    monitor = GradientMonitor(model.module, {"a": seed}, ranks=Ranks())
    for batch in batches(3):
        own = mine(batch, rank, world)
        loss_of(model, own).backward()
        (seed(torch.ones(len(own[0]), Host.width) * (1 + rank)).square().mean() * 0.1).backward()
        for parameter in seed.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= world
        monitor.measure()
        model.zero_grad()
        seed.zero_grad()
    known = monitor.read()["a"]
    return known.samples, known.ratio, monitor.latest().evidence["a"].ratio


def test_a_monitor_alone_takes_part():
    found = values(bare, 2)
    assert found[0] == found[1]
    assert found[0][0] == 3
    assert found[0][1] == found[0][2]
