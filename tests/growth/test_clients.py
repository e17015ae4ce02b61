"""What clients need of a controller: parameters in parts, numbers by name, seeds made without a trace, an exchange."""

import copy
import math

import pytest
import torch
from torch import nn

from seedtriton import GrowthController, SeedSlot, Stage, StateDictError
from seedtriton.growth.clients import exchange, numbers, own_random_numbers, parted


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.one, self.two, self.last = nn.Linear(4, 4), SeedSlot(), SeedSlot(), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.two(self.one(self.first(x))))


def grown(*slots):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    growth = GrowthController(model, optimizer, sinks=[])
    for slot in slots:
        growth.germinate(slot, nn.Linear(4, 4))
    return growth, model, optimizer


def step(growth, model, optimizer):
    model(torch.randn(8, 4)).square().mean().backward()
    growth.measure()
    optimizer.step()
    optimizer.zero_grad()


def test_what_is_blended_is_parted_from_nothing():
    growth, model, _ = grown("one", "two")
    felt, behind = parted(model.parameters(), growth.slots)
    assert [id(p) for p in felt] == [id(p) for part in (model.first, model.last) for p in part.parameters()]
    assert {name: len(parameters) for name, parameters in behind.items()} == {"one": 2, "two": 2}
    growth._mover.move(growth._lives["one"], Stage.BLENDING, "test", "test")
    felt, behind = parted(model.parameters(), growth.slots)
    assert len(felt) == 6
    assert list(behind) == ["two"]
    assert parted([], growth.slots) == ([], {})


def test_numbers_are_those_that_are_known_and_finite():
    growth, model, optimizer = grown("one")
    assert numbers(growth) == {f"one/{name}": 0.0 for name in ("alpha", "samples", "dropped", "displacement")}
    step(growth, model, optimizer)
    found = numbers(growth)
    assert found["one/ratio"] == growth.evidence()["one"].ratio
    assert found["one/samples"] == 1.0
    assert all(math.isfinite(value) for value in found.values())
    assert not any(name.startswith("two") for name in found)


def test_seeds_are_made_without_a_trace_and_differ():
    model = nn.Linear(2, 2)
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    with own_random_numbers(model):
        one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    assert torch.equal(torch.rand(3), wanted)
    assert not torch.equal(one.weight, two.weight)


def test_an_exchange_brings_back_the_seeds_of_an_earlier_state():
    growth, model, optimizer = grown("one")
    step(growth, model, optimizer)
    saved = {part: copy.deepcopy(x.state_dict()) for part, x in (("growth", growth), ("model", model))}
    growth._mover.move(growth._lives["one"], Stage.BLENDING, "test", "test")
    growth.germinate("two", nn.Linear(4, 4))
    step(growth, model, optimizer)
    exchange(growth, saved["growth"], {"one": lambda: nn.Linear(4, 4)})
    model.load_state_dict(saved["model"])
    assert [str(slot.stage) for slot in growth.slots.values()] == ["TRAINING", "DORMANT"]
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 2]
    step(growth, model, optimizer)
    assert (growth.step, growth.evidence()["one"].samples) == (2, 2)


def test_a_state_that_does_not_fit_exchanges_nothing():
    growth, model, _ = grown("one")
    seed, state = model.one.seed, growth.state_dict()
    with pytest.raises(StateDictError):
        exchange(growth, {**state, "epoch": -1}, {"one": lambda: nn.Linear(4, 4)})
    assert model.one.seed is seed
    assert "one" in growth.monitor.seeds
