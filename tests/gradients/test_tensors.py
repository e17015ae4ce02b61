"""What is known of single tensors: against fp64 sums of every gradient, kept by the test itself."""

import copy
import math
import random

import pytest
import torch
from networks import Residual
from scripts import Script
from torch import nn

from seedtriton import ConfigurationError, GateThresholds, GradientMonitor, GrowthController, SeedSlot
from seedtriton.core.tensors import NAMING, TensorReading, name_tensors
from seedtriton.gradients.row import EXPLODING_RMS, VANISHING_RMS

NAN, INF = math.nan, math.inf


class Truth:
    """The gradients of every sample, in fp64, and what they say of each parameter by its name."""

    def __init__(self, named):
        self.named = dict(named)
        self.samples = 0
        self.first = {}
        self.last = {}

    def see(self, scale=1.0):
        self.samples += 1
        self.last = dict.fromkeys(self.named)
        for name, parameter in self.named.items():
            if parameter.grad is not None and parameter.numel():
                gradient = parameter.grad.to_dense().detach().double() / scale
                self.last[name] = gradient.square().sum().sqrt().item()
                if not math.isfinite(self.last[name]):
                    self.first.setdefault(name, self.samples)

    def check(self, readings):
        assert sorted(reading.name for reading in readings) == sorted(self.named)
        for name, shape, _, norm, rms, state, sample, first in readings:
            parameter, right = self.named[name], self.last[name]
            assert (shape, sample, first) == (tuple(parameter.shape), self.samples, self.first.get(name))
            if right is None:
                assert (norm, rms) == (None, None)
                assert state in ("no gradient", "frozen", "never measured")
                continue
            assert norm == pytest.approx(right, rel=1e-6, nan_ok=True)
            assert rms == pytest.approx(right / math.sqrt(parameter.numel()), rel=1e-6, nan_ok=True)
            assert state == self.state(name, rms)
        sizes = [-1.0 if r.norm is None else r.norm if math.isfinite(r.norm) else INF for r in readings]
        assert sizes == sorted(sizes, reverse=True)

    def state(self, name, rms):
        if not math.isfinite(self.last[name]):
            return f"not finite, first in sample {self.first[name]}"
        if rms == 0.0:
            return "zero"
        return "vanishing" if rms < VANISHING_RMS else "exploding" if rms > EXPLODING_RMS else "finite"


class Bare(nn.Module):
    """Parameters of many kinds, for gradients that a test lays there."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.low = nn.Linear(4, 4).bfloat16()
        self.table = nn.Embedding(6, 3, sparse=True)
        self.wide = nn.Linear(2, 5).double()
        self.none = nn.Parameter(torch.empty(0, 3))  # nobody watches what has no elements
        self.adapter = nn.Linear(4, 2)


def named(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.numel()}


def watched(model, **options):
    monitor = GradientMonitor(model, {"adapter": model.adapter}, **options)
    return monitor, Truth(named(model))


def lay(model, generator, absent=0.2, bad=0.05):
    """Gradients of all magnitudes, zeros, and now and then NaN or infinity."""
    for name, parameter in model.named_parameters():
        parameter.grad = None
        if not parameter.requires_grad or (generator.random() < absent and name != "first.weight"):
            continue
        size = generator.choice([0.0, 1e-12, 1e-3, 1.0, 300.0])
        gradient = torch.randn(parameter.shape, dtype=parameter.dtype) * size
        if generator.random() < bad and gradient.numel():
            gradient.view(-1)[generator.randrange(gradient.numel())] = generator.choice([NAN, INF, -INF])
        parameter.grad = gradient.to_sparse(1) if name == "table.weight" else gradient


@pytest.mark.parametrize("loop", range(6))
def test_every_reading_is_that_of_fp64_whoever_has_a_gradient(loop):
    generator = random.Random(loop)
    model = Bare()
    monitor, truth = watched(model)
    assert {reading.state for reading in monitor.tensors()} == {"never measured"}
    for _ in range(30):
        lay(model, generator)
        truth.see()
        monitor.measure()
        if generator.random() < 0.5:
            truth.check(monitor.tensors())
    assert truth.first
    truth.check(monitor.tensors())


def ones(*parameters, value=1.0):
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, value)


def by_name(monitor, *arguments):
    return {reading.name: reading for reading in monitor.tensors(*arguments)}


def test_every_state_has_its_name():
    model = Bare()
    monitor, _ = watched(model)
    ones(model.first.weight)
    ones(model.first.bias, value=0.0)
    ones(model.low.weight, value=1e-9)
    ones(model.low.bias, value=11.0)
    ones(model.wide.weight, value=NAN)
    ones(model.none, model.adapter.weight)
    model.wide.bias.requires_grad_(False)
    monitor.measure()
    states = {name: reading.state for name, reading in by_name(monitor).items()}
    assert states == {
        "first.weight": "finite", "first.bias": "zero", "low.weight": "vanishing", "low.bias": "exploding",
        "wide.weight": "not finite, first in sample 1", "wide.bias": "frozen",
        "adapter.weight": "finite", "adapter.bias": "no gradient", "table.weight": "no gradient",
    }  # fmt: skip
    assert [r.name for r in monitor.tensors()][:3] == ["wide.weight", "low.bias", "first.weight"]
    assert by_name(monitor)["adapter.weight"].segment == 1
    assert by_name(monitor)["first.weight"][1:5] == ((4, 3), 0, pytest.approx(12**0.5), pytest.approx(1.0))


def test_limits_that_are_off_are_in_no_state_and_exactly_at_one_is_neither():
    for options, states in (
        ({"vanishing_rms": None, "exploding_rms": None}, ["finite"] * 4),
        ({"vanishing_rms": 0.25, "exploding_rms": 4.0}, ["exploding", "finite", "finite", "vanishing"]),
    ):
        parameters = [nn.Parameter(torch.zeros(4)) for _ in range(4)]
        monitor = GradientMonitor(parameters[:2], {"a": parameters[2:]}, **options)
        for parameter, value in zip(parameters, (4.001, 4.0, 0.25, 0.2499)):
            ones(parameter, value=value)
        monitor.measure()
        assert [reading.state for reading in monitor.tensors()] == states
        assert [reading.name for reading in monitor.tensors()] == ["0", "1", "a.0", "a.1"]


def test_the_first_sample_that_was_not_finite_is_kept_until_the_window_begins_anew():
    model = Bare()
    monitor, _ = watched(model)
    for sample in range(1, 7):
        ones(*model.first.parameters(), *model.adapter.parameters())
        if sample in (3, 5):
            model.adapter.bias.grad[1] = INF
        if sample == 5:
            model.first.weight.grad[0] = NAN
        monitor.measure()
    readings = by_name(monitor)
    assert readings["adapter.bias"][3:] == (pytest.approx(2**0.5), pytest.approx(1.0), "finite", 6, 3)
    assert readings["first.weight"].first_not_finite == 5
    assert readings["first.bias"].first_not_finite is None
    monitor.reset("adapter")
    assert {reading.first_not_finite for reading in monitor.tensors()} == {None}
    model.adapter.bias.grad[0] = NAN
    monitor.measure()
    assert by_name(monitor)["adapter.bias"].state == "not finite, first in sample 7"


def test_a_seed_whose_window_begins_takes_nothing_from_another_seeds():
    host, a, b = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    monitor = GradientMonitor(host, {"a": a, "b": b})
    ones(*host.parameters(), *a.parameters(), *b.parameters(), value=NAN)
    monitor.measure()
    monitor.reset("b")
    kept = {name for name, reading in by_name(monitor).items() if reading.first_not_finite}
    assert kept == {"a.weight", "a.bias"}
    assert {reading.name for reading in monitor.tensors("b")} == {"weight", "bias", "b.weight", "b.bias"}
    with pytest.raises(ConfigurationError, match="no seed is called 'c'"):
        monitor.tensors("c")


@pytest.mark.parametrize("scale", [1024.0, 3.0])
def test_the_loss_scale_is_divided_out(scale):
    model = Bare()
    optimizer = torch.optim.SGD([*model.first.parameters(), *model.adapter.parameters()], lr=0.1)
    monitor, truth = watched(model, optimizers=optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.ones(()))  # lays its scale out
    ones(*model.first.parameters(), value=0.5 * scale)
    ones(*model.adapter.parameters(), value=9.0 * scale)
    truth.see(scale)
    monitor.measure(scaler)
    truth.check(monitor.tensors())
    optimizer.step()
    ones(*model.first.parameters())
    truth.see()
    monitor.measure()
    truth.check(monitor.tensors())


def test_frozen_and_unfrozen_parameters_keep_their_entries():
    model = Bare()
    monitor, truth = watched(model)
    generator = random.Random(0)
    for step in range(12):
        model.first.bias.requires_grad_(step % 3 != 1)
        model.low.requires_grad_(step % 4 != 2)
        lay(model, generator, absent=0.0, bad=0.0)
        truth.see()
        monitor.measure()
        truth.check(monitor.tensors())
    model.first.bias.requires_grad_(False).grad = None
    monitor.measure()
    assert by_name(monitor)["first.bias"].state == "frozen"


def test_parameters_that_are_replaced_appended_or_gone_take_nothing_from_others():
    model = Bare()
    monitor, truth = watched(model)
    ones(*(p for p in model.parameters() if p.numel()))
    model.first.weight.grad[0] = model.adapter.weight.grad[0] = model.wide.bias.grad[0] = NAN
    truth.see()
    monitor.measure()
    model.first.weight = nn.Parameter(torch.zeros(4, 3))
    del model.low
    model.appended = nn.Parameter(torch.zeros(7))
    monitor.refresh()
    readings = by_name(monitor)
    assert set(readings) == set(named(model))
    assert readings["first.weight"].state == readings["appended"].state == "never measured"
    assert readings["first.weight"].first_not_finite is None
    assert readings["adapter.weight"].state == readings["wide.bias"].state == "not finite, first in sample 1"
    assert readings["wide.weight"].norm == pytest.approx(10**0.5)
    ones(*(p for p in model.parameters() if p.numel()), value=2.0)
    truth.named = named(model)
    truth.first = {}
    truth.see()
    monitor.measure()
    truth.check(monitor.tensors())


def test_parameters_that_a_load_replaces_are_followed():
    model = Bare()
    monitor, truth = watched(model)
    ones(*model.first.parameters(), value=NAN)
    monitor.measure()
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    assert {reading.first_not_finite for reading in monitor.tensors()} == {None}
    truth.named, truth.samples = named(model), 1
    ones(*model.first.parameters())
    truth.see()
    monitor.measure()
    truth.check(monitor.tensors())


def test_seeds_that_come_and_go_leave_what_is_known_of_the_others():
    host = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    monitor = GradientMonitor(host, {"a": host[1]})
    ones(*host.parameters())
    host[2].weight.grad[:] = 5.0
    host[1].bias.grad[:] = NAN
    monitor.measure()
    monitor.add_seed("b", host[2])
    readings = by_name(monitor)
    assert (readings["2.weight"].norm, readings["2.weight"].segment) == (10.0, 2)
    assert (readings["1.bias"].first_not_finite, readings["1.bias"].segment) == (1, 1)
    assert readings["2.weight"].first_not_finite is None
    late = nn.Linear(2, 2)
    monitor.add_seed("late", late)
    assert by_name(monitor)["late.weight"].state == "never measured"
    host[1].bias.grad[:] = 1.0
    monitor.measure()
    monitor.add_seed("later", nn.Linear(2, 2))  # what is known and not read yet stays as well
    assert by_name(monitor)["2.weight"].sample == 2
    assert by_name(monitor)["2.weight"].norm == 10.0
    monitor.remove_seed("later")
    monitor.remove_seed("a")
    readings = by_name(monitor)
    assert (readings["1.bias"].first_not_finite, readings["1.bias"].segment) == (1, 0)
    assert (readings["2.weight"].norm, readings["2.weight"].segment) == (10.0, 1)
    monitor.measure()
    readings = by_name(monitor)
    assert readings["late.weight"].state == "no gradient"
    assert (readings["2.weight"].norm, readings["2.weight"].sample) == (10.0, 3)


def test_of_a_seed_that_was_part_of_the_host_nothing_is_held_from_before():
    host = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    monitor = GradientMonitor(host, {})
    ones(*host.parameters(), value=NAN)
    monitor.measure()
    monitor.add_seed("a", host[1])
    assert {reading.first_not_finite for reading in monitor.tensors()} == {None}


def test_a_new_seed_begins_with_a_host_of_which_nothing_is_held_against_it():
    host = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    monitor = GradientMonitor(host, {"a": host[1]})
    ones(*host.parameters(), value=NAN)
    monitor.measure()
    monitor.add_seed("b", nn.Linear(2, 2))
    assert {name for name, r in by_name(monitor).items() if r.first_not_finite} == {"1.weight", "1.bias"}


def test_a_loaded_state_knows_no_tensors_yet_and_has_none_in_it():
    model = Bare()
    monitor, _ = watched(model)
    ones(*model.first.parameters(), value=NAN)
    monitor.measure()
    state = monitor.state_dict()
    assert set(state) == {"ring", "count", "since", "_extra_state"}
    monitor.load_state_dict(state)
    assert {reading.state for reading in monitor.tensors()} == {"never measured"}
    assert {reading.first_not_finite for reading in monitor.tensors()} == {None}
    monitor.measure()
    assert by_name(monitor)["first.bias"].state == "not finite, first in sample 2"
    assert by_name(monitor)["adapter.bias"].state == "no gradient"


def test_explicit_gradients_are_read_by_their_parameters():
    model = Bare()
    monitor, _ = watched(model)
    monitor.measure(gradients={model.adapter.bias: torch.tensor([3.0, 4.0]), model.first.weight: torch.ones(4, 3)})
    readings = by_name(monitor)
    assert readings["adapter.bias"].norm == 5.0
    assert readings["first.weight"].rms == pytest.approx(1.0)
    assert readings["first.bias"].state == "no gradient"


def test_sums_taken_in_backward_are_read_by_their_parameters():
    torch.manual_seed(0)
    host, seed = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), nn.Linear(3, 3)
    monitor = GradientMonitor(host, {"a": seed})
    monitor.collect_in_backward()
    seed(host(torch.randn(5, 4))).square().sum().backward()
    truth = Truth([*host.named_parameters(), *((f"a.{name}", p) for name, p in seed.named_parameters())])
    truth.see()
    monitor.measure()
    truth.check(monitor.tensors())
    for parameter in truth.named.values():
        parameter.grad = None
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    loss = seed(host(torch.randn(5, 4))).square().sum()
    gradients = torch.autograd.grad(loss, list(truth.named.values()), retain_graph=True)
    loss.backward()  # each gradient is freed as soon as it is there
    monitor.measure()
    for parameter, gradient in zip(truth.named.values(), gradients):
        parameter.grad = gradient
    truth.see()
    truth.check(monitor.tensors())


def test_of_what_is_collected_a_parameter_that_is_gone_has_no_entry():
    host, seed = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), nn.Linear(3, 3)
    monitor = GradientMonitor(host, {"a": seed})
    monitor.collect_in_backward()
    seed(host(torch.randn(5, 4))).square().sum().backward()
    expected = host[1].weight.grad.double().norm().item()
    host[0] = nn.Identity()
    monitor.refresh()
    monitor.measure()
    assert by_name(monitor)["1.weight"].norm == pytest.approx(expected, rel=1e-6)


def test_what_the_quarantine_clears_was_noted():
    model = Bare()
    monitor, _ = watched(model, quarantine=True)
    ones(*model.first.parameters(), *model.adapter.parameters())
    model.adapter.bias.grad[0] = NAN
    monitor.measure()
    assert (model.adapter.bias.grad == 0).all()
    assert by_name(monitor)["adapter.bias"].state == "not finite, first in sample 1"
    assert by_name(monitor)["adapter.weight"].state == "finite"


@pytest.mark.parametrize("values", [(1.0, NAN, 2.0), (1.0, NAN)])
@pytest.mark.parametrize("eager", [0, 1])
def test_a_compiled_monitor_notes_the_same_also_behind_eager_samples(eager, values):
    model = Bare()
    monitor, truth = watched(model)
    compiled = torch.compile(monitor, fullgraph=True, backend="aot_eager")
    for index, value in enumerate(values):
        ones(*model.first.parameters(), *model.adapter.parameters())
        model.first.bias.grad[0] = value
        truth.see()
        (monitor.measure if index < eager else compiled)()
    truth.check(monitor.tensors())


def test_a_table_of_the_same_parameters_stays_where_it_is():
    model = Bare()
    monitor, _ = watched(model)
    ones(*model.first.parameters())
    monitor.measure()
    before = [column.data_ptr() for column in monitor._noted.table.columns]
    model.load_state_dict(model.state_dict())
    monitor.read()
    monitor.refresh()
    monitor.measure()
    assert [column.data_ptr() for column in monitor._noted.table.columns] == before


def test_a_monitor_without_seeds_follows_its_host_into_a_compiled_sample():
    host = nn.Sequential(nn.Linear(3, 3))
    monitor = GradientMonitor(host, {})
    ones(*host.parameters())
    monitor.measure()
    host.append(nn.Linear(3, 2))
    monitor.refresh()
    ones(*host.parameters(), value=2.0)
    torch.compile(monitor, fullgraph=True, backend="aot_eager")()
    assert [reading.rms for reading in monitor.tensors()] == [pytest.approx(2.0)] * 4


def test_a_parameter_that_is_emptied_after_it_was_measured_is_read_all_the_same():
    model = Bare()
    monitor, _ = watched(model)
    ones(*model.first.parameters())
    monitor.measure()
    model.first.weight.data = torch.empty(0)
    assert by_name(monitor)["first.weight"].norm == pytest.approx(12**0.5)


def test_of_micro_batches_a_later_one_without_a_gradient_leaves_what_was_noted():
    host, seed = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*host.parameters(), *seed.parameters()], lr=0.0)
    for looked in (False, True):
        monitor = GradientMonitor(host, {"a": seed}, optimizers=optimizer)
        ones(*host.parameters(), *seed.parameters())
        monitor.measure()
        if looked:
            monitor.tensors()
        seed.bias.grad = None
        monitor.measure()
        assert by_name(monitor)["a.bias"].state == "finite"


def test_a_copy_has_a_table_of_its_own_and_moves_keep_it():
    model = Bare()
    pair = nn.ModuleDict({"model": model, "monitor": GradientMonitor(model, {"adapter": model.adapter})})
    ones(*model.first.parameters(), value=3.0)
    pair["monitor"].measure()
    twin = copy.deepcopy(pair)
    ones(*twin["model"].first.parameters(), value=NAN)
    twin["monitor"].half().measure()
    assert by_name(twin["monitor"])["first.bias"].state == "not finite, first in sample 2"
    assert by_name(pair["monitor"].half())["first.bias"].norm == 6.0


def test_the_table_goes_where_the_ring_goes():
    monitor, _ = watched(Bare())
    for device in ("meta", "cpu"):  # as the ring, it does not go to "meta" with a model that is filled later
        monitor.to(device)
        assert {column.device for column in monitor._noted.table.columns} == {monitor.ring.device}


def test_the_table_is_16_bytes_per_tensor():
    monitor, _ = watched(Bare())
    columns = monitor._noted.table.columns
    assert {len(column) for column in columns} == {len(monitor._watched.tracked)}
    assert sum(column.element_size() for column in columns) == 16


def test_reading_is_one_copy(monkeypatch):
    model = Bare()
    monitor, _ = watched(model)
    ones(*model.first.parameters())
    monitor.measure()
    made = []
    for name in ("tolist", "item", "cpu", "__float__", "__bool__", "__int__"):
        original = getattr(torch.Tensor, name)

        def counting(self, *args, _original=original, _name=name):
            made.append(_name)
            return _original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counting)
    monitor.tensors()
    assert made == ["tolist"]


@pytest.mark.parametrize("bad", [None, 1, 2, 3])
def test_micro_batches_of_one_step_are_one_sample_of_every_tensor(bad):
    torch.manual_seed(0)
    model = nn.ModuleDict({"host": nn.Linear(3, 3), "adapter": nn.Linear(3, 2)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    monitor = GradientMonitor(model["host"], {"a": model["adapter"]}, optimizers=optimizer)
    for step in range(1, 4):
        for micro in range(1, 4):
            ones(*model.parameters(), value=float(micro))
            if (step, micro) == (2, bad):
                model["adapter"].bias.grad[0] = NAN
            monitor.measure()
        found = by_name(monitor)
        # A micro-batch that is not finite is a sample of its own, which the next one does not replace.
        extra = int(bad in (1, 2) and step >= 2)
        assert {reading.sample for reading in found.values()} == {int(monitor.count)} == {step + extra}
        assert found["weight"].rms == pytest.approx(3.0)
        assert found["a.bias"].first_not_finite == (None if bad is None or step == 1 else 2)
        assert found["weight"].first_not_finite is None
        optimizer.step()


# --- refusals ---


def reading(name, state="finite", norm=1.0, segment=1, first=None):
    return TensorReading(name, (4, 2), segment, norm, None if norm is None else norm / 8**0.5, state, 9, first)


def test_a_refusal_names_the_first_three_and_the_sample():
    readings = [
        reading("late", "not finite, first in sample 7", NAN, first=7),
        reading("host", "not finite, first in sample 4", NAN, segment=0, first=4),
        reading("big", "exploding", 80.0),
        reading("was", "finite", 8.0, first=2),
        reading("next", "finite", 4.0, first=8),
        reading("small", "vanishing", 8e-10),
        reading("least", "vanishing", 8e-12),
        reading("dead", "zero", 0.0),
        reading("none", "no gradient", None),
    ]
    assert name_tensors("finite", readings) == (
        "first not finite: 'was' [4, 2] in sample 2; 'host' [4, 2] in sample 4; 'late' [4, 2] in sample 7; and 1 more"
    )
    assert name_tensors("vanishing", readings) == (
        "in sample 9: 'least' [4, 2], rms 2.83e-12; 'small' [4, 2], rms 2.83e-10"
    )
    assert name_tensors("exploding_tensors", readings) == "in sample 9: 'big' [4, 2], rms 28.3"
    assert name_tensors("live_share", readings) == "in sample 9: 'dead' [4, 2], rms 0; 'none' [4, 2], no gradient"
    assert name_tensors("exploding", readings).endswith("'was' [4, 2], rms 2.83; and 3 more")
    assert all(name_tensors(question, []) == "" for question in NAMING)
    assert name_tensors("vanishing", readings[:3]) == ""


class Host(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.slot, self.last = nn.Linear(5, 6), SeedSlot(), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.slot(torch.tanh(self.first(x))))


def refused(question, spoil, thresholds=None, steps=20):
    """The refused check of that question, after steps in which ``spoil(seed, host, step)`` touched the gradients."""
    torch.manual_seed(0)
    model = Host()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    growth = GrowthController(model, optimizer, thresholds=thresholds or GateThresholds(), sinks=[])
    seed = Residual(6)
    growth.germinate("slot", seed, probe=torch.randn(2, 6))
    for step in range(1, steps + 1):
        model(torch.randn(8, 5)).square().mean().backward()
        spoil(seed, model, step)
        growth.measure()
        optimizer.step()
        optimizer.zero_grad()
    (verdict,) = growth.end_epoch()
    path = next(name for name, p in model.named_parameters() if p is seed.expand.weight).removesuffix("expand.weight")
    check = next(check for check in verdict.failed if check.question == question)
    assert check.reason in str(verdict)
    return check, path


def test_a_verdict_names_the_tensor_and_the_step_at_which_it_was_first_not_finite():
    def spoil(seed, host, step):
        if step >= 7:
            seed.contract.bias.grad[2] = INF
        if step == 20:
            host.last.weight.grad[0] = NAN

    check, path = refused("finite", spoil)
    assert check.reason.endswith(
        f"; first not finite: '{path}contract.bias' [6] in sample 7; 'last.weight' [3, 6] in sample 20"
    )
    check, path = refused("measured", lambda seed, host, step: seed.expand.weight.grad.fill_(NAN))
    assert check.name == "gradient_not_finite"
    assert check.reason.endswith(f"; first not finite: '{path}expand.weight' [8, 6] in sample 1")


def test_a_verdict_names_dead_vanishing_and_exploding_tensors():
    def dead(seed, host, step):
        seed.expand.weight.grad.zero_()
        seed.expand.bias.grad = None
        seed.contract.bias.grad.zero_()

    check, path = refused("live_share", dead, GateThresholds(min_live_share=0.5))
    assert check.reason.endswith(
        f"; in sample 20: '{path}expand.weight' [8, 6], rms 0; '{path}contract.bias' [6], rms 0; "
        f"'{path}expand.bias' [8], no gradient"
    )

    def vanishing(seed, host, step):
        seed.expand.weight.grad.mul_(1e-12)

    check, path = refused("vanishing", vanishing, GateThresholds(max_vanishing_share=0.0))
    assert f"; in sample 20: '{path}expand.weight' [8, 6], rms " in check.reason

    def exploding(seed, host, step):
        seed.contract.weight.grad.fill_(400.0)
        seed.expand.bias.grad.fill_(50.0)

    check, path = refused("exploding_tensors", exploding, GateThresholds(max_exploding_share=0.0))
    assert check.reason.endswith(
        f"; in sample 20: '{path}contract.weight' [6, 8], rms 400; '{path}expand.bias' [8], rms 50"
    )
    check, path = refused("exploding", exploding, GateThresholds(max_gradient_ratio=10.0))
    assert f"; in sample 20: '{path}contract.weight' [6, 8], rms 400; '{path}expand.bias' [8], rms 50; " in check.reason
    assert check.reason.endswith("; and 1 more")


def test_tensors_are_read_only_for_a_refusal_that_names_them_and_for_whoever_keeps_events(monkeypatch):
    script = Script()
    script.growth.telemetry.sinks.clear()
    script.growth.germinate("early", Residual(6, 16), probe=torch.randn(2, 6))
    monkeypatch.setattr(GradientMonitor, "tensors", lambda *_: pytest.fail("nothing asks for tensors"))
    script.epochs(2)
