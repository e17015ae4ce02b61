"""Slots that the model gets after its controller: put in later, or inside a seed that has become permanent."""

import copy

import pytest
import torch
from networks import Residual
from same import same
from scripts import Script, TwoSlots
from torch import nn
from torch.optim.swa_utils import AveragedModel

from seedtriton import (
    AlphaSchedule,
    ConfigurationError,
    GateThresholds,
    SeedSlot,
    Stage,
    StateDictError,
    WiringError,
    insert_slot,
    load_grown,
    merge_fossils,
    remove_slot,
    restore_slots,
)
from seedtriton.growth.clients import exchange

INNER = "early.seed.slot"


class WithSlot(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.slot = Residual(6, 16), SeedSlot()

    def forward(self, x):
        return self.slot(self.inner(x))


def fossil():
    """A script whose seed in "early" is permanent, and has a slot in it; behind it little is left to learn."""
    script = Script(thresholds=GateThresholds(min_blend_gain_t=0.5), schedule=AlphaSchedule(steps=8, curve="linear"))
    script.growth.germinate("early", WithSlot(), probe=torch.randn(2, 6))
    while script.growth.slots["early"].stage is not Stage.FOSSILIZED:
        script.epoch()
        assert script.growth.epoch < 40
    return script


def grown():
    script = fossil()
    assert INNER in script.growth.slots
    script.growth.germinate(INNER, Residual(6, 4))
    script.epochs(2)
    return script


def saved(script):
    states = script.growth.state_dict(), script.model.state_dict(), script.optimizer.state_dict()
    return copy.deepcopy((*states, script.generator.get_state()))


def seeds():
    return {"early": WithSlot, INNER: lambda: Residual(6, 4)}


def test_a_slot_that_is_put_in_later_is_found_by_its_name_and_at_the_end_of_an_epoch():
    script = Script()
    insert_slot(script.model, "second")
    assert script.growth.germinate("second.growth_slot", Residual(6))
    insert_slot(script.model, "first")
    (verdict,) = script.epoch()
    assert verdict.seed == "second.growth_slot"
    assert list(script.growth.slots) == ["early", "late", "second.growth_slot", "first.growth_slot"]
    script.epochs(2)
    evidence = script.growth.evidence()["second.growth_slot"]
    assert evidence.in_optimizer
    assert evidence.samples > 32


def with_late_slot():
    """A script whose model gets a slot after its controller."""
    script = Script()
    insert_slot(script.model, "second")
    return script


def test_a_slot_that_is_put_in_later_is_saved_and_told_of_at_once():
    script = with_late_slot()
    assert "second.growth_slot" in repr(script.growth)
    script = with_late_slot()
    assert [row["slot"] for row in script.growth.summary().rows] == ["early", "late", "second.growth_slot"]
    assert list(with_late_slot().growth.state_dict()["slots"]) == ["early", "late", "second.growth_slot"]
    script = with_late_slot()
    script.growth.follow(copy.deepcopy(script.model))


@pytest.mark.parametrize("load", [lambda growth, *given: growth.load_state_dict(*given), exchange])
def test_a_state_with_a_slot_that_was_put_in_later_is_loaded_into_a_model_that_has_it_by_now(load):
    script = with_late_slot()
    script.growth.germinate("second.growth_slot", Residual(6))
    script.epochs(2)
    growth, model, optimizer, order = saved(script)
    script.epochs(3)
    again = with_late_slot()
    load(again.growth, growth, {"second.growth_slot": lambda: Residual(6)})
    again.model.load_state_dict(model)
    again.optimizer.load_state_dict(optimizer)
    again.generator.set_state(order)
    again.epochs(3)
    assert same(again.model.state_dict(), script.model.state_dict())
    assert same(again.growth.state_dict(), script.growth.state_dict())


def removed():
    """A script whose model had a slot for an epoch."""
    script = with_late_slot()
    script.epoch()
    assert "second.growth_slot" in script.growth.slots
    remove_slot(script.model, "second")
    return script


def test_a_loop_over_the_slots_goes_on_when_one_is_found_in_it():
    script = with_late_slot()
    for name in script.growth.slots:
        script.growth.germinate(name, Residual(6), probe=torch.randn(2, 6))
    assert len(script.growth.slots) == 3


def test_a_slot_that_is_removed_is_forgotten():
    assert [row["slot"] for row in removed().growth.summary().rows] == ["early", "late"]
    growth, *_ = saved(removed())
    Script().growth.load_state_dict(growth)
    with pytest.raises(ConfigurationError, match=r"no slot 'second.growth_slot'; its slots are \['early', 'late'\]"):
        removed().growth.germinate("second.growth_slot", Residual(6))


def test_one_that_is_put_in_again_is_used():
    script = removed()
    slot = insert_slot(script.model, "second")
    script.growth.germinate(slot.name, Residual(6))
    assert slot.stage is Stage.TRAINING
    script.epoch()
    assert script.growth.evidence()[slot.name].samples == 16
    assert script.growth.slots[slot.name] is slot


def test_one_that_is_removed_before_the_first_step_has_no_weights_to_check():
    script = with_late_slot()
    script.growth.germinate("second.growth_slot", Residual(6))
    growth, *_ = saved(script)
    again = with_late_slot()
    again.growth.load_state_dict(growth, {"second.growth_slot": lambda: Residual(6)})
    again.growth.prune("second.growth_slot")
    for _ in range(3):
        again.growth.end_epoch()
    remove_slot(again.model, "second")
    assert "second.growth_slot" not in again.growth.state_dict()["slots"]
    again.epoch()
    assert again.growth.step == 16


def test_an_empty_slot_is_known_by_the_object_that_is_in_the_model():
    script = Script()
    script.model.early, script.model.late = nn.Sequential(script.model.early), SeedSlot()
    script.epoch()
    assert script.growth.slots == {"early": script.model.early[0], "late": script.model.late}
    script.growth.germinate("late", Residual(6))
    script.growth.germinate("early", Residual(6))
    assert script.model.late.stage is script.model.early[0].stage is Stage.TRAINING


def test_a_seed_stays_known_when_its_slot_is_taken_out_of_the_model():
    script = Script()
    script.growth.germinate("late", Residual(6))
    script.model.late = SeedSlot()
    script.epoch()
    assert script.growth.slots["late"].stage is Stage.TRAINING
    script.growth.prune("late")
    script.epochs(3)
    script.growth.germinate("late", Residual(6))
    assert script.model.late.stage is Stage.TRAINING


def test_a_slot_in_a_seed_waits_until_that_seed_is_permanent():
    script = Script()
    script.growth.germinate("early", WithSlot(), probe=torch.randn(2, 6))
    with pytest.raises(WiringError, match=r"'early.seed.slot' lies in a seed that is not permanent yet"):
        script.growth.germinate(INNER, Residual(6))
    assert INNER not in script.growth.slots
    script.growth.prune("early")
    script.epochs(4)
    assert script.growth.slots["early"].stage is Stage.DORMANT


def test_a_slot_in_a_fossil_is_found_and_lives_a_life_of_its_own():
    script = grown()
    growth = script.growth
    assert growth.slots[INNER].name == INNER
    assert growth.evidence()[INNER].in_optimizer
    assert len(growth.optimizer.param_groups) == 3
    while growth.slots[INNER].stage is not Stage.BLENDING:
        script.epoch()
        assert growth.epoch < 60
    growth.prune(INNER)
    assert len(growth.optimizer.param_groups) == 2
    assert growth.slots["early"].stage is Stage.FOSSILIZED


def test_a_run_with_a_seed_in_a_seed_goes_on_bit_for_bit():
    script = grown()
    growth, model, optimizer, order = saved(script)
    script.epochs(3)
    again = Script(thresholds=GateThresholds(min_blend_gain_t=0.5), schedule=AlphaSchedule(steps=8, curve="linear"))
    again.growth.load_state_dict(growth, seeds())
    again.model.load_state_dict(model)
    again.optimizer.load_state_dict(optimizer)
    again.generator.set_state(order)
    assert list(again.growth.slots) == list(script.growth.slots)
    again.epochs(3)
    for (name, mine), theirs in zip(again.model.state_dict().items(), script.model.state_dict().values()):
        assert torch.equal(mine, theirs), name
    assert again.growth.slots[INNER].stage is script.growth.slots[INNER].stage
    assert again.growth.state_dict()["slots"].keys() == script.growth.state_dict()["slots"].keys()


def test_the_same_by_restoring_the_slots_first():
    growth, model, optimizer, _ = saved(grown())
    fresh = TwoSlots()
    restore_slots(fresh, growth, seeds())
    fresh.load_state_dict(model)
    again = Script(model=fresh)
    again.growth.load_state_dict(growth)
    again.optimizer.load_state_dict(optimizer)
    again.epochs(1)
    assert again.growth.slots[INNER].stage is Stage.TRAINING


def test_a_state_of_a_slot_that_the_seed_has_not_got_changes_nothing():
    growth, *_ = saved(grown())
    script = Script()
    with pytest.raises(StateDictError, match=r"slots \['early.seed.slot'\] in seeds, and these seeds have none"):
        script.growth.load_state_dict(growth, {**seeds(), "early": lambda: Residual(6)})
    assert list(script.growth.slots) == ["early", "late"]
    assert script.growth.slots["early"].stage is Stage.DORMANT
    damaged = copy.deepcopy(growth)
    damaged["monitor"]["ring"] = torch.zeros(1)
    with pytest.raises(StateDictError):
        script.growth.load_state_dict(damaged, seeds())
    assert list(script.growth.slots) == ["early", "late"]
    assert len(script.optimizer.param_groups) == 1
    script.growth.load_state_dict(growth, seeds())


@pytest.mark.parametrize("with_state", [True, False])
def test_a_grown_model_is_rebuilt_with_both_and_merged(with_state):
    script = grown()
    growth, model, *_ = saved(script)
    rebuilt = load_grown(TwoSlots(), model, seeds(), growth if with_state else None)
    with torch.no_grad():
        expected = script.model.eval()(script.x)
        assert torch.equal(rebuilt.eval()(script.x), expected)
        script.growth.prune(INNER)
        assert merge_fossils(script.model) == ["early"]
        assert torch.equal(script.model(script.x), expected)
    assert [path for path, _ in script.model.named_modules() if "slot" in path] == ["early.slot"]


def test_an_average_follows_into_the_seed_of_a_seed():
    script = fossil()
    average = AveragedModel(script.model)
    script.growth.follow(average)
    script.growth.germinate(INNER, Residual(6, 4))
    mirrored = average.module.get_submodule(INNER)
    assert mirrored.stage is Stage.TRAINING
    assert mirrored.seed is not script.growth.slots[INNER].seed
    average.update_parameters(script.model)


def test_a_copy_without_a_later_slot_is_told_and_searched_once(caplog, monkeypatch):
    script = Script()
    average = AveragedModel(script.model)
    script.growth.follow(average)
    searched, usual = [], TwoSlots.named_modules

    def named_modules(self, *arguments, **named):
        searched.append(self is average.module)
        return usual(self, *arguments, **named)

    monkeypatch.setattr(TwoSlots, "named_modules", named_modules)
    insert_slot(script.model, "second")
    script.growth.germinate("second.growth_slot", Residual(6))
    script.epoch()
    assert searched.count(True) == 1
    assert caplog.text.count("has no slot 'second.growth_slot'") == 1


@pytest.mark.parametrize("stepping", [False, True])
def test_a_copy_goes_on_following_when_a_slot_is_removed_and_put_in_again(stepping, caplog):
    script = with_late_slot()
    twin = copy.deepcopy(script.model)
    script.growth.follow(twin)
    kept = twin.second.growth_slot
    for model in (script.model, twin):
        remove_slot(model, "second")
    if stepping:
        script.epoch()
    for model in (script.model, twin):
        insert_slot(model, "second")
    script.growth.germinate("early", Residual(6))
    script.growth.germinate("second.growth_slot", Residual(6))
    script.epoch()
    assert twin.early.stage is twin.second.growth_slot.stage is Stage.TRAINING
    assert kept.seed is None
    assert "has no slot" not in caplog.text
