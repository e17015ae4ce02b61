"""Schedulers whose optimizer's groups come and go: told or found, looked through, and never past what was told."""

import copy
import gc
import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as lr

from seedtriton import ConfigurationError, GrowthController, SeedSlot, WiringError


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), SeedSlot(), nn.Linear(4, 2))


def run(growth, net, optimizer, *schedulers, steps=1):
    for _ in range(steps):
        net(torch.randn(3, 4)).square().mean().backward()
        growth.measure()
        optimizer.step()
        optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()


def grown(make, settings, steps=20, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9)):
    """Host, optimizer, scheduler and controller after some steps and a germination with these settings."""
    net = model()
    made = optimizer(net.parameters())
    scheduler = make(made)
    growth = GrowthController(net, made, schedulers=[scheduler], sinks=[])
    run(growth, net, made, scheduler, steps=steps)
    growth.germinate("1", nn.Linear(4, 4), **settings)
    return net, made, scheduler, growth


# --- what a script tells of a group survives ---


def one_cycle(optimizer, peak=0.1):
    return lr.OneCycleLR(optimizer, max_lr=peak, total_steps=60, div_factor=10.0, final_div_factor=100.0)


def test_a_told_rate_is_the_peak_of_a_one_cycle():
    net, optimizer, scheduler, growth = grown(one_cycle, {"lr": 1e-4})
    assert optimizer.param_groups[1]["lr"] == 1e-4
    twin = torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)]} for _ in range(2)], lr=0.1, momentum=0.9)
    truth = one_cycle(twin, [0.1, 1e-4])
    for _ in range(20):
        twin.step()
        truth.step()
    for _ in range(30):
        run(growth, net, optimizer, scheduler)
        twin.step()
        truth.step()
        for own, other in zip(optimizer.param_groups, twin.param_groups):
            assert own["lr"] == pytest.approx(other["lr"], rel=1e-12)
            assert own["momentum"] == pytest.approx(other["momentum"], rel=1e-12)


def test_a_told_peak_of_a_one_cycle_is_kept_as_it_is():
    _, optimizer, _, _ = grown(one_cycle, {"max_lr": 0.02})
    assert optimizer.param_groups[1]["max_lr"] == 0.02


@pytest.mark.parametrize(
    "settings, optimizer",
    [
        ({"momentum": 0.3}, lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9)),
        ({"betas": (0.3, 0.999)}, lambda ps: torch.optim.AdamW(ps, lr=0.1)),
    ],
)
@pytest.mark.parametrize(
    "make",
    [one_cycle, lambda o: lr.CyclicLR(o, 0.01, 0.1, step_size_up=7)],
    ids=["one cycle", "cyclic"],
)
def test_a_told_momentum_stays_where_schedulers_move_it(make, settings, optimizer):
    net, made, scheduler, growth = grown(make, settings, optimizer=optimizer)
    for _ in range(20):
        run(growth, net, made, scheduler)
        group = made.param_groups[1]
        assert (group["betas"][0] if "betas" in group else group["momentum"]) == 0.3


def test_a_told_rate_is_the_base_of_a_cycle_whose_top_follows():
    net, optimizer, scheduler, growth = grown(lambda o: lr.CyclicLR(o, 0.01, 0.1, step_size_up=7), {"lr": 1e-4})
    for _ in range(20):
        run(growth, net, optimizer, scheduler)
        first, second = optimizer.param_groups
        assert second["lr"] == pytest.approx(first["lr"] * 1e-4 / 0.01, rel=1e-12)


@pytest.mark.parametrize("base", [0.0, 0.01])
def test_a_cycle_that_starts_at_zero_gets_the_told_rate_on_top(base):
    _, _, scheduler, _ = grown(lambda o: lr.CyclicLR(o, base, 0.1, step_size_up=7), {"lr": 1e-4})
    assert scheduler.max_lrs[1] == pytest.approx(1e-3 if base else 1e-4)


# --- a state that somebody holds ---


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr.LambdaLR(o, lambda t: 0.9**t),
        lambda o: lr.CyclicLR(o, 0.01, 0.1),
        lambda o: lr.ReduceLROnPlateau(o, min_lr=[1e-5]),
        lambda o: lr.SequentialLR(o, [lr.ConstantLR(o, 0.5, 3), lr.ExponentialLR(o, 0.9)], [3]),
    ],
)
def test_a_state_that_was_taken_before_is_as_it_was(make):
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    scheduler = make(optimizer)
    growth = GrowthController(net, optimizer, schedulers=[scheduler], sinks=[])
    held = [scheduler.state_dict()]
    kept = copy.deepcopy(held)
    growth.germinate("1", nn.Linear(4, 4), lr=1e-3)
    held.append(scheduler.state_dict())
    kept.append(copy.deepcopy(held[1]))
    growth.prune("1")
    assert held == kept
    assert held[0] != held[1]


# --- whose scheduler it is ---


def test_a_scheduler_of_another_optimizer_is_refused():
    net = model()
    optimizer, other = (torch.optim.SGD(net.parameters(), lr=0.1) for _ in range(2))
    scheduler = lr.ExponentialLR(other, 0.9)
    with pytest.raises(WiringError, match="ExponentialLR schedules another optimizer"):
        GrowthController(net, optimizer, schedulers=[scheduler], sinks=[])
    growth = GrowthController(net, optimizer, sinks=[])
    with pytest.raises(WiringError, match="schedules another optimizer"):
        growth.add_scheduler(scheduler)


@pytest.mark.parametrize("thing", [object(), "cosine", nn.Linear(1, 1)])
def test_what_is_no_scheduler_is_refused_by_name(thing):
    net = model()
    with pytest.raises(ConfigurationError, match=f"{type(thing).__name__} is no learning-rate scheduler"):
        GrowthController(net, torch.optim.SGD(net.parameters(), lr=0.1), schedulers=[thing], sinks=[])


class Accelerated:
    """What accelerate, Trainer and Lightning hand out: a scheduler that has one inside, and no optimizer."""

    def __init__(self, scheduler, optimizers):
        self.scheduler, self.optimizers = scheduler, optimizers

    def step(self):
        self.scheduler.step()


def test_a_scheduler_is_looked_through():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    inner = lr.OneCycleLR(optimizer, 0.1, total_steps=100)
    outer = Accelerated(inner, [optimizer])
    growth = GrowthController(net, optimizer, schedulers=[outer], sinks=[])
    growth.germinate("1", nn.Linear(4, 4))
    assert len(inner.base_lrs) == 2
    run(growth, net, optimizer, outer, steps=3)
    growth.prune("1")
    run(growth, net, optimizer, outer, steps=3)
    assert len(inner.base_lrs) == 1


# --- one that is made later ---


def test_a_scheduler_told_later_learns_of_groups():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    growth = GrowthController(net, optimizer, sinks=[])
    scheduler = lr.ExponentialLR(optimizer, 0.9)
    with pytest.raises(WiringError, match=r"ExponentialLR.*add_scheduler"):
        growth.germinate("1", nn.Linear(4, 4))
    assert len(optimizer.param_groups) == 1
    growth.add_scheduler(scheduler)
    growth.add_scheduler(scheduler)
    growth.germinate("1", nn.Linear(4, 4))
    assert scheduler.base_lrs == [0.1, 0.1]
    run(growth, net, optimizer, scheduler)


def test_a_second_scheduler_that_nobody_told_of_is_named():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    known = lr.ExponentialLR(optimizer, 0.9)
    growth = GrowthController(net, optimizer, schedulers=[known], sinks=[])
    unknown = lr.StepLR(optimizer, 5)
    with pytest.raises(WiringError, match="has StepLR, which"):
        growth.germinate("1", nn.Linear(4, 4))
    del unknown
    growth.germinate("1", nn.Linear(4, 4))


def test_a_scheduler_that_only_waits_to_be_collected_is_nobodys():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    growth = GrowthController(net, optimizer, schedulers=[lr.ExponentialLR(optimizer, 0.9)], sinks=[])
    gc.disable()
    try:
        lost = lr.StepLR(optimizer, 5)
        lost.itself = lost
        del lost
        growth.germinate("1", nn.Linear(4, 4))
    finally:
        gc.enable()


def test_a_scheduler_made_before_a_germination_and_told_after_it_does_not_fit():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scheduler = lr.LambdaLR(optimizer, lambda t: 0.5)
    growth = GrowthController(net, optimizer, schedulers=[scheduler], sinks=[])
    growth.germinate("1", nn.Linear(4, 4))
    stranger = copy.copy(scheduler)
    stranger.base_lrs = [0.1]
    with pytest.raises(WiringError, match="1 entries in base_lrs, the optimizer has 2 parameter groups"):
        growth.add_scheduler(stranger)


@pytest.mark.parametrize("make", [lambda o: lr.LambdaLR(o, lambda t: 0.9**t), lambda o: lr.CosineAnnealingLR(o, 50)])
def test_a_scheduler_made_after_germination_is_found_at_prune(make, caplog):
    """Left alone, its next step would fail with "zip() argument 2 is shorter", which names nobody."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    growth = GrowthController(net, optimizer, sinks=[])
    growth.germinate("1", nn.Linear(4, 4), lr=0.3)
    scheduler = make(optimizer)
    run(growth, net, optimizer, scheduler, steps=2)
    growth.prune("1")
    assert "was never told: growth.add_scheduler(scheduler)" in caplog.text
    run(growth, net, optimizer, scheduler, steps=2)
    assert len(scheduler.base_lrs) == len(optimizer.param_groups) == 1
    assert math.isfinite(optimizer.param_groups[0]["lr"])
