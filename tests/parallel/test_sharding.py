"""Seeds under FSDP2: sharded like their host they learn what they learn in one process.

The truth is one process on the global batches; host, seed and truth are in float64 unless mixed precision is the point.
"""

import subprocess
import sys

import pytest
import torch
from parallel.harness import Host, batches, gradients_of, host, loss_of, mine, values
from parallel.sharded import F64, distance, full, germinate, mesh_of, prepared, seed_of
from torch import nn

from seedtriton import SeedSlot, Stage, StraightThrough, WiringError
from seedtriton.growth.probing import probe
from seedtriton.parallel import sharding
from seedtriton.parallel.sharding import refuse_wrappers, settle, shard_like


class Narrow(Host):
    """Six features on four ranks: two rows, two, two and none; of four outputs one each."""

    width = 6


LAYOUTS = {
    "one group": {"when": "whole"},
    "per block, seed by the script": {"when": "own", "blocks": True},
    "given sharded": {"when": "given"},
    "early": {"when": "early", "blocks": True},
    "late": {"when": "late"},
    "late, with a gate": {"when": "late", "blend": "gate"},
    "late, kept after forward": {"when": "late", "blocks": True, "options": {"reshard_after_forward": False}},
    "uneven and empty": {"when": "late", "blocks": True, "world": 4, "make": Narrow},
    "uneven and empty, one group": {"when": "whole", "world": 4, "make": Narrow},
    "HSDP": {"when": "late", "world": 4, "shape": (2, 2)},
    "a mesh of one shard": {"when": "late", "shape": (2, 1)},
}


def life(model, part, dtype=F64):
    """Behind the host, blended in and frozen, thawed, pruned: the gradients of each step, and the weights after it."""
    model.slot.move(Stage.TRAINING)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    held = {id(parameter) for parameter in model.parameters()}
    found = []

    def step(batch):
        loss_of(model, mine(batch, *part)).backward()
        found.append(gradients_of(model))
        assert all(id(parameter) in held for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        found.append({name: full(p.detach()).clone() for name, p in model.named_parameters()})

    data = batches(9, dtype=dtype)
    step(data[0])
    step(data[1])
    model.slot.move(Stage.BLENDING)
    model.slot.set_alpha(0.5)
    with torch.no_grad():  # FSDP2 leaves its root unsharded behind such a pass
        model(data[2][0])
    model.slot.freeze()
    step(data[2])
    step(data[3])
    with torch.no_grad():
        model(data[4][0])
    model.slot.thaw()
    step(data[4])
    step(data[5])
    with torch.no_grad():
        model(data[4][0])
    settle(model)
    model.slot.move(Stage.PRUNED)
    step(data[6])
    step(data[7])
    return found


def lives_alike(rank, world, make=Host, **layout):
    model = prepared(rank, world, make=make, **layout)
    alpha = model.slot.alpha
    violations = []
    model.slot.register_forward_hook(lambda slot, *_: violations.append(slot.isolation_violations))
    assert alpha.is_leaf
    assert type(alpha) is torch.Tensor
    found = life(model, (rank, world))
    assert alpha.grad is not None
    truth = host(F64, make)
    germinate(truth, seed_of(truth), blend=layout.get("blend", "add"))
    wanted = life(truth, (0, 1))
    return [distance(*pair) for pair in zip(found, wanted, strict=True)], max(violations)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_sharded_seed_lives_as_in_one_process(layout):
    """Learns behind the host, is frozen and thawed in the blend, is pruned; and its host with it."""
    layout = dict(layout)
    for distances, violations in values(lives_alike, layout.pop("world", 2), **layout):
        assert max(distances) < 1e-12, distances
        assert violations == 0


# --- mixed precision ---


def policy():
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32)


def in_bfloat16(rank, world, when, frozen):
    """Gradients of one step; the root returns float32, the seed in the middle of it what it was given."""
    model = prepared(
        rank, world, when, options={"mp_policy": policy()}, dtype=torch.float32, isolation=StraightThrough()
    )
    model.slot.move(Stage.TRAINING)
    data = batches(2, dtype=torch.float32)
    if frozen:  # FSDP2 asks for the dtypes of gradients in its first forward pass alone
        model.slot.freeze()
        loss_of(model, mine(data[0], rank, world)).backward()
        model.zero_grad()
        model.slot.thaw()
    loss_of(model, mine(data[1], rank, world)).backward()
    truth = host(F64)
    germinate(truth, seed_of(truth), StraightThrough())
    truth.slot.move(Stage.TRAINING)
    loss_of(truth, batches(2, dtype=F64)[1]).backward()
    apart = {
        name: float((full(p.grad).double() - want.grad).norm() / want.grad.norm())
        for (name, p), want in zip(model.named_parameters(), truth.parameters(), strict=True)
    }
    dtypes = {p.grad.dtype for p in model.parameters()}
    return apart, dtypes, model.slot.isolation_violations


@pytest.mark.parametrize("when", ["early", "late"])
@pytest.mark.parametrize("frozen", [False, True])
def test_in_mixed_precision_a_seed_computes_as_its_host_does(when, frozen):
    for apart, dtypes, violations in values(in_bfloat16, when=when, frozen=frozen):
        assert max(apart.values()) < 0.03  # bfloat16 has 8 bits
        assert dtypes == {torch.float32}
        assert violations == 0


# --- gradients that wait ---


def fails_inside(model, x):
    hook = model.last.register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        model(x)
    finally:
        hook.remove()


def accumulates(rank, world, when, reduce=False, shape=None):
    """Two micro-batches, the first without synchronization; in between somebody settles, probes and freezes."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    options = {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)} if reduce else {}
    dtype = torch.bfloat16 if reduce else F64
    model = prepared(rank, world, when, options=options, dtype=dtype, shape=shape)
    idle = str(model.slot.stage)  # FSDP2 has the seed in its root, and nobody has ever run it
    data = batches(3, 32, dtype)

    def micro(batch, sync):
        (model.set_requires_all_reduce if shape else model.set_requires_gradient_sync)(sync)
        (loss_of(model, mine(batch, rank, world)) / 2).backward()
        settle(model)

    micro(data[0], False)
    micro(data[0], True)
    model.slot.move(Stage.TRAINING)
    model.zero_grad()
    micro(data[0], False)
    probe(model, "slot", lambda m: m(data[2][0]).flatten(1).square().mean(1), (0.5,))
    with pytest.raises(ZeroDivisionError):
        probe(model, "slot", lambda m: fails_inside(m, data[2][0]))
    micro(data[1], True)
    both = gradients_of(model)
    model.zero_grad()
    micro(data[0], False)
    model.slot.freeze()
    micro(data[1], True)
    late = [p.grad is None for p in model.slot.parameters()]
    model.zero_grad()
    model.slot.thaw()
    micro(data[1], True)
    again = gradients_of(model)
    truth = host(F64)
    germinate(truth, seed_of(truth))
    truth.slot.move(Stage.TRAINING)
    apart = []
    for found, wanted in ((both, data[:2]), (again, data[1:2])):
        truth.zero_grad()
        for batch in wanted:
            (loss_of(truth, [tensor.double() for tensor in batch]) / 2).backward()
        apart.append(distance(found, gradients_of(truth)))
    return idle, max(apart), late


@pytest.mark.parametrize(
    "layout",
    [{"when": "early"}, {"when": "late"}, {"when": "whole"}, {"when": "late", "shape": (2, 2), "world": 4}],
    ids=str,
)
def test_gradients_that_wait_for_their_reduction_stay(layout):
    layout = dict(layout)
    for idle, apart, late in values(accumulates, layout.pop("world", 2), **layout):
        assert idle == "GERMINATED"
        assert apart < 1e-12
        # With its host it is out of reach: what the first micro-batch has given it comes with the second.
        assert set(late) == {layout["when"] != "whole"}


def test_they_stay_in_the_dtype_of_their_reduction():
    for _, apart, late in values(accumulates, when="early", reduce=True):
        assert apart < 0.3
        assert set(late) == {True}


# --- settle ---


def settles(rank, world):
    from torch.distributed.tensor import DTensor

    seen = []
    for when in ("late", "whole", "own"):
        model = prepared(rank, world, when)
        model.slot.move(Stage.TRAINING)
        held = [id(p) for p in model.parameters()]
        with torch.no_grad():
            model(batches(1, dtype=F64)[0][0])
        left = all(isinstance(p, DTensor) for p in model.parameters())
        settle(model.slot if when == "whole" else model)
        part = model.slot if when == "whole" else model
        seen.append((when, left, all(isinstance(p, DTensor) and id(p) in held for p in part.parameters())))
    return seen


def test_settled_it_shows_the_parameters_that_the_optimizer_holds():
    for seen in values(settles):
        assert seen == [("late", False, True), ("whole", False, True), ("own", False, True)]


# --- shard_like ---


class Nested(nn.Module):
    """root -> inner -> block, slot; the root has parameters of its own if told, and so has what is between."""

    def __init__(self, own=True):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), SeedSlot(), nn.Linear(4, 4))
        self.outer = nn.Linear(4, 4) if own else nn.Identity()


def settings_of(seed):
    """What a seed is sharded with, as far as a script can ask."""
    state = seed._get_fsdp_state()
    (group,) = state._fsdp_param_groups
    after = group.post_forward_mesh_info
    return (
        tuple(group.mesh_info.mesh.shape), str(state._mp_policy.param_dtype), str(state._mp_policy.output_dtype),
        after is not None, type(group.offload_policy).__name__, group.gradient_divide_factor, group.reduce_grads,
    )  # fmt: skip


def shards_like(rank, world):
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

    line, square = mesh_of(world), mesh_of(world, (1, world))
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32)
    found = {}

    def case(name, model, returns=None, seed=None):
        seed = seed or nn.Linear(4, 4)
        try:
            found[name] = settings_of(seed) if shard_like(seed, model, "inner.1", returns=returns) else None
        except WiringError as error:
            found[name] = str(error)
        return seed

    case("plain", Nested())
    model = Nested()
    fully_shard(model.inner, mesh=square, mp_policy=half, reshard_after_forward=False)
    fully_shard(model, mesh=line)
    case("nearest", model)
    case("returns", model, torch.float64)
    model = Nested()
    fully_shard(model, mesh=line, offload_policy=CPUOffloadPolicy(pin_memory=False))
    model.set_gradient_divide_factor(1.0)
    model.set_requires_gradient_sync(False)
    case("root", model)
    model = Nested(own=False)
    fully_shard(model.inner[0], mesh=line), fully_shard(model.inner[2], mesh=line), fully_shard(model, mesh=line)
    case("neighbours", model)
    model = Nested(own=False)
    fully_shard(model.inner[0], mesh=line), fully_shard(model.inner[2], mesh=square), fully_shard(model, mesh=line)
    case("neighbours differ", model)
    model = Nested()
    fully_shard(model, mesh=line)
    scalar = nn.Linear(4, 4)
    scalar.scale = nn.Parameter(torch.zeros(()))
    case("scalar", model, seed=scalar)
    own = fully_shard(nn.Linear(4, 4), mesh=square, reshard_after_forward=False)
    case("by the script", model, seed=own)
    bits = [p.full_tensor().clone() for p in case("bits", model).parameters()]
    found["bits"] = [tuple(b.shape) for b in bits]
    for name in ("mesh_info", "mp_policy"):
        group = model._get_fsdp_state()._fsdp_param_groups[0]
        value = vars(group).pop(name)
        case(f"no {name}", model)
        setattr(group, name, value)
    assert isinstance(own, FSDPModule)
    return found


def test_a_seed_is_sharded_as_what_is_around_it():
    for found in values(shards_like):
        assert found["plain"] is None
        assert found["nearest"] == ((1, 2), "torch.bfloat16", "None", False, "OffloadPolicy", None, True)
        assert found["returns"] == ((1, 2), "torch.bfloat16", "torch.float64", False, "OffloadPolicy", None, True)
        assert found["root"] == ((2,), "None", "None", True, "CPUOffloadPolicy", 1.0, False)
        assert found["neighbours"] == ((2,), "None", "None", True, "OffloadPolicy", None, True)
        assert found["by the script"] == ((1, 2), "None", "None", False, "OffloadPolicy", None, True)
        assert found["bits"] == [(4, 4), (4,)]
        by_hand = "shard it yourself: fully_shard(seed, mesh=..., mp_policy=...) and give it to germinate"
        for name in ("neighbours differ", "no mesh_info", "no mp_policy"):
            assert found[name].endswith(by_hand), name
        assert "'inner.1'" in found["no mesh_info"]
        assert "mesh_info" in found["no mesh_info"]
        assert found["scalar"].endswith("['scale']; give them one, nn.Parameter(torch.zeros(1))")


# --- refusals, and one process ---


def test_what_hides_parameters_is_refused_with_the_way_out(gloo):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = host()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    refuse_wrappers(model, optimizer)
    model.after = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # it takes no CPU
    nn.Module.__init__(model.after)
    with pytest.raises(WiringError, match=r"'after' of the model .*fully_shard"):
        refuse_wrappers(model, optimizer)
    with pytest.raises(WiringError, match=r"the model is .*fully_shard"):
        refuse_wrappers(model.after, optimizer)
    plain = host()
    shared = ZeroRedundancyOptimizer(plain.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(WiringError, match=r"ZeroRedundancyOptimizer .*plain optimizer.*fully_shard"):
        refuse_wrappers(plain, shared)


ALONE = """
import sys, torch
from seedtriton import SeedSlot, Stage
from seedtriton.growth.probing import probe
from seedtriton.parallel import sharding
model = torch.nn.Sequential(torch.nn.Linear(3, 3), SeedSlot())
model[1].germinate(torch.nn.Linear(3, 3), probe=torch.ones(2, 3))
model[1].move(Stage.TRAINING)
model(torch.ones(2, 3)).sum().backward()
sharding.settle(model), sharding.refuse_wrappers(model, None)  # torch imports all of it for an optimizer
assert not sharding.shard_like(model[1].seed, model, "1")
probe(model, "1", lambda m: m(torch.ones(2, 3)).mean())
model[1].freeze(), model[1].thaw()
assert not {"torch.distributed.fsdp", "torch.distributed.tensor"} & set(sys.modules)
"""


def test_one_process_never_imports_what_shards():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sharding.own_unsharded([host()]) == []
