"""GradientMonitor: numbers by hand, changing models, saved states, clipping, and what it must not do."""

import copy
import gc
import io
import math
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from seedtriton import ConfigurationError, GradientMonitor, StateDictError, WiringError, ops
from seedtriton.core.evidence import (
    GAIN_SAMPLES,
    HOST_UNDEFINED,
    MEASURED,
    NEVER_MEASURED,
    NO_GRADIENT,
    NOT_FINITE,
    RATIO_EPS,
)
from seedtriton.gradients import reference

SGD = torch.optim.SGD


def weights(*values):
    return nn.Parameter(torch.tensor(values))


def give(parameter, *gradient):
    parameter.grad = torch.tensor(gradient, dtype=parameter.dtype)


class Pair:
    """A host of two numbers, a seed of two, and gradients written by hand."""

    def __init__(self, **options):
        self.host, self.seed = weights(1.0, 1.0), weights(3.0, 4.0)
        self.monitor = GradientMonitor([self.host], {"a": [self.seed]}, **options)

    def measure(self, host=(3.0, 4.0), seed=(0.6, 0.8)):
        for parameter, gradient in ((self.host, host), (self.seed, seed)):
            parameter.grad = None
            if gradient is not None:
                give(parameter, *gradient)
        self.monitor.measure()
        return self

    def read(self):
        return self.monitor.read()["a"]


class Net(nn.Module):
    """A host with a seed inside."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.seed = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 5))
        self.last = nn.Linear(5, 2)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.last(x + self.seed(x))

    def backward(self):
        self.zero_grad(set_to_none=True)
        self(torch.ones(3, 4) / 4).square().sum().backward()
        return self

    def host_parameters(self):
        return [*self.first.parameters(), *self.last.parameters()]


def norm(parameters):
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in parameters if p.grad is not None))


def same(a, b):
    """Equal, NaN included (the ring's mark for "no gain")."""
    return torch.equal(a.nan_to_num(nan=-1e9), b.nan_to_num(nan=-1e9))


def seed_evidence(monitor, model):
    monitor.measure()
    return monitor.read()[monitor.seeds[-1]]


# --- numbers ---


def test_ratio_and_norms_of_one_sample():
    found = Pair().measure().read()
    assert (found.status, found.samples, found.dropped, found.empty) == (MEASURED, 1, 0, 0)
    assert found.host_norm == pytest.approx(5.0)
    assert found.seed_norm == pytest.approx(1.0)
    assert found.ratio == pytest.approx(1.0 / (5.0 + RATIO_EPS), rel=1e-7)
    assert found.seed == "a"
    assert found.live_share == 1.0


def test_norms_are_root_means_of_the_squares_over_the_window():
    pair = Pair().measure((3.0, 4.0), (1.0, 0.0)).measure((0.0, 1.0), (2.0, 0.0))
    found = pair.read()
    assert found.host_norm == pytest.approx(math.sqrt((25 + 1) / 2))
    assert found.seed_norm == pytest.approx(math.sqrt((1 + 4) / 2))
    assert found.ratio == pytest.approx(math.sqrt(5 / 26))


def test_health_is_counted_tensor_by_tensor_whatever_its_size():
    # The same norm in few elements and in many: 8 is exploding as 2 of root mean square, not as a quarter.
    host, seed = weights(1.0), [weights(*[1.0] * n) for n in (16, 1024, 4, 4)]
    monitor = GradientMonitor([host], {"a": seed}, vanishing_rms=1e-3, exploding_rms=1.5)
    give(host, 1e6)
    for parameter, gradient in zip(seed, ([2.0] * 16, [0.25] * 1024, [1e-4] * 4, [0.0] * 4)):
        give(parameter, *gradient)
    monitor.measure()
    found = monitor.read()["a"]
    assert (found.vanishing_share, found.exploding_share, found.live_share) == (0.25, 0.25, 0.75)
    assert found.health == pytest.approx(1 - 0.5 * 0.5 - 0.8 * 0.25)


def test_what_is_not_counted_has_no_share():
    found = Pair(vanishing_rms=None, exploding_rms=0.1).measure().read()
    assert (found.vanishing_share, found.exploding_share, found.health) == (None, 1.0, None)
    found = Pair(vanishing_rms=1e3, exploding_rms=None).measure().read()
    assert (found.vanishing_share, found.exploding_share, found.health) == (1.0, None, None)


@pytest.mark.parametrize("name", ["vanishing_rms", "exploding_rms"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_limit_is_refused(name, value):
    with pytest.raises(ConfigurationError, match=rf"{name} must be finite and above 0, or None .* got {value!r}"):
        Pair(**{name: value})


def test_limits_the_wrong_way_round_are_refused():
    with pytest.raises(ConfigurationError, match=r"vanishing_rms 11\.0 is above exploding_rms 10\.0"):
        Pair(vanishing_rms=11.0)


def test_eps_and_floor_are_the_users():
    pair = Pair(eps=1.0, host_floor=0.5).measure()
    assert pair.read().ratio == pytest.approx(1.0 / 6.0)
    assert Pair(host_floor=5.1).measure().read().status == HOST_UNDEFINED


def test_rms_ratio_counts_the_elements_that_had_a_gradient():
    host, other, seed = weights(*[1.0] * 8), weights(1.0, 1.0), weights(1.0, 1.0)
    monitor = GradientMonitor([host, other], {"a": [seed]})
    give(host, *[1.0] * 8)
    give(seed, 1.0, 1.0)
    monitor.measure()
    found = monitor.read()["a"]
    assert found.ratio == pytest.approx(math.sqrt(2 / 8), rel=1e-6)
    assert found.rms_ratio == pytest.approx(1.0, rel=1e-6)


def test_the_window_wraps_and_keeps_the_newest():
    pair = Pair(window=3)
    for number in range(1, 6):
        pair.measure(seed=(float(number), 0.0))
    found = pair.read()
    assert found.samples == 3
    assert found.seed_norm == pytest.approx(math.sqrt((9 + 16 + 25) / 3))


def test_the_newest_gains_of_a_wrapped_window_are_in_order():
    alpha = torch.zeros((), requires_grad=True)
    pair = Pair(window=GAIN_SAMPLES + 30, alphas={"a": alpha})
    total = GAIN_SAMPLES + 50
    for number in range(total):
        alpha.grad = torch.tensor(-float(number))
        pair.measure()
    newest = range(total - GAIN_SAMPLES, total)
    assert pair.read().blend_gain == pytest.approx(sum(newest) / GAIN_SAMPLES)


def test_blend_gain_is_minus_the_mean_gradient_of_alpha():
    alpha = torch.zeros((), requires_grad=True)
    pair = Pair(alphas={"a": alpha})
    gradients = [-1.0, -2.0, -3.0, 0.5, -1.5, -2.5, -0.5, -2.0, -1.0]
    for gradient in gradients:
        alpha.grad = torch.tensor(gradient)
        pair.measure()
        assert alpha.grad.item() == 0.0
    found = pair.read()
    assert found.blend_gain == pytest.approx(-sum(gradients) / len(gradients))
    assert found.blend_gain_t > 0.0
    assert 1.0 <= found.effective_samples <= len(gradients)


def test_samples_without_a_gain_do_not_count_as_zero_gain():
    alpha = torch.zeros((), requires_grad=True)
    pair = Pair(alphas={"a": alpha}).measure()
    assert pair.read().blend_gain is None
    alpha.grad = torch.tensor(-4.0)
    assert pair.measure().read().blend_gain == 4.0


def test_alpha_is_looked_up_in_its_holder_every_time():
    class Slot:
        alpha = None

    slot = Slot()
    pair = Pair(alphas={"a": slot}).measure()
    for gradient in (-1.0, -3.0):
        slot.alpha = torch.zeros((), requires_grad=True)
        slot.alpha.grad = torch.tensor(gradient)
        pair.measure()
        assert slot.alpha.grad.item() == 0.0
    assert pair.read().blend_gain == pytest.approx(2.0)


def test_each_seed_has_its_own_alpha_and_its_own_column():
    host, one, two = weights(1.0), weights(1.0), weights(1.0)
    alpha = torch.zeros((), requires_grad=True)
    monitor = GradientMonitor([host], {"one": [one], "two": [two]}, alphas={"two": alpha})
    alpha.grad = torch.tensor(-5.0)
    for parameter, gradient in ((host, 2.0), (one, 1.0), (two, 8.0)):
        give(parameter, gradient)
    monitor.measure()
    found = monitor.read()
    assert list(found) == list(monitor.seeds) == ["one", "two"]
    assert [found[name].ratio for name in found] == pytest.approx([0.5, 4.0])
    assert [found[name].blend_gain for name in found] == [None, 5.0]


def test_live_share_is_of_the_parameters_that_train():
    parts = [weights(1.0), weights(1.0), weights(1.0), weights(1.0)]
    host = weights(1.0)
    monitor = GradientMonitor([host], {"a": parts})
    give(host, 1.0)
    give(parts[0], 1.0)
    give(parts[1], 0.0)
    assert seed_evidence(monitor, None).live_share == 0.25
    parts[3].requires_grad_(False)
    assert monitor.read()["a"].live_share is None
    assert seed_evidence(monitor, None).live_share == pytest.approx(1 / 3)


def test_displacement_is_relative_to_the_weights_at_the_beginning():
    pair = Pair()
    with torch.no_grad():
        pair.seed.add_(torch.tensor([0.3, 0.4]))
    assert pair.read().displacement == pytest.approx(0.1, rel=1e-5)


def test_displacement_of_weights_that_start_at_zero_has_a_floor():
    seed = nn.Parameter(torch.zeros(4))
    monitor = GradientMonitor([weights(1.0)], {"a": [seed]})
    assert monitor.read()["a"].displacement == 0.0
    with torch.no_grad():
        seed.fill_(5e-4)
    assert monitor.read()["a"].displacement == pytest.approx(0.5)


def test_displacement_is_over_all_tensors_of_the_seed():
    parts = [weights(3.0), weights(4.0)]
    monitor = GradientMonitor([weights(1.0)], {"a": parts})
    with torch.no_grad():
        parts[1].add_(2.0)
    assert monitor.read()["a"].displacement == pytest.approx(2.0 / 5.0)


def test_displacement_is_unknown_once_the_shapes_have_changed():
    pair = Pair()
    pair.seed.data = torch.ones(7)
    assert pair.read().displacement is None


def test_displacement_of_bf16_weights_is_not_rounded_again():
    seed = nn.Parameter(torch.full((64,), 1.0, dtype=torch.bfloat16))
    monitor = GradientMonitor([weights(1.0)], {"a": [seed]})
    with torch.no_grad():
        seed[0] = 258.0  # 257 more, which bf16 cannot hold
    assert monitor.read()["a"].displacement == pytest.approx(257 / 8)


def test_a_seed_with_a_frozen_quantised_tensor_is_read():
    seed = nn.Linear(2, 2)
    seed.packed = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    monitor = GradientMonitor([weights(1.0)], {"a": seed})
    assert monitor.read()["a"].displacement == 0.0


def test_wide_lanes_reach_far_magnitudes():
    assert Pair().measure((1e20, 0.0), (1e20, 0.0)).read().status == NOT_FINITE
    found = Pair(lanes=torch.float64).measure((1e20, 0.0), (1e19, 0.0)).read()
    assert found.ratio == pytest.approx(0.1)


# --- five different answers ---


def test_never_measured_no_gradient_not_finite_undefined_and_zero_are_different():
    zero = (0.0, 0.0)
    answers = {
        "never": Pair().read(),
        "after zero_grad": Pair().measure(None, None).read(),
        "seed unused": Pair().measure(seed=None).read(),
        "nan": Pair().measure(seed=(math.nan, 0.0)).read(),
        "frozen host": Pair().measure(host=None).read(),
        "zero host": Pair().measure(host=zero).read(),
        "zero seed": Pair().measure(seed=zero).read(),
    }
    assert {name: found.status for name, found in answers.items()} == {
        "never": NEVER_MEASURED,
        "after zero_grad": NO_GRADIENT,
        "seed unused": NO_GRADIENT,
        "nan": NOT_FINITE,
        "frozen host": HOST_UNDEFINED,
        "zero host": HOST_UNDEFINED,
        "zero seed": MEASURED,
    }
    assert len({found.reason for found in answers.values()}) == 6  # the two undefined ones agree
    assert {name for name, found in answers.items() if found.ratio is not None} == {"zero seed"}
    assert answers["zero seed"].ratio == 0.0
    assert answers["zero seed"].live_share == 0.0
    assert (answers["after zero_grad"].empty, answers["after zero_grad"].samples) == (1, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["host", "seed"])
def test_a_sample_that_is_not_finite_is_dropped_and_counted(side, bad):
    pair = Pair().measure().measure(**{side: (bad, 1.0)}).measure()
    found = pair.read()
    assert (found.status, found.samples, found.dropped) == (MEASURED, 2, 1)
    assert found.ratio == pytest.approx(0.2)


def test_a_bad_seed_does_not_drop_the_samples_of_the_others():
    host, one, two = weights(1.0), weights(1.0), weights(1.0)
    monitor = GradientMonitor([host], {"one": [one], "two": [two]})
    for parameter, gradient in ((host, 2.0), (one, math.nan), (two, 1.0)):
        give(parameter, gradient)
    monitor.measure()
    found = monitor.read()
    assert (found["one"].status, found["two"].status) == (NOT_FINITE, MEASURED)


# --- who is host and who is seed ---


def test_seeds_inside_the_host_are_taken_out_by_identity():
    model = Net()
    monitor = GradientMonitor(model, {"a": model.seed})
    found = seed_evidence(monitor, model.backward())
    assert found.host_norm == pytest.approx(norm(model.host_parameters()), rel=1e-6)
    assert found.seed_norm == pytest.approx(norm(model.seed.parameters()), rel=1e-6)


def test_tied_parameters_count_once():
    model = Net()
    model.seed[0].alias = model.seed[0].weight
    both = [*model.first.parameters(), *model.first.parameters(), model.last]
    monitor = GradientMonitor(both, {"a": [model.seed, model.seed[0]]})
    found = seed_evidence(monitor, model.backward())
    assert found.host_norm == pytest.approx(norm(model.host_parameters()), rel=1e-6)
    assert found.seed_norm == pytest.approx(norm(model.seed.parameters()), rel=1e-6)
    assert found.live_share == 1.0


@pytest.mark.parametrize(
    "host, seed",
    [
        (lambda m: m, lambda m: m.seed.parameters()),
        (lambda m: m.parameters(), lambda m: [m.seed[0], m.seed[2]]),
        (lambda m: [m.first, m.last], lambda m: list(m.seed.parameters())),
        (lambda m: (p for p in m.host_parameters()), lambda m: (module for module in m.seed)),
        (lambda m: [m.first, *m.last.parameters()], lambda m: nn.ModuleList(m.seed)),
    ],
)
def test_hosts_and_seeds_are_modules_parameters_generators_or_lists(host, seed):
    model = Net()
    monitor = GradientMonitor(host(model), {"a": seed(model)})
    for _ in range(2):
        found = seed_evidence(monitor, model.backward())
    assert found.samples == 2
    assert found.ratio == pytest.approx(norm(model.seed.parameters()) / norm(model.host_parameters()), rel=1e-6)


def test_one_bare_parameter_is_measured_or_refused_but_not_taken_apart():
    host, scale = weights(2.0, 2.0), weights(3.0, 1.0)
    try:
        monitor = GradientMonitor([host], {"a": scale})
    except ConfigurationError:
        return
    give(host, 1.0, 0.0)
    give(scale, 1.0, 0.0)
    assert seed_evidence(monitor, None).ratio == pytest.approx(1.0)


def test_seeds_that_overlap_are_refused_by_name():
    model = Net()
    with pytest.raises(WiringError, match=r"seeds 'a' and 'b' share a parameter of shape \(3, 5\)"):
        GradientMonitor(model, {"a": model.seed, "b": model.seed[0]})


@pytest.mark.parametrize("empty", [nn.ReLU(), [], [nn.Parameter(torch.empty(0))]])
def test_an_empty_seed_is_refused(empty):
    with pytest.raises(WiringError, match="seed 'a' has no parameters"):
        GradientMonitor([weights(1.0)], {"a": empty})


@pytest.mark.parametrize("host", [lambda m: m.seed, lambda m: [], lambda m: nn.Tanh()])
def test_a_host_with_nothing_outside_the_seeds_is_refused(host):
    model = Net()
    with pytest.raises(WiringError, match="the host has no parameters outside the seeds"):
        GradientMonitor(host(model), {"a": model.seed})


def test_a_monitor_without_seeds_measures_the_host_and_clips():
    host = weights(1.0, 1.0)
    monitor = GradientMonitor([host], {})
    give(host, 3.0, 4.0)
    monitor.measure()
    assert monitor.read() == {}
    assert monitor.clip_grad_norm_(1.0).item() == pytest.approx(5.0)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"window": 0}, "window .* got 0"),
        ({"window": 2.0}, r"window .* got 2\.0"),
        ({"window": True}, "window .* got True"),
        ({"eps": 0.0}, r"eps .* got 0\.0"),
        ({"eps": math.nan}, "eps .* got nan"),
        ({"host_floor": -1.0}, r"host_floor .* got -1\.0"),
        ({"host_floor": math.inf}, "host_floor .* got inf"),
        ({"lanes": torch.float16}, "lanes must be one of .* got torch.float16"),
        ({"alphas": {"b": torch.zeros(())}}, r"unknown seeds \['b'\]; seeds are \['a'\]"),
        ({"alphas": {"a": 0.5}}, "an alpha is .* got float"),
    ],
)
def test_impossible_options_are_named(options, words):
    with pytest.raises(ConfigurationError, match=words):
        Pair(**options)


@pytest.mark.parametrize("seed", [{"weight": weights(1.0)}, [3.0], "abc"])
def test_what_is_neither_module_nor_parameter_is_named(seed):
    with pytest.raises(ConfigurationError, match=r"modules or iterables of parameters, got (str|float)"):
        GradientMonitor([weights(1.0)], {"a": seed})


# --- models that change ---


def test_parameters_frozen_and_thawed_after_construction():
    model = Net()
    model.seed.requires_grad_(False)
    monitor = GradientMonitor(model, {"a": model.seed})
    assert seed_evidence(monitor, model.backward()).status == NO_GRADIENT
    model.seed.requires_grad_(True)
    model.first.requires_grad_(False)
    monitor.reset()
    found = seed_evidence(monitor, model.backward())
    assert (found.status, found.live_share) == (MEASURED, 1.0)
    assert found.host_norm == pytest.approx(norm(model.last.parameters()), rel=1e-6)


def assign(module):
    """Load with assign=True: every parameter becomes another object, a tenth larger."""
    module.load_state_dict({k: v * 1.1 for k, v in module.state_dict().items()}, assign=True)


@pytest.mark.parametrize("part", [lambda m: m, lambda m: m.first, lambda m: m.seed, lambda m: m.seed[2]])
def test_parameters_replaced_by_a_load_are_found(part):
    model = Net()
    monitor = GradientMonitor(model, {"a": model.seed})
    assign(part(model))
    found = seed_evidence(monitor, model.backward())
    assert found.live_share == 1.0
    assert found.host_norm == pytest.approx(norm(model.host_parameters()), rel=1e-6)
    assert found.seed_norm == pytest.approx(norm(model.seed.parameters()), rel=1e-6)


def test_parameters_replaced_twice_are_found_twice():
    model = Net()
    monitor = GradientMonitor(model, {"a": [model.seed[0], model.seed[2]]})
    for _ in range(2):
        assign(model)
        assert seed_evidence(monitor, model.backward()).live_share == 1.0


def test_clipping_finds_parameters_replaced_by_a_load():
    model = Net()
    monitor = GradientMonitor(model, {"a": model.seed})
    assign(model)
    model.backward()
    assert monitor.clip_grad_norm_(1e-3).item() > 1e-2
    assert norm(model.parameters()) == pytest.approx(1e-3, rel=1e-2)


def test_a_read_right_after_a_load_sees_the_new_parameters():
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    monitor = GradientMonitor(model, {"a": model.seed}, optimizers=optimizer)
    assign(model)
    found = monitor.read()["a"]
    assert found.displacement == pytest.approx(0.1, rel=1e-4)
    assert found.in_optimizer is False


def test_a_reset_right_after_a_load_starts_from_the_new_weights():
    model = Net()
    monitor = GradientMonitor(model, {"a": model.seed})
    assign(model)
    monitor.reset()
    seed_evidence(monitor, model.backward())
    assert monitor.read()["a"].displacement == 0.0


@pytest.mark.parametrize("change", [lambda m: m.to(torch.float64), lambda m: m.double(), lambda m: m.bfloat16()])
def test_models_that_change_their_dtype_are_measured(change):
    model = Net()
    monitor = GradientMonitor(model, {"a": model.seed})
    change(model)
    model.zero_grad()
    dtype = model.first.weight.dtype
    model(torch.ones(3, 4, dtype=dtype)).square().sum().backward()
    found = seed_evidence(monitor, model)
    assert found.seed_norm == pytest.approx(norm(model.seed.parameters()), rel=1e-6)
    if dtype == torch.float64:
        assert found.displacement == 0.0


def test_refresh_finds_parameters_that_no_hook_can_see():
    model = Net()
    monitor = GradientMonitor(model, {"a": model.seed})
    model.seed[2] = nn.Linear(3, 5)
    monitor.refresh()
    assert seed_evidence(monitor, model.backward()).seed_norm == pytest.approx(norm(model.seed.parameters()), rel=1e-6)


@pytest.mark.parametrize("change", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_the_ring_stays_float64_when_the_monitor_is_cast(change):
    pair = Pair().measure()
    assert change(pair.monitor) is pair.monitor
    assert {name: b.dtype for name, b in pair.monitor.named_buffers()} == {
        "ring": torch.float64,
        "count": torch.int64,
        "since": torch.int64,
        "summary": torch.float64,
    }
    assert pair.measure().read().samples == 2


def test_a_monitor_made_in_a_device_context_lives_where_its_parameters_do():
    host, seed = weights(1.0), weights(1.0)
    with torch.device("meta"):
        monitor = GradientMonitor([host], {"a": [seed]})
    assert monitor.ring.device.type == "cpu"
    assert monitor.read()["a"].status == NEVER_MEASURED


def test_a_monitor_used_in_a_device_context_stays_where_it_is():
    pair = Pair().measure()
    with torch.device("meta"):
        pair.monitor.reset()
        assert pair.read().status == NEVER_MEASURED
        pair.monitor.measure()
        assert pair.read().ratio == pytest.approx(0.2)
        assert pair.monitor.latest().evidence["a"].ratio == pytest.approx(0.2)
        assert float(pair.monitor.clip_grad_norm_(1.0)) == pytest.approx(26**0.5)
    assert pair.host.grad.norm() == pytest.approx((25 / 26) ** 0.5)


def test_a_monitored_model_is_copied_pickled_and_saved_as_before():
    model = Net().backward()
    monitor = GradientMonitor(model, {"a": model.seed}, optimizers=SGD(model.parameters(), lr=0.1))
    monitor.measure()
    names = set(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assign(twin)  # the hooks of the copy know no monitor and do nothing
        assert set(twin.state_dict()) == names
    assert seed_evidence(monitor, model.backward()).status == MEASURED


def test_refreshing_leaves_one_hook_per_module_however_often():
    model = Net()
    monitor = GradientMonitor(model, {})
    for _ in range(3):
        monitor.refresh()
    assert [len(module._load_state_dict_post_hooks) for module in model.modules()] == [1] * 7


def test_a_monitor_inside_its_model_adds_no_parameters_and_is_copied_with_it():
    model = Net()
    names = [name for name, _ in model.named_parameters()]
    model.monitor = GradientMonitor(model, {"a": model.seed})
    assert [name for name, _ in model.named_parameters()] == names
    twin = copy.deepcopy(model)
    assert seed_evidence(twin.monitor, twin.backward()).seed_norm == pytest.approx(
        norm(twin.seed.parameters()), rel=1e-6
    )
    assert model.monitor.read()["a"].status == NEVER_MEASURED


# --- seeds that come and go ---


def test_a_new_seed_keeps_the_samples_of_the_others_and_starts_with_none():
    pair = Pair().measure().measure()
    before = pair.read()
    late = weights(1.0)
    pair.monitor.add_seed("b", [late])
    found = pair.monitor.read()
    assert found["a"] == before
    assert found["b"].status == NEVER_MEASURED
    give(late, 2.5)
    pair.measure()
    found = pair.monitor.read()
    assert (found["a"].samples, found["b"].samples) == (3, 1)
    assert found["b"].ratio == pytest.approx(0.5)


def test_a_new_seed_found_in_the_host_leaves_the_host():
    model = Net()
    monitor = GradientMonitor(model, {})
    monitor.add_seed("a", model.seed)
    found = seed_evidence(monitor, model.backward())
    assert found.host_norm == pytest.approx(norm(model.host_parameters()), rel=1e-6)


def test_a_new_seed_has_its_alpha_and_counts_its_steps_from_now():
    pair = Pair()
    late, alpha = weights(1.0), torch.zeros((), requires_grad=True)
    optimizer = SGD([pair.host, pair.seed, late], lr=0.0)
    monitor = GradientMonitor([pair.host], {"a": [pair.seed]}, optimizers=optimizer)
    optimizer.step()
    monitor.add_seed("b", [late], alpha=alpha)
    optimizer.step()
    alpha.grad = torch.tensor(-2.0)
    monitor.measure()
    found = monitor.read()
    assert [found[name].optimizer_steps for name in "ab"] == [2, 1]
    assert [found[name].blend_gain for name in "ab"] == [None, None]  # no gradient at all: an empty sample
    optimizer.step()
    alpha.grad = torch.tensor(-2.0)
    give(late, 1.0)
    monitor.measure()
    assert monitor.read()["b"].blend_gain == 2.0


def test_a_seed_that_leaves_takes_only_its_own_samples():
    host, one, two = weights(1.0), weights(1.0), weights(1.0)
    alpha = torch.zeros((), requires_grad=True)
    monitor = GradientMonitor([host], {"one": [one], "two": [two]}, alphas={"two": alpha})
    for gradient in (1.0, 2.0):
        alpha.grad = torch.tensor(-gradient)
        for parameter in (host, one, two):
            give(parameter, gradient)
        monitor.measure()
    before = monitor.read()["two"]
    monitor.remove_seed("one")
    assert monitor.seeds == ("two",)
    assert monitor.read() == {"two": before}
    monitor.reset("two")
    alpha.grad = torch.tensor(-8.0)
    give(two, 6.0)
    monitor.measure()
    found = monitor.read()["two"]
    assert (found.ratio, found.blend_gain) == (pytest.approx(3.0), 8.0)


def test_a_seed_named_twice_is_removed_once_and_nothing_happens_for_no_name():
    host, one, two = weights(1.0), weights(1.0), weights(1.0)
    monitor = GradientMonitor([host], {"one": [one], "two": [two]})
    for parameter in (host, one, two):
        give(parameter, 1.0)
    monitor.measure()
    monitor.remove_seed()
    monitor.measure()
    assert monitor.read()["two"].samples == 2
    monitor.remove_seed("one", "one")
    monitor.measure()
    assert monitor.seeds == ("two",)
    assert monitor.read()["two"].samples == 3
    assert list(monitor.state_dict()["_extra_state"]["marks"]) == ["two"]


def test_what_is_left_of_a_seed_in_the_host_counts_as_host():
    model = Net()
    monitor = GradientMonitor(model, {"a": model.seed, "b": model.last})
    monitor.remove_seed("a")
    found = seed_evidence(monitor, model.backward())
    rest = [*model.first.parameters(), *model.seed.parameters()]
    assert found.host_norm == pytest.approx(norm(rest), rel=1e-6)


def test_a_seed_can_come_back_under_its_name():
    pair = Pair().measure()
    pair.monitor.remove_seed("a")
    pair.monitor.add_seed("a", [pair.seed])
    assert pair.read().status == NEVER_MEASURED
    assert pair.measure().read().samples == 1


@pytest.mark.parametrize(
    "name, seed, alpha, error",
    [
        ("a", lambda p: [weights(1.0)], None, ConfigurationError),
        ("b", lambda p: [p.seed], None, WiringError),
        ("b", lambda p: [p.host], None, WiringError),
        ("b", lambda p: nn.ReLU(), None, WiringError),
        ("b", lambda p: [1.0], None, ConfigurationError),
        ("b", lambda p: [weights(1.0)], 0.5, ConfigurationError),
        ("b", lambda p: [p.seed], torch.zeros(()), WiringError),
        pytest.param(
            "b", lambda p: nn.LazyLinear(3), None, Exception, marks=pytest.mark.filterwarnings("ignore:Lazy modules")
        ),
    ],
)
def test_a_seed_that_is_refused_leaves_everything_as_it_was(name, seed, alpha, error):
    pair = Pair(optimizers=SGD([weights(1.0)], lr=0.1)).measure()
    before, state = pair.read(), copy.deepcopy(pair.monitor.state_dict())
    with pytest.raises(error):
        pair.monitor.add_seed(name, seed(pair), alpha=alpha)
    assert pair.monitor.seeds == ("a",)
    assert pair.monitor.read() == {"a": before}
    assert same(pair.monitor.ring, state["ring"])
    assert pair.measure().read().samples == 2
    pair.monitor.add_seed("b", [weights(1.0)])
    assert pair.monitor.seeds == ("a", "b")


def test_the_alpha_of_a_refused_seed_is_forgotten():
    pair = Pair()
    late, alpha = weights(1.0), torch.zeros((), requires_grad=True)
    with pytest.raises(WiringError):
        pair.monitor.add_seed("b", [pair.seed], alpha=alpha)
    pair.monitor.add_seed("b", [late])
    give(late, 1.0)
    alpha.grad = torch.tensor(-2.0)
    pair.measure()
    assert pair.monitor.read()["b"].blend_gain is None
    assert alpha.grad == -2.0


@pytest.mark.parametrize("call", ["reset", "remove_seed"])
def test_an_unknown_seed_is_named(call):
    with pytest.raises(ConfigurationError, match=r"no seed is called 'x'; seeds are \['a'\]"):
        getattr(Pair().monitor, call)("x")


# --- reset, optimizers, age ---


def test_reset_of_one_seed_drops_its_samples_and_restarts_its_displacement():
    host, one, two = weights(1.0), weights(2.0), weights(2.0)
    monitor = GradientMonitor([host], {"one": [one], "two": [two]})
    for parameter in (host, one, two):
        give(parameter, 1.0)
    monitor.measure()
    with torch.no_grad():
        one.add_(1.0)
        two.add_(1.0)
    before = monitor.read()["one"]
    monitor.reset("two")
    found = monitor.read()
    assert found["one"] == before
    assert (found["two"].status, found["two"].displacement) == (NEVER_MEASURED, 0.0)
    give(two, 3.0)
    monitor.measure()
    found = monitor.read()
    assert (found["one"].samples, found["two"].samples) == (2, 1)
    assert found["two"].ratio == pytest.approx(3.0)


def test_reset_of_all_drops_every_sample():
    pair = Pair().measure()
    pair.monitor.add_seed("b", [weights(1.0)])
    pair.measure().monitor.reset()
    assert {found.status for found in pair.monitor.read().values()} == {NEVER_MEASURED}


def test_membership_is_unknown_without_an_optimizer():
    found = Pair().measure().read()
    assert (found.in_optimizer, found.optimizer_steps, found.age) == (None, None, None)


def test_membership_is_of_every_parameter_that_requires_grad():
    parts = [weights(1.0), weights(1.0)]
    host = weights(1.0)
    optimizer = SGD([host, parts[0]], lr=0.1)
    monitor = GradientMonitor([host], {"a": parts}, optimizers=optimizer)
    assert monitor.read()["a"].in_optimizer is False
    parts[1].requires_grad_(False)
    assert monitor.read()["a"].in_optimizer is True
    parts[1].requires_grad_(True)
    optimizer.add_param_group({"params": [parts[1]]})
    assert monitor.read()["a"].in_optimizer is True
    for part in parts:
        part.requires_grad_(False)
    assert monitor.read()["a"].in_optimizer is False


def test_membership_may_be_spread_over_several_optimizers_and_the_slowest_counts():
    host, parts = weights(1.0), [weights(1.0), weights(1.0)]
    one, two, other = SGD([host, parts[0]], lr=0.1), SGD([parts[1]], lr=0.1), SGD([weights(1.0)], lr=0.1)
    monitor = GradientMonitor([host], {"a": parts}, optimizers=[one, two, other])
    for _ in range(3):
        one.step()
    two.step()
    found = monitor.read()["a"]
    assert (found.in_optimizer, found.optimizer_steps) == (True, 1)


def test_steps_of_an_optimizer_without_the_seed_do_not_count():
    pair = Pair()
    optimizer = SGD([pair.host], lr=0.1)
    monitor = GradientMonitor([pair.host], {"a": [pair.seed]}, optimizers=optimizer)
    optimizer.step()
    found = monitor.read()["a"]
    assert (found.in_optimizer, found.optimizer_steps) == (False, None)


def test_reset_restarts_the_count_of_steps():
    pair = Pair()
    optimizer = SGD([pair.seed], lr=0.0)
    monitor = GradientMonitor([pair.host], {"a": [pair.seed]}, optimizers=optimizer)
    optimizer.step()
    monitor.reset("a")
    assert monitor.read()["a"].optimizer_steps == 0
    optimizer.step()
    assert monitor.read()["a"].optimizer_steps == 1


def test_an_optimizer_that_is_gone_is_forgotten():
    pair = Pair(optimizers=SGD([weights(1.0)], lr=0.1))
    gc.collect()
    assert pair.read().in_optimizer is None


def test_age_counts_steps_since_a_read_found_something_new():
    host, seed = weights(1.0), weights(1.0)
    optimizer = SGD([host, seed], lr=0.0)
    monitor = GradientMonitor([host], {"a": [seed]}, optimizers=optimizer)
    optimizer.step()
    assert monitor.read()["a"].age == 1
    give(host, 1.0)
    give(seed, 1.0)
    monitor.measure()
    optimizer.step()
    assert monitor.read()["a"].age == 0
    for _ in range(3):
        optimizer.step()
    assert monitor.read()["a"].age == 3
    give(seed, math.nan)
    monitor.measure()
    assert monitor.read()["a"].age == 3
    give(seed, 1.0)
    monitor.measure()
    assert monitor.read()["a"].age == 0
    optimizer.step()
    monitor.reset("a")
    assert monitor.read()["a"].age == 0


# --- what it must not do ---


class Forbid(TorchDispatchMode):
    """No number may go to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default), func
        assert "nonzero" not in str(func), func
        return func(*args, **kwargs or {})


@pytest.fixture
def copies(monkeypatch):
    """Counts the ways in which numbers reach Python without a dispatched op."""
    calls = []
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, name=name, original=original, **kwargs):
            calls.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    return calls


def test_measuring_sends_nothing_to_the_host(copies, monkeypatch):
    # On a CPU a look at a number is no wait, and is taken: here tensors are treated as those of a GPU.
    monkeypatch.setattr(reference, "_on_host", lambda _: False)
    model = Net()
    alpha = torch.zeros((), requires_grad=True)
    monitor = GradientMonitor(model, {"a": model.seed}, alphas={"a": alpha})
    model.backward()
    alpha.grad = torch.tensor(1.0)
    copies.clear()
    with Forbid():
        monitor.measure()
    assert copies == []
    assert int(monitor.count) == 1


def test_that_check_can_fail():
    with Forbid(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        torch.ones(()).item()


def test_reading_any_number_of_seeds_is_one_copy(copies):
    model = Net()
    seeds = {"a": model.seed[0], "b": model.seed[2]}
    monitor = GradientMonitor(model, seeds, optimizers=SGD(model.parameters(), lr=0.1))
    for _ in range(5):
        model.backward()
        monitor.measure()
    copies.clear()
    with Forbid():
        monitor.read()
    assert copies == ["tolist"]


def test_reading_twice_says_the_same():
    pair = Pair().measure()
    assert pair.read() == pair.read()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_measures_in_every_grad_mode(context):
    pair = Pair().measure()
    with context():
        pair.monitor.measure()
        assert pair.read().samples == 2
    pair.monitor.measure()
    assert pair.read().samples == 3
    assert not pair.monitor.ring.requires_grad


def test_measuring_leaves_gradients_weights_and_random_state_untouched():
    model = Net().backward()
    monitor = GradientMonitor(model, {"a": model.seed})
    tensors = [*model.parameters(), *(p.grad for p in model.parameters())]
    before = [(t._version, t.detach().clone()) for t in tensors]
    random = torch.get_rng_state()
    monitor.measure()
    monitor.read()
    assert all(t._version == version and torch.equal(t, value) for t, (version, value) in zip(tensors, before))
    assert torch.equal(random, torch.get_rng_state())


def test_it_keeps_no_gradient_alive():
    model = Net().backward()
    monitor = GradientMonitor(model, {"a": model.seed}, optimizers=SGD(model.parameters(), lr=0.1))
    seen = [weakref.ref(p.grad) for p in model.parameters()]
    monitor.measure()
    monitor.read()
    monitor.clip_grad_norm_(1.0)
    monitor.measure()
    model.zero_grad(set_to_none=True)
    assert [ref() for ref in seen] == [None] * len(seen)


def test_it_dies_when_dropped_although_model_and_optimizer_live():
    model = Net().backward()
    optimizer = SGD(model.parameters(), lr=0.1)
    monitor = GradientMonitor(model, {"a": model.seed}, optimizers=optimizer)
    monitor.measure()
    monitor.read()
    ref = weakref.ref(monitor)
    gc.disable()
    try:
        del monitor
        assert ref() is None
    finally:
        gc.enable()
    assign(model)
    optimizer.step()


def test_calling_it_measures_and_it_compiles_whole():
    torch._dynamo.reset()
    pair = Pair().measure()
    pair.monitor()
    torch.compile(pair.monitor, fullgraph=True, backend="eager")()
    found = pair.read()
    assert found.samples == 3
    assert found.ratio == pytest.approx(0.2)


# --- saved states ---


def saved(monitor):
    file = io.BytesIO()
    torch.save(monitor.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Run:
    """A short training that can be continued in "another process"."""

    def __init__(self):
        self.model = Net()
        self.alpha = torch.zeros((), requires_grad=True)
        self.optimizer = SGD(self.model.parameters(), lr=0.1)
        self.monitor = GradientMonitor(
            self.model, {"a": self.model.seed}, window=4, alphas={"a": self.alpha}, optimizers=self.optimizer
        )

    def train(self, steps):
        for step in range(steps):
            self.model.backward()
            self.alpha.grad = torch.tensor(-1.0 - step)
            self.monitor.measure()
            self.optimizer.step()
        return self

    def continued(self):
        other = Run()
        other.model.load_state_dict(self.model.state_dict())
        other.monitor.load_state_dict(saved(self.monitor))
        return other

    def read(self):
        return self.monitor.read()["a"]


@pytest.mark.parametrize("assigned", [False, True])
def test_a_state_survives_saving_with_identical_evidence(assigned):
    run = Run().train(6)
    other = Run()
    other.model.load_state_dict(run.model.state_dict())
    other.monitor.load_state_dict(saved(run.monitor), assign=assigned)
    assert other.read() == run.read()
    assert other.read().displacement > 0.0


def test_a_loaded_monitor_goes_on_as_the_saved_one():
    run = Run().train(3)
    run.monitor.reset("a")
    run.train(2).read()
    other = run.continued()
    assert other.read().optimizer_steps == 2
    assert other.train(2).read() == run.train(2).read()


def test_a_window_that_is_stale_is_stale_after_loading():
    run = Run().train(2)
    run.read()
    run.optimizer.step()
    run.optimizer.step()
    assert run.read().age == run.continued().read().age == 2


def test_a_saved_state_shares_no_memory_with_the_weights():
    run = Run().train(1)
    state = run.monitor.state_dict()
    other = Run()
    other.monitor.load_state_dict(state)
    other.monitor.reset()
    other.train(3)
    assert run.read() == run.continued().read()


def edit(state, key, value):
    extra = copy.deepcopy(state["_extra_state"])
    if value is KeyError:
        del extra[key]
    else:
        extra[key] = value
    return {**state, "_extra_state": extra}


def edit_mark(state, key, value):
    marks = copy.deepcopy(state["_extra_state"]["marks"])
    if value is KeyError:
        del marks["a"][key]
    else:
        marks["a"][key] = value
    return edit(state, "marks", marks)


BAD_STATES = {
    "no extra state": lambda s: {k: v for k, v in s.items() if k != "_extra_state"},
    "no dict": lambda s: {**s, "_extra_state": 3},
    "no version": lambda s: edit(s, "version", KeyError),
    "another version": lambda s: edit(s, "version", 1),
    "other seeds": lambda s: edit(s, "seeds", ["b"]),
    "no seeds": lambda s: edit(s, "seeds", KeyError),
    "no steps": lambda s: edit(s, "steps", KeyError),
    "measurements since the step of optimizers it has not": lambda s: edit(s, "waited", [0, 0, 0]),
    "measurements since the step below zero": lambda s: edit(s, "waited", [-1]),
    "no marks": lambda s: edit(s, "marks", KeyError),
    "unknown extra key": lambda s: edit(s, "surprise", 1),
    "no mark of the seed": lambda s: edit(s, "marks", {}),
    "no weights": lambda s: edit_mark(s, "weights", KeyError),
    "weights of another shape": lambda s: edit_mark(s, "weights", [torch.ones(3)]),
    "no newest": lambda s: edit_mark(s, "newest", KeyError),
    "no ring": lambda s: {k: v for k, v in s.items() if k != "ring"},
    "no count": lambda s: {k: v for k, v in s.items() if k != "count"},
    "another window": lambda s: {**s, "ring": s["ring"][:3]},
    "another number of segments": lambda s: {**s, "since": s["since"][:1]},
    "ring of the wrong kind": lambda s: {**s, "ring": [1.0]},
    "unknown key": lambda s: {**s, "surprise": torch.ones(1)},
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_a_bad_state_is_refused_and_changes_nothing(name):
    state = saved(Run().train(5).monitor)
    run = Run().train(2)
    before = run.read(), copy.deepcopy(run.monitor.state_dict())
    with pytest.raises(StateDictError, match="GradientMonitor"):
        run.monitor.load_state_dict(BAD_STATES[name](state))
    assert run.read() == before[0]
    assert same(run.monitor.ring, before[1]["ring"])
    assert run.monitor.count == before[1]["count"]


def test_a_refused_state_names_both_sides():
    state = saved(Run().monitor)
    with pytest.raises(StateDictError, match=r"version 1, .* reads version 2"):
        Run().monitor.load_state_dict(edit(state, "version", 1))
    with pytest.raises(StateDictError, match=r"seeds \['b'\], the monitor has \['a'\]"):
        Run().monitor.load_state_dict(edit(state, "seeds", ["b"]))
    with pytest.raises(StateDictError, match=r"'ring' .* \(4, 2, 7\)"):
        Run().monitor.load_state_dict({**state, "ring": state["ring"][:3]})


# --- clipping ---


@pytest.fixture
def passes(monkeypatch):
    """How often gradients were summed outside a measurement."""
    calls = []
    original = ops.segmented_sumsq
    monkeypatch.setattr(ops, "segmented_sumsq", lambda *a, **k: calls.append(1) or original(*a, **k))
    return calls


def twins(scale=1.0):
    """A model with gradients, and a copy of it for torch to clip."""
    model = Net().backward()
    if scale != 1.0:
        for p in model.parameters():
            p.grad.mul_(scale)
    other = copy.deepcopy(model)
    for p, q in zip(model.parameters(), other.parameters()):
        q.grad = p.grad.clone()
    return model, other, GradientMonitor(model, {"a": model.seed})


def gradients(model):
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("max_norm", [1e-3, 0.5, 1e3, math.inf])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 300.0, 0.0])
def test_clipping_is_torchs(scale, max_norm, measured):
    model, other, monitor = twins(scale)
    if measured:
        monitor.measure()
    total = monitor.clip_grad_norm_(max_norm)
    expected = nn.utils.clip_grad_norm_(other.parameters(), max_norm)
    assert (total.dtype, total.shape) == (torch.float32, ())
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(gradients(model), gradients(other), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clipping_non_finite_gradients_is_torchs(bad, measured):
    model, other, monitor = twins()
    for net in (model, other):
        net.first.weight.grad[0, 0] = bad
    if measured:
        monitor.measure()
    total = monitor.clip_grad_norm_(1.0)
    expected = nn.utils.clip_grad_norm_(other.parameters(), 1.0)
    torch.testing.assert_close(total, expected, equal_nan=True)
    torch.testing.assert_close(gradients(model), gradients(other), equal_nan=True)


@pytest.mark.parametrize("measured", [True, False])
def test_error_if_nonfinite_raises_and_scales_nothing(measured):
    model, _, monitor = twins()
    model.first.weight.grad[0, 0] = math.inf
    before = [g.clone() for g in gradients(model)]
    if measured:
        monitor.measure()
    with pytest.raises(RuntimeError, match="total norm of the gradients is inf"):
        monitor.clip_grad_norm_(1.0, error_if_nonfinite=True)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), before))


def test_error_if_nonfinite_lets_finite_gradients_pass():
    model, other, monitor = twins()
    monitor.clip_grad_norm_(1e-3, error_if_nonfinite=True)
    nn.utils.clip_grad_norm_(other.parameters(), 1e-3)
    torch.testing.assert_close(gradients(model), gradients(other), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_an_impossible_max_norm_is_named(max_norm):
    with pytest.raises(ConfigurationError, match=f"max_norm must be above 0, got {max_norm}"):
        Pair().measure().monitor.clip_grad_norm_(max_norm)


@pytest.mark.parametrize("measured", [True, False])
def test_gradients_below_the_limit_are_not_written(measured):
    model, _, monitor = twins()
    versions = [g._version for g in gradients(model)]
    for _ in range(2):  # the coefficient of the second comes from the measurement itself
        if measured:
            monitor.measure()
        monitor.clip_grad_norm_(1e6)
    assert [g._version for g in gradients(model)] == versions


def test_clipping_reuses_the_measurement(passes):
    model, _, monitor = twins()
    asked(monitor, passes)
    for max_norm in (1.0, 1.0, 0.5):
        model.backward()
        expected = norm(model.parameters())
        monitor.measure()
        assert monitor.clip_grad_norm_(max_norm).item() == pytest.approx(expected, rel=1e-6)
        assert norm(model.parameters()) == pytest.approx(min(expected, max_norm), rel=1e-5)
    assert passes == []


def asked(monitor, passes):
    """Clip once without a limit: only then a monitor notes which gradients it measured."""
    monitor.clip_grad_norm_(math.inf)
    passes.clear()


def accumulate(model, optimizer):
    model(torch.ones(1, 4)).sum().backward()


def rescale(model, optimizer):
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_(3.0)


def replace(model, optimizer):
    model.backward()


def vanish(model, optimizer):
    model.last.zero_grad(set_to_none=True)


def appear(model, optimizer):
    model.late.grad = torch.tensor([30.0])


def step(model, optimizer):
    optimizer.step()


CHANGES = [appear, accumulate, rescale, replace, vanish, step]


@pytest.mark.parametrize("change", CHANGES)
def test_clipping_sums_anew_when_the_gradients_are_others(passes, change):
    model = Net()
    model.late = weights(1.0)
    model.backward()
    optimizer = SGD(model.parameters(), lr=0.1)
    monitor = GradientMonitor(model, {"a": model.seed, "late": [model.late]}, optimizers=optimizer)
    asked(monitor, passes)
    monitor.measure()
    change(model, optimizer)
    expected = norm(model.parameters())
    assert monitor.clip_grad_norm_(1e-3).item() == pytest.approx(expected, rel=1e-6)
    assert len(passes) == 1


def test_clipping_twice_sums_twice(passes):
    _, _, monitor = twins(300.0)
    asked(monitor, passes)
    monitor.measure()
    monitor.clip_grad_norm_(1.0)
    assert monitor.clip_grad_norm_(1.0).item() == pytest.approx(1.0, rel=1e-5)
    assert len(passes) == 1


@pytest.mark.parametrize("change", [accumulate, rescale, replace, vanish])
def test_clipping_after_a_compiled_measurement_sees_other_gradients(change):
    torch._dynamo.reset()
    model, _, monitor = twins()
    torch.compile(monitor, fullgraph=True, backend="eager")()
    change(model, None)
    expected = norm(model.parameters())
    assert monitor.clip_grad_norm_(1e-3).item() == pytest.approx(expected, rel=1e-6)


def test_clipping_twice_sums_twice_when_kernels_leave_the_versions_alone(monkeypatch):
    def scale_(tensors, coefficient):
        for tensor in tensors:
            tensor.data.mul_(coefficient.float())

    monkeypatch.setattr(ops, "scale_", scale_)
    _, _, monitor = twins(300.0)
    monitor.measure()
    monitor.clip_grad_norm_(1.0)
    assert monitor.clip_grad_norm_(1.0).item() == pytest.approx(1.0, rel=1e-5)


def test_clipping_no_gradients_returns_a_norm_of_zero():
    pair = Pair()
    assert pair.monitor.clip_grad_norm_(1.0).item() == 0.0
    pair.measure(None, None)
    assert pair.monitor.clip_grad_norm_(1.0).item() == 0.0


def test_a_norm_once_returned_stays():
    model, _, monitor = twins()
    monitor.measure()
    total = monitor.clip_grad_norm_(1.0)
    kept = total.item()
    model.backward()
    rescale(model, None)
    monitor.measure()
    monitor.clip_grad_norm_(2.0)
    assert total.item() == kept


def test_clipping_leaves_samples_and_evidence_alone():
    _, _, monitor = twins()
    monitor.measure()
    before = monitor.read()
    monitor.clip_grad_norm_(1e-3)
    assert monitor.read() == before


def test_clipping_after_seeds_came_or_went():
    model, _, monitor = twins()
    monitor.measure()
    monitor.remove_seed("a")
    assert monitor.clip_grad_norm_(1e6).item() == pytest.approx(norm(model.parameters()), rel=1e-6)
    monitor.measure()
    late = weights(1.0)
    give(late, 1e3)
    monitor.add_seed("b", [late])
    expected = norm([*model.parameters(), late])
    assert monitor.clip_grad_norm_(1e6).item() == pytest.approx(expected, rel=1e-6)


def test_a_skipped_or_scaled_step_is_not_this_monitors_business():
    # unscale_ is the script's: measured before it, the ratio is right all the same.
    pair = Pair().measure((3.0 * 2**16, 4.0 * 2**16), (0.6 * 2**16, 0.8 * 2**16))
    assert pair.read().ratio == pytest.approx(0.2)
