"""Does a seed hand on the host's features, x + f(x), or replace them? Looked at once, told, and never waited for."""

import logging

import pytest
import torch
from networks import Residual, conv
from scripts import Script
from torch import nn

from seedtriton import GrowthController, SeedSlot, Stage, StateDictError
from seedtriton.growth.isolation import handed_on


def slot_in_training(seed=None):
    slot = SeedSlot()
    slot.germinate(seed or Residual(4))
    slot.move(Stage.TRAINING)
    return slot


class Replacing(Residual):
    """Returns f(x) alone."""

    def forward(self, x):
        return super().forward(x) - x


class Silent(Residual):
    def forward(self, x):
        return 0 * super().forward(x)


SHAPES = {"linear": ((64, 12), nn.Linear), "sequence": ((32, 6, 12), nn.Linear), "conv": ((16, 12, 5, 5), conv)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("seed, hands_on", [(Residual, True), (Replacing, False), (Silent, False)])
@pytest.mark.parametrize("probed", [True, False], ids=["probe", "first pass"])
def test_a_slot_knows_how_much_of_the_features_its_seed_hands_on(seed, hands_on, kind, dtype, probed):
    shape, make = SHAPES[kind]
    features, slot = (torch.randn(shape).relu() + 1).to(dtype), SeedSlot()
    slot.germinate(seed(12, 24, make), dtype=dtype, probe=features if probed else None)
    if not probed:
        assert slot.handed_on is None
        slot.move(Stage.TRAINING)
        slot(features)
    assert abs(slot.handed_on - hands_on) < 0.25


def test_what_is_handed_on_is_the_slope_over_the_samples():
    features, output = torch.randn(2, 9, 4, dtype=torch.float64)
    slopes = torch.linalg.lstsq((features - features.mean(0)).reshape(-1, 1), output.reshape(-1, 1)).solution
    torch.testing.assert_close(handed_on(features, output), slopes.squeeze())
    torch.testing.assert_close(handed_on(features, 3 * features + 7), torch.tensor(3.0, dtype=torch.float64))


@pytest.mark.parametrize("read", [True, False])
def test_what_is_known_does_not_depend_on_whether_somebody_looked(read):
    slot = SeedSlot()
    slot.germinate(Residual(4), probe=torch.zeros(3, 4))  # features that do not vary say nothing
    if read:
        assert slot.handed_on is None
    slot.move(Stage.TRAINING)
    slot(torch.randn(3, 4))
    assert slot.handed_on == pytest.approx(1.0, abs=0.25)


def test_the_seed_is_looked_at_once_and_the_first_look_stays():
    slot = slot_in_training()
    slot(torch.randn(3, 4))
    first = slot.handed_on
    with torch.no_grad():
        slot.seed.contract.weight.mul_(100)
    slot.check_isolation_again()
    slot(torch.randn(3, 4))
    assert slot.handed_on == first
    restored = SeedSlot()
    restored.load_lifecycle_state(slot.lifecycle_state(), Residual(4))
    assert restored.handed_on == first
    restored(torch.randn(3, 4))
    assert restored.handed_on == first
    slot.move(Stage.PRUNED)
    assert slot.handed_on is None


@pytest.mark.parametrize("features", [torch.ones(3, 4), torch.randn(1, 4), torch.full((3, 4), float("nan"))])
def test_features_that_do_not_differ_say_nothing_of_the_seed(features):
    slot = slot_in_training()
    slot(features)
    assert slot.handed_on is None
    assert "handed_on" not in slot.lifecycle_state()
    slot(torch.randn(3, 4))
    assert slot.handed_on is not None


def test_a_seed_on_no_device_is_not_waited_for():
    with torch.device("meta"):
        slot = SeedSlot()
        slot.germinate(Residual(4), probe=torch.randn(3, 4))
    assert slot.handed_on is None


def test_the_look_is_not_waited_for_in_the_forward_pass(monkeypatch):
    slot = slot_in_training()

    def wait(*_):
        raise AssertionError("read in the forward pass")

    for name in ("item", "__float__", "__bool__", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, wait)
    slot(torch.randn(3, 4))


def test_a_state_with_a_damaged_look_is_refused_and_changes_nothing():
    slot = slot_in_training()
    slot(torch.randn(3, 4))
    before = slot.lifecycle_state()
    for bad in ("1", 1, [1.0]):
        with pytest.raises(StateDictError, match="handed_on"):
            slot.load_lifecycle_state({**before, "handed_on": bad})
        assert slot.lifecycle_state() == before


# --- through the controller -------------------------------------------------------------------------


def names(event):
    return {check["question"]: (check["name"], check["passed"]) for check in event["checks"]}


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_with_a_probe_it_is_told_at_germination(caplog):
    script = Script()
    verdict = script.growth.germinate("early", Replacing(6, 16), probe=torch.randn(32, 6))
    assert verdict.passed
    assert [check.name for check in verdict.warnings] == ["seed_replaces_host"]
    assert script.growth.slots["early"].stage is Stage.TRAINING
    (warning,) = said(caplog)
    assert "slot 'early': seed_replaces_host" in warning
    assert "x + f(x)" in warning
    g1 = next(event for event in script.of("gate") if event["gate"] == "G1")
    assert names(g1)["identity"] == ("seed_replaces_host", None)


def test_without_a_probe_it_is_told_after_the_first_epoch_and_once(caplog):
    script = Script()
    assert script.growth.germinate("early", Replacing(6, 16)).warnings == ()
    assert said(caplog) == []
    for _ in range(3):
        (verdict,) = script.epoch()
        assert [check.name for check in verdict.warnings] == ["seed_replaces_host"]
        assert "seed_replaces_host" not in {check.name for check in verdict.failed}
    assert len(said(caplog)) == 1
    assert {names(event)["identity"][0] for event in script.of("gate") if event["gate"] == "G2"} == {
        "seed_replaces_host"
    }


def test_a_seed_that_hands_on_the_features_is_told_so_and_nobody_is_warned(caplog):
    script = Script()
    assert script.growth.germinate("early", Residual(6, 16)).warnings == ()
    (verdict,) = script.epoch()
    assert next(check.name for check in verdict.checks if check.question == "identity") == "seed_hands_on_host"
    assert said(caplog) == []


def test_the_look_survives_a_restart():
    first = Script()
    first.growth.germinate("early", Replacing(6, 16))
    first.epoch()
    second = Script()
    second.growth.load_state_dict(first.growth.state_dict(), seeds={"early": lambda: Replacing(6, 16)})
    assert second.growth.slots["early"].handed_on == first.growth.slots["early"].handed_on
    assert isinstance(second.growth, GrowthController)
