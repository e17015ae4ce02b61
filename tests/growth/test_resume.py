"""Stopped at any step and resumed in a new process, a run ends bit for bit as if it had never stopped."""

import copy
import math
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from resuming import STEPS, Run, Seed
from same import same
from torch import nn

from seedtriton import AlphaSchedule, ConfigurationError, GrowthController, SeedSlot, Stage, StateDictError, WiringError

TESTS = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One run, saved before every step and at its end, and all of its resumed twins."""
    folder = tmp_path_factory.mktemp("resume")
    run, lengths = Run(), []
    stages = []
    while run.step < STEPS:
        torch.save(run.state(), folder / f"{run.step}.pt")
        lengths.append(len(run.log))
        stages.append((str(run.model.early.stage), str(run.model.late.stage), run.model.late.frozen is not None))
        run.one()
    torch.save({**run.finish(), "lengths": lengths, "stages": stages}, folder / "whole.pt")
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(TESTS / "resuming.py"), str(folder)], env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def read(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=True)


def test_the_run_stops_in_every_stage(folder):
    """Otherwise the test below would not show what it says."""
    stages = read(folder, "whole")["stages"]
    assert {early for early, _, _ in stages} == {"DORMANT", "TRAINING", "BLENDING", "HOLDING", "FOSSILIZED"}
    assert {late for _, late, _ in stages} >= {"TRAINING", "BLENDING", "PRUNED", "EMBARGOED", "RESETTING", "DORMANT"}
    assert any(frozen for _, _, frozen in stages)


def test_every_resumed_run_ends_in_the_same_bits(folder):
    whole = read(folder, "whole")
    for step in range(STEPS):
        resumed = read(folder, f"{step}.done")
        for part in whole["state"]:
            assert same(resumed["state"][part], whole["state"][part]), (step, part)
        assert same(resumed["evidence"], whole["evidence"]), step
        assert same(resumed["log"], whole["log"][whole["lengths"][step] :]), step


def stopped_at(step):
    run = Run()
    while run.step < step:
        run.one()
    return run


def snapshot(run):
    return copy.deepcopy((run.growth.state_dict(), run.model.state_dict(), run.optimizer.state_dict()))


SEEDS = {"early": Seed, "late": Seed}


def damaged(state):
    """Name, damaged copy of the state, and what the error says."""

    def changed(*path, to):
        copied = copy.deepcopy(state)
        inner = copied
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = to
        return copied

    slot = ("slots", "late", "slot")
    yield "version", changed("version", to=2), "version 2"
    yield "no dict", [], "must be a dict"
    yield "missing", {key: value for key, value in state.items() if key != "lives"}, r"missing \['lives'\]"
    yield "unknown", {**state, "more": 1}, r"unknown \['more'\]"
    yield "epoch", changed("epoch", to=-1), "epoch"
    yield "accuracy", changed("accuracy", to=math.nan), "accuracy"
    yield "slots", changed("slots", to={"early": state["slots"]["early"]}), "slots"
    yield "slot", changed(*slot, to=None), "damaged entry of slot 'late'"
    yield "slot version", changed(*slot, "version", to=9), "version 9"
    yield "stage", changed(*slot, "lifecycle", "stage", to="GROWING"), "GROWING"
    yield "alpha", changed(*slot, "alpha", to=math.nan), "bad alpha"
    yield "blend", changed(*slot, "blend", to="max"), "blend 'max'"
    yield "dtype", changed(*slot, "dtype", to="nn"), "dtype"
    yield "frozen", changed(*slot, "frozen", to=["seed.nothing"]), "frozen"
    yield "groups", changed("group_sizes", to=[3, 8, 4]), "groups"
    yield "group names", changed("slots", "late", "groups", to=[[2, ["seed.a"] * 4]]), "seed.a"
    yield "lives", changed("lives", to=[]), "lives of"
    yield "life", changed("lives", 0, "alpha", "steps_done", to=-1), "steps_done"
    yield "pruning", changed("lives", 0, "pruning", to="why"), "pruning"
    for name, value in [
        ("losses", [math.nan]), ("losses", 1.0), ("loss", "low"), ("epoch_steps", -1), ("epoch_began", 0.5),
    ]:  # fmt: skip
        yield f"{name} {value}", changed(name, to=value), "damaged"
    for name, value in [
        ("blending_loss", math.nan), ("usual_change", -1.0), ("usual_change", math.inf), ("probe_due", -5),
        ("probe_refusals", 1.0), ("blending_loss", True),
    ]:  # fmt: skip
        yield f"{name} {value}", changed("lives", 0, name, to=value), "life of slot"
    yield "slot of a life", changed("lives", 0, "slot", to=[]), "life of slot"
    yield "watch", changed("lives", 0, "watch", "above", to=-1), "above"
    yield "admission", changed("lives", 0, "watch", "admission_loss", to=math.nan), "admission_loss"
    yield "monitor", changed("monitor", to=None), "monitor"
    yield "ring", changed("monitor", "ring", to=torch.zeros(2, 2)), "ring"
    yield "steps", changed("monitor", "_extra_state", "steps", to=[None]), "counts steps"
    yield "marks", changed("monitor", "_extra_state", "marks", to={}), "mark"


def test_a_damaged_state_is_refused_and_nothing_has_changed():
    state = stopped_at(25).growth.state_dict()
    assert state["slots"]["late"]["slot"]["frozen"]
    for name, bad, words in damaged(state):
        run = Run()
        before = snapshot(run)
        with pytest.raises(StateDictError, match=words):
            run.growth.load_state_dict(bad, seeds=SEEDS)
        assert same(before, snapshot(run)), name
        assert run.growth.monitor.seeds == (), name
        run.growth.load_state_dict(state, seeds=SEEDS)
        assert same(run.growth.state_dict(), state), name


def test_seeds_that_are_missing_unknown_or_unlike_are_refused_and_nothing_has_changed():
    state = stopped_at(25).growth.state_dict()
    shared = Seed()
    for seeds, error, words in [
        ({"early": Seed}, ConfigurationError, r"slots \['late'\]"),
        ({**SEEDS, "middle": Seed}, ConfigurationError, r"unknown slots: \['middle'\]"),
        ({"early": Seed, "late": lambda: nn.Linear(6, 6)}, StateDictError, "frozen"),
        ({"early": lambda: nn.Linear(6, 6), "late": Seed}, StateDictError, "expand"),
        ({"early": shared, "late": shared}, WiringError, "shares parameters"),
        ({"early": Seed, "late": 3}, ConfigurationError, "module or a factory"),
    ]:
        run = Run()
        before = snapshot(run)
        with pytest.raises(error, match=words):
            run.growth.load_state_dict(state, seeds=seeds)
        assert same(before, snapshot(run))
        run.growth.load_state_dict(state, seeds=SEEDS)


def test_seeds_for_slots_that_had_none_are_not_made():
    made = []
    run = Run()
    run.growth.load_state_dict(stopped_at(4).growth.state_dict(), seeds={"early": Seed, "late": lambda: made.append(1)})
    assert made == []
    assert run.model.late.stage is Stage.DORMANT


def test_a_wrong_order_is_an_error_that_names_the_right_one():
    saved = stopped_at(25).state()
    for strict in (True, False):
        run = Run()
        with pytest.raises(RuntimeError, match=r"'late' is empty.*growth\.load_state_dict"):
            run.model.load_state_dict(saved["model"], strict=strict)
    run = Run()
    with pytest.raises(ValueError, match="parameter groups"):
        run.optimizer.load_state_dict(saved["optimizer"])
    run.growth.load_state_dict(saved["growth"], seeds=SEEDS)
    with pytest.raises(WiringError, match="freshly built"):
        run.growth.load_state_dict(saved["growth"], seeds=SEEDS)


def test_another_model_or_optimizer_is_refused():
    saved = stopped_at(25).growth.state_dict()
    model = nn.Sequential(nn.Linear(4, 4), SeedSlot())
    other = GrowthController(model, torch.optim.SGD(model.parameters(), lr=0.1), sinks=[])
    with pytest.raises(StateDictError, match=r"the model has \['1'\]"):
        other.load_state_dict(saved)
    run = Run()
    optimizer = torch.optim.SGD([{"params": [p]} for p in run.model.parameters()], lr=0.1)
    with pytest.raises(StateDictError, match=r"groups of \[6\] parameters, this one has \[1, 1, 1, 1, 1, 1\]"):
        GrowthController(run.model, optimizer, sinks=[]).load_state_dict(saved, seeds=SEEDS)


def test_a_scheduler_that_the_controller_does_not_know_is_refused_here_too():
    saved = stopped_at(25).growth.state_dict()
    run = Run()
    growth = GrowthController(run.model, run.optimizer, sinks=[])
    with pytest.raises(WiringError, match="schedulers="):
        growth.load_state_dict(saved, seeds=SEEDS)
    assert run.model.late.stage is Stage.DORMANT


def test_groups_come_back_at_their_places_also_between_those_of_the_host():
    def built(late_group):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), SeedSlot(), nn.Linear(4, 2))
        optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        growth = GrowthController(model, optimizer, schedulers=[scheduler], sinks=[])
        if late_group:
            optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.5, "initial_lr": 0.5})
            scheduler.base_lrs.append(0.5)
        return model, optimizer, scheduler, growth

    model, optimizer, scheduler, growth = built(late_group=False)
    growth.germinate("1", nn.Linear(4, 4), lr=0.01)
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.5, "initial_lr": 0.5})
    scheduler.base_lrs.append(0.5)
    model(torch.randn(3, 4)).sum().backward()
    growth.measure()
    optimizer.step()
    resumed = built(late_group=True)
    resumed[3].load_state_dict(growth.state_dict(), seeds={"1": nn.Linear(4, 4)})
    assert resumed[2].base_lrs == [0.1, 0.1, 0.5]
    resumed[0].load_state_dict(model.state_dict())
    resumed[1].load_state_dict(optimizer.state_dict())
    names = {id(p): name for name, p in resumed[0].named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in resumed[1].param_groups]
    assert groups == [["0.weight", "0.bias"], ["1.seed.weight", "1.seed.bias"], ["2.weight", "2.bias"]]
    moments = resumed[1].state[resumed[0][1].seed.weight]["momentum_buffer"]
    assert torch.equal(moments, optimizer.state[model[1].seed.weight]["momentum_buffer"])
    resumed[3].prune("1")
    assert [len(group["params"]) for group in resumed[1].param_groups] == [2, 2]
    assert resumed[2].base_lrs == [0.1, 0.5]


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_an_accuracy_at_the_end_of_its_range_comes_back(accuracy):
    """The best and the worst that can be are no damage; 1.0 is an epoch like any other on a small task."""
    first, second = Run(), Run()
    first.growth.end_epoch(accuracy=accuracy)
    first.growth.germinate("late", Seed())
    first.growth.end_epoch(accuracy=accuracy)
    state = first.growth.state_dict()
    assert (state["accuracy"], state["lives"][0]["training_accuracy"]) == (accuracy, accuracy)
    second.growth.load_state_dict(state, seeds=SEEDS)
    assert same(second.growth.state_dict(), state)
    for bad in (math.nextafter(0.0, -1.0), math.nextafter(1.0, 2.0)):
        with pytest.raises(StateDictError, match="accuracy"):
            Run().growth.load_state_dict({**state, "accuracy": bad}, seeds=SEEDS)


def test_a_ramp_that_is_resumed_is_as_steep_as_before():
    steep = AlphaSchedule(steps=6, target=0.7, curve="sigmoid", steepness=3.0)
    first, second = Run(), Run()
    first.growth.schedule = steep
    while first.growth.slots["early"].alpha_value == 0.0:
        first.one()
    assert first.model.early.alpha_value == steep(1)
    second.load(first.state())
    for _ in range(3):
        first.one()
        second.one()
    assert second.model.early.alpha_value == first.model.early.alpha_value == steep(4)
    assert second.growth.state_dict()["lives"][0]["alpha"] == first.growth.state_dict()["lives"][0]["alpha"]


def test_a_target_that_float32_cannot_hold_is_still_reached_after_loading():
    run = stopped_at(14)
    assert run.model.early.stage in (Stage.BLENDING, Stage.HOLDING)
    slot = run.model.early
    slot.set_alpha(0.7)
    run.model.load_state_dict(run.model.state_dict())
    assert slot.alpha_value == 0.7
