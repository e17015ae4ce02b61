"""growth.probe: at which alphas it looks unless told, and what two seeds do alone and together."""

import dataclasses
import json
import math

import pytest
import torch
from networks import Residual, Scaled
from same import same
from torch import nn

from seedtriton import (
    AlphaSchedule,
    ConfigurationError,
    Gate,
    GateThresholds,
    GrowthController,
    PairProbe,
    SeedSlot,
    Stage,
)

LIMITS = {item.name for item in dataclasses.fields(GateThresholds)} - {"ratio"}
ONLY_THE_PROBE = GateThresholds().without(*LIMITS - {"min_probe_gain", "max_probe_harm"})
LIFE = (Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED)
ONE = AlphaSchedule(target=0.75, steps=4)
TWO = AlphaSchedule(target=0.5, steps=0)


def data():
    return torch.randn(9, 5, generator=torch.Generator().manual_seed(1))


def losses_on(x):
    return lambda model: model(x).square().mean(dim=1)


class Three(nn.Module):
    """Three slots in a row; what the third does, it does to the others' losses too."""

    def __init__(self):
        super().__init__()
        self.first, self.one, self.second, self.two = nn.Linear(5, 7), SeedSlot(), nn.Linear(7, 7), SeedSlot()
        self.three, self.last = SeedSlot(), nn.Linear(7, 3)

    def forward(self, x):
        h = torch.tanh(self.second(self.one(torch.tanh(self.first(x)))))
        return self.last(self.three(self.two(h)))


def by_hand(model, x, one, two, three):
    """The losses of the samples with every seed's share written out."""
    with torch.no_grad():
        h = torch.tanh(model.first(x))
        h = h + one * (model.one.seed(h) - h)
        h = torch.tanh(model.second(h))
        for alpha, slot in ((two, model.two), (three, model.three)):
            h = h + alpha * (slot.seed(h) - h)
        return model.last(h).square().mean(dim=1).double()


def brought_to(growth, slot, stage, alpha):
    for target in LIFE:
        if growth.slots[slot].stage < stage and growth.slots[slot].stage < target:
            growth._mover.move(growth._lives[slot], target, "forced", "script")
    growth.slots[slot].set_alpha(alpha)


def grown(one=Stage.TRAINING, two=Stage.TRAINING, three=0.0, **options):
    """Seeds in the first two slots in these stages, at an alpha that no probe asks for, and the third at its own."""
    torch.manual_seed(0)
    model = Three()
    events = []
    growth = GrowthController(
        model, torch.optim.SGD(model.parameters(), lr=0.1), sinks=[events.append], evaluate=losses_on(data()), **options
    )
    for name, stage, schedule in (("one", one, ONE), ("two", two, TWO)):
        growth.germinate(name, Residual(7), schedule=schedule)
        brought_to(growth, name, stage, 0.0 if stage is Stage.TRAINING else 0.375)
    growth.germinate("three", Residual(7))
    if three:
        brought_to(growth, "three", Stage.HOLDING, three)
    return growth, events


# --- one seed ---


def test_one_seed_is_looked_at_up_to_the_target_of_its_schedule():
    growth, _ = grown()
    assert growth.probe("one").alphas == pytest.approx((0.075, 0.375, 0.75))
    assert growth.probe("two").alphas == (0.05, 0.25, 0.5)
    assert growth.probe("three").alphas == (0.1, 0.5, 1.0)
    assert growth.probe("two", alphas=(0.9,)).alphas == (0.9,)


def test_gate_g2_looks_up_to_the_target_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), SeedSlot(), nn.Linear(7, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    looked, losses = [], losses_on(data())
    growth = GrowthController(
        model, optimizer, thresholds=ONLY_THE_PROBE, schedule=AlphaSchedule(target=0.5), sinks=(),
        evaluate=lambda twin: looked.append(twin[1].alpha_value) or losses(twin),
    )  # fmt: skip
    growth.germinate("1", Scaled(0.5))
    model(data()).square().mean().backward()
    growth.measure()
    optimizer.step()
    (verdict,) = growth.end_epoch()
    assert (verdict.gate, verdict.passed) == (Gate.G2, True)
    assert looked == [0.0, 0.05, 0.25, 0.5]
    assert "at alpha 0.5;" in next(c.reason for c in verdict.checks if c.question == "probe_harm")


def test_a_fossil_is_looked_at_up_to_where_it_stands():
    growth, _ = grown(one=Stage.FOSSILIZED)
    assert "one" not in growth._lives
    found = growth.probe("one")
    assert found.alphas == pytest.approx((0.0375, 0.1875, 0.375))
    x = data()
    gone = (by_hand(growth.model, x, 0.375, 0, 0) - by_hand(growth.model, x, 0, 0, 0)).mean().item()
    assert found.changes[-1] == pytest.approx(gone, rel=1e-4)
    assert growth.slots["one"].alpha_value == 0.375


# --- two seeds ---


@pytest.mark.parametrize("three", [0.0, 0.625])
@pytest.mark.parametrize(
    "one, two",
    [
        (Stage.TRAINING, Stage.TRAINING),
        (Stage.BLENDING, Stage.TRAINING),
        (Stage.HOLDING, Stage.BLENDING),
        (Stage.TRAINING, Stage.FOSSILIZED),
    ],
)
def test_a_pair_is_each_alone_both_and_what_is_more_than_their_sum(one, two, three):
    growth, _ = grown(one, two, three)
    x, model = data(), growth.model
    found = growth.probe(["one", "two"])
    second = 0.375 if two is Stage.FOSSILIZED else 0.5
    assert (found.seeds, found.alphas) == (("one", "two"), (0.75, second))
    rows = [(0, 0), (0.75, 0), (0, second), (0.75, second)]
    none, a, b, both = (by_hand(model, x, *alphas, three) for alphas in rows)
    assert found.loss == pytest.approx(none.mean().item(), rel=1e-6)
    expected = [a - none, b - none, both - none, both - a - b + none]
    changes = [*found.alone, found.together, found.interaction]
    errors = [*found.alone_errors, found.together_error, found.interaction_error]
    for change, error, apart in zip(changes, errors, expected, strict=True):
        assert change == pytest.approx(apart.mean().item(), rel=1e-3)
        assert error == pytest.approx((apart.var() / len(x)).sqrt().item(), rel=1e-3)
    assert found.interaction == pytest.approx(found.together - sum(found.alone), rel=1e-9)
    # Each of these is a number of its own, and a pair that is told the other way round is the same pair.
    assert len({abs(number) for number in changes}) == len(set(errors)) == 4
    turned = growth.probe(("two", "one"))
    assert (turned.alone, turned.alphas) == (found.alone[::-1], found.alphas[::-1])
    assert turned.interaction == pytest.approx(found.interaction, rel=1e-9)


def test_seeds_that_do_the_same_work_have_an_interaction_that_is_well_known():
    """Each alone halves the output, both together quarter it: the second has less left to do."""
    model = nn.Sequential(Scaled(1.0), SeedSlot(), SeedSlot())
    growth = GrowthController(model, torch.optim.SGD(model.parameters(), lr=0.1), sinks=())
    growth.germinate("1", Scaled(0.5))
    growth.germinate("2", Scaled(0.5))
    x = torch.randn(50, 1)
    found = growth.probe(["1", "2"], lambda twin: twin(x).square().flatten())
    mean = x.double().square().mean().item()
    assert found.alone == pytest.approx((-0.75 * mean, -0.75 * mean))
    assert found.together == pytest.approx(-0.9375 * mean)
    assert found.interaction == pytest.approx(0.5625 * mean)
    assert found.interaction > 3 * found.interaction_error > 0


def test_a_pair_may_be_asked_at_other_alphas_and_of_another_loss():
    growth, _ = grown()
    found = growth.probe(["one", "two"], lambda twin: twin.one.alpha_value + 10 * twin.two.alpha_value, (0.25, 1.0))
    assert (found.alphas, found.loss, found.alone, found.together) == ((0.25, 1.0), 0.0, (0.25, 10.0), 10.25)
    assert (found.interaction, found.alone_errors, found.together_error, found.interaction_error) == (0.0, *[None] * 3)


def test_a_pair_that_is_probed_changes_nothing():
    growth, events = grown(Stage.BLENDING, Stage.TRAINING, 0.625)
    model = growth.model
    model(data()).square().sum().backward()

    def now():
        grads = [p.grad.clone() for p in model.parameters()]
        alphas = [(id(slot.alpha), slot.alpha._version, slot.alpha.grad.clone()) for slot in growth.slots.values()]
        modes = [(slot._mode, slot.stage, slot.alpha_value) for slot in growth.slots.values()]
        flags = [module.training for module in model.modules()]
        states = [growth.state_dict(), model.state_dict(), torch.get_rng_state()]
        return [*states, grads, alphas, modes, flags, len(events)]

    before = now()
    growth.probe(["one", "two"], lambda twin: losses_on(data())(twin.eval()) + torch.rand(1))
    assert same(before, now())


@pytest.mark.parametrize(
    "slots, options, words",
    [
        (["one"], {}, r"a pair is two slots, got \['one'\]; probe one seed by its name"),
        ([], {}, r"a pair is two slots, got \[\]"),
        (["one", "two", "three"], {}, "a pair is two slots"),
        (["one", "one"], {}, "two different slots, got 'one' twice"),
        (["one", "elsewhere"], {}, r"no slot 'elsewhere'; its slots are \['one', 'three', 'two'\]"),
        (["one", "three"], {}, "'three' is no slot with a seed: germinate one first"),
        (["three", "one"], {}, "'three' is no slot with a seed: germinate one first"),
        (["one", "two"], {"alphas": (0.5,)}, r"one alpha for each of \['one', 'two'\], got \(0.5,\)"),
        (["one", "two"], {"alphas": ()}, "one alpha for each"),
        (["one", "two"], {"alphas": (0.5, 0.5, 0.5)}, "one alpha for each"),
        (["one", "two"], {"alphas": (0.5, 0.0)}, r"\(0, 1\]"),
        (["one", "two"], {"alphas": (math.nan, 0.5)}, r"\(0, 1\]"),
        (["one", "two"], {"evaluate": lambda twin: "low"}, "mean loss"),
    ],
)
def test_what_is_no_pair_is_refused_with_the_way_out_and_changes_nothing(slots, options, words):
    growth, events = grown()
    growth.prune("three")
    before, told = growth.state_dict(), len(events)
    with pytest.raises(ConfigurationError, match=words):
        growth.probe(slots, **options)
    assert same(before, growth.state_dict())
    assert len(events) == told


def test_a_pair_without_a_validation_function_is_refused():
    growth, _ = grown()
    growth.evaluate = None
    with pytest.raises(ConfigurationError, match="evaluate="):
        growth.probe(["one", "two"])


@pytest.mark.parametrize("evaluate", [None, lambda twin: 1.0], ids=["errors", "means"])
def test_a_pair_is_plain_values_and_comes_back_equal(evaluate):
    growth, _ = grown()
    found = growth.probe(["one", "two"], evaluate)
    state = found.state_dict()
    assert {type(value) for value in state.values()} <= {int, float, str, list, type(None)}
    assert PairProbe.from_state_dict(json.loads(json.dumps(state))) == found
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.loss = 0.0
    for name, value, words in [("alone", [1.0], "two alone"), ("seeds", ["a", "a"], "'a' twice"),
                               ("alone_errors", [1.0] * 3, "two alone_errors")]:  # fmt: skip
        with pytest.raises(ConfigurationError, match=words):
            PairProbe.from_state_dict({**state, name: value})
