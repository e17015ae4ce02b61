"""The whole street on real training: nothing here sets a metric by hand."""

import copy
import dataclasses
import json
import math
import sys
from unittest import mock

import pytest
import torch
from networks import Mlp, Residual
from scripts import THRESHOLDS, Script, TwoSlots, blending
from torch import nn

from seedtriton import (
    AlphaSchedule,
    ConfigurationError,
    Gate,
    GateThresholds,
    GrowthController,
    ProgressThreshold,
    Stage,
    StraightThrough,
    TrustRegion,
    WiringError,
)
from seedtriton.growth.slot import ISOLATION_CHECKS
from seedtriton.report import CallableSink, CsvSink, LogSink, MlflowSink, TensorBoardSink, WandbSink


def test_a_healthy_seed_lives_from_germinated_to_fossilized_on_measurements_alone():
    script = Script(schedule=AlphaSchedule(steps=48))
    script.epochs(3)
    script.growth.germinate("early", Residual(6, 16), probe=torch.randn(2, 6))
    for _ in range(30):
        script.epoch()
        if script.growth.slots["early"].stage is Stage.FOSSILIZED:
            break
    moves = [(event["source"], event["target"]) for event in script.of("stage")]
    assert moves == [
        ("GERMINATED", "TRAINING"),
        ("TRAINING", "BLENDING"),
        ("BLENDING", "HOLDING"),
        ("HOLDING", "FOSSILIZED"),
    ]
    assert script.growth.slots["early"].alpha_value == 1.0
    passed = [event["gate"] for event in script.of("gate") if event["passed"]]
    assert passed == ["G0", "G1", "G2", "G3", "G5"]
    g2 = next(event for event in script.of("gate") if event["gate"] == "G2" and event["passed"])
    assert g2["ratio"] >= 0.05
    assert g2["blend_gain_t"] >= 4
    assert len(script.of("fossilized")) == 1
    assert script.growth.monitor.seeds == ()


def test_not_calling_measure_makes_the_gate_say_so():
    script = Script(measure=False)
    script.growth.germinate("early", Residual(6, 16), probe=torch.randn(2, 6))
    verdicts = script.epochs(6)
    assert script.growth.slots["early"].stage is Stage.TRAINING
    last = verdicts[-1][0]
    assert not last.passed
    assert "gradient_never_measured" in {check.name for check in last.failed}
    assert "gradient_never_measured" in str(last)


def test_forgetting_to_go_on_measuring_makes_the_samples_stale():
    script = Script()
    script.growth.germinate("early", Residual(6, 16), probe=torch.randn(2, 6))
    script.epochs(1)
    script.measure = False
    (verdict,) = script.epochs(2)[-1]
    assert "samples_stale" in {check.name for check in verdict.failed}


SABOTAGE = {
    "no optimizer": ({"add_to_optimizer": False}, "seed_in_no_optimizer"),
    "learning rate 0": ({"lr": 0.0, "weight_decay": 0.0}, "weights_not_moved"),
}


@pytest.mark.parametrize("how", SABOTAGE)
def test_a_seed_that_cannot_learn_is_refused_with_its_reason(how):
    options, reason = SABOTAGE[how]
    script = Script()
    script.growth.germinate("early", Residual(6, 16), probe=torch.randn(2, 6), **options)
    for verdicts in script.epochs(12):
        assert not verdicts[0].passed
    assert reason in {check.name for check in verdicts[0].failed}
    # The bare ratio of the original gate would have passed it.
    ratio = next(check for check in verdicts[0].checks if check.question == "gradient_ratio")
    assert ratio.passed


def test_a_detached_seed_has_no_gradient_and_the_gate_says_so():
    class Detached(Residual):
        def forward(self, x):
            return super().forward(x).detach()

    script = Script()
    script.growth.germinate("early", Detached(6), probe=torch.randn(2, 6))
    (verdict,) = script.epochs(4)[-1]
    assert "seed_gradient_missing" in {check.name for check in verdict.failed}


def test_a_seed_that_reaches_into_the_host_is_refused():
    class Leaky(Residual):
        def forward(self, x):
            return super().forward(x) + 0 * host.first.bias.sum()

    script = Script()
    host = script.model
    script.growth.germinate("early", Leaky(6))
    for verdicts in script.epochs(3):
        assert "isolation_violated" in {check.name for check in verdicts[0].failed}
    assert script.model.early.isolation_violations == 3 * ISOLATION_CHECKS


def test_the_question_about_the_optimizer_says_how_often_it_has_stepped():
    script = Script()
    script.growth.germinate("early", Residual(6, 16), probe=torch.randn(2, 6))
    (verdict,) = script.epochs(2)[-1]
    check = next(check for check in verdict.checks if check.question == "optimizer")
    assert (check.name, check.reason) == ("seed_in_optimizer", "all parameters, 32 steps")


def test_nan_batches_are_dropped_counted_and_refused_beyond_the_limit():
    script = Script(thresholds=GateThresholds(min_training_epochs=1))
    script.growth.germinate("early", Residual(6, 16), probe=torch.randn(2, 6))
    script.epochs(1)
    for parameter in script.model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    for _ in range(4):
        script.growth.measure()
    verdict = script.growth.end_epoch(accuracy=0.5)[0]
    assert "gradients_not_finite" in {check.name for check in verdict.failed}
    assert next(check for check in verdict.checks if check.question == "finite").value == pytest.approx(4 / 20)


def flat(model):
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), torch.optim.AdamW])
def test_without_a_seed_training_is_bit_identical(make):
    results = []
    for with_growth in (True, False):
        torch.manual_seed(0)
        model = TwoSlots()
        optimizer = make(model.parameters())
        growth = GrowthController(model, optimizer, sinks=[]) if with_growth else None
        for _ in range(20):
            model(torch.randn(16, 8)).square().mean().backward()
            if growth:
                growth.measure()
            optimizer.step()
            optimizer.zero_grad()
        if growth:
            growth.end_epoch(accuracy=0.5)
        results.append(flat(model))
    assert torch.equal(*results)


@pytest.mark.parametrize("isolation", [TrustRegion(), StraightThrough()])
def test_behind_the_host_training_of_the_host_is_bit_identical(isolation):
    results = []
    for with_seed in (True, False):
        torch.manual_seed(0)
        model = Mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        growth = GrowthController(model, optimizer, sinks=[])
        inputs = torch.randn(20, *Mlp.shape)
        if with_seed:
            growth.germinate("slot", Residual(7), isolation=isolation, probe=torch.randn(2, 7))
        for x in inputs:
            model(x).square().mean().backward()
            growth.measure()
            optimizer.step()
            optimizer.zero_grad()
        results.append(torch.cat([p.flatten() for n, p in model.named_parameters() if not n.startswith("slot")]))
    assert torch.equal(*results)


def test_the_seed_is_in_the_optimizer_as_its_own_group_with_the_first_groups_settings():
    script = Script()
    script.optimizer.param_groups[0]["lr"] = 0.123
    script.growth.germinate("early", Residual(6), weight_decay=0.5)
    group = script.optimizer.param_groups[1]
    assert group["params"] == list(script.model.early.seed.parameters())
    assert (group["lr"], group["weight_decay"]) == (0.123, 0.5)
    assert script.optimizer.param_groups[0]["weight_decay"] != 0.5


def test_pruning_takes_group_and_state_out_of_the_optimizer_and_nothing_else():
    script = Script()
    script.growth.germinate("early", Residual(6))
    script.growth.germinate("late", Residual(6))
    script.epochs(1)
    gone = set(script.model.early.seed.parameters())
    kept = copy.deepcopy([script.optimizer.state[p]["exp_avg"] for p in script.model.late.seed.parameters()])
    script.growth.prune("early", "not needed")
    assert not gone & set(script.optimizer.state)
    held = {p for group in script.optimizer.param_groups for p in group["params"]}
    assert held == set(script.model.parameters())
    now = [script.optimizer.state[p]["exp_avg"] for p in script.model.late.seed.parameters()]
    assert all(torch.equal(*pair) for pair in zip(kept, now))
    assert script.growth.monitor.seeds == ("late",)
    assert script.of("pruned")[0]["reason"] == "not needed"
    script.epochs(1)


def test_a_pruned_slot_rests_three_epochs_and_can_be_used_again():
    script = Script()
    script.growth.germinate("early", Residual(6))
    script.growth.prune("early")
    for stage in (Stage.EMBARGOED, Stage.RESETTING, Stage.DORMANT):
        with pytest.raises(WiringError, match="resting"):
            script.growth.germinate("early", Residual(6))
        script.epoch()
        assert script.growth.slots["early"].stage is stage
    script.growth.germinate("early", Residual(6))
    script.epoch()


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 50),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=200),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [torch.optim.lr_scheduler.ConstantLR(o, 0.5, 3), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
            milestones=[3],
        ),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, min_lr=[1e-5]),
    ],
)
def test_learning_rate_schedulers_survive_germination_and_pruning(make):
    model = TwoSlots()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = make(optimizer)
    script = Script(model, optimizer, schedulers=[scheduler])

    def step():
        arguments = (1.0,) if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else ()
        optimizer.step()
        scheduler.step(*arguments)

    step()
    script.growth.germinate("early", Residual(6))
    for _ in range(5):
        step()
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert second == pytest.approx(first)
    script.growth.prune("early")
    step()


def test_an_optimizer_with_an_unknown_scheduler_is_refused_before_anything_changes():
    model = TwoSlots()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    growth = GrowthController(model, optimizer, sinks=[])
    with pytest.raises(WiringError, match="schedulers="):
        growth.germinate("early", Residual(6))
    assert growth.slots["early"].stage is Stage.DORMANT
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (("middle", Residual(6)), ConfigurationError, r"\['early', 'late'\]"),
        (("early", nn.Linear(6, 7)), WiringError, "keep shape"),
        (("early", nn.ReLU()), WiringError, "no trainable parameter"),
        (("early", 7), ConfigurationError, "module or a factory"),
    ],
)
def test_refused_germinations_leave_everything_as_it_was(arguments, error, words):
    script = Script()
    with pytest.raises(error, match=words):
        script.growth.germinate(*arguments, probe=torch.randn(2, 6))
    assert script.growth.slots["early"].stage is Stage.DORMANT
    assert len(script.optimizer.param_groups) == 1
    assert script.growth.monitor.seeds == ()
    assert script.events == []
    script.growth.germinate("early", Residual(6), probe=torch.randn(2, 6))


def test_an_unknown_group_setting_leaves_everything_as_it_was():
    script = Script()
    with pytest.raises(ConfigurationError, match="learning_rate"):
        script.growth.germinate("early", Residual(6), learning_rate=1.0)
    assert script.growth.slots["early"].stage is Stage.DORMANT
    script.growth.germinate("early", Residual(6), lr=1.0)


def test_unknown_group_settings_are_named_in_order():
    """All in one message, which is the same on every run: the names of a set come in another order in every process."""
    script = Script()
    settings = dict.fromkeys(("zeal", "warmth", "rate", "pace", "learning_rate", "drive"), 1.0)
    with pytest.raises(ConfigurationError) as caught:
        script.growth.germinate("early", Residual(6), **settings)
    assert f"has no settings {sorted(settings)}; it has {sorted(script.optimizer.param_groups[0])}" in str(caught.value)


def test_a_seed_that_the_monitor_refuses_leaves_slot_and_optimizer_as_they_were(monkeypatch):
    script = Script()

    def refuse(*args, **kwargs):
        raise WiringError("no")

    monkeypatch.setattr(script.growth.monitor, "add_seed", refuse)
    with pytest.raises(WiringError, match="no"):
        script.growth.germinate("early", Residual(6))
    assert script.growth.slots["early"].stage is Stage.DORMANT
    assert script.growth.slots["early"].lifecycle.history == []
    assert len(script.optimizer.param_groups) == 1
    monkeypatch.undo()
    script.growth.germinate("early", Residual(6))


def test_a_seed_whose_last_layer_starts_at_zero_is_not_judged_by_its_first_steps():
    """ReZero and LoRA start so: the first samples have next to no gradient, the window has."""
    script = Script(schedule=AlphaSchedule(steps=1000))
    seed = Residual(6, 16)
    nn.init.zeros_(seed.contract.weight)
    nn.init.zeros_(seed.contract.bias)
    script.growth.germinate("early", seed, probe=torch.randn(2, 6))
    for _ in range(20):
        script.epoch()
        if script.growth.slots["early"].stage is Stage.BLENDING:
            break
    assert script.growth.slots["early"].stage is Stage.BLENDING


def test_a_seed_that_shares_parameters_with_the_host_is_refused():
    script = Script()
    with pytest.raises(WiringError, match="shares parameters"):
        script.growth.germinate("early", script.model.second)
    assert script.growth.slots["early"].stage is Stage.DORMANT


def test_a_fossil_cannot_be_pruned_and_belongs_to_the_host():
    script = Script(schedule=AlphaSchedule(steps=0), thresholds=THRESHOLDS.without("max_accuracy_drop"))
    script.growth.germinate("early", Residual(6, 16), probe=torch.randn(2, 6))
    for _ in range(30):
        script.epoch()
    assert script.growth.slots["early"].stage is Stage.FOSSILIZED
    with pytest.raises(WiringError, match="FOSSILIZED"):
        script.growth.prune("early")
    script.growth.germinate("late", Residual(6), probe=torch.randn(2, 6))
    seeds = {id(p) for p in script.model.late.seed.parameters()}
    watched = script.growth.monitor._watched
    host = [p for p, segment in zip(watched.tracked, watched.segments) if segment == 0]
    assert {id(p) for p in script.model.early.seed.parameters()} <= {id(p) for p in host}
    assert not seeds & {id(p) for p in host}


def test_evidence_of_a_stage_begins_with_the_stage():
    script = Script(schedule=AlphaSchedule(steps=1000))
    script.growth.germinate("early", Residual(6, 16), probe=torch.randn(2, 6))
    while script.growth.slots["early"].stage is Stage.TRAINING:
        script.epoch()
    assert script.growth.evidence()["early"].samples == 0
    script.epoch()
    assert script.growth.evidence()["early"].samples == 16


def test_alpha_moves_along_its_schedule_once_per_measured_step():
    schedule = AlphaSchedule(steps=40, curve="linear", target=0.5)
    script = Script(schedule=schedule)
    script.growth.germinate("early", Residual(6, 16), probe=torch.randn(2, 6))
    while script.growth.slots["early"].stage is Stage.TRAINING:
        script.epoch()
    slot = script.growth.slots["early"]
    assert slot.alpha_value == 0.0
    script.epoch()
    assert slot.alpha_value == pytest.approx(schedule(16))
    script.epochs(2)
    assert slot.alpha_value == 0.5


STEEP = AlphaSchedule(steps=40, curve="sigmoid", steepness=5.0)


@pytest.mark.parametrize(
    "controllers, seeds, expected", [(STEEP, None, STEEP), (None, STEEP, STEEP), (AlphaSchedule(), STEEP, STEEP)]
)
def test_the_first_ramp_is_as_steep_as_the_schedule_of_the_controller_or_of_the_seed_says(controllers, seeds, expected):
    script = blending(Script(schedule=controllers), schedule=seeds)
    slot = script.growth.slots["early"]
    script.epoch()
    assert slot.alpha_value == expected(16) != AlphaSchedule(steps=40, curve="sigmoid")(16)


@pytest.mark.parametrize(
    "told, curve, steepness",
    [
        ({}, "sigmoid", 5.0),
        ({"curve": "sigmoid"}, "sigmoid", 5.0),
        ({"steepness": 30.0}, "sigmoid", 30.0),
        ({"curve": "linear"}, "linear", 12.0),
    ],
)
def test_a_later_target_keeps_the_steepness_of_the_seeds_sigmoid_unless_told(told, curve, steepness):
    thresholds = THRESHOLDS.without("max_accuracy_drop")
    schedule = dataclasses.replace(STEEP, steps=8, target=0.5)
    script = blending(Script(schedule=schedule, thresholds=thresholds))
    script.epoch()
    script.growth.set_alpha_target("early", 1.0, steps=20, **told)
    script.epoch()
    way = AlphaSchedule(start=0.5, target=1.0, steps=20, curve=curve, steepness=steepness)
    assert script.growth.slots["early"].alpha_value == way(16)
    (event,) = script.of("alpha_target")
    assert (event["curve"], event["steepness"]) == (curve, steepness)


def test_a_steepness_that_cannot_be_is_refused_and_the_seed_stays_where_it_was():
    script = blending()
    script.epoch()
    slot, events = script.growth.slots["early"], len(script.events)
    before = script.growth.state_dict()["lives"]
    for told in ({"steepness": 0.0, "curve": "sigmoid"}, {"steepness": 3.0}, {"steepness": 3.0, "curve": "cosine"}):
        with pytest.raises(ConfigurationError, match="steepness"):
            script.growth.set_alpha_target("early", 0.5, **told)
        with pytest.raises(ConfigurationError, match="steepness"):
            script.growth.prune("early", steps=4, **told)
    assert (slot.stage, slot.alpha_value, slot.frozen, len(script.events)) == (Stage.HOLDING, 1.0, None, events)
    assert script.growth.state_dict()["lives"] == before


def test_a_partial_target_is_held_and_raised_on_request_by_way_of_blending():
    schedule = AlphaSchedule(steps=8, target=0.5, curve="linear")
    script = blending(Script(schedule=schedule, thresholds=THRESHOLDS.without("max_accuracy_drop")))
    slot = script.growth.slots["early"]
    with pytest.raises(ConfigurationError, match="on its way UP"):
        script.growth.set_alpha_target("early", 1.0)
    script.epoch()
    assert (slot.stage, slot.alpha_value) == (Stage.HOLDING, 0.5)
    accuracy = script.growth._lives["early"].blending_accuracy
    script.growth.set_alpha_target("early", 1.0, steps=20, curve="linear")
    assert (slot.stage, slot.alpha_value) == (Stage.BLENDING, 0.5)
    assert script.growth._lives["early"].blending_accuracy == accuracy
    (verdict,) = script.epoch()
    assert slot.alpha_value == pytest.approx(0.5 + 0.5 * 16 / 20)
    assert "alpha_not_at_target" in {check.name for check in verdict.failed}
    script.epoch()
    assert (slot.stage, slot.alpha_value) == (Stage.HOLDING, 1.0)
    targets = script.of("alpha_target")
    assert [(event["target"], event["steps"], event["curve"]) for event in targets] == [(1.0, 20, "linear")]


def test_a_jump_is_felt_at_once_and_needs_no_step():
    script = blending()
    script.epoch()
    script.growth.set_alpha_target("early", 0.25, steps=0)
    assert script.growth.slots["early"].alpha_value == 0.25


@pytest.mark.parametrize("target", [0.0, -0.5, 1.5, float("nan")])
def test_an_impossible_target_is_refused_and_the_seed_stays_where_it_was(target):
    script = blending()
    script.epoch()
    slot = script.growth.slots["early"]
    assert slot.stage is Stage.HOLDING
    with pytest.raises(ConfigurationError, match=r"\(0, 1\]"):
        script.growth.set_alpha_target("early", target)
    with pytest.raises(ConfigurationError, match="unknown curve"):
        script.growth.set_alpha_target("early", 0.5, curve="cubic")
    assert (slot.stage, slot.alpha_value) == (Stage.HOLDING, 1.0)


def test_alpha_moves_only_where_it_is_felt():
    script = Script()
    with pytest.raises(WiringError, match="no living seed"):
        script.growth.set_alpha_target("early", 0.5)
    script.growth.germinate("early", Residual(6))
    with pytest.raises(WiringError, match=r"BLENDING and HOLDING.*TRAINING"):
        script.growth.set_alpha_target("early", 0.5)
    assert script.growth.slots["early"].alpha_value == 0.0


@pytest.mark.parametrize("accuracy", [93.0, -0.1, float("nan")])
def test_an_accuracy_that_is_no_share_is_refused_and_no_epoch_counted(accuracy):
    script = Script()
    script.growth.germinate("early", Residual(6))
    with pytest.raises(ConfigurationError, match=r"\[0, 1\]"):
        script.growth.end_epoch(accuracy=accuracy)
    assert script.growth.epoch == 0
    assert script.growth.slots["early"].lifecycle.epochs_in_stage == 0


def test_without_an_accuracy_the_improvement_check_fails_closed():
    script = Script(thresholds=GateThresholds(min_training_improvement=1.0))
    script.growth.germinate("early", Residual(6))
    (verdict,) = script.growth.end_epoch()
    assert "improvement_never_measured" in {check.name for check in verdict.failed}


def test_improvement_is_in_percentage_points_since_training_began():
    script = Script(thresholds=GateThresholds(min_training_improvement=1.0))
    script.growth.end_epoch(accuracy=0.5)
    script.growth.germinate("early", Residual(6))
    script.growth.end_epoch(accuracy=0.505)
    (verdict,) = script.growth.end_epoch(accuracy=0.52)
    check = next(check for check in verdict.checks if check.question == "improvement")
    assert check.value == pytest.approx(2.0)
    assert check.passed


# One boundary in the middle and one at the very end: a progress that is a little wrong misses one of them.
PHASES = ProgressThreshold(early=0.0, mid=1e-6, late=1e6, mid_from=0.5, late_from=1.0)
STEPS_OF_AN_EPOCH = 16  # of a Script


@pytest.mark.parametrize("total", [{"total_epochs": 10}, {"total_steps": 10 * STEPS_OF_AN_EPOCH}])
def test_a_threshold_by_progress_is_asked_at_the_share_of_the_training_that_is_done(total):
    script = Script(thresholds=GateThresholds(min_gradient_ratio=PHASES), auto_advance=[Gate.G1], **total)
    script.growth.germinate("early", Residual(6, 16), probe=torch.randn(2, 6))
    asked = [next(c for c in verdict.checks if c.question == "gradient_ratio") for (verdict,) in script.epochs(12)]
    assert [asked[epoch - 1].limit for epoch in (1, 4, 5, 9, 10, 12)] == [0.0, 0.0, 1e-6, 1e-6, 1e6, 1e6]
    assert [check.passed for check in asked] == 9 * [True] + 3 * [False]
    shares = [event["progress"] for event in script.of("epoch") if event["seed"] is None]
    assert shares == [min(1.0, epoch / 10) for epoch in range(1, 13)]
    assert script.growth.progress == 1.0


def test_a_total_of_steps_counts_steps_and_no_epochs():
    """Epochs of three steps and of none: by epochs it would be over long ago."""
    script = Script(thresholds=GateThresholds(min_gradient_ratio=PHASES), auto_advance=[Gate.G1], total_steps=12)
    script.growth.germinate("early", Residual(6, 16), probe=torch.randn(2, 6))
    limits = []
    for steps in (3, 0, 0, 3, 0, 3, 3, 3):
        for _ in range(steps):
            nn.functional.cross_entropy(script.model(script.x[:32]), script.y[:32]).backward()
            script.growth.measure()
            script.optimizer.step()
            script.optimizer.zero_grad()
        (verdict,) = script.growth.end_epoch(accuracy=0.5)
        limits.append(next(c.limit for c in verdict.checks if c.question == "gradient_ratio"))
    assert limits == 3 * [0.0] + 3 * [1e-6] + 2 * [1e6]


@pytest.mark.parametrize("total", [{"total_epochs": 8}, {"total_steps": 8 * STEPS_OF_AN_EPOCH}])
def test_progress_goes_on_where_a_saved_run_was(total):
    script, resumed = Script(**total), Script(**total)
    script.epochs(3)
    assert (script.growth.progress, resumed.growth.progress) == (3 / 8, 0.0)
    resumed.growth.load_state_dict(script.growth.state_dict())
    assert resumed.growth.progress == 3 / 8


def test_without_a_total_the_progress_is_unknown_and_the_refusal_names_both_arguments():
    script = Script(thresholds=GateThresholds(min_gradient_ratio=PHASES))
    script.growth.germinate("early", Residual(6, 16), probe=torch.randn(2, 6))
    (verdict,) = script.epoch()
    check = next(check for check in verdict.failed if check.name == "progress_unknown")
    assert check.reason.endswith("give the controller total_epochs or total_steps")
    assert script.growth.progress is None


def test_two_totals_would_be_two_measures_of_progress_and_are_refused():
    model = TwoSlots()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match=r"total_epochs=3 and total_steps=48 .*give the one"):
        GrowthController(model, optimizer, total_epochs=3, total_steps=48)


def test_a_strict_epoch_refuses_a_seed_that_was_never_measured_and_counts_nothing():
    script = Script()
    script.growth.germinate("early", Residual(6, 16), probe=torch.randn(2, 6))
    events = len(script.events)
    with pytest.raises(WiringError, match="early"):
        script.growth.end_epoch(accuracy=0.5, strict=True)
    assert (script.growth.epoch, len(script.events)) == (0, events)
    assert script.growth.slots["early"].lifecycle.epochs_in_stage == 0
    script.epoch()
    script.growth.end_epoch(strict=True)
    assert script.growth.epoch == 2


def test_the_loss_of_an_epoch_is_in_its_events():
    script = Script()
    script.growth.germinate("early", Residual(6, 16), probe=torch.randn(2, 6))
    script.growth.end_epoch(accuracy=0.25, loss=0.5)
    told = {event["seed"]: (event["loss"], event["accuracy"]) for event in script.of("epoch")}
    assert told[None] == (0.5, 0.25)
    assert told["early"][0] == 0.5


def test_events_are_flat_json_safe_and_carry_the_agreed_fields():
    script = Script()
    script.epochs(1)
    script.growth.germinate("early", Residual(6))
    script.epochs(2)
    script.growth.prune("early")
    for event in script.events:
        json.dumps(event, allow_nan=False)
        assert {"event", "seed", "epoch", "step", "stage", "run"} <= set(event)
        nested = {key for key, value in event.items() if isinstance(value, (list, dict))}
        assert nested <= {"checks", "tensors"}
    assert {event["run"] for event in script.events} == {script.growth.telemetry.run} != {Script().growth.telemetry.run}
    gate = script.of("gate")[-1]
    numbers = {"gate", "passed", "checks", "ratio", "host_norm", "seed_norm", "blend_gain", "blend_gain_t"}
    numbers |= {"live_share", "vanishing_share", "exploding_share", "health", "plateau_share"}
    assert numbers <= set(gate)
    assert {"name", "passed", "value", "limit", "reason"} <= set(gate["checks"][0])
    assert {event["event"] for event in script.events} == {"epoch", "germinated", "gate", "stage", "pruned"}


def test_an_epoch_tells_of_the_largest_gradient_tensors_where_somebody_keeps_events():
    script = Script()
    script.growth.germinate("early", Residual(6))
    script.epoch()
    told = script.of("epoch")[0]["tensors"]
    readings = {reading.name: reading for reading in script.growth.monitor.tensors()}
    assert {name for name, *_ in told} == {"early.seed.expand.weight", "early.seed.expand.bias"} | {
        "early.seed.contract.weight", "early.seed.contract.bias", "first.weight", "first.bias", "second.weight",
        "second.bias", "last.weight", "last.bias",
    }  # fmt: skip
    for name, shape, norm, rms, state in told:
        known = readings[name]
        assert (tuple(shape), norm, rms, state) == (known.shape, known.norm, known.rms, known.state)
    with torch.no_grad():
        script.model.first.weight[0, 0] = math.nan
    script.epoch()
    told = {name: entry for name, *entry in script.of("epoch")[-2]["tensors"]}
    assert told["last.weight"][1] is None
    assert told["last.weight"][3].startswith("not finite, first in sample 17")


@pytest.mark.parametrize("kind", ["log", "function", "csv", "tensorboard", "wandb", "mlflow"])
def test_where_events_are_taken_in_part_only_no_tensors_are_read(kind, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "mlflow", mock.MagicMock())
    monkeypatch.setitem(sys.modules, "mlflow.entities", mock.MagicMock())
    sink = {
        "log": LogSink, "function": lambda: CallableSink(lambda values, step: None),
        "csv": lambda: CsvSink(tmp_path / "events.csv"), "tensorboard": lambda: TensorBoardSink(mock.MagicMock()),
        "wandb": lambda: WandbSink(mock.MagicMock()), "mlflow": lambda: MlflowSink("run"),
    }[kind]()  # fmt: skip
    script = Script()
    script.growth.telemetry.sinks[:] = [sink]
    script.growth.germinate("early", Residual(6))
    monkeypatch.setattr(script.growth.monitor, "tensors", None)
    script.epoch()


def test_a_model_without_slots_is_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(WiringError, match="SeedSlot"):
        GrowthController(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_slots_of_a_compiled_model_keep_their_names():
    model = TwoSlots()
    growth = GrowthController(torch.compile(model), torch.optim.SGD(model.parameters(), lr=0.1), sinks=[])
    assert list(growth.slots) == ["early", "late"]


def test_permissive_mode_blends_without_asking_for_improvement_but_never_unmeasured():
    for measure in (True, False):
        script = Script(thresholds=GateThresholds(min_training_improvement=1.0), mode="permissive", measure=measure)
        script.growth.germinate("early", Residual(6, 16), probe=torch.randn(2, 6))
        script.epochs(3)
        expected = Stage.BLENDING if measure else Stage.TRAINING
        assert script.growth.slots["early"].stage is expected


@pytest.mark.parametrize("felt", [False, True])
def test_clipping_uses_the_measurement_and_clips_a_seed_with_the_host_only_once_it_is_felt(felt):
    script = Script()
    script.growth.germinate("early", Residual(6, 16), probe=torch.randn(2, 6))
    if felt:
        script.growth._mover.move(script.growth._lives["early"], Stage.BLENDING, "forced", "script")
        script.model.early.set_alpha(0.5)
    twin = copy.deepcopy(script.model)
    for model in (script.model, twin):
        nn.functional.cross_entropy(model(script.x[:32]), script.y[:32]).backward()
    script.growth.measure()
    norm = script.growth.clip_grad_norm_(1e-3)
    seed = {id(p) for p in twin.early.parameters()}
    host = [p for p in twin.parameters() if felt or id(p) not in seed]
    expected = nn.utils.clip_grad_norm_(host, 1e-3)
    if not felt:
        nn.utils.clip_grad_norm_(twin.early.parameters(), 1e-3)
    torch.testing.assert_close(norm, expected)
    for ours, theirs in zip(script.model.parameters(), twin.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_explicit_gradients_are_what_is_measured():
    model = Mlp()
    growth = GrowthController(model, torch.optim.SGD(model.parameters(), lr=0.1), sinks=())
    growth.germinate("slot", model.seed())
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(model(torch.randn(6, 5)).square().mean(), parameters, allow_unused=True)
    growth.measure(gradients=zip(parameters, gradients))
    evidence = growth.evidence()["slot"]
    own = {id(parameter) for parameter in model.slot.parameters()}
    seed = torch.cat([g.flatten() for p, g in zip(parameters, gradients) if id(p) in own])
    assert evidence.samples == 1
    assert evidence.seed_norm == pytest.approx(seed.norm().item())
    assert all(parameter.grad is None for parameter in parameters)


# --- clipping apart and quarantine, through the controller ---


class Spoiled(Residual):
    """Its output is not finite in some forward passes of training."""

    def __init__(self, bad, value=float("nan")):
        super().__init__(6)
        self.bad, self.value, self.calls = bad, value, 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (self.value if self.calls in self.bad else 1.0)


def trained(seed, steps=40, clip=None, **options):
    torch.manual_seed(0)
    model = TwoSlots()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    host = dict(model.named_parameters())
    growth = GrowthController(model, optimizer, sinks=[], auto_advance=[Gate.G1], **options)
    if seed is not None:
        growth.germinate("late", seed)
    data = torch.Generator().manual_seed(1)
    norms = []
    for _ in range(steps):
        x, y = torch.randn(16, 8, generator=data), torch.randint(4, (16,), generator=data)
        nn.functional.cross_entropy(model(x), y).backward()
        growth.measure()
        if clip is not None:
            norms.append(growth.clip_grad_norm_(clip).item())
        optimizer.step()
        optimizer.zero_grad()
    return growth, [parameter.detach().clone() for parameter in host.values()], norms


@pytest.mark.parametrize("clip", [None, 0.05, 1e6])
@pytest.mark.parametrize("bad", [(), range(10, 100), (3, 7, 30)], ids=["healthy", "from 10 on", "three times"])
def test_the_host_is_bit_for_bit_that_of_the_same_script_without_the_seed(bad, clip):
    _, alone, norms_alone = trained(None, clip=clip)
    growth, host, norms = trained(Spoiled(bad), clip=clip)
    assert all(map(torch.equal, alone, host))
    assert norms == norms_alone
    assert all(p.isfinite().all() for p in growth.model.late.seed.parameters())


def test_a_seed_that_was_in_quarantine_is_refused_and_g2_says_how_often():
    growth, _, _ = trained(Spoiled(range(11, 21)))
    (verdict,) = growth.end_epoch(accuracy=0.5)
    (check,) = [check for check in verdict.checks if check.question == "finite"]
    assert (check.name, check.passed, check.value) == ("gradients_not_finite", False, 0.25)
    assert "10 of 40; in 10 the seed's own gradients were not finite" in check.reason


def test_without_quarantine_a_seed_keeps_its_nan_and_the_host_its_peace():
    _, alone, _ = trained(None, clip=0.05)
    growth, host, _ = trained(Spoiled([10]), clip=0.05, quarantine=False)
    assert all(map(torch.equal, alone, host))
    assert any(p.isnan().any() for p in growth.model.late.seed.parameters())
