"""Whole lives on many ranks: what becomes of a seed is what becomes of it in one process."""

import dataclasses

import pytest
import torch
from parallel.harness import Host, batches, block, host, mine, spawn, values, wrapped
from parallel.test_agreement import EASY
from parallel.test_ranks import learn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from seedtriton import AlphaSchedule, Gate, GrowthController, Stage, StraightThrough

PER_EPOCH = 8
# Nothing is to be learned here: the probe is asked, and its answer is taken as it comes.
TOLERANT = dataclasses.replace(
    EASY, min_probe_gain=None, max_probe_harm=10.0, harm_epochs=None, lasting_harm_epochs=None, max_harm_t=None
)


class Noisy(nn.Module):
    """A seed with running statistics and random numbers."""

    def __init__(self, width):
        super().__init__()
        self.layer, self.norm, self.drop = nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.1)

    def forward(self, x):
        return x + self.drop(self.norm(self.layer(x)))


def started(rank, kind, make=None, dtype=torch.float32, **options):
    inner = host(dtype)
    model = wrapped(inner, kind)
    optimizer = torch.optim.SGD(inner.parameters(), 0.05)
    thresholds = TOLERANT if "evaluate" in options else EASY
    growth = GrowthController(
        model, optimizer, thresholds=thresholds, sinks=[], schedule=AlphaSchedule(steps=2 * PER_EPOCH), **options
    )
    seed = block(dtype, rank=rank if kind else 0) if make is None else make(Host.width)
    growth.germinate("slot", seed, isolation=StraightThrough(), probe=torch.zeros(2, Host.width, dtype=dtype))
    return model, optimizer, growth


def losses_of_a_part(rank, world, dtype):
    """An ``evaluate`` that looks at this rank's part of the samples that are trained on, a loss for each."""
    x, y = map(torch.cat, zip(*batches(PER_EPOCH, dtype=dtype)))

    def evaluate(model):
        part = mine((x, y), rank, world)
        return (model(part[0]) - part[1]).square().mean(dim=1)

    return evaluate


def life(rank, world, kind, epochs=7, whole=False):
    """From germination to the end, with a probe; each rank looks at its part of the validation data or at all of it."""
    dtype = torch.float32 if kind else torch.float64
    evaluate = losses_of_a_part(*((0, 1) if whole else (rank, world)), dtype)
    model, optimizer, growth = started(rank, kind, dtype=dtype, evaluate=evaluate)
    told = []
    for _ in range(epochs):
        learn(model, growth, optimizer, (rank, world), steps=PER_EPOCH, dtype=dtype)
        verdicts = growth.end_epoch()
        probe = growth._lives["slot"].probe if "slot" in growth._lives else None
        seen = None if probe is None else (probe.loss, *probe.changes, *probe.errors, probe.degrees)
        names = [(str(verdict.gate), verdict.passed, [c.name.rstrip("-.0123456789") for c in verdict.failed])
                 for verdict in verdicts]  # fmt: skip
        told.append((growth.slots["slot"].stage.name, growth.slots["slot"].alpha_value, names, seen))
    return told


@pytest.mark.parametrize(
    "kind, world, whole", [("ddp", 2, False), ("fsdp", 2, False), ("fsdp", 4, False), ("ddp", 2, True)]
)
def test_a_life_with_a_probe_is_that_of_one_process(kind, world, whole):
    [want] = values(life, 1, kind=None)
    found = values(life, world, kind=kind, whole=whole)
    assert all(one == found[0] for one in found)
    assert want[-1][0] == "FOSSILIZED"
    for (*moves, seen), (*wanted, want_seen) in zip(found[0], want, strict=True):
        assert moves == wanted
        assert (seen is None) == (want_seen is None)
        if seen is not None:
            assert seen == pytest.approx(want_seen, rel=1e-4, abs=1e-7)


def ways_out(rank, world, kind):
    """Blended, faded half-way out and kept, faded out, another seed in its place after the rest."""
    model, optimizer, growth = started(rank, kind)
    stages, skip = [], 0

    def epoch():
        nonlocal skip
        learn(model, growth, optimizer, (rank, world), steps=PER_EPOCH, skip=skip)
        skip += 1
        growth.end_epoch(loss=1.0)
        stages.append((growth.slots["slot"].stage.name, round(growth.slots["slot"].alpha_value, 12)))

    def bits():
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
        return float(sum(p.detach().double().sum() for p in whole))

    while growth.slots["slot"].stage is not Stage.HOLDING:
        epoch()
    growth.prune("slot", steps=2 * PER_EPOCH)
    frozen = bits_of_seed(growth)
    epoch()
    assert bits_of_seed(growth) == frozen
    growth.set_alpha_target("slot", 0.5, steps=PER_EPOCH)
    epoch()
    assert bits_of_seed(growth) != frozen
    growth.prune("slot", steps=PER_EPOCH)
    while growth.slots["slot"].stage is not Stage.DORMANT:
        epoch()
    assert len(optimizer.param_groups) == 1
    growth.germinate("slot", block(rank=5 + rank), isolation=StraightThrough(), probe=torch.zeros(2, Host.width))
    for _ in range(2):
        epoch()
    return stages, bits()


def bits_of_seed(growth):
    parameters = growth.slots["slot"].seed.parameters()
    return [getattr(p, "_local_tensor", p).detach().double().sum().item() for p in parameters]


@pytest.mark.parametrize("kind, world", [("ddp", 2), ("ddp", 4), ("fsdp", 2)])
def test_a_seed_is_faded_out_kept_pruned_and_replaced(kind, world):
    found = values(ways_out, world, kind=kind)
    assert all(one == found[0] for one in found)
    [(stages, bits)] = values(ways_out, 1, kind=None)
    assert found[0][0] == stages
    if kind == "ddp":
        return  # the last seed is the first rank's, which is the one process's
    assert found[0][1] == pytest.approx(bits, rel=1e-5)


def with_statistics(rank, world, kind):
    def make(width):
        torch.manual_seed(rank)  # of which a slot makes its key
        return Noisy(width)

    model, optimizer, growth = started(rank, kind, make=make)
    learn(model, growth, optimizer, (rank, world), steps=PER_EPOCH)
    inside = growth.state_dict()["slots"]["slot"]["digest"]  # of each rank: nobody has met at the end of an epoch yet
    growth.end_epoch(loss=1.0)
    slot = growth.slots["slot"]
    drawn, _ = slot.random.run(nn.Dropout(0.5), torch.ones(64), False)
    ratio = growth.evidence()["slot"].ratio
    return [b.tolist() for b in slot.seed.buffers()], slot.random.key, ratio, drawn.tolist(), inside


def test_running_statistics_are_those_of_one_rank_and_random_numbers_have_one_key():
    found = values(with_statistics, 2, kind="ddp")
    assert found[0][:3] == found[1][:3]
    assert found[0][3] != found[1][3]
    assert found[0][4] == found[1][4]
    assert found[0][0][2] == PER_EPOCH  # num_batches_tracked


def waiting(rank, world):
    """GERMINATED for long: in the slot, not in the forward pass; then it goes on."""
    model, optimizer, growth = started(rank, "ddp", auto_advance=[Gate.G2])
    for skip in range(2):
        learn(model, growth, optimizer, (rank, world), steps=PER_EPOCH, skip=skip)
        growth.end_epoch(loss=1.0)
    stage = growth.slots["slot"].stage.name
    verdict = growth.advance("slot")
    learn(model, growth, optimizer, (rank, world), steps=PER_EPOCH, skip=2)
    growth.end_epoch(loss=1.0)
    return stage, verdict.passed, growth.slots["slot"].stage.name, growth.evidence()["slot"].samples


def test_a_seed_may_wait_in_its_slot():
    found = values(waiting, 2)
    assert found[0] == found[1] == ("GERMINATED", True, "BLENDING", PER_EPOCH)


def in_the_reducer(rank, world, how, find=False):
    """A seed that was there when DDP wrapped the model."""
    inner = host()
    optimizer = torch.optim.SGD(inner.parameters(), 0.05)
    growth = GrowthController(inner, optimizer, thresholds=EASY, sinks=[])
    growth.germinate("slot", block(), isolation=StraightThrough(), probe=torch.zeros(2, Host.width))
    model = DistributedDataParallel(inner, find_unused_parameters=find)
    learn(model, growth, optimizer, (rank, world), steps=2)
    if how == "prune":
        growth.prune("slot")
    else:
        growth._mover.move(growth._lives["slot"], Stage.BLENDING, "forced", "script")
        growth.slots["slot"].set_alpha(0.5)
        if how == "harm":
            growth._mover.act_on("it harms", growth._lives["slot"], "fade")
        else:
            growth.prune("slot", steps=PER_EPOCH)
    learn(model, growth, optimizer, (rank, world), steps=2)
    if how == "harm":
        return growth._lives["slot"].pruning, growth._lives["slot"].alpha.mode
    return growth.slots["slot"].stage.name


def test_the_watch_halts_a_seed_that_ddp_waits_for():
    assert values(in_the_reducer, 2, how="harm") == [(None, "HOLD")] * 2


@pytest.mark.parametrize("how", ["prune", "fade"])
def test_a_seed_that_ddp_waits_for_is_neither_pruned_nor_faded_out(how):
    for one in spawn(in_the_reducer, 2, how=how):
        assert one.error.startswith("WiringError: the seed in 'slot' was in the model when DistributedDataParallel")
        assert "Germinate after the wrap, or wrap with find_unused_parameters=True" in one.error
    found = values(in_the_reducer, 2, how=how, find=True)
    assert found == [{"prune": "PRUNED", "fade": "BLENDING"}[how]] * 2
