"""What clients that own the loop ask of a controller: groups by weight decay, other seeds for those that are there."""

import copy

import pytest
import torch
from resuming import SEEDS_BY_SLOT, Run
from same import same
from torch import nn

from seedtriton import ConfigurationError, GrowthController, Stage, StateDictError, WiringError
from seedtriton.growth.clients import (
    check_weights,
    clip_apart,
    exchange,
    give_group,
    numbers,
    own_random_numbers,
    parted,
)


def run_to(step):
    run = Run()
    while run.step < step:
        run.one()
    return run


def rates_of(optimizer):
    return [(group["lr"], group.get("initial_lr"), group["weight_decay"]) for group in optimizer.param_groups]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("names", [["seed.expand.bias", "seed.contract.bias"], None])
def test_some_of_a_seed_get_a_group_that_is_scheduled_like_the_rest(named, names):
    run = Run()
    if named:
        run.optimizer = torch.optim.AdamW(run.model.named_parameters(), lr=1e-2, weight_decay=0.1)
        run.scheduler = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.5)
        run.growth = GrowthController(run.model, run.optimizer, schedulers=[run.scheduler], sinks=[])
    run.optimizer.step()
    run.scheduler.step()
    run.growth.germinate("late", SEEDS_BY_SLOT["late"](), lr=2e-2)
    before = rates_of(run.optimizer)
    place = run.growth.slots["late"]
    chosen = names or [name for name, _ in place.named_parameters()]
    give_group(run.growth, "late", chosen, weight_decay=0.0)
    assert rates_of(run.optimizer) == [before[0], *([before[1]] if names else []), (*before[1][:2], 0.0)]
    known = dict(place.named_parameters())
    assert list(map(id, run.optimizer.param_groups[-1]["params"])) == [
        id(known[name]) for name in known if name in chosen
    ]
    if named:
        assert run.optimizer.param_groups[-1]["param_names"] == [name for name in known if name in chosen]
        assert all(len(group["param_names"]) == len(group["params"]) for group in run.optimizer.param_groups)
        assert {*run.optimizer.param_groups[-2]["param_names"]}.isdisjoint(chosen)
    held = [id(p) for group in run.optimizer.param_groups for p in group["params"]]
    assert len(set(held)) == len(held) == len(list(run.model.parameters()))
    run.scheduler.step()
    factor = run.scheduler.gamma
    wanted = [*[rate * factor for rate, _, _ in before][: 2 if names else 1], before[1][0] * factor]
    assert [rate for rate, _, _ in rates_of(run.optimizer)] == pytest.approx(wanted)
    assert rates_of(run.optimizer)[-1][2] == 0.0
    run.growth.prune("late")
    assert len(run.optimizer.param_groups) == len(run.scheduler.base_lrs) == 1


def test_nothing_is_moved_for_names_and_settings_that_are_not_there():
    run = run_to(5)
    before = copy.deepcopy(run.optimizer.state_dict())
    give_group(run.growth, "early", [], weight_decay=0.0)
    for names, settings in ((["seed.nothing"], {}), (["seed.expand.bias"], {"decay": 0.0})):
        with pytest.raises(ConfigurationError, match="no parameters of the seed"):
            give_group(run.growth, "early", names, **settings)
    with pytest.raises(ConfigurationError, match="no slot 'nowhere'"):
        give_group(run.growth, "nowhere", [])
    assert same(run.optimizer.state_dict(), before)


@pytest.mark.parametrize("then, now", [(2, 10), (5, 40), (10, 60), (25, 10)])
def test_the_seeds_of_an_earlier_state_are_those_of_that_state(then, now):
    first = run_to(then)
    saved = copy.deepcopy(first.state())
    whole = first.finish()["state"]
    run = run_to(now)
    exchange(run.growth, saved["growth"], SEEDS_BY_SLOT)
    assert {row["last verdict"] for row in run.growth.summary().rows} == {None}, "those were of other seeds"
    if saved["growth"]["slots"]["early"]["digest"]:
        with pytest.raises(WiringError, match="not those that were saved"):
            check_weights(run.growth)
    run.model.load_state_dict(saved["model"])
    check_weights(run.growth)
    check_weights(run.growth)
    run.optimizer.load_state_dict(saved["optimizer"])
    run.scheduler.load_state_dict(saved["scheduler"])
    torch.random.set_rng_state(saved["random"])
    run.step, run.log[:] = saved["step"], []
    assert same(run.state(), saved)
    assert same(run.finish()["state"], whole)


def test_what_does_not_fit_exchanges_nothing():
    run, saved = run_to(40), copy.deepcopy(run_to(10).growth.state_dict())
    before = copy.deepcopy(run.state())
    broken = copy.deepcopy(saved)
    broken["group_sizes"][0] = 1
    for state, seeds, error in (
        (saved, {"early": nn.Identity}, ConfigurationError),
        (broken, SEEDS_BY_SLOT, StateDictError),
    ):
        with pytest.raises(error):
            exchange(run.growth, state, seeds)
        torch.random.set_rng_state(before["random"])  # reading a state makes gate networks
        assert same(run.state(), before)


def test_clipping_parts_the_seeds_that_the_host_does_not_feel():
    run = run_to(10)
    slots = run.growth.slots
    listed = list(run.model.parameters())
    felt, behind = parted(listed, slots)
    wanted = {name: [id(p) for p in slot.parameters()] for name, slot in slots.items() if slot.stage is Stage.TRAINING}
    assert {name: list(map(id, found)) for name, found in behind.items()} == wanted
    assert len(wanted) > 0
    hidden = {i for ids in wanted.values() for i in ids}
    assert list(map(id, felt)) == [id(p) for p in listed if id(p) not in hidden]


def test_a_clients_clipping_runs_once_on_what_is_felt_and_each_seed_behind_has_its_own_norm():
    run = run_to(10)
    listed, slots = list(run.model.parameters()), run.growth.slots
    felt, behind = parted(listed, slots)
    for number, parameter in enumerate(listed, start=1):
        parameter.grad = torch.full_like(parameter, float(number))
    calls = []

    def clip(parameters, max_norm, norm_type):
        calls.append((list(map(id, parameters)), max_norm, norm_type))
        return "the host's norm"

    before = [p.grad.clone() for p in felt]
    assert clip_apart(clip, iter(listed), slots, 0.5, 2.0) == "the host's norm"
    assert calls == [(list(map(id, felt)), 0.5, 2.0)]  # a second one would unscale the gradients again
    assert all(torch.equal(p.grad, grad) for p, grad in zip(felt, before))
    assert behind
    for seed in behind.values():
        assert nn.utils.get_total_norm([p.grad for p in seed]) == pytest.approx(0.5, rel=1e-4)


def test_numbers_are_those_that_the_gates_had():
    run = run_to(16)
    found = numbers(run.growth)
    assert {"early/alpha", "late/alpha"} <= set(found)
    for name, life in run.growth._position.lives.items():
        assert found[f"{name}/ratio"] == life.evidence.ratio
    assert all(type(value) is float for value in found.values())
    assert numbers(Run().growth) == {}


def test_own_random_numbers_leave_no_trace():
    model = nn.Linear(2, 2)
    before = torch.random.get_rng_state()
    with own_random_numbers(model):
        torch.randn(3)
    assert torch.equal(torch.random.get_rng_state(), before)
