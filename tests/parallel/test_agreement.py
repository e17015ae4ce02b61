"""What ranks decide together, whatever each was told; and what is said when they cannot."""

import math
from types import SimpleNamespace

import pytest
import torch
from parallel.harness import batches, block, host, loss_of, mine, spawn, values, wrapped
from parallel.test_ranks import germinate, grow, learn
from torch.nn.parallel import DistributedDataParallel

from seedtriton import (
    AlphaSchedule,
    GateThresholds,
    GradientMonitor,
    GrowthController,
    Ranks,
    Stage,
    WiringError,
)
from seedtriton.gradients.progress import SeedFacts
from seedtriton.gradients.row import ELEMENTS, EXTRA, LIVE, QUANTITIES, SUMSQ, TENSORS
from seedtriton.gradients.spread import Column, Way, fold, laid_back, unfold
from seedtriton.growth.together import taken

# So that a few steps are a whole life.
EASY = GateThresholds(
    min_training_improvement=None, min_training_epochs=1, min_samples=4, min_blend_gain_t=None, max_loss_rise=None,
    max_sample_age=None, min_contribution=None,
)  # fmt: skip


def lives(rank, world, epochs=8):
    """A life in which every rank is told something else, and only some are told a loss."""
    model = DistributedDataParallel(host())
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    events = []
    growth = GrowthController(
        model, optimizer, thresholds=EASY, sinks=[events.append], schedule=AlphaSchedule(steps=12)
    )
    germinate(growth, block(rank=rank))
    seen = []
    for epoch in range(epochs):
        learn(model, growth, optimizer, (rank, world), skip=epoch)
        accuracy = 0.5 + 0.1 * rank + 0.01 * epoch
        verdicts = growth.end_epoch(accuracy=accuracy, loss=1.0 if rank else None)
        slot = growth.slots["slot"]
        seen.append(([str(v) for v in verdicts], slot.stage.name, slot.alpha_value, growth._position.accuracy,
                     growth._position.loss, slot.handed_on))  # fmt: skip
    return {"seen": seen, "events": len(events)}


def test_verdicts_stages_and_alpha_are_the_same_whatever_each_rank_was_told():
    for world in (2, 4):
        found = values(lives, world)
        assert all(one["seen"] == found[0]["seen"] for one in found)
        assert [stage for _, stage, *_ in found[0]["seen"]][-1] == "FOSSILIZED"
        last = found[0]["seen"][-1]
        assert last[3] == pytest.approx(0.5 + 0.1 * (world - 1) / 2 + 0.07)
        assert last[4] == 1.0
        assert found[0]["events"] > 0
        assert all(one["events"] == 0 for one in found[1:])


def disagreeing(rank, world, how):
    model = DistributedDataParallel(host())
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    growth = grow(model, optimizer)
    germinate(growth, block(rank=rank))
    for index, batch in enumerate(batches(3)):
        loss_of(model, mine(batch, rank, world)).backward()
        if not (how == "a measurement" and rank == 1 and index == 1):
            growth.measure()
        optimizer.step()
        optimizer.zero_grad()
    if how == "another call" and rank == 1:
        growth.advance("slot")
    elif how == "a state" and rank == 1:
        growth.state_dict()
    elif how == "a probe" and rank == 1:
        growth.probe("slot", lambda model: model(batches(1)[0][0]).square().mean(1))
    elif how == "a seed" and rank == 1:
        growth.prune("slot")
        growth.slots["slot"].vacate()
        germinate(growth, block())
    elif how == "a stage" and rank == 1:
        growth.slots["slot"].move(Stage.BLENDING)
        growth.end_epoch()
    elif how == "evaluate" and rank == 0:
        growth.evaluate = lambda model: model(batches(1)[0][0]).square().mean(1)
        growth.end_epoch()
    elif how == "weights":
        with torch.no_grad():
            growth.slots["slot"].seed.expand.weight.add_(0.1 * rank)
        growth.end_epoch()
    else:
        growth.end_epoch()


def clipping(rank, world, other):
    """One rank clips what is cut, and another one is somewhere else already."""
    model = wrapped(host(), "fsdp")
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    growth = grow(model, optimizer)
    germinate(growth, block(rank=rank))
    loss_of(model, mine(batches(1)[0], rank, world)).backward()
    growth.measure()
    if rank == 0:
        growth.clip_grad_norm_(1.0)
    getattr(growth, other)(*(["slot"] if other == "advance" else []))


@pytest.mark.parametrize("other", ["end_epoch", "advance", "state_dict"])
def test_a_rank_that_clips_while_another_one_does_not_is_named(other):
    found = spawn(clipping, 2, other=other)
    words = f"WiringError: ranks are in different calls: rank 0 clip_grad_norm_(), rank 1 {other}()"
    assert [one.error[: len(words)] for one in found] == [words, words]


def many(rank, world):
    numbers = torch.arange(70, dtype=torch.float64) * (1 + rank)
    ranks = Ranks()
    found = ranks.few(numbers, "many()")
    return found.tolist(), ranks.collectives, ranks.bytes


def test_more_numbers_than_a_header_has_are_summed_too():
    found = values(many, 4)
    assert found == [([10.0 * number for number in range(70)], 3, 3 * 4 * 32 * 8)] * 4


@pytest.mark.parametrize(
    "how, words",
    [
        ("a measurement", r"disagree about .*(the samples measured: rank 0 3, rank 1 2|the steps: rank 0 3, rank 1 2)"),
        ("another call", r"ranks are in different calls: rank 0 end_epoch\(\), rank 1 advance\(\)"),
        ("a state", r"ranks are in different calls: rank 0 end_epoch\(\), rank 1 state_dict\(\)"),
        ("a probe", r"ranks are in different calls: rank 0 end_epoch\(\), rank 1 probe\(\)"),
        ("a seed", r"ranks are in different calls: rank 0 end_epoch\(\), rank 1 germinate\(\)"),
        ("evaluate", r"disagree about a validation function: rank 0 evaluate, rank 1 None"),
        ("a stage", r"the stages of the slots: rank 0 \['TRAINING'\], rank 1 \['BLENDING'\]"),
        ("weights", r"the weights of seed 'slot' are not the same on every rank"),
    ],
)
def test_where_ranks_disagree_all_of_them_say_the_same(how, words):
    found = spawn(disagreeing, 2, how=how)
    assert [one.error is not None for one in found] == [True, True]
    assert found[0].error == found[1].error
    assert found[0].error.startswith("WiringError")
    import re

    assert re.search(words, found[0].error), found[0].error


def differences(rank, world):
    """What each thing that is not the same on rank 1 makes end_epoch() say; it changes nothing, so each is put back."""
    model = DistributedDataParallel(host())
    growth = grow(model, torch.optim.SGD(model.parameters(), 0.05))
    germinate(growth, block(rank=rank))
    position, slot, monitor = growth._position, growth.slots["slot"], growth.monitor
    since = monitor.since.clone()
    changes = {
        "the epoch": (lambda: setattr(position, "epoch", 1), lambda: setattr(position, "epoch", 0)),
        "the verdicts of the last epoch": (
            lambda: setattr(position, "verdicts", ["passed"]), lambda: setattr(position, "verdicts", [])
        ),
        "alpha": (lambda: slot.set_alpha(0.5), lambda: slot.set_alpha(0.0)),
        "where windows begin": (lambda: monitor.since.add_(1), lambda: monitor.since.copy_(since)),
    }  # fmt: skip
    said = {}
    for what, (change, back) in changes.items():
        if rank:
            change()
        with pytest.raises(WiringError) as error:
            growth.end_epoch()
        back()
        said[what] = str(error.value)
    for what, monitor in {
        "the seeds": GradientMonitor(host(), {f"seed{rank}": block()}, ranks=Ranks()),
        "the length of the window": GradientMonitor(host(), {"seed": block()}, window=8 + rank, ranks=Ranks()),
    }.items():
        with pytest.raises(WiringError) as error:
            monitor.read()
        said[what] = str(error.value)
    growth.end_epoch()
    return said


def test_each_thing_that_is_not_the_same_is_named():
    found = values(differences, 2)
    assert found[0] == found[1]
    for what, said in found[0].items():
        assert said.startswith(f"ranks disagree about {what}: rank 0 "), said


def test_of_what_ranks_have_seen_the_worst_counts():
    agreed = []
    slots = {"slot": SimpleNamespace(agree=lambda *told: agreed.append(told))}
    told = [(1, 0.5, 0, 0.0, 0, 0, 0, 0.0), (0, 0.0, 1, 3.0, 2, 1, 1, 0.8), (1, 0.7, 1, 5.0, 1, 0, 1, 0.6)]
    assert taken(told, slots) == (pytest.approx(0.6), 4.0)
    assert agreed == [(2, True, pytest.approx(0.7))]


def test_of_what_ranks_know_parts_are_summed_and_the_worst_counts():
    nan = math.nan
    nothing = SeedFacts(0.0, 0.0, 0.0, nan, nan, nan, nan, nan, nan)  # of a rank that does not hold the seed
    one, two = SeedFacts(1.0, 2.0, 3.0, 4, 0, 1, 7, 1, 9), SeedFacts(2.0, 3.0, 4.0, 2, 1, 0, 6, 5, 8)
    assert SeedFacts.merged([nothing, one, two]) == SeedFacts(3.0, 5.0, 7.0, 4, 1, 0, 6, 5, 8)
    assert SeedFacts.merged([one, one._replace(moved=nan)]).displacement is None


def test_what_ranks_hold_adds_up_to_the_window_of_one_process():
    world = 49  # of which 49 shares of 1 are not 1
    columns, segments = (Column(None, Way(world, 1)), Column("a", Way(1, world)), Column("a", Way(world, 1))), (0, 1, 1)
    rings = torch.zeros(world, 2, 3, QUANTITIES, dtype=torch.float64)
    rings[..., SUMSQ], rings[..., ELEMENTS], rings[..., TENSORS], rings[..., LIVE] = 2.0, 3.0, 1.0, 1.0
    rings[:, :, 1:, EXTRA] = math.nan
    rings[3, 1, 0, EXTRA] = 1.0  # one rank will skip the second step
    rings[4, :, 1, EXTRA], rings[5, :, 1, EXTRA] = 1.0, 3.0
    window = unfold(sum(fold(ring, columns, segments) for ring in rings))
    assert window[0, 0].tolist() == pytest.approx(_row(SUMSQ=2, ELEMENTS=3, TENSORS=1, LIVE=1))
    assert window[..., 0, EXTRA].tolist() == [0.0, 1.0]
    assert window[0, 1].tolist() == pytest.approx(
        _row(SUMSQ=2 * world + 2, ELEMENTS=3 * world + 3, TENSORS=2, LIVE=2, EXTRA=2)
    )
    assert [float(window[0, 0, TENSORS]), float(window[0, 1, LIVE])] == [1.0, 2.0]
    parts = [laid_back(window, columns, mine=rank == 1) for rank in range(world)]
    torch.testing.assert_close(unfold(sum(fold(part, columns, segments) for part in parts)), window)


def _row(**numbers):
    places = {"SUMSQ": SUMSQ, "ELEMENTS": ELEMENTS, "TENSORS": TENSORS, "LIVE": LIVE, "EXTRA": EXTRA}
    row = [0.0] * QUANTITIES
    for name, number in numbers.items():
        row[places[name]] = number
    return row


def forgets(rank, world):
    """What was agreed on of a seed that is gone is none of the next one's in its place."""
    model = DistributedDataParallel(host())
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    growth = grow(model, optimizer)
    germinate(growth, block(rank=rank))
    learn(model, growth, optimizer, (rank, world), steps=2)
    growth.end_epoch()
    before = list(growth.evidence()), list(growth.monitor.latest().evidence)
    growth.prune("slot")
    return before, (list(growth.evidence()), list(growth.monitor.latest().evidence))


def test_nothing_is_known_of_a_seed_that_is_gone():
    assert values(forgets, 2) == [((["slot"], ["slot"]), ([], []))] * 2


def absent(rank, world, late=0.0):
    import time

    model = DistributedDataParallel(host())
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    growth = grow(model, optimizer)
    germinate(growth, block(rank=rank))
    learn(model, growth, optimizer, (rank, world), steps=2)
    if rank == 0:
        growth.evidence()  # asks nobody
        repr(growth)
        growth.monitor.latest()
    if rank == 1 and not late:
        time.sleep(6)
        return None
    if rank == 1:
        time.sleep(late)
    begun = time.monotonic()
    growth.end_epoch()
    return time.monotonic() - begun, growth.evidence()["slot"].samples


def test_a_rank_that_does_not_come_ends_in_an_error_after_the_timeout():
    [error, _] = spawn(absent, 2, timeout=2, limit=15)
    assert "WiringError: end_epoch() on rank 0: not every rank came within 0:00:02" in error.error
    assert "not under `if rank == 0`" in error.error


def test_a_rank_that_is_late_is_waited_for():
    found = values(absent, 2, late=3.0)
    assert [samples for _, samples in found] == [2, 2]
