"""What people get wrong at first, one test per message: it names the value, what is taken, and how to write it."""

import logging
import re
import subprocess
import sys

import pytest
import torch
from networks import Residual
from scripts import Script, TwoSlots, blending
from torch import nn

from seedtriton import (
    ConfigurationError,
    Gate,
    GradientMonitor,
    GrowthController,
    Stage,
    WiringError,
    load_grown,
    restore_slots,
)

FEATURES = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def made(**options):
    model = TwoSlots()
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=0.1)
    return GrowthController(options.pop("model", model), optimizer, **options)


# --- what the controller is given ---


@pytest.mark.parametrize(
    "options, words",
    [
        ({"thresholds": {"min_samples": 16}}, "got a dict: GateThresholds(min_samples=16)"),
        ({"thresholds": 0.05}, "thresholds must be a GateThresholds, got 0.05"),
        ({"sinks": "events.jsonl"}, "got 'events.jsonl': sinks=[JsonLinesSink('events.jsonl')]"),
        ({"sinks": ["events.jsonl"]}, "JsonLinesSink('events.jsonl') writes a file"),
        ({"sinks": print}, "sinks must be a list of sinks or functions"),
        ({"schedule": 200}, "got 200: AlphaSchedule(steps=200)"),
        ({"auto_advance": Gate.G1}, "auto_advance must be a list of gates"),
        ({"evaluate": 0.3}, "evaluate must be a function from a model to its validation losses, got 0.3"),
        ({"optimizer": torch.optim.SGD}, "got the class SGD: give SGD(...)"),
        ({"model": TwoSlots}, "model must be a torch.nn.Module, got the class TwoSlots: give TwoSlots(...)"),
        ({"model": None}, "model must be a torch.nn.Module, got None"),
    ],
)
def test_a_setting_of_another_kind_is_named_with_what_to_write(options, words):
    with pytest.raises(ConfigurationError, match=re.escape(words)):
        made(**options)


def test_several_optimizers_are_one_and_the_others():
    model = TwoSlots()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match=r"a list of 1: .* growth\.monitor\.watch"):
        GrowthController(model, [optimizer])
    assert not optimizer._optimizer_step_post_hooks, "nothing was hooked"
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    with pytest.raises(ConfigurationError, match=r"got a StepLR: schedulers=\[\.\.\.\]"):
        GrowthController(model, optimizer, schedulers=scheduler)


# --- seeds ---


class Adapter(Residual):
    def __init__(self, width):
        super().__init__(width)


def test_a_class_that_needs_arguments_is_no_seed_and_says_which():
    growth = made()
    with pytest.raises(ConfigurationError, match=r"the class Adapter, which needs width: give Adapter\(\.\.\.\)"):
        growth.germinate("early", Adapter)
    with pytest.raises(ConfigurationError, match="the function <lambda>, which needs width"):
        growth.germinate("early", lambda width: Adapter(width))
    assert growth.slots["early"].stage is Stage.DORMANT

    class Whole(Adapter):
        def __init__(self, width=6):
            super().__init__(width)

    growth.germinate("early", Whole)  # a class that makes itself is a factory
    assert isinstance(growth.slots["early"].seed, Whole)


def test_a_slot_is_told_by_its_path():
    growth = made()
    with pytest.raises(ConfigurationError, match=r"path in the model, one of \['early', 'late'\], not by a SeedSlot"):
        growth.germinate(growth.slots["early"], Adapter(6))
    with pytest.raises(ConfigurationError, match=r"no slot 'erly'; its slots are \['early', 'late'\]"):
        growth.germinate("erly", Adapter(6))


def test_seeds_are_told_by_name():
    model, growth = TwoSlots(), made()
    with pytest.raises(ConfigurationError, match=r"\{'adapter': module\}, got a Linear"):
        GradientMonitor(host=model.first, seeds=model.last)
    for load in (
        lambda: growth.load_state_dict(growth.state_dict(), seeds=Adapter(6)),
        lambda: restore_slots(model, growth.state_dict(), Adapter),
        lambda: load_grown(model, model.state_dict(), [Adapter(6)]),
    ):
        with pytest.raises(ConfigurationError, match=r"a mapping from slots to modules .*, got"):
            load()


class Narrow(nn.Module):
    """Takes features of another width."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return x + self.layer(x)


def test_a_seed_that_fails_is_named_by_its_slot_and_keeps_the_cause():
    growth = made()
    words = r"slot 'early': its seed, Narrow, failed on features \(4, 6\) torch.float32: RuntimeError: mat1 and mat2"
    with pytest.raises(WiringError, match=words) as raised:
        growth.germinate("early", Narrow(), probe=FEATURES)
    assert type(raised.value.__cause__) is RuntimeError
    assert growth.slots["early"].stage is Stage.DORMANT
    assert len(growth.optimizer.param_groups) == 1
    growth.germinate("early", Narrow())
    with pytest.raises(WiringError, match=words) as raised:
        growth.model(torch.randn(4, 8))
    assert type(raised.value.__cause__) is RuntimeError


def test_a_blended_seed_that_fails_is_named_too():
    script = blending()
    script.growth.slots["early"].seed.forward = lambda x: {}["key"]
    with pytest.raises(WiringError, match=r"slot 'early': its seed, Residual, failed .*KeyError: 'key'"):
        script.model(script.x)


class Signal(RuntimeError):
    """What somebody outside of the seed waits for."""


def test_an_error_of_a_kind_of_its_own_goes_on_as_it_is():
    class Signalling(Residual):
        def forward(self, x):
            raise Signal

    growth = made()
    growth.germinate("early", Signalling(6))
    with pytest.raises(Signal):
        growth.model(torch.randn(4, 8))


# --- while it trains ---


def test_a_verdict_is_true_where_it_passed():
    script = Script()
    assert script.growth.germinate("early", Residual(6))
    verdict = script.growth.advance("early")
    assert not verdict
    assert not verdict.passed


def test_a_tag_that_nobody_measures_is_named_in_the_verdict():
    script = Script(tag="critic")
    script.growth.germinate("early", Residual(6))
    script.measure = False
    script.growth.measure(tag="generator")
    (verdict,) = script.epochs(1)[0]
    assert "tags ['generator'], and 'critic' counts here" in str(verdict)


def test_measure_takes_no_loss_and_no_optimizer():
    script = Script()
    script.growth.germinate("early", Residual(6))
    loss = script.model(script.x).square().mean()
    loss.backward()
    for wrong in (loss, script.optimizer):
        with pytest.raises(ConfigurationError, match=rf"a GradScaler or nothing, got a {type(wrong).__name__}"):
            script.growth.measure(wrong)


def test_measuring_in_eval_mode_is_said_once(caplog):
    script = Script()
    script.growth.germinate("early", Residual(6))
    with caplog.at_level(logging.WARNING, "seedtriton"):
        script.epoch()
        assert "eval mode" not in caplog.text
        script.model.eval()
        script.epochs(2)
    assert caplog.text.count("['early'] are measured in eval mode") == 1
    assert "model.train()" in caplog.text


def accuracy_of(script):
    def evaluate(model):
        return (model(script.x).argmax(dim=1) == script.y).float()

    return evaluate


@pytest.mark.parametrize("each", [True, False], ids=["of each sample", "the mean alone"])
def test_an_evaluate_that_returns_an_accuracy_is_suspected_in_the_verdict(each):
    script = Script()
    right = accuracy_of(script)
    script.growth.evaluate = right if each else lambda model: right(model).mean()
    script.growth.germinate("early", Residual(6, 16), probe=FEATURES)
    said = [str(verdict) for verdicts in script.epochs(12) for verdict in verdicts]
    assert any("evaluate returns an accuracy" in words and "1 - the accuracy" in words for words in said)


def test_the_same_with_the_loss_passes_and_says_nothing_of_accuracies():
    script = Script()
    script.growth.evaluate = lambda model: nn.functional.cross_entropy(model(script.x), script.y, reduction="none")
    script.growth.germinate("early", Residual(6, 16), probe=FEATURES)
    said = [str(verdict) for verdicts in script.epochs(12) for verdict in verdicts]
    assert not any("accuracy or another score" in words for words in said)
    assert script.growth.slots["early"].stage is not Stage.TRAINING


def test_warnings_are_seen_where_nobody_has_set_up_logging():
    code = "import logging, seedtriton; logging.getLogger('seedtriton').warning('look here')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "look here" in done.stderr
