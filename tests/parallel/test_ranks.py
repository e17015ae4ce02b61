"""What many ranks measure, read, decide and clip, against one process in float64 on the global batch."""

import math
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from parallel.harness import Host, batches, block, host, loss_of, mine, spawn, values, wrapped
from torch.nn.parallel import DistributedDataParallel

from seedtriton import GateThresholds, GradientMonitor, GrowthController, Ranks, StraightThrough

OPEN = GateThresholds(min_training_improvement=None, min_training_epochs=None)
STEPS, CLIP = 12, 0.5


def grow(model, optimizer, **options):
    return GrowthController(model, optimizer, thresholds=OPEN, sinks=[], **options)


def germinate(growth, seed, dtype=torch.float32, probe=True):
    features = torch.zeros(2, Host.width, dtype=dtype)
    return growth.germinate("slot", seed, isolation=StraightThrough(), probe=features if probe else None)


def learn(model, growth, optimizer, part=(0, 1), steps=STEPS, clip=None, dtype=torch.float32, skip=0):
    """The norms before clipping, if that was asked for."""
    norms = []
    for batch in batches(skip + steps, dtype=dtype)[skip:]:
        loss_of(model, mine(batch, *part)).backward()
        growth.measure()
        if clip is not None:
            norms.append(float(growth.clip_grad_norm_(clip)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def told(growth, name="slot"):
    known = growth.monitor.read()[name]
    rows = [known.ratio, known.rms_ratio, known.blend_gain, known.blend_gain_t, known.displacement, known.live_share]
    return {"numbers": rows, "status": known.status, "samples": known.samples, "held": known.in_optimizer,
            "steps": known.optimizer_steps}  # fmt: skip


def alone(rank, world, clip=None, steps=STEPS):
    """The truth."""
    model = host(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    growth = grow(model, optimizer)
    germinate(growth, block(torch.float64), torch.float64)
    norms = learn(model, growth, optimizer, clip=clip, dtype=torch.float64, steps=steps)
    return {**told(growth), "norms": norms}


def near(found, wanted, tolerance=1e-6):
    assert (found["status"], found["samples"]) == (wanted["status"], wanted["samples"])
    assert (found["held"], found["steps"]) == (wanted["held"], wanted["steps"])
    for got, want in zip(found["numbers"], wanted["numbers"], strict=True):
        assert want is not None
        assert got == pytest.approx(want, rel=tolerance)


def under_ddp(rank, world, late=True, clip=None, wrap=(), controller_first=False):
    model = host()
    inner, seed = model, block(rank=rank if late else 0)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    growth = grow(model, optimizer) if controller_first else None
    if not late:
        growth = growth or grow(model, optimizer)
        germinate(growth, seed)
    model = DistributedDataParallel(model, **dict(wrap))
    growth = growth or grow(model, optimizer)
    if late:
        germinate(growth, seed)
    norms = learn(model, growth, optimizer, (rank, world), clip=clip)
    before = growth.monitor.ranks.collectives
    found = told(growth)
    found["collectives"] = growth.monitor.ranks.collectives - before
    weights = sum(float(p.detach().double().sum()) for p in inner.parameters())
    return {**found, "norms": norms, "weights": weights}


@pytest.fixture(scope="module")
def want():
    [found] = values(alone, 1)
    return found


@pytest.fixture(scope="module")
def clipped():
    [found] = values(alone, 1, clip=CLIP)
    return found


def equal(found):
    assert all(one == found[0] for one in found)
    return found[0]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("late", [True, False], ids=["late", "early"])
def test_under_ddp_a_seed_is_measured_as_by_one_process(world, late, want):
    found = equal(values(under_ddp, world, late=late))
    near(found, want)
    assert found["collectives"] == 2


@pytest.mark.parametrize(
    "wrap",
    [{"gradient_as_bucket_view": True}, {"static_graph": True}, {"find_unused_parameters": True}],
    ids=lambda wrap: next(iter(wrap)),
)
def test_with_every_way_to_wrap(wrap, want):
    near(equal(values(under_ddp, 2, wrap=tuple(wrap.items()))), want)


def test_a_wrapper_that_comes_after_the_controller_is_noticed(want):
    near(equal(values(under_ddp, 2, controller_first=True)), want)


def test_clipping_under_ddp_is_that_of_one_process(clipped):
    found = equal(values(under_ddp, 2, clip=CLIP))
    near(found, clipped)
    assert found["norms"] == pytest.approx(clipped["norms"], rel=1e-6)


# --- fully_shard ---


def under_fsdp(rank, world, how="whole", late=True, clip=None, shape=None, width=None, bf16=False, **options):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    names = ("replicate", "shard") if shape else ("shard",)
    options["mesh"] = init_device_mesh("cpu", shape or (world,), mesh_dim_names=names)
    if bf16:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = host()
    seed = block(rank=rank if late else 0)
    if not late:
        model.slot.germinate(seed, isolation=StraightThrough(), probe=torch.zeros(2, Host.width))
        model.slot.vacate()  # tried: only where it stands is to be early
    if how == "blocks":
        for part in (model.first, model.before, model.after, model.last):
            fully_shard(part, **options)
    fully_shard(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    growth = grow(model, optimizer)
    germinate(growth, seed)
    norms = learn(model, growth, optimizer, (rank, world), clip=clip)
    ranks = growth.monitor.ranks
    before = ranks.collectives
    found = told(growth)
    found |= {"norms": norms, "collectives": ranks.collectives - before, "leaks": model.slot.isolation_violations}
    return found


@pytest.mark.parametrize(
    "world, how, shape",
    [(2, "whole", None), (2, "blocks", None), (4, "blocks", None), (4, "blocks", (2, 2)), (2, "whole", (2, 1))],
)
def test_under_fsdp2_a_seed_is_measured_as_by_one_process(world, how, shape, want):
    found = equal(values(under_fsdp, world, how=how, shape=shape))
    near(found, want)
    assert (found["collectives"], found["leaks"]) == (2, 0)


def accumulating(rank, world, micro, held=False):
    """Micro-batches that FSDP2 adds up over the ranks in the last one alone; one batch in between is thrown away."""
    from torch.distributed.fsdp import fully_shard

    model = host()
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    growth = grow(model, optimizer)
    germinate(growth, block(rank=rank))
    for step, batch in enumerate(batches(STEPS)):
        own = mine(batch, rank, world)
        if step == 3:
            loss_of(model, own).backward()
            optimizer.zero_grad()
        for index in range(micro):
            model.set_requires_gradient_sync(index + 1 == micro)
            growth.slots["slot"].seed.set_requires_gradient_sync(index + 1 == micro)
            (loss_of(model, mine(own, index, micro)) / micro).backward()
            if held:
                growth.measure()
        if not held:
            growth.measure()
        optimizer.step()
        optimizer.zero_grad()
    return told(growth)


@pytest.mark.parametrize("held", [False, True], ids=["measured once", "measured each time"])
def test_a_gain_is_of_all_micro_batches_that_fsdp2_accumulates(held, want):
    near(equal(values(accumulating, 2, micro=2, held=held)), want)


def test_clipping_under_fsdp2_is_that_of_one_process(clipped):
    for shape in (None, (2, 2)):
        found = equal(values(under_fsdp, 4 if shape else 2, clip=CLIP, shape=shape))
        near(found, clipped)
        assert found["norms"] == pytest.approx(clipped["norms"], rel=1e-6)


def growing(rank, world, kind):
    """The host gets a layer in the middle of training, of which the ranks hear at the end of the epoch."""
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    dtype = torch.float32 if kind else torch.float64
    model, layer = host(dtype), block(dtype).expand
    if kind:
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    growth = grow(model, optimizer)
    germinate(growth, block(dtype, rank=rank), dtype)
    learn(model, growth, optimizer, (rank, world), steps=3, dtype=dtype)
    if kind:
        fully_shard(layer)
    model.before.contract = nn.Sequential(nn.Linear(2 * Host.width, Host.width).to(dtype), layer, model.before.contract)
    nn.init.eye_(model.before.contract[0].weight)
    nn.init.zeros_(model.before.contract[0].bias)
    if kind:
        fully_shard(model.before.contract[0])
    optimizer.add_param_group({"params": list(model.before.contract[:2].parameters())})
    learn(model, growth, optimizer, (rank, world), dtype=dtype, skip=3)
    return told(growth)


def test_what_the_host_gets_while_it_trains_is_measured_before_the_ranks_have_heard_of_it():
    [wanted] = values(growing, 1, kind=None)
    near(equal(values(growing, 2, kind="fsdp")), wanted)


def sharing(rank, world, one):
    """Two monitors of sharded networks, which may have one ``Ranks``."""
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    def network(*widths):
        torch.manual_seed(len(widths))
        return fully_shard(nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(widths))))

    pairs = [(network(8, 8, 8), network(8, 8)), (network(8, 8, 8, 8), network(8, 4, 8))]
    ranks = Ranks()
    monitors = [
        GradientMonitor(a, {f"seed{index}": b}, ranks=ranks if one else Ranks()) for index, (a, b) in enumerate(pairs)
    ]
    for batch in batches(2):
        for (a, b), monitor in zip(pairs, monitors):
            b(a(mine(batch, rank, world)[0])).square().mean().backward()
            monitor.measure()
    for monitor in monitors:
        monitor.refresh()
    found = [known for monitor in monitors for known in monitor.read().values()]
    return [(each.ratio, each.live_share, each.samples) for each in found]


def test_monitors_may_share_their_ranks():
    found = equal(values(sharing, 2, one=True))
    assert found == equal(values(sharing, 2, one=False))
    assert [share for _, share, _ in found] == [1.0, 1.0]


# --- tensor parallel ---


def under_tp(rank, world, seed_too=False, clip=None):
    """Every rank has the same batch, and parts of the layers."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    model, seed = host(), block(rank=0 if seed_too else rank)
    plan = {"expand": ColwiseParallel(), "contract": RowwiseParallel()}
    for part in (model.before, model.after, *([seed] if seed_too else [])):
        parallelize_module(part, mesh, dict(plan))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, foreach=False)
    growth = grow(model, optimizer)
    germinate(growth, seed, probe=not seed_too)
    norms = learn(model, growth, optimizer, clip=clip)
    return {**told(growth), "norms": norms}


@pytest.mark.parametrize("world, seed_too", [(2, False), (2, True), (4, True)])
def test_with_tensor_parallel_layers_a_seed_is_measured_as_by_one_process(world, seed_too, want):
    near(equal(values(under_tp, world, seed_too=seed_too)), want)


def test_clipping_with_tensor_parallel_layers_is_that_of_one_process(clipped):
    found = equal(values(under_tp, 2, seed_too=True, clip=CLIP))
    near(found, clipped)
    assert found["norms"] == pytest.approx(clipped["norms"], rel=1e-6)


# --- what may go wrong in a step ---


def with_a_fault(rank, world, kind, nan=True, fewer=False, again=False):
    """A NaN in what one rank holds of the gradients, in one step; or fewer samples on one rank."""
    inner = host()
    model = wrapped(inner, kind)
    optimizer = torch.optim.SGD(inner.parameters(), 0.05)
    growth = grow(model, optimizer)
    germinate(growth, block(rank=rank))
    for step, batch in enumerate(batches(STEPS)):
        x, y = mine(batch, rank, world)
        if fewer and rank == 1:
            x, y = x[:3], y[:3]
        loss_of(model, (x, y)).backward()
        if nan and step == 5 and rank == 1:
            # Of one shard alone, or of what one rank holds: backward has spread whatever came before.
            part = getattr(inner.slot.seed.contract.bias.grad, "_local_tensor", inner.slot.seed.contract.bias.grad)
            part[0] = math.nan
        growth.measure()
        if again:
            growth.measure()
        optimizer.step()
        optimizer.zero_grad()
    known = growth.monitor.read()["slot"]
    return known.samples, known.dropped, known.ratio, known.blend_gain, known.seed_not_finite


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_sample_that_is_not_finite_on_one_rank_is_dropped_on_all(kind):
    if kind == "ddp":
        # What one rank alone has made of an averaged gradient lets it go another way: that is said.
        errors = {one.error for one in spawn(with_a_fault, 2, kind=kind)}
        assert len(errors) == 1
        assert "the weights of seed 'slot' are not the same on every rank" in errors.pop()
        return
    found = values(with_a_fault, 2, kind=kind)
    assert found[0] == found[1]
    assert found[0][:2] == (STEPS - 1, 1)
    assert found[0][4] == 1


def test_measured_again_it_is_replaced_on_all_ranks_or_on_none():
    found = values(with_a_fault, 2, kind="fsdp", again=True)
    assert found[0] == found[1]
    assert found[0][0] + found[0][1] == STEPS


def overflowing(rank, world, kind):
    """Loss scaling: in one step the batch of one rank overflows, and the step is left out on all."""
    inner = host()
    model = wrapped(inner, kind)
    optimizer = torch.optim.SGD(inner.parameters(), 0.05)
    growth = grow(model, optimizer)
    germinate(growth, block(rank=rank))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step, batch in enumerate(batches(STEPS)):
        loss = loss_of(model, mine(batch, rank, world))
        if step == 4 and rank == 1:
            loss = loss * math.inf
        scaler.scale(loss).backward()
        growth.measure(scaler)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    known = growth.monitor.read()["slot"]
    return known.samples, known.dropped, known.optimizer_steps, known.ratio, scaler.get_scale()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_step_that_overflows_on_one_rank_is_dropped_on_all(kind):
    found = values(overflowing, 2, kind=kind)
    assert found[0] == found[1]
    assert found[0][:3] == (STEPS - 1, 1, STEPS - 1)
    assert found[0][4] == 128.0


def attached(rank, world, micro=1):
    """No line in the loop: a hook in the step measures; micro-batches in no_sync, then one that averages."""
    model = DistributedDataParallel(host())
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    growth = grow(model, optimizer)
    germinate(growth, block(rank=rank))
    growth.monitor.attach(optimizer)
    for batch in batches(STEPS):
        own = mine(batch, rank, world)
        for index in range(micro):
            with model.no_sync() if index + 1 < micro else nullcontext():
                (loss_of(model, mine(own, index, micro)) / micro).backward()
        optimizer.step()
        optimizer.zero_grad()
    return told(growth)


@pytest.mark.parametrize("micro", [1, 2])
def test_a_hook_in_the_step_measures_what_was_averaged(micro, want):
    near(equal(values(attached, 2, micro=micro)), want)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_with_fewer_samples_agree_all_the_same(kind):
    found = values(with_a_fault, 2, kind=kind, nan=False, fewer=True)
    assert found[0] == found[1]
    assert found[0][0] == STEPS


# --- pipeline ---


def in_a_pipeline(rank, world):
    """Rank 0 has all up to the slot, rank 1 the rest and no slot; activations and their gradients are sent by hand."""
    import torch.distributed as dist
    from torch import nn

    model = host()
    front = nn.ModuleDict({"first": model.first, "before": model.before, "slot": model.slot})
    part = nn.ModuleDict({"after": model.after, "last": model.last}) if rank else front
    optimizer = torch.optim.SGD(part.parameters(), 0.05)
    growth = grow(part, optimizer)
    germinate(growth, block(rank=rank))
    norms = []
    for x, y in batches(STEPS):
        if rank == 0:
            features = model.slot(model.before(torch.relu(model.first(x))))
            dist.send(features.detach(), 1)
            gradient = torch.empty_like(features)
            dist.recv(gradient, 1)
            features.backward(gradient)
        else:
            features = torch.empty(len(x), Host.width)
            dist.recv(features, 0)
            features.requires_grad_()
            nn.functional.mse_loss(model.last(model.after(features)), y).backward()
            dist.send(features.grad, 0)
        growth.measure()
        norms.append(float(growth.clip_grad_norm_(CLIP)))
        optimizer.step()
        optimizer.zero_grad()
    verdicts = growth.end_epoch(accuracy=0.5)
    return {**told(growth), "norms": norms, "verdicts": [str(v) for v in verdicts]}


def test_a_rank_without_the_slot_takes_part(clipped):
    found = equal(values(in_a_pipeline, 2))
    near(found, clipped)
    assert found["norms"] == pytest.approx(clipped["norms"], rel=1e-6)
    assert len(found["verdicts"]) == 1
