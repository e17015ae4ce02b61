"""Slots before weights, groups and monitor after: for scripts in which a client loads the weights."""

import contextlib
import copy

import pytest
import torch
from resuming import SEEDS_BY_SLOT, STEPS, Net, Run, Seed
from same import same
from torch import nn

from seedtriton import ConfigurationError, GrowthController, SeedSlot, Stage, StateDictError, WiringError, restore_slots
from seedtriton.growth.digest import digest_of


def stopped_at(step):
    run = Run()
    while run.step < step:
        run.one()
    return run


def restored(saved):
    """As a client does: weights into a model with seeds, then an optimizer of all that it has by now."""
    run = Run()
    restore_slots(run.model, saved["growth"], SEEDS_BY_SLOT)
    run.model.load_state_dict(saved["model"])
    run.equip()
    run.growth.load_state_dict(saved["growth"])
    run.optimizer.load_state_dict(saved["optimizer"])
    run.scheduler.load_state_dict(saved["scheduler"])
    torch.random.set_rng_state(saved["random"])
    run.step = saved["step"]
    return run


@pytest.mark.parametrize("step", [2, 5, 10, 25, 40, STEPS - 1])
def test_a_run_goes_on_bit_for_bit(step):
    saved = copy.deepcopy(stopped_at(step).state())
    whole = stopped_at(step).finish()["state"]
    resumed = restored(saved).finish()["state"]
    for part in whole:
        assert same(resumed[part], whole[part]), part


@pytest.mark.parametrize("step", [5, 40])
def test_weights_that_a_loader_dropped_are_named_before_the_first_step(step):
    saved = copy.deepcopy(stopped_at(step).state())
    run = Run()
    restore_slots(run.model, saved["growth"], SEEDS_BY_SLOT)
    run.equip()
    run.growth.load_state_dict(saved["growth"])
    host = {name: tensor for name, tensor in saved["model"].items() if ".seed." not in name}
    run.model.load_state_dict(host, strict=False)
    before = copy.deepcopy(run.model.state_dict())
    for _ in range(2):
        nn.functional.cross_entropy(run.model(run.x[0]), run.y[0]).backward()
        with pytest.raises(WiringError, match=r"not those that were saved, such as \['early\.seed"):
            run.growth.measure()
    assert same(run.model.state_dict(), before)
    run.model.load_state_dict(saved["model"])
    run.growth.measure()
    run.growth.measure()


def test_other_weights_may_be_meant():
    saved = copy.deepcopy(stopped_at(10).state())
    run = Run()
    run.growth.load_state_dict(saved["growth"], seeds=SEEDS_BY_SLOT, check_weights=False)
    nn.functional.cross_entropy(run.model(run.x[0]), run.y[0]).backward()
    run.growth.measure()


def test_a_trip_through_half_precision_is_no_loss():
    saved = copy.deepcopy(stopped_at(10).state())
    run = Run()
    run.growth.load_state_dict(saved["growth"], seeds=SEEDS_BY_SLOT)
    run.model.load_state_dict({k: v.bfloat16().to(v.dtype) for k, v in saved["model"].items()})
    with pytest.raises(WiringError, match="not those that were saved"):
        run.growth._position.unchecked.check()  # float32 weights that are others
    saved["growth"]["slots"]["early"]["digest"] = {
        name: ["bfloat16", *numbers[1:]] for name, numbers in saved["growth"]["slots"]["early"]["digest"].items()
    }
    run = Run()
    run.growth.load_state_dict(saved["growth"], seeds=SEEDS_BY_SLOT)
    run.model.load_state_dict(saved["model"])
    for parameter in run.model.early.parameters():
        parameter.data = parameter.data.bfloat16().to(parameter.dtype)
    run.growth._position.unchecked.saved.pop("late", None)
    run.growth._position.unchecked.check()


def test_a_state_that_is_saved_before_the_weights_came_still_names_them():
    saved = copy.deepcopy(stopped_at(10).state())
    run = Run()
    run.growth.load_state_dict(saved["growth"], seeds=SEEDS_BY_SLOT)
    assert same(run.growth.state_dict()["slots"]["early"]["digest"], saved["growth"]["slots"]["early"]["digest"])


def test_what_does_not_fit_changes_nothing():
    saved = copy.deepcopy(stopped_at(10).state())["growth"]
    model = Net()
    with pytest.raises(ConfigurationError, match=r"needed for slots \['late'\]"):
        restore_slots(model, saved, {"early": Seed})
    with pytest.raises(StateDictError, match="the model has"):
        restore_slots(nn.Sequential(nn.Linear(4, 4), SeedSlot()), saved, {})
    broken = copy.deepcopy(saved)
    broken["slots"]["late"]["slot"]["alpha"] = 2.0
    with pytest.raises(StateDictError, match="bad alpha"):
        restore_slots(model, broken, SEEDS_BY_SLOT)
    broken = copy.deepcopy(saved)
    broken["slots"]["late"]["digest"]["seed.expand.weight"] = [1.0]
    with pytest.raises(StateDictError, match="damaged digest"):
        restore_slots(model, broken, SEEDS_BY_SLOT)
    same_seed = Seed()
    with pytest.raises(WiringError, match="shares parameters"):
        restore_slots(model, saved, {"early": same_seed, "late": same_seed})
    assert model.early.stage is model.late.stage is Stage.DORMANT
    assert not any(".seed." in name for name in model.state_dict())
    restore_slots(model, saved, SEEDS_BY_SLOT)
    with pytest.raises(WiringError, match="freshly built model"):
        restore_slots(model, saved, SEEDS_BY_SLOT)


def test_slots_of_another_state_are_refused():
    saved, later = stopped_at(10).growth.state_dict(), stopped_at(40).growth.state_dict()
    model = Net()
    restore_slots(model, later, SEEDS_BY_SLOT)
    growth = GrowthController(model, torch.optim.AdamW(model.parameters()), sinks=[])
    with pytest.raises(WiringError, match="are not empty"):
        growth.load_state_dict(saved)
    growth.load_state_dict(later)
    assert growth.slots["early"].stage is Stage.FOSSILIZED


def loaded_and_pruned():
    """A run with the state of another, of which one seed leaves before the first step."""
    saved = copy.deepcopy(stopped_at(10).state())
    run = Run()
    run.growth.load_state_dict(saved["growth"], seeds=SEEDS_BY_SLOT)
    run.model.load_state_dict(saved["model"])
    run.growth.prune("late")
    return run


def test_another_seed_and_weights_that_were_trained_are_none_of_the_states():
    run = loaded_and_pruned()
    for _ in range(2):  # the first step goes unmeasured
        nn.functional.cross_entropy(run.model(run.x[0]), run.y[0]).backward()
        run.optimizer.step()
    run.growth.measure()


@pytest.mark.parametrize("first", ["another", "hosts", "seeds"])
def test_only_a_step_that_trains_seed_or_host_makes_the_weights_others(first):
    saved = copy.deepcopy(stopped_at(10).state())
    run = Run()
    run.growth.load_state_dict(saved["growth"], seeds=SEEDS_BY_SLOT)
    run.model.load_state_dict({name: tensor for name, tensor in saved["model"].items() if "seed" not in name}, False)
    another = nn.Linear(4, 1)
    watched = [torch.optim.SGD(another.parameters(), lr=0.1), torch.optim.SGD(run.model.early.parameters(), lr=0.1)]
    for optimizer in watched:
        run.growth.monitor.watch(optimizer)
    output = run.model(run.x[0])
    (nn.functional.cross_entropy(output, run.y[0]) + another(output).sum()).backward()
    {"another": watched[0], "seeds": watched[1], "hosts": run.optimizer}[first].step()
    refused = pytest.raises(WiringError, match=r"not those that were saved, such as \['early\.seed")
    with refused if first == "another" else contextlib.nullcontext():
        run.growth.measure()


def test_a_seed_put_in_before_the_first_step_is_not_held_against_the_weights_of_the_one_before():
    run = loaded_and_pruned()
    while run.growth.slots["late"].stage is not Stage.DORMANT:
        run.growth.end_epoch(accuracy=0.5)
    run.growth.germinate("late", SEEDS_BY_SLOT["late"]())
    assert run.growth.state_dict()["slots"]["late"]["digest"] == digest_of(run.model.late)
    nn.functional.cross_entropy(run.model(run.x[0]), run.y[0]).backward()
    run.growth.measure()
