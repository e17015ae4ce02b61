"""Slots under other layouts, modes and transforms of torch: right, or refused with an error that names the slot."""

import copy
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from networks import Cnn, Mlp, Residual
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import pack_sequence

from seedtriton import AlphaSchedule, GateThresholds, GrowthController, SeedSlot, Stage, StraightThrough, WiringError
from seedtriton.growth.blending import BLENDS
from seedtriton.growth.slot import ISOLATION_CHECKS

ROOT = pathlib.Path(__file__).resolve().parents[2]
STAGES = [Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED]


def move_to(slot, stage, alpha=0.3):
    for step in STAGES[: STAGES.index(stage) + 1] if stage in STAGES else ():
        slot.move(step)
        if step is Stage.BLENDING:
            slot.set_alpha(alpha)
    return slot


# Layouts. A crash ends the process, so the first case has one of its own.

CRASHES = """
import torch
from torch import nn
from seedtriton import SeedSlot, Stage

class Norm(nn.Module):
    def __init__(self, functional):
        super().__init__()
        self.norm, self.functional = nn.GroupNorm(4, 8), functional
    def forward(self, x):
        n = self.norm
        return x + (nn.functional.group_norm(x, 4, n.weight, n.bias) if self.functional else n(x))

torch.set_num_threads(1)
for functional in (False, True):
    for probe in (False, True):
        for last in (6, 1):
            for apart in (False, True):
                for frozen in (False, True):
                    x = torch.randn(4, 8, last, last).to(memory_format=torch.channels_last)
                    slot = SeedSlot()
                    slot.germinate(Norm(functional), probe=x.clone() if probe else None, isolate_blending=apart)
                    x.requires_grad_(not frozen)
                    for stage in (Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED):
                        slot.move(stage)
                        if stage is Stage.BLENDING:
                            slot.set_alpha(0.5)
                        for _ in range(2):
                            slot(x).square().sum().backward()
x = torch.randn(4, 8, 6, 6).to(memory_format=torch.channels_last)
for first in (0, 1):  # one parameter of the fossil is frozen: no gradient reaches it, the other one learns
    slot = SeedSlot()
    slot.germinate(Norm(False))
    for stage in (Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED):
        slot.move(stage)
    list(slot.seed.parameters())[first].requires_grad_(False)
    slot(x).square().sum().backward()
for x, groups in (
    (torch.randn(2, 8, 3, 4, 5).to(memory_format=torch.channels_last_3d), 4),
    (torch.randn(2, 1, 6, 6).to(memory_format=torch.channels_last), 1),
):
    slot = SeedSlot()
    slot.germinate(nn.GroupNorm(groups, x.shape[1]))
    slot.move(Stage.TRAINING)
    slot(x).sum().backward()
x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
slot = SeedSlot()
slot.germinate(Norm(False))
slot.move(Stage.TRAINING)
torch.compile(slot, backend="aot_eager", fullgraph=True)(x).sum().backward()
print("alive")
"""


def test_group_norm_behind_a_channels_last_host_leaves_the_process_alive():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", CRASHES], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr[-2000:]


@pytest.mark.parametrize("probed", [False, True])
def test_only_a_seed_with_a_group_norm_pays_for_a_gradient_of_its_input(probed):
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    for seed, pays in ((nn.GroupNorm(2, 8), True), (nn.Conv2d(8, 8, 1), False)):
        slot, wanted = SeedSlot(), []
        slot.germinate(seed, probe=x if probed else None)
        slot.seed.register_forward_pre_hook(lambda _, given, into=wanted: into.append(given[0].requires_grad))
        move_to(slot, Stage.TRAINING)
        for _ in range(ISOLATION_CHECKS + 1):
            slot(x)
        assert wanted == [True] * ISOLATION_CHECKS + [pays]
        compiled = SeedSlot()  # there nobody looks, and the probe says
        compiled.germinate(copy.deepcopy(seed), probe=x if probed else None)
        assert compiled._group_norm == (pays or not probed)


def test_a_hook_on_a_parameter_that_the_seed_does_not_use_is_not_called():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.spare, self.norm = nn.Parameter(torch.zeros(3)), nn.GroupNorm(2, 8)

        def forward(self, x):
            return x + self.norm(x)

    slot, called = SeedSlot(), []
    slot.germinate(Spare())
    slot.seed.spare.register_hook(called.append)
    move_to(slot, Stage.TRAINING)
    for _ in range(ISOLATION_CHECKS + 1):
        slot(torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)).sum().backward()
    assert called == []
    assert slot.isolation_violations == 0


def test_what_is_known_of_one_seeds_norms_is_not_believed_of_the_next():
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    slot, other, wanted = SeedSlot(), SeedSlot(), []
    other.germinate(nn.GroupNorm(2, 8))
    state = {**move_to(other, Stage.TRAINING).lifecycle_state(), "checks_due": 0}
    slot.germinate(nn.Conv2d(8, 8, 1), probe=x)
    slot.vacate()
    slot.load_lifecycle_state(state, nn.GroupNorm(2, 8))
    slot.seed.register_forward_pre_hook(lambda _, given: wanted.append(given[0].requires_grad))
    slot(x)
    assert wanted == [True]


@pytest.mark.parametrize("stage", [Stage.TRAINING, Stage.BLENDING])
@pytest.mark.parametrize(
    "norm", [lambda: nn.GroupNorm(4, 8), lambda: nn.BatchNorm2d(8), lambda: nn.InstanceNorm2d(8, affine=True)]
)
def test_a_norm_gets_the_same_gradients_in_channels_last_as_in_the_plain_layout(stage, norm):
    torch.manual_seed(1)
    seed, x, weight = nn.Sequential(norm(), nn.Conv2d(8, 8, 1)).double(), *torch.randn(2, 4, 8, 6, 6).double()
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        slot = SeedSlot()
        slot.germinate(copy.deepcopy(seed), probe=x, isolation=StraightThrough())
        move_to(slot, stage)
        features = x.to(memory_format=layout)
        output = slot(features)
        assert output.is_contiguous(memory_format=layout)
        (output * weight).sum().backward()
        found.append([p.grad for p in slot.parameters()])
        assert slot.isolation_violations == 0
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


# torch.func


class Wide(nn.Module):
    """A seed and its gradients written by hand: x + tanh(x W)."""

    def __init__(self, width=4):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / 2)

    def forward(self, x):
        return x + torch.tanh(x @ self.weight)


def by_hand(stage, blend, gate, host, full, alpha):
    """The slot's output and, behind the host, a surrogate with the gradients that a seed gets straight through."""
    if blend == "multiply":
        full = host * (1 + torch.tanh(full - host))
    elif blend == "gate":
        hidden = torch.relu(host @ gate["squeeze.weight"].T + gate["squeeze.bias"])
        full = host + torch.sigmoid(hidden @ gate["excite.weight"].T + gate["excite.bias"]) * (full - host)
    return host + alpha * (full - host)


def func_case(stage, blend):
    """A network with a slot, its parameters, and a function of (parameters, x) for it and for one without a slot."""
    torch.manual_seed(2)
    slot = SeedSlot()
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), slot, nn.Linear(4, 2)).double()
    if stage not in (Stage.DORMANT,):
        slot.germinate(Wide(), probe=torch.randn(2, 4).double(), blend=blend, isolation=StraightThrough())
    move_to(slot, stage)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def plain(parameters, x):
        gate = {k.removeprefix("2.gate."): v for k, v in parameters.items() if k.startswith("2.gate.")}
        host = torch.tanh(x @ parameters["0.weight"].T + parameters["0.bias"])
        out = host
        if stage in STAGES:
            behind = stage is Stage.TRAINING
            inner = host.detach() if behind else host
            full = by_hand(stage, blend, gate, inner, inner + torch.tanh(inner @ parameters["2.seed.weight"]), 1.0)
            out = host + full - full.detach() if behind else host + 0.3 * (full - host)
        return out @ parameters["3.weight"].T + parameters["3.bias"]

    return net, parameters, plain


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("stage", [Stage.DORMANT, Stage.GERMINATED, *STAGES])
def test_grad_and_vmap_through_a_slot_are_those_of_the_network_by_hand(stage, blend):
    net, parameters, plain = func_case(stage, blend)
    x = torch.randn(5, 3).double()

    def loss(function):
        return lambda parameters, x: function(parameters, x).pow(3).sum()

    def slotted(parameters, x):
        return functional_call(net, parameters, (x,))

    close = {"rtol": 1e-6, "atol": 1e-6}  # alpha is a float32
    torch.testing.assert_close(grad(loss(slotted))(parameters, x), grad(loss(plain))(parameters, x), **close)
    torch.testing.assert_close(vmap(slotted, (None, 0))(parameters, x), plain(parameters, x), **close)
    each = vmap(grad(loss(slotted)), (None, 0))(parameters, x)
    torch.testing.assert_close(each, vmap(grad(loss(plain)), (None, 0))(parameters, x), **close)
    twice = [grad(lambda x, f=f: grad(lambda x: loss(f)(parameters, x))(x).pow(2).sum())(x) for f in (slotted, plain)]
    torch.testing.assert_close(*twice, **close)


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("stage", [Stage.DORMANT, Stage.GERMINATED, *STAGES])
def test_forward_mode_through_a_slot_is_the_derivative_of_its_output(stage, blend):
    net, parameters, plain = func_case(stage, blend)
    x, along = torch.randn(2, 5, 3).double()

    def output(parameters, x):
        """What comes out of the slot's network: behind the host the seed has no part in it."""
        return plain({**parameters, "2.seed.weight": torch.zeros(4, 4).double()}, x) if hides else plain(parameters, x)

    hides = stage is Stage.TRAINING
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    if hides:
        tangents = {name: t if not name.startswith("2.") else torch.zeros_like(t) for name, t in tangents.items()}
    close = {"rtol": 1e-6, "atol": 1e-6}
    slotted = jvp(lambda p, x: functional_call(net, p, (x,)), (parameters, x), (tangents, along))
    torch.testing.assert_close(slotted, jvp(output, (parameters, x), (tangents, along)), **close)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(net(forward_ad.make_dual(x, along))).tangent
    torch.testing.assert_close(tangent, jvp(lambda x: plain(parameters, x), (x,), (along,))[1], **close)


def test_alphas_slope_has_a_forward_mode_too():
    net, parameters, _ = func_case(Stage.BLENDING, "add")
    x, one = torch.randn(5, 3).double(), torch.ones(())
    _, slope = jvp(
        lambda alpha: functional_call(net, {**parameters, "2.alpha": alpha}, (x,)).pow(3).sum(),
        (torch.tensor(0.3),), (one,),
    )  # fmt: skip
    net(x).pow(3).sum().backward()
    torch.testing.assert_close(slope, net[2].alpha.grad.double(), rtol=1e-6, atol=1e-6)


# Modes


def grown(**arguments):
    model = Mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    growth = GrowthController(model, optimizer, sinks=[], **arguments)
    return model, optimizer, growth


def train(model, optimizer, growth):
    model(torch.randn(Mlp.shape)).square().sum().backward()
    growth.measure()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("stage", STAGES)
def test_transforms_see_through_a_slot_of_channels_last_features(stage):
    slot, x = SeedSlot(), torch.randn(3, 8, 4, 4).double()
    slot.germinate(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Tanh()), probe=x)  # torch has no jvp of such a group norm
    move_to(slot, stage)
    x, along = (t.to(memory_format=torch.channels_last) for t in (x, torch.randn_like(x)))
    other = copy.deepcopy(slot)

    def each(function):
        return lambda x: vmap(lambda one: function(one[None]))(x).pow(3).sum()

    found = [
        (jvp(place, (given,), (along,))[1], grad(lambda x, f=place: f(x).pow(3).sum())(given), grad(each(place))(given))
        for place, given in ((slot, x), (other, x.contiguous()))
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("blend", BLENDS)
def test_a_life_under_inference_mode_goes_on_outside(blend):
    model, optimizer, growth = grown(schedule=AlphaSchedule(steps=0))
    probe = torch.randn(3, 7)
    with torch.inference_mode():
        growth.germinate("slot", Residual(7), probe=probe, blend=blend)
    assert not any(t.is_inference() for t in (*model.parameters(), *model.buffers(), *growth.monitor.buffers()))
    before = model.slot.seed.contract.weight.detach().clone()
    train(model, optimizer, growth)
    assert not torch.equal(model.slot.seed.contract.weight, before)
    with torch.inference_mode():
        growth.end_epoch(accuracy=0.5)
        growth.advance("slot")
    train(model, optimizer, growth)
    with torch.inference_mode():
        growth._mover.move(growth._lives["slot"], Stage.BLENDING, "told", "script")
        growth.set_alpha_target("slot", 0.5, steps=2)
    train(model, optimizer, growth)
    with torch.inference_mode():
        growth.prune("slot")
        for _ in range(3):
            growth.end_epoch(accuracy=0.5)
        growth.germinate("slot", lambda: Residual(7), probe=torch.randn(3, 7))
    train(model, optimizer, growth)
    assert growth.evidence()["slot"].samples == 1


ACTIONS = {
    "prune": lambda growth: growth.prune("1"),
    "fade": lambda growth: growth.prune("1", steps=1),
    "keep": lambda growth: growth.set_alpha_target("1", 1.0, steps=0),
    "end_epoch": lambda growth: growth.end_epoch(accuracy=0.5),
    "advance": lambda growth: growth.advance("1").passed or pytest.fail("it should become a fossil"),
    "germinate": lambda growth: growth.germinate("3", Residual(7)),
}


@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize("actions", [("prune",), ("fade", "keep"), ("fade", "end_epoch"), ("advance",), ("germinate",)])
def test_each_step_of_a_life_may_be_taken_under_inference_mode(actions, ready):
    model = nn.Sequential(nn.Linear(5, 7), SeedSlot(), SeedSlot(), SeedSlot(), nn.Linear(7, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    limits = GateThresholds(min_holding_epochs=None, max_accuracy_drop=None, max_harm_t=None)
    growth = GrowthController(model, optimizer, thresholds=limits, schedule=AlphaSchedule(steps=0), sinks=[])
    for name in "12":
        growth.germinate(name, Residual(7))
    if ready:
        growth._mover.move(growth._lives["1"], Stage.BLENDING, "told", "script")
    if ready and actions == ("advance",):
        growth._mover.move(growth._lives["1"], Stage.HOLDING, "told", "script")
    for action in actions:
        if action in ("keep", "fade", "advance") and not ready:
            continue
        train(model, optimizer, growth)
        with torch.inference_mode():
            ACTIONS[action](growth)
        buffers = (*model.parameters(), *model.buffers(), *growth.monitor.buffers())
        assert not any(tensor.is_inference() for tensor in buffers)
        for _ in range(2):
            train(model, optimizer, growth)
            growth.evidence()
        growth.monitor.reset()
        train(model, optimizer, growth)


def test_a_state_loaded_under_inference_mode_can_be_trained():
    _, _, growth = grown()
    growth.germinate("slot", Residual(7))
    model, optimizer, resumed = grown()
    with torch.inference_mode():
        resumed.load_state_dict(growth.state_dict(), seeds={"slot": Residual(7)}, check_weights=False)
    train(model, optimizer, resumed)


def test_weights_tied_inside_a_seed_stay_tied_when_they_leave_inference_mode():
    with torch.inference_mode():
        seed = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        seed[2].weight = seed[0].weight
        seed[0].bias.requires_grad_(False)
    slot = SeedSlot()
    slot.germinate(seed)
    assert slot.seed[0].weight is slot.seed[2].weight
    assert not slot.seed[0].bias.requires_grad
    move_to(slot, Stage.TRAINING)(torch.randn(3, 4)).sum().backward()
    assert slot.seed[0].weight.grad is not None


def test_a_seed_keeps_the_models_dtype_when_it_is_tried_under_autocast():
    model, _, growth = grown()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        probe = torch.tanh(model.first(torch.randn(Mlp.shape)))
        assert probe.dtype is torch.bfloat16
        growth.germinate("slot", Residual(7), probe=probe, blend="gate")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    bare = SeedSlot()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bare.germinate(nn.Linear(7, 7), probe=probe)
        assert {p.dtype for p in bare.parameters()} == {torch.float32}


def test_a_probe_that_autocast_left_behind_does_not_convert_the_seed():
    model, _, growth = grown()
    growth.germinate("slot", Residual(7), probe=torch.randn(3, 7).bfloat16())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_in_a_model_of_two_dtypes_the_seed_takes_that_of_the_probe():
    model = nn.Sequential(nn.Linear(3, 7), nn.Linear(7, 7).double(), SeedSlot())
    growth = GrowthController(model, torch.optim.SGD(model.parameters(), lr=0.1), sinks=[])
    growth.germinate("2", Residual(7), probe=torch.randn(3, 7).double())
    assert {p.dtype for p in model[2].parameters()} == {torch.float64}


# Features and outputs that are no dense real tensor

NO_FEATURES = {
    "tuple": (lambda: (torch.randn(2, 7), torch.randn(2, 7)), "tuple of 2"),
    "dict": (lambda: {"a": torch.randn(2, 7)}, "dict of 1"),
    "None": (lambda: None, "NoneType"),
    "packed": (lambda: pack_sequence([torch.randn(3, 7), torch.randn(2, 7)]), "PackedSequence"),
    "nested": (lambda: torch.nested.as_nested_tensor([torch.randn(3, 7)] * 2, layout=torch.jagged), "nested"),
    "sparse": (lambda: torch.randn(3, 7).to_sparse(), "sparse"),
    "complex": (lambda: torch.randn(3, 7, dtype=torch.complex64), "view_as_real"),
    "whole numbers": (lambda: torch.ones(3, 7, dtype=torch.int64), "int64"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_FEATURES)
def test_features_that_no_seed_can_take_are_refused_by_name(kind):
    make, words = NO_FEATURES[kind]
    model, _, growth = grown()
    features = make()
    assert model.slot(features) is features  # an empty slot is the identity for everything
    if features is not None:  # None is no probe at all
        with pytest.raises(WiringError, match=rf"slot 'slot'.*{words}"):
            growth.germinate("slot", Residual(7), probe=features)
    assert model.slot.stage is Stage.DORMANT
    growth.germinate("slot", Residual(7))
    for stage in (Stage.TRAINING, Stage.BLENDING):
        if model.slot.stage is not stage:
            model.slot.move(stage)
        with pytest.raises(WiringError, match=rf"slot 'slot'.*{words}"):
            model.slot(features)


@pytest.mark.parametrize("kind", NO_FEATURES)
def test_an_output_that_no_slot_can_use_is_refused_by_name(kind):
    class Odd(Residual):
        def forward(self, x):
            return NO_FEATURES[kind][0]()

    model, _, growth = grown()
    with pytest.raises(WiringError, match="slot 'slot'"):
        growth.germinate("slot", Odd(7), probe=torch.randn(3, 7))
    growth.germinate("slot", Odd(7))
    before = torch.random.get_rng_state()
    with pytest.raises(WiringError, match="slot 'slot': a seed"):
        model.slot(torch.zeros(3, 7))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_a_controller_an_error_says_a_slot():
    slot = SeedSlot()
    slot.germinate(Residual(7))
    with pytest.raises(WiringError, match="a slot takes one tensor"):
        move_to(slot, Stage.TRAINING)((torch.randn(2, 7),))


# Lazy seeds


def lazy():
    return nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(7))


def test_a_lazy_seed_is_finished_by_the_probe():
    model, optimizer, growth = grown()
    before = torch.random.get_rng_state()
    seed = lazy()
    verdict = growth.germinate("slot", seed, probe=torch.randn(3, 7, generator=torch.Generator().manual_seed(1)))
    assert verdict.passed
    assert seed[0].weight.shape == (8, 7)
    assert torch.equal(torch.random.get_rng_state(), before)
    train(model, optimizer, growth)
    assert growth.evidence()["slot"].samples == 1


def test_a_lazy_seed_of_inference_mode_can_be_trained():
    model, optimizer, growth = grown()
    with torch.inference_mode():
        growth.germinate("slot", lazy(), probe=torch.randn(3, 7))
    assert not any(t.is_inference() for t in model.parameters())
    train(model, optimizer, growth)


def test_a_lazy_seed_without_a_probe_is_refused_with_the_way_out():
    model, _, growth = grown()
    with pytest.raises(WiringError, match=r"slot 'slot'.*probe=features"):
        growth.germinate("slot", lazy())
    assert model.slot.stage is Stage.DORMANT
    growth.germinate("slot", lazy(), probe=torch.randn(3, 7))
    other = grown()[2]
    with pytest.raises(Exception, match="waits for its first features"):
        other.load_state_dict(growth.state_dict(), seeds={"slot": lazy})
    assert other.slots["slot"].stage is Stage.DORMANT


# Writing into what a slot handed on


@pytest.mark.parametrize("stage", [Stage.DORMANT, Stage.GERMINATED, *STAGES])
def test_what_is_written_into_a_slots_output_reaches_a_skip_where_it_would_without_a_slot(stage):
    """Empty or waiting it is nn.Identity, alias and all; with a seed at work its output has memory of its own."""
    slot = SeedSlot()
    if stage is not Stage.DORMANT:
        slot.germinate(Wide(), isolation=StraightThrough())
    move_to(slot, stage)
    features = torch.randn(5, 4, requires_grad=True) * 1
    before = features.detach().clone()
    out = slot(features)
    expected = (out if stage in STAGES else nn.Identity()(features.clone())).detach().clone().mul_(2)
    out.mul_(2)
    torch.testing.assert_close(out, expected)
    assert torch.equal(features, before if stage in STAGES else 2 * before)
    (out + features).sum().backward()  # and nothing that a backward pass needs was overwritten


def test_channels_last_hosts_in_a_whole_network():
    model = Cnn().to(memory_format=torch.channels_last)
    model.requires_grad_(False)
    model.slot.germinate(nn.Sequential(nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1)), probe=torch.randn(2, 8, 6, 6))
    x = torch.randn(Cnn.shape).to(memory_format=torch.channels_last)
    for stage in STAGES[:2]:
        model.slot.move(stage)
        model(x).square().sum().backward()
        assert all(p.grad is not None for p in model.slot.parameters())


@pytest.mark.parametrize("stage", STAGES[:2])
def test_writing_into_what_a_seed_was_given_is_an_error_and_not_a_wrong_gradient(stage):
    slot = SeedSlot()
    slot.germinate(Residual(4))
    move_to(slot, stage)
    features = torch.randn(5, 4, requires_grad=True) * 1
    features += slot(features)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        features.sum().backward()
