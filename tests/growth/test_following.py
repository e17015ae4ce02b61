"""A copy of the model that averages its weights: it grows as the model grows, whenever it was made."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from seedtriton import AlphaSchedule, GrowthController, SeedSlot, Stage, WiringError


class Seed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return x + torch.tanh(self.inner(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.slot, self.last = nn.Linear(4, 6), SeedSlot(), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.slot(torch.relu(self.first(x))))


X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


class Script:
    def __init__(self):
        torch.manual_seed(0)
        self.model = Net()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.growth = GrowthController(self.model, self.optimizer, sinks=[], schedule=AlphaSchedule(steps=4))

    def step(self, times=1):
        for _ in range(times):
            self.model(X).square().mean().backward()
            self.growth.measure()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def move(self, stage):
        self.growth._move(self.growth._lives["slot"], stage, "forced", "script")


def same_now(ema, model):
    """With a decay of 0 the average is the model, whatever has happened."""
    ema.update_parameters(model)
    inner = ema.module
    assert inner.slot.stage is model.slot.stage
    assert inner.slot.alpha_value == model.slot.alpha_value
    assert [n for n, _ in inner.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert torch.equal(inner.eval()(X), model.eval()(X))
    model.train()
    inner.train()


@pytest.mark.parametrize("when", ["before", "after", "ramp"])
@pytest.mark.parametrize("blend", ["add", "gate"])
def test_an_average_follows_a_whole_life(when, blend):
    script = Script()
    model, growth = script.model, script.growth
    averages = []

    def begin(moment):
        if moment == when:
            averages.append(AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.0)))
            growth.follow(averages[0])
        for ema in averages:
            same_now(ema, model)

    begin("before")
    growth.germinate("slot", Seed(), probe=torch.randn(2, 6), blend=blend)
    begin("after")
    script.step()
    begin("")
    script.move(Stage.BLENDING)
    script.step(2)
    assert 0.0 < model.slot.alpha_value < 1.0
    begin("ramp")
    [ema] = averages
    for _ in range(3):
        script.step()
        same_now(ema, model)
    growth.set_alpha_target("slot", 0.5, steps=2)
    script.step(2)
    same_now(ema, model)
    growth.prune("slot", steps=2)
    script.step(2)
    same_now(ema, model)
    assert ema.module.slot.frozen == model.slot.frozen
    for _ in range(4):
        growth.end_epoch(loss=1.0)
        same_now(ema, model)
    assert model.slot.stage is Stage.DORMANT
    growth.germinate("slot", Seed())
    same_now(ema, model)
    script.move(Stage.BLENDING)
    script.move(Stage.HOLDING)
    script.move(Stage.FOSSILIZED)
    script.step()
    same_now(ema, model)


def test_the_average_of_a_later_seed_begins_with_its_weights():
    script = Script()
    ema = AveragedModel(script.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    script.growth.follow(ema)
    ema.update_parameters(script.model)
    script.growth.germinate("slot", Seed(), probe=torch.randn(2, 6))
    before = script.model.slot.seed.inner.weight.detach().clone()
    assert torch.equal(ema.module.slot.seed.inner.weight, before)
    assert ema.module.slot.seed.inner.weight is not script.model.slot.seed.inner.weight
    script.step()
    ema.update_parameters(script.model)
    want = 0.9 * before + 0.1 * script.model.slot.seed.inner.weight
    torch.testing.assert_close(ema.module.slot.seed.inner.weight, want)


def test_a_copy_that_is_gone_is_forgotten():
    script = Script()
    twin = copy.deepcopy(script.model)
    script.growth.follow(twin)
    del twin
    gc.collect()
    script.growth.germinate("slot", Seed(), probe=torch.randn(2, 6))
    assert script.growth._followers._copies == []


def test_another_model_and_itself_are_refused():
    script = Script()
    with pytest.raises(WiringError, match=r"has its slots \['slot'\], this one has \['1'\]"):
        script.growth.follow(nn.Sequential(nn.Linear(4, 4), SeedSlot()))
    with pytest.raises(WiringError, match="cannot follow itself"):
        script.growth.follow(script.model)


class Normed(Seed):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        return x + torch.tanh(self.inner(self.norm(x)))


def test_update_bn_wants_a_seed_that_is_blended():
    """What the recipes say of SWA: behind the host a seed does not run, and torch has reset its statistics by then."""
    script = Script()
    script.growth.germinate("slot", Normed(), probe=torch.randn(2, 6))
    script.step(3)
    ema = AveragedModel(script.model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    script.growth.follow(ema)
    norm = ema.module.slot.seed.norm
    kept = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    assert kept["num_batches_tracked"] == 3
    update_bn([X], ema)
    assert (float(norm.running_mean.abs().max()), int(norm.num_batches_tracked)) == (0.0, 0)
    norm.load_state_dict({**norm.state_dict(), **kept})  # copied back
    assert torch.equal(norm.running_var, kept["running_var"])
    script.move(Stage.BLENDING)
    script.step(2)
    update_bn([X], ema)
    features = torch.relu(ema.module.first(X))
    torch.testing.assert_close(norm.running_mean, features.mean(0))
    assert int(norm.num_batches_tracked) == 1
