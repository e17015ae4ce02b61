"""Seeds that go: at once, faded out, kept after all; what rests afterwards; and gates that only report."""

import copy
import dataclasses

import pytest
import torch
from networks import Residual
from scripts import THRESHOLDS, Script, TwoSlots, blending

from seedtriton import AlphaSchedule, ConfigurationError, Gate, GrowthController, Stage, WiringError

LINEAR = {"steps": 20, "curve": "linear"}


def held(**options):
    """A script whose seed stands at alpha 1 in HOLDING and would stay there."""
    thresholds = THRESHOLDS.without("max_accuracy_drop")
    moving = [Gate.G1, Gate.G2, Gate.G3]
    script = Script(schedule=AlphaSchedule(steps=8), thresholds=thresholds, auto_advance=moving)
    blending(script, **options)
    script.epoch()
    assert script.growth.slots["early"].stage is Stage.HOLDING
    return script


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def same(before, module):
    return all(torch.equal(w, p) for w, p in zip(before, module.parameters()))


@pytest.mark.parametrize("blend", ["add", "gate"])
def test_a_fading_seed_is_frozen_to_the_bit_and_taken_out_when_alpha_is_zero(blend):
    script = held(blend=blend)
    slot = script.growth.slots["early"]
    script.growth.prune("early", "too slow", initiator="policy", **LINEAR)
    assert slot.stage is Stage.BLENDING
    parts = slot.modules_of_seed()
    before = [weights(part) for part in parts]
    gates = len(script.of("gate"))
    assert script.epoch() == []
    assert slot.alpha_value == pytest.approx(1 - 16 / 20)
    assert all(same(w, part) for w, part in zip(before, parts))
    assert all(p.grad is None and not p.requires_grad for part in parts for p in part.parameters())
    assert script.epoch() == []
    assert slot.stage is Stage.PRUNED
    assert all(same(w, part) for w, part in zip(before, parts))
    assert all(p.requires_grad for part in parts for p in part.parameters())
    assert len(script.of("gate")) == gates
    assert len(script.optimizer.param_groups) == 1
    assert script.growth.monitor.seeds == ()


def test_the_gradients_of_a_step_under_way_no_longer_move_the_seed():
    script = held()
    seed = script.model.early.seed
    torch.nn.functional.cross_entropy(script.model(script.x[:32]), script.y[:32]).backward()
    before = weights(seed)
    script.growth.prune("early", **LINEAR)
    script.optimizer.step()
    assert same(before, seed)


def test_the_host_still_gets_the_gradient_that_comes_through_the_frozen_seed():
    script = held()
    script.growth.slots["early"].set_alpha(0.6)
    learning = copy.deepcopy(script.model)
    script.growth.prune("early", **LINEAR)
    for model in (script.model, learning):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(script.x[:32]), script.y[:32]).backward()
    host = {name: p.grad for name, p in script.model.named_parameters() if not name.startswith("early")}
    expected = {name: p.grad for name, p in learning.named_parameters() if not name.startswith("early")}
    assert all(torch.equal(host[name], expected[name]) for name in expected)
    # And it is more than the direct path: without the way through the seed it would be another one.
    direct = copy.deepcopy(script.model)
    direct.early.seed.register_forward_hook(lambda module, inputs, output: output.detach())
    direct.zero_grad()
    torch.nn.functional.cross_entropy(direct(script.x[:32]), script.y[:32]).backward()
    assert not torch.equal(direct.first.weight.grad, host["first.weight"])


def test_exactly_what_learned_learns_again_when_the_seed_is_kept():
    seed = Residual(6, 16)
    seed.expand.bias.requires_grad_(False)
    script = blending(Script(schedule=AlphaSchedule(steps=8)), seed=seed)
    script.epochs(1)
    slot = script.growth.slots["early"]
    script.growth.prune("early", steps=40)
    assert [p.requires_grad for p in seed.parameters()] == [False] * 4
    script.epoch()
    script.growth.set_alpha_target("early", 1.0, steps=8)
    assert {name for name, p in seed.named_parameters() if not p.requires_grad} == {"expand.bias"}
    assert slot.frozen is None
    assert slot.stage is Stage.BLENDING
    assert script.growth.evidence()["early"].samples == 0
    before = weights(seed)
    (verdict,) = script.epoch()
    assert not same(before, seed)
    assert verdict.gate is Gate.G3
    assert slot.alpha_value == 1.0
    assert [len(script.of(event)) for event in ("prune_scheduled", "prune_cancelled", "pruned")] == [1, 1, 0]


def test_a_seed_on_its_way_up_can_be_faded_out_too():
    script = blending(Script(schedule=AlphaSchedule(steps=1000, curve="linear")))
    script.epoch()
    alpha = script.growth.slots["early"].alpha_value
    assert 0 < alpha < 1
    script.growth.prune("early", **LINEAR)
    assert script.growth.slots["early"].alpha_value == alpha
    script.epochs(2)
    assert script.growth.slots["early"].stage is Stage.PRUNED


def test_a_fade_is_as_steep_as_it_was_told():
    script = held()
    script.growth.prune("early", steps=20, curve="sigmoid", steepness=3.0)
    script.epoch()
    way = AlphaSchedule(start=1.0, target=0.0, steps=20, curve="sigmoid", steepness=3.0)
    assert script.growth.slots["early"].alpha_value == way(16) != dataclasses.replace(way, steepness=12.0)(16)
    (event,) = script.of("prune_scheduled")
    assert (event["steps"], event["curve"], event["steepness"]) == (20, "sigmoid", 3.0)


def test_a_seed_that_nobody_feels_goes_at_once_whatever_the_steps():
    script = Script()
    script.growth.germinate("early", Residual(6))
    script.growth.prune("early", steps=100)
    assert script.growth.slots["early"].stage is Stage.PRUNED


def test_a_fading_seed_can_go_at_once_but_not_be_faded_again_or_advanced():
    script = held()
    slot = script.growth.slots["early"]
    script.growth.prune("early", "first", **LINEAR)
    with pytest.raises(WiringError, match="already being faded"):
        script.growth.prune("early", "second", steps=5)
    with pytest.raises(WiringError, match=r"being pruned \(first\)"):
        script.growth.advance("early")
    seed = slot.seed
    script.growth.prune("early", "second", initiator="governor")
    assert slot.stage is Stage.PRUNED
    assert all(p.requires_grad for p in seed.parameters())
    assert (script.of("pruned")[0]["reason"], script.of("pruned")[0]["initiator"]) == ("second", "governor")


@pytest.mark.parametrize("options", [{"steps": -1}, {"steps": 1.5}, {"steps": 4, "curve": "cubic"}])
def test_an_impossible_fade_is_refused_and_changes_nothing(options):
    script = held()
    with pytest.raises(ConfigurationError, match=r"steps must|unknown curve"):
        script.growth.prune("early", **options)
    slot = script.growth.slots["early"]
    assert (slot.stage, slot.alpha_value, slot.frozen) == (Stage.HOLDING, 1.0, None)
    assert script.of("prune_scheduled") == []


def test_an_impossible_target_does_not_save_a_fading_seed():
    script = held()
    script.growth.prune("early", **LINEAR)
    for options in ({"target": 2.0}, {"target": 1.0, "steps": -1}, {"target": 1.0, "curve": "cubic"}):
        with pytest.raises(ConfigurationError):
            script.growth.set_alpha_target("early", **options)
    assert script.growth.slots["early"].frozen
    assert script.of("prune_cancelled") == []


def test_reason_and_initiator_are_kept_in_events_and_history():
    script = held()
    script.growth.prune("early", "too slow", initiator="policy", **LINEAR)
    script.epochs(5)
    moves = [(entry["target"], entry["initiator"]) for entry in script.growth.slots["early"].lifecycle.history]
    assert moves == [
        ("GERMINATED", "script"), ("TRAINING", "gate"), ("BLENDING", "gate"), ("HOLDING", "gate"),
        ("BLENDING", "policy"), ("PRUNED", "policy"),
        ("EMBARGOED", "time"), ("RESETTING", "time"), ("DORMANT", "time"),
    ]  # fmt: skip
    reasons = [entry["reason"] for entry in script.growth.slots["early"].lifecycle.history]
    assert reasons[4:] == ["too slow", "too slow", "rested", "rested", "rested"]
    for event in ("prune_scheduled", "pruned"):
        (entry,) = script.of(event)
        assert (entry["reason"], entry["initiator"]) == ("too slow", "policy")


def test_a_slot_rests_as_long_as_told_and_says_how_long_still():
    script = Script(pruned_epochs=2, embargoed_epochs=3, resetting_epochs=1)
    slot = script.growth.slots["early"]
    first = Residual(6)
    script.growth.germinate("early", first)
    script.growth.prune("early")
    stages = []
    for left in range(6, 0, -1):
        with pytest.raises(WiringError, match=rf"resting \(stage {slot.stage}\), {left} more epochs"):
            script.growth.germinate("early", Residual(6))
        stages.append(str(slot.stage))
        script.epoch()
    assert stages == ["PRUNED"] * 2 + ["EMBARGOED"] * 3 + ["RESETTING"]
    assert slot.stage is Stage.DORMANT
    script.growth.germinate("early", lambda: Residual(6))
    assert slot.seed is not first
    (verdict,) = script.epoch()
    assert verdict.gate is Gate.G2


def test_the_rest_begins_with_the_epoch_after_a_fade():
    script = held()
    script.growth.prune("early", steps=1)
    stages = []
    for _ in range(4):
        script.epoch()
        stages.append(str(script.growth.slots["early"].stage))
    assert stages == ["PRUNED", "EMBARGOED", "RESETTING", "DORMANT"]


def test_every_stage_after_a_prune_is_told_with_its_epoch_and_who_moved_the_slot():
    script = Script(embargoed_epochs=2)
    script.growth.germinate("early", Residual(6))
    script.growth.prune("early", "not wanted", initiator="policy")
    told = len(script.events) - 2  # the move to PRUNED, and that it was pruned
    script.epochs(5)
    events = [event for event in script.events[told:] if event["seed"] == "early"]
    assert [(e["event"], e["epoch"], e["stage"], e.get("source"), e.get("target"), e["initiator"]) for e in events] == [
        ("stage", 0, "PRUNED", "TRAINING", "PRUNED", "policy"),
        ("pruned", 0, "PRUNED", None, None, "policy"),
        ("stage", 1, "EMBARGOED", "PRUNED", "EMBARGOED", "time"),
        ("stage", 3, "RESETTING", "EMBARGOED", "RESETTING", "time"),
        ("stage", 4, "DORMANT", "RESETTING", "DORMANT", "time"),
    ]
    assert [event["reason"] for event in events] == 2 * ["not wanted"] + 3 * ["rested"]


@pytest.mark.parametrize(
    "options",
    [{"pruned_epochs": 0}, {"embargoed_epochs": 1.5}, {"resetting_epochs": True}, {"auto_advance": [Gate.G0]},
     {"auto_advance": [2]}, {"auto_advance": "G2"}, {"total_epochs": 0},
     {"total_steps": 0}, {"total_steps": 1e3}, {"total_steps": True}],
)  # fmt: skip
def test_an_impossible_controller_is_refused(options):
    model = TwoSlots()
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        GrowthController(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def test_a_gate_that_only_reports_moves_nothing_until_the_script_asks():
    thresholds = THRESHOLDS.without("max_accuracy_drop")
    script = Script(schedule=AlphaSchedule(steps=8), thresholds=thresholds, auto_advance=())
    slot = script.growth.slots["early"]
    assert script.growth.germinate("early", Residual(6, 16), probe=torch.randn(2, 6)).passed
    assert slot.stage is Stage.GERMINATED
    for stage in (Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED):
        for _ in range(30):
            (verdict,) = script.epoch()
            if verdict.passed:
                break
        assert verdict.target is stage
        assert slot.stage is not stage
        assert script.growth.advance("early").passed
        assert slot.stage is stage
    assert {entry["initiator"] for entry in slot.lifecycle.history} == {"script"}
    with pytest.raises(WiringError, match="no living seed"):
        script.growth.advance("early")


def test_advance_refuses_with_a_verdict_and_leaves_the_seed():
    script = Script(auto_advance=[Gate.G1])
    script.growth.germinate("early", Residual(6))
    verdict = script.growth.advance("early")
    assert not verdict.passed
    assert "gradient_never_measured" in {check.name for check in verdict.failed}
    assert script.growth.slots["early"].stage is Stage.TRAINING
    assert script.of("gate")[-1]["gate"] == "G2"
