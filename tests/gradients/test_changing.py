"""Parameters that are no longer those, steps that were none, and what a reading says of both."""

import copy
import logging
import math

import pytest
import torch
from torch import nn

from seedtriton import GradientMonitor, GrowthController, SeedSlot, Stage, WiringError
from seedtriton.core.evidence import IDLE_LIMIT, MEASURED, NEVER_MEASURED, NO_GRADIENT
from seedtriton.core.gates import QualityGates
from seedtriton.core.verdict import SeedStatus
from seedtriton.gradients import adapters
from seedtriton.gradients.spread import Holding, Way


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.host, self.seed, self.head = nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 3)
        self.run = 0

    def forward(self, x):
        x = torch.tanh(self.host(x))
        return self.head(x + self.seed(x))

    def backward(self):
        torch.manual_seed(self.run)
        self.run += 1
        self(torch.randn(8, 4)).square().mean().backward()

    def truth(self):
        """fp64 norms of host and seed from the gradients that the model's parameters have now."""
        own = {id(p) for p in self.seed.parameters()}
        squares = [0.0, 0.0]
        for p in self.parameters():
            if p.grad is not None:
                squares[id(p) in own] += p.grad.double().square().sum().item()
        return [math.sqrt(square) for square in squares]


def watched(**options):
    model = Model()
    return model, GradientMonitor(model, {"s": model.seed}, **options)


def step(model, monitor, times=1):
    """Measure some steps; the root mean square of the true norms over them, host and seed."""
    truths = []
    for _ in range(times):
        model.zero_grad()
        model.backward()
        truths.append(model.truth())
        monitor.measure()
    return [math.sqrt(sum(t[i] ** 2 for t in truths) / times) for i in (0, 1)]


def agree(known, truth):
    assert (known.host_norm, known.seed_norm) == pytest.approx(truth, rel=1e-6)


def widened(model):
    model.seed[0] = nn.Linear(6, 9)
    model.seed.append(nn.Linear(9, 6))


def in_place(model):
    model.seed[0].weight = nn.Parameter(torch.eye(6))


def weight_norm(model):
    torch.nn.utils.parametrizations.weight_norm(model.seed[0])


def old_weight_norm(model):
    torch.nn.utils.weight_norm(model.seed[0])


class Lora(nn.Module):
    """A layer around another one, as get_peft_model puts it in its place."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})
        self.active_adapters, self.disable_adapters = ["default"], False

    def forward(self, x):
        out = self.base_layer(x)
        for name in [] if self.disable_adapters else self.active_adapters:
            out = out + self.lora_B[name](self.lora_A[name](x))
        return out


def peft(model):
    model.seed[0] = Lora(model.seed[0])


# --- noticed in the very next measurement, the old ones dropped, and said ---


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("change", [widened, in_place, weight_norm, old_weight_norm, peft])
def test_a_changed_seed_begins_its_window_anew_at_once(change, caplog):
    model, monitor = watched()
    step(model, monitor, 5)
    change(model)
    truth = step(model, monitor, 3)
    known = monitor.read()["s"]
    assert known.samples == 3
    agree(known, truth)
    assert known.live_share == 1.0 or change is peft  # B is zero at first, so A has no slope
    assert "its window began anew when parameters changed (seed 's': parameter '0." in known.reason
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "the window of ['s'] begins anew" in caplog.text
    step(model, monitor)
    monitor.read()
    assert len(caplog.records) == 1
    monitor.reset()
    step(model, monitor)
    assert "anew" not in monitor.read()["s"].reason


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_removed_weight_norm_is_noticed_too():
    model, monitor = watched()
    old_weight_norm(model)
    step(model, monitor, 2)
    torch.nn.utils.remove_weight_norm(model.seed[0])
    truth = step(model, monitor, 3)
    known = monitor.read()["s"]
    assert known.samples == 3
    agree(known, truth)


def test_a_changed_host_begins_the_window_of_every_seed_anew():
    model = Model()
    monitor = GradientMonitor(model, {"s": model.seed[0].weight, "t": model.seed[0].bias})
    step(model, monitor, 3)
    model.head = nn.Linear(6, 3)
    model.zero_grad()
    step(model, monitor, 2)
    found = monitor.read()
    assert [known.samples for known in found.values()] == [2, 2]
    for known in found.values():
        assert "the host: parameter 'head.weight', parameter 'head.bias' replaced" in known.reason
        assert known.host_norm == pytest.approx(found["s"].host_norm)


def test_a_changed_seed_leaves_the_window_of_the_others():
    model = Model()
    monitor = GradientMonitor(model, {"s": model.seed, "t": model.head})
    step(model, monitor, 3)
    in_place(model)
    step(model, monitor, 2)
    assert [known.samples for known in monitor.read().values()] == [2, 5]


def test_the_gradient_that_a_replaced_parameter_keeps_is_never_counted():
    """One backward before and one after, one measurement."""
    model, monitor = watched()
    model.backward()
    in_place(model)
    model.zero_grad()
    model.backward()
    truth = model.truth()
    monitor.measure()
    agree(monitor.read()["s"], truth)


def test_clipping_counts_no_replaced_parameter_either():
    model, monitor = watched()
    model.backward()
    in_place(model)
    model.zero_grad()
    model.backward()
    truth = math.hypot(*model.truth())
    assert float(monitor.clip_grad_norm_(truth / 2)) == pytest.approx(truth, rel=1e-6)
    assert math.hypot(*model.truth()) == pytest.approx(truth / 2, rel=1e-4)


def test_a_replacement_that_no_registration_tells_of_is_found_by_the_next_read():
    """Assigned past setattr, as torch's own conversions and FSDP do; in the middle of the model."""
    model, monitor = watched()
    step(model, monitor, 2)
    model.seed[0]._parameters["weight"] = nn.Parameter(torch.eye(6))
    assert monitor.read()["s"].status == NEVER_MEASURED
    truth = step(model, monitor, 2)
    agree(monitor.read()["s"], truth)


def test_conversions_that_replace_all_parameters_are_noticed_by_measuring():
    model, monitor = watched()
    step(model, monitor, 2)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    model.zero_grad()
    model(torch.randn(8, 4).double()).square().mean().backward()
    truth = model.truth()
    monitor.measure()
    agree(monitor.read()["s"], truth)


def test_another_model_that_is_built_meanwhile_changes_nothing():
    model, monitor = watched()
    step(model, monitor, 2)
    Model()
    step(model, monitor, 2)
    assert monitor.read()["s"].samples == 4


def test_loading_is_no_change_of_the_model(caplog):
    """Other objects, the same parameters: a resumed run goes on with its window."""
    model, monitor = watched()
    step(model, monitor, 3)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    step(model, monitor, 2)
    known = monitor.read()["s"]
    assert (known.samples, caplog.records) == (5, [])


def test_a_change_before_anything_was_measured_is_not_worth_a_word(caplog):
    model, monitor = watched()
    peft(model)
    truth = step(model, monitor, 2)
    agree(monitor.read()["s"], truth)
    assert caplog.records == []


# --- frozen and unfrozen ---


def test_unfreezing_begins_anew_and_costs_at_most_one_sample(caplog):
    model, monitor = watched()
    model.head.requires_grad_(False)
    step(model, monitor, 1)
    monitor.reset()
    step(model, monitor, 4)
    model.head.requires_grad_(True)
    truths = [step(model, monitor) for _ in range(4)]
    known = monitor.read()["s"]
    assert known.samples == 3
    agree(known, [math.sqrt(sum(t[i] ** 2 for t in truths[1:]) / 3) for i in (0, 1)])
    assert "parameter 'head.weight', parameter 'head.bias' unfrozen" in caplog.text


def test_freezing_part_of_the_host_is_noticed_by_a_read_where_gradients_stay_as_zeros():
    model, monitor = watched()
    step(model, monitor, 2)
    model.head.requires_grad_(False)
    assert monitor.read()["s"].samples == 0


def gate(known):
    status = SeedStatus(seed="s", stage=Stage.TRAINING, evidence=known)
    return {check.question: check for check in QualityGates().judge(Stage.BLENDING, status).checks}


def test_a_frozen_seed_is_called_frozen():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = GradientMonitor(model, {"s": model.seed}, optimizers=optimizer)
    model.seed.requires_grad_(False)
    for _ in range(2):
        step(model, monitor, 2)
        optimizer.step()
    known = monitor.read()["s"]
    assert (known.frozen, known.status) == (True, NO_GRADIENT)
    assert "it is frozen" in known.reason
    checks = gate(known)
    assert checks["optimizer"].name == checks["measured"].name == "seed_frozen"
    assert "in no optimizer" not in str(checks)


def test_a_seed_that_is_partly_frozen_is_not_called_so():
    model, monitor = watched()
    model.seed[0].bias.requires_grad_(False)
    step(model, monitor)
    assert monitor.read()["s"].frozen is False


def test_a_reading_asks_no_module_of_adapters_where_none_has_any(monkeypatch):
    model, monitor = watched()
    step(model, monitor)
    monkeypatch.setattr(adapters, "active_of", lambda layer: pytest.fail("a module was asked"))
    assert monitor.read()["s"].status == MEASURED


@pytest.mark.parametrize("freeze", [True, False])
def test_an_inactive_adapter_is_named(freeze):
    model = Model()
    peft(model)
    layer = model.seed[0]
    layer.lora_A["b"], layer.lora_B["b"] = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
    layer.lora_A["b"].requires_grad_(not freeze)
    layer.lora_B["b"].requires_grad_(not freeze)
    monitor = GradientMonitor(model, {"s": [layer.lora_A["b"], layer.lora_B["b"]]})
    step(model, monitor)
    known = monitor.read()["s"]
    assert known.status == NO_GRADIENT
    assert known.frozen
    assert "it is the adapter 'b', which is inactive, and active is ['default']: set_adapter('b')" in known.reason
    layer.active_adapters = ["b"]
    layer.lora_A["b"].requires_grad_(True)
    layer.lora_B["b"].requires_grad_(True)
    monitor.read()
    step(model, monitor, 2)
    assert monitor.read()["s"].status == MEASURED
    layer.disable_adapters = True
    monitor.reset()
    step(model, monitor)
    assert "adapters are disabled" in monitor.read()["s"].reason


# --- the host's parameters in no optimizer ---


def test_parameters_of_the_host_whose_gradients_pile_up_are_named_once(caplog):
    model = Model()
    optimizer = torch.optim.SGD([*model.host.parameters(), *model.seed.parameters()], lr=0.1)
    monitor = GradientMonitor(model, {"s": model.seed}, optimizers=optimizer)
    for _ in range(3):
        model.backward()
        monitor.measure()
        optimizer.step()
        optimizer.zero_grad()
    for _ in range(2):
        assert "of the host parameter 'head.weight', parameter 'head.bias' in no known" in monitor.read()["s"].reason
    assert caplog.text.count("pile up") == 1
    model.backward()
    assert "of the host parameter 'head.weight', parameter 'head.bias' in no known" in monitor.read()["s"].reason
    other = torch.optim.SGD(model.head.parameters(), lr=0.1)
    monitor.watch(other)
    assert "pile up" not in monitor.read()["s"].reason


def test_a_host_whose_parameters_were_all_replaced_piles_up_in_no_optimizer():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = GradientMonitor(model, {"s": model.seed}, optimizers=optimizer)
    model.host, model.head = nn.Linear(4, 6), nn.Linear(6, 3)
    model.backward()
    monitor.measure()
    words = "of the host parameter 'host.weight', parameter 'host.bias', parameter 'head.weight' and 1 more in no known"
    assert words in monitor.read()["s"].reason


def test_a_host_whose_optimizer_is_unknown_is_not_blamed():
    model = Model()
    monitor = GradientMonitor(model, {"s": model.seed}, optimizers=torch.optim.SGD(model.seed.parameters(), lr=0.1))
    step(model, monitor)
    assert "pile up" not in monitor.read()["s"].reason


# --- a part of a parameter ---


@pytest.mark.parametrize("part", [lambda w: w[2:], lambda w: w.detach()[2:], lambda w: w.t(), lambda w: w * 1.0])
@pytest.mark.parametrize("side", ["seed 's'", "the host"])
def test_a_part_of_a_parameter_is_refused_with_the_way_out(part, side):
    layer, other = nn.Linear(4, 6), nn.Linear(4, 6)
    host, seed = (other, part(layer.weight)) if side.startswith("seed") else ([part(layer.weight)], other)
    with pytest.raises(WiringError, match=rf"{side}: parameter 0 of shape .*nn\.Parameter\(part\)"):
        GradientMonitor(host, {"s": seed})


def test_a_part_that_keeps_its_gradient_is_measured():
    layer, other = nn.Linear(4, 6), nn.Linear(4, 6)
    part = layer.weight[2:]
    part.retain_grad()
    monitor = GradientMonitor(other, {"s": [part]})
    (part.sum() + other(torch.ones(1, 4)).sum()).backward()
    monitor.measure()
    assert monitor.read()["s"].seed_norm == pytest.approx(4.0)


# --- empty parameters ---


def test_empty_parameters_are_neither_dead_nor_unhealthy():
    model, monitor = watched()
    model.seed.register_parameter("nothing", nn.Parameter(torch.empty(0, 6)))
    model.seed.nothing.grad = torch.empty(0, 6)
    model.backward()
    monitor.measure()
    known = monitor.read()["s"]
    assert (known.live_share, known.health) == (1.0, 1.0)
    gradients = {p: torch.ones_like(p) for p in model.parameters()}
    monitor.measure(gradients=gradients)


# --- in a life ---


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.body(x))


class Grown(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.slot, self.b = nn.Linear(4, 8), SeedSlot(), nn.Linear(8, 1)

    def forward(self, x):
        return self.b(self.slot(torch.tanh(self.a(x))))


def life():
    torch.manual_seed(0)
    model = Grown()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    growth = GrowthController(model, optimizer, sinks=[])
    growth.germinate("slot", Residual(8))
    return model, optimizer, growth


def epoch(model, optimizer, growth, steps=20):
    for _ in range(steps):
        model(torch.randn(8, 4)).square().mean().backward()
        growth.measure()
        optimizer.step()
        optimizer.zero_grad()
    return growth.end_epoch()


def test_a_seed_that_is_widened_is_told_as_what_it_is():
    model, optimizer, growth = life()
    epoch(model, optimizer, growth)
    model.slot.seed.body = nn.Linear(8, 8)
    verdict = epoch(model, optimizer, growth)[0]
    known = growth.evidence()["slot"]
    assert (known.samples, known.in_optimizer) == (20, False)
    assert "seed_in_no_optimizer" in str(verdict)
    assert "parameter '0.body.weight', parameter '0.body.bias' replaced" in known.reason


def test_a_fade_freezes_a_seed_without_a_word(caplog):
    model, optimizer, growth = life()
    epoch(model, optimizer, growth)
    growth._mover.move(growth._lives["slot"], Stage.BLENDING, "test", "test")
    epoch(model, optimizer, growth, 5)
    growth.prune("slot", steps=50)
    epoch(model, optimizer, growth, 5)
    growth.set_alpha_target("slot", 0.5)
    epoch(model, optimizer, growth, 5)
    assert caplog.records == []


def test_germination_and_pruning_are_no_changes_of_the_host(caplog):
    model, optimizer, growth = life()
    epoch(model, optimizer, growth, 3)
    growth.prune("slot")
    epoch(model, optimizer, growth, 3)
    assert caplog.records == []


def test_a_layer_that_was_swapped_is_noticed_before_a_seed_leaves():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), SeedSlot(), SeedSlot(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    growth = GrowthController(model, optimizer, sinks=[])
    for name in ("1", "2"):
        growth.germinate(name, Residual(4))
    epoch(model, optimizer, growth, 3)
    model[0] = nn.Linear(4, 4)
    growth.prune("1")
    assert growth.evidence()["2"].samples == 0


# --- steps are steps ---


def fused(lr=0.1, **scaler):
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    return model, optimizer, torch.amp.GradScaler("cpu", **scaler)


def test_steps_that_a_fused_optimizer_skips_do_not_count():
    model, optimizer, scaler = fused()
    monitor = GradientMonitor(model, {"s": model.seed}, optimizers=optimizer)
    truth = 0
    for run in range(12):
        overflow = run % 3 == 0
        optimizer.zero_grad()
        before = model.head.weight.detach().clone()
        scaler.scale(model(torch.randn(8, 4)).square().mean() * (math.inf if overflow else 1.0)).backward()
        monitor.measure(scaler)
        scaler.step(optimizer)
        scaler.update()
        truth += int(not torch.equal(before, model.head.weight))
        if run == 5:
            saved = copy.deepcopy(monitor.state_dict())
            assert monitor.read()["s"].optimizer_steps == truth == 4
            monitor.reset()
            truth = 0
    known = monitor.read()["s"]
    assert (known.optimizer_steps, truth, known.dropped) == (4, 4, 2)
    assert saved["_extra_state"]["steps"] == [4]
    another = torch.optim.AdamW(model.parameters())
    other = GradientMonitor(model, {"s": model.seed}, optimizers=another)
    other.load_state_dict(copy.deepcopy(monitor.state_dict()))
    assert other.read()["s"].optimizer_steps == 4


def test_skipped_steps_make_no_sample_old():
    model, optimizer, scaler = fused()
    monitor = GradientMonitor(model, {"s": model.seed}, optimizers=optimizer)
    ages = []
    for overflow in (False, True, True):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(8, 4)).square().mean() * (math.inf if overflow else 1.0)).backward()
        monitor.measure(scaler)
        scaler.step(optimizer)
        scaler.update()
        ages.append(monitor.read()["s"].age)
    assert ages == [0, 0, 0]


def test_an_optimizer_that_was_replaced_is_noticed_and_named():
    model = Model()
    first = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = GradientMonitor(model, {"s": model.seed}, optimizers=first)

    def run(optimizer, times):
        for _ in range(times):
            model.zero_grad()
            model.backward()
            monitor.measure()
            optimizer.step()
        return monitor.read()["s"]

    assert run(first, 3).idle == 0
    second = torch.optim.SGD([*model.host.parameters(), *model.head.parameters()], lr=0.1)
    known = run(second, IDLE_LIMIT - 1)
    assert (known.idle, known.in_optimizer, known.optimizer_steps) == (IDLE_LIMIT - 1, True, 3)
    assert gate(known)["optimizer"].name == "seed_in_optimizer"
    known = run(second, 1)
    check = gate(known)["optimizer"]
    assert (check.name, check.passed, check.value, check.limit) == ("optimizer_stopped", False, IDLE_LIMIT, IDLE_LIMIT)
    assert "watch(optimizer)" in check.reason
    assert gate(run(first, 1))["optimizer"].name == "seed_in_optimizer"


# --- copies ---


def test_copies_of_model_optimizer_and_monitor_belong_together():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = GradientMonitor(model, {"s": model.seed}, optimizers=optimizer)
    step(model, monitor, 2)
    optimizer.step()
    twins = copy.deepcopy((model, optimizer, monitor))
    for _ in range(2):
        truth = step(twins[0], twins[2])
        twins[1].step()
    known, own = twins[2].read()["s"], monitor.read()["s"]
    assert (known.in_optimizer, known.optimizer_steps, known.samples) == (True, 3, 3)
    assert (own.in_optimizer, own.optimizer_steps, own.samples) == (True, 1, 1)
    twins[2].reset()
    agree_with = step(twins[0], twins[2])
    agree(twins[2].read()["s"], agree_with)
    assert truth != agree_with
    given = {p: torch.ones_like(p) for p in twins[0].parameters()}
    twins[2].measure(gradients=given)
    with pytest.raises(WiringError, match="neither host nor seeds"):
        twins[2].measure(gradients={p: torch.ones_like(p) for p in model.parameters()})


def test_a_copy_notices_changes_of_its_own_model_alone():
    model, monitor = watched()
    step(model, monitor, 2)
    twin, its = copy.deepcopy((model, monitor))
    in_place(twin)
    step(twin, its, 1)
    step(model, monitor, 1)
    assert (its.read()["s"].samples, monitor.read()["s"].samples) == (1, 3)


def test_a_copy_without_its_optimizer_knows_none():
    model = Model()
    monitor = GradientMonitor(model, {"s": model.seed}, optimizers=torch.optim.SGD(model.parameters(), lr=0.1))
    assert copy.deepcopy(monitor).read()["s"].in_optimizer is None


def test_a_copied_controller_goes_on():
    model, optimizer, growth = life()
    epoch(model, optimizer, growth, 3)
    twin = copy.deepcopy(growth)
    epoch(twin.model, twin.optimizer, twin, 3)
    assert growth.evidence()["slot"].optimizer_steps == 3
    assert twin.evidence()["slot"].optimizer_steps == 6
    twin.prune("slot")
    assert len(twin.optimizer.param_groups) == 1
    assert len(optimizer.param_groups) == 2


class Shard(torch.nn.Parameter):
    """Looks like a DTensor, which fully_shard replaces by the gathered parameter during a forward pass."""

    placements = device_mesh = None


class OneRank:
    """Holds all of everything, as the only one."""

    rank, world = 0, 1

    def local(self, tensor):
        return tensor

    def ways(self, named, holding):
        return [Way() for _ in named]

    def exchange(self, named, call):
        return Holding({}, replicated=False)

    def headers(self, call, facts, flag):
        return flag

    def total(self, numbers, call):
        return numbers


def test_a_shard_without_ranks_is_refused():
    model, monitor = watched()
    model.seed[0]._parameters["weight"] = Shard(torch.eye(6))
    with pytest.raises(WiringError, match=r"'seed\.0\.weight' is a DTensor, .* ranks=seedtriton.Ranks\(\)"):
        monitor.refresh()


def test_a_shard_that_is_gathered_is_no_change():
    model, monitor = watched(ranks=OneRank())
    model.seed[0]._parameters["weight"] = shard = Shard(torch.eye(6))
    monitor.refresh()
    step(model, monitor, 2)
    model.seed[0]._parameters["weight"] = nn.Parameter(torch.eye(6))
    assert monitor.read()["s"].samples == 2
    model.seed[0]._parameters["weight"] = shard
    step(model, monitor, 2)
    assert monitor.read()["s"].samples == 4
