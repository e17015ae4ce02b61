"""Copies of a training: a twin of model, optimizer and controller goes its own way; a file is not made of one."""

import copy
import io
import pickle

import pytest
import torch
from clients.truth import GROWTH, Adapter, Net, data
from same import same
from torch.optim.swa_utils import AveragedModel

from seedtriton import AlphaSchedule, GradientMonitor, GrowthController, Stage, WiringError
from seedtriton.report.runs import read_events
from seedtriton.report.sinks import CsvSink, JsonLinesSink

X, Y = data(16).tensors


class Run:
    def __init__(self):
        torch.manual_seed(0)
        self.model = Net()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.growth = GrowthController(
            self.model, self.optimizer, schedulers=[self.scheduler], **GROWTH | {"schedule": AlphaSchedule(steps=12)}
        )

    def step(self, times, begin=0):
        for number in range(begin, begin + times):
            torch.manual_seed(number)
            torch.nn.functional.cross_entropy(self.model(X), Y).backward()
            self.growth.measure()
            self.growth.clip_grad_norm_(0.5)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def live(self, epochs, begin=0):
        for epoch in range(begin, begin + epochs):
            self.step(4, 4 * epoch)
            self.scheduler.step()
            self.growth.end_epoch(accuracy=0.5)

    def whole(self):
        parts = (self.model, self.optimizer, self.scheduler, self.growth)
        return copy.deepcopy([part.state_dict() for part in parts])


@pytest.mark.parametrize("epochs, stage", [(1, Stage.TRAINING), (3, Stage.BLENDING)])
def test_a_twin_goes_on_bit_for_bit_and_by_itself(epochs, stage):
    run = Run()
    run.growth.germinate("slot", Adapter())
    run.live(epochs)
    assert run.growth.slots["slot"].stage is stage
    twin = copy.deepcopy(run)
    assert twin.growth.model is twin.model is not run.model
    assert twin.growth.optimizer is twin.optimizer is not run.optimizer
    before = run.whole()
    twin.live(3, epochs)
    assert same(run.whole(), before)
    run.live(3, epochs)
    assert same(twin.whole(), run.whole())
    known = twin.growth.evidence()["slot"]
    assert known == run.growth.evidence()["slot"]
    assert (known.in_optimizer, twin.growth.step) == (True, 4 * (epochs + 3))


def test_a_controller_that_is_copied_alone_brings_its_model_and_optimizer():
    run = Run()
    run.growth.germinate("slot", Adapter())
    run.live(1)
    twin = copy.deepcopy(run.growth)
    assert twin.slots["slot"] is twin.model.slot is not run.model.slot
    before = run.whole()
    torch.nn.functional.cross_entropy(twin.model(X), Y).backward()
    twin.measure()
    twin.optimizer.step()
    steps = [growth.evidence()["slot"].optimizer_steps for growth in (twin, run.growth)]
    assert (twin.step, steps[0] - steps[1]) == (5, 1)
    assert same(run.whole(), before)


@pytest.mark.parametrize("together", [True, False])
def test_an_average_follows_the_training_that_it_is_of(together):
    """Copied before the controller, it follows the twin; left out, the twin has none, and lets the first one's be."""
    run = Run()
    ema = AveragedModel(run.model)
    run.growth.follow(ema)
    run.growth.germinate("slot", Adapter())
    run.live(1)
    parts = (run.model, run.optimizer, *([ema] if together else []), run.growth)
    *_, before_last, growth = copy.deepcopy(parts)
    before = copy.deepcopy(ema.state_dict())
    growth.prune("slot", "the twin wants it")
    assert (ema.module.slot.stage, run.model.slot.stage) == (Stage.TRAINING, Stage.TRAINING)
    assert same(ema.state_dict(), before)
    if together:
        assert before_last.module.slot.stage is Stage.PRUNED
        assert before_last.module.slot.seed is None
    else:
        assert growth._followers._copies == []
    run.growth.prune("slot")
    assert ema.module.slot.stage is Stage.PRUNED


def test_a_twin_of_a_controller_with_a_file_tells_that_file_of_a_run_of_its_own(tmp_path):
    run, path = Run(), tmp_path / "events.jsonl"
    run.growth.telemetry.sinks[:] = [JsonLinesSink(path), CsvSink(tmp_path / "events.csv")]
    run.live(2)
    twin = copy.deepcopy(run.growth)
    assert [record["epoch"] for record in twin.history()] == [1, 2]
    twin.end_epoch(accuracy=0.25)
    for sink in twin.telemetry.sinks:
        sink.close()
    run.live(1, 2)
    mine, its = run.growth.telemetry.run, twin.telemetry.run
    assert mine != its
    events = [(event["run"], event["epoch"]) for event in read_events(path)]
    assert events == [(mine, 1), (mine, 2), (its, 3), (mine, 3)]
    assert len(twin.history()) == len(run.growth.history()) == 3
    rows = (tmp_path / "events.csv").read_text().splitlines()
    assert [row for row in rows if "accuracy" in row][-2:] == ["epoch,,3,8,,accuracy,0.25", "epoch,,3,12,,accuracy,0.5"]
    for sink in run.growth.telemetry.sinks:
        sink.close()
    copy.deepcopy(run.growth).end_epoch(accuracy=0.5)
    assert len(read_events(path)) == 4, "the copy of a closed one is closed"


def through_torch(value):
    torch.save(value, io.BytesIO())


@pytest.mark.parametrize("write", [pickle.dumps, through_torch, copy.copy])
def test_a_controller_in_a_file_is_refused_with_the_way_out(write):
    run = Run()
    run.growth.germinate("slot", Adapter())
    for kind, part in (("GrowthController", run.growth), ("GradientMonitor", run.growth.monitor)):
        with pytest.raises(WiringError) as error:
            write(part)
        assert str(error.value).startswith(f"a {kind} has hooks in the model")
        assert "save its state_dict()" in str(error.value)
        with pytest.raises(WiringError):
            write({"part": part}) if write is not copy.copy else write(part)


def test_a_model_and_an_optimizer_that_are_watched_go_into_a_file():
    run = Run()
    run.growth.germinate("slot", Adapter())
    run.live(3)
    model, optimizer = pickle.loads(pickle.dumps((run.model, run.optimizer)))
    assert same(model.state_dict(), run.model.state_dict())
    assert torch.equal(model.eval()(X), run.model.eval()(X))
    assert model.slot.stage is Stage.BLENDING
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    torch.nn.functional.cross_entropy(model.train()(X), Y).backward()
    optimizer.step()  # nobody watches it any more
    assert run.growth.step == 12


def test_a_monitor_is_copied_with_what_it_watches():
    host, seed = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    monitor = GradientMonitor(host, {"s": seed})
    host2, seed2, twin = copy.deepcopy((host, seed, monitor))
    seed2(host2(torch.ones(1, 3))).sum().backward()
    twin.measure()
    assert twin.read()["s"].samples == 1
    assert monitor.read()["s"].samples == 0
    assert twin.state_dict().keys() == monitor.state_dict().keys()
