"""Several seeds in one network: one measurement for all, the right evidence for each, coming and going alone."""

import math

import pytest
import torch
from networks import Residual
from torch import nn

from seedtriton import GrowthController, SeedSlot, Stage
from seedtriton.gradients import monitor as monitor_room

NAMES = ["a", "b", "c", "d"]


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)
        self.layers = nn.ModuleDict({name: nn.Linear(6, 6) for name in NAMES})
        for name in NAMES:
            setattr(self, name, SeedSlot())

    def forward(self, x):
        x = torch.tanh(self.first(x))
        for name in NAMES:
            x = getattr(self, name)(torch.tanh(self.layers[name](x)))
        return self.last(x)


def grown(names=NAMES):
    model = Tower()
    growth = GrowthController(model, torch.optim.SGD(model.parameters(), lr=0.05), sinks=[])
    for index, name in enumerate(names):
        blend = ["add", "multiply", "gate"][index % 3]
        growth.germinate(name, Residual(6, 4 + index), probe=torch.randn(2, 6), blend=blend)
    return model, growth


def step(model, growth):
    model(torch.randn(7, 5)).square().mean().backward()
    growth.measure()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    growth.optimizer.step()
    growth.optimizer.zero_grad()
    return gradients


def norm_of(gradients, belongs):
    return math.sqrt(sum(float(g.double().square().sum()) for name, g in gradients.items() if belongs(name)))


def test_all_seeds_are_one_measurement_with_a_segment_each(monkeypatch):
    model, growth = grown()
    calls = []
    record = monitor_room.ops.record_

    def noted(*args, **options):
        calls.append(args)
        record(*args, **options)

    monkeypatch.setattr(monitor_room.ops, "record_", noted)
    step(model, growth)
    assert len(calls) == 1
    segments, gain_segments = calls[0][0].segments, calls[0][1].segments
    assert set(segments) == {0, 1, 2, 3, 4}
    assert gain_segments == [1, 2, 3, 4]
    assert growth.monitor.ring.shape[1] == 5


def test_each_seed_has_its_own_evidence_and_all_the_same_host():
    model, growth = grown()
    gradients = step(model, growth)
    host = norm_of(gradients, lambda name: name.partition(".")[0] not in NAMES)
    norms = set()
    for name, known in growth.evidence().items():
        seed = norm_of(gradients, lambda key, name=name: key.startswith(f"{name}."))
        assert known.seed_norm == pytest.approx(seed, rel=1e-5)
        assert known.host_norm == pytest.approx(host, rel=1e-5)
        assert known.blend_gain is not None
        norms.add(known.seed_norm)
    assert len(norms) == 4


def test_a_seed_that_goes_or_comes_leaves_the_evidence_of_the_others_as_it_was():
    model, growth = grown(["a", "b", "c"])
    for _ in range(5):
        step(model, growth)
    before = growth.evidence()
    growth.prune("b")
    growth.germinate("d", Residual(6, 9), probe=torch.randn(2, 6))
    after = growth.evidence()
    assert list(after) == ["a", "c", "d"]
    assert (after["a"], after["c"]) == (before["a"], before["c"])
    assert after["d"].samples == 0
    gradients = step(model, growth)
    now = growth.evidence()
    assert [now[name].samples for name in ("a", "c", "d")] == [6, 6, 1]
    assert now["d"].seed_norm == pytest.approx(norm_of(gradients, lambda name: name.startswith("d.")), rel=1e-5)
    assert growth.monitor.ring.shape[1] == 4


def test_seeds_live_at_different_stages_side_by_side():
    model, growth = grown(["a", "b"])
    growth.slots["a"].move(Stage.BLENDING)
    growth.slots["a"].set_alpha(0.5)
    step(model, growth)
    growth.prune("b")
    growth.end_epoch(accuracy=0.5)
    assert [growth.slots[name].stage for name in NAMES] == [
        Stage.BLENDING, Stage.EMBARGOED, Stage.DORMANT, Stage.DORMANT,
    ]  # fmt: skip
    assert growth.slots["a"].alpha_value == 0.5
