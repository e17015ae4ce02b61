"""What torch itself does to parameters and gradients: swapping, "meta", inference mode, quantising, sparse layouts."""

import itertools
import math
import types

import pytest
import torch
from torch import nn

from seedtriton import ConfigurationError, FlatGradients, GradientMonitor, GrowthController, SeedSlot, ops
from seedtriton.core.evidence import MEASURED, NEVER_MEASURED
from seedtriton.gradients import reference
from seedtriton.gradients.row import Listed


def parts(device=None):
    torch.manual_seed(0)
    with torch.device(device or "cpu"):
        return nn.Linear(4, 4), nn.Linear(4, 4)


def backward(host, seed, run=0):
    torch.manual_seed(run)
    x = torch.randn(8, 4, dtype=host.weight.dtype)
    seed(host(x).tanh()).pow(2).mean().backward()


def norm(*modules):
    gradients = [p.grad.double() for module in modules for p in module.parameters() if p.grad is not None]
    return math.sqrt(sum(g.square().sum().item() for g in gradients))


def agree(monitor, host, seed):
    known = monitor.read()["s"]
    assert (known.host_norm, known.seed_norm) == pytest.approx((norm(host), norm(seed)), rel=1e-6)
    return known


# --- swapping ---


@pytest.mark.parametrize("kept", ["flat", "apart"])
def test_a_measured_model_can_be_converted_by_swapping(kept):
    host, seed = parts()
    flat = FlatGradients([host, seed]) if kept == "flat" else None
    monitor = GradientMonitor(host, {"s": seed}, flat=flat)
    backward(host, seed)
    monitor.measure()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for module in (host, seed):
            module.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    if flat is not None:
        flat.refresh()
        flat.zero_()
    host.zero_grad()
    seed.zero_grad()
    backward(host, seed, 1)
    monitor.reset()
    monitor.measure()
    agree(monitor, host, seed)


# --- "meta" ---


def filled(host, seed):
    for module, values in zip((host, seed), parts()):
        module.load_state_dict(values.state_dict(), assign=True)


def emptied(host, seed):
    for module in (host, seed):
        module.to_empty(device="cpu")
        module.reset_parameters()


@pytest.mark.parametrize("fill", [filled, emptied])
@pytest.mark.parametrize("read", [True, False])
def test_a_monitor_of_a_model_on_meta_works_once_it_is_filled(fill, read):
    host, seed = parts("meta")
    monitor = GradientMonitor(host, {"s": seed})
    if read:
        known = monitor.read()["s"]
        assert (known.status, known.displacement) == (NEVER_MEASURED, None)
        assert "on 'meta', without values" in known.reason
    fill(host, seed)
    backward(host, seed)
    monitor.measure()
    assert monitor.ring.device.type == "cpu"
    assert agree(monitor, host, seed).displacement == 0.0
    with torch.no_grad():
        for p in seed.parameters():
            p.mul_(1.5)
    assert monitor.read()["s"].displacement == pytest.approx(0.5, rel=1e-5)


def test_a_monitor_that_goes_to_meta_with_its_model_and_back_keeps_what_it_knows():
    host, seed = parts()
    host.monitor = GradientMonitor([host.weight], {"s": seed})
    backward(host, seed)
    host.monitor.measure()
    host.to("meta")
    assert host.monitor.ring.device.type == "cpu"
    host.to_empty(device="cpu")
    assert host.monitor.read()["s"].samples == 1


def test_a_monitor_made_on_meta_by_hand_gets_buffers_of_its_own():
    host, seed = parts()
    monitor = GradientMonitor(host, {"s": seed})
    for name, buffer in monitor._buffers.items():
        monitor._buffers[name] = buffer.to("meta")
    monitor.to("cpu")
    backward(host, seed)
    monitor.measure()
    agree(monitor, host, seed)


# --- inference mode ---


def inferred(*modules, spoil=None):
    """Gradients made in inference mode, as torch.autograd.grad's results and loaded ones may be."""
    with torch.inference_mode():
        torch.manual_seed(0)
        for module in modules:
            for p in module.parameters():
                gradient = torch.randn_like(p)
                if module is spoil:
                    gradient[0] = math.nan
                p.grad = gradient


@pytest.mark.parametrize("clipped", [True, False])
def test_gradients_of_inference_mode_are_measured_and_clipped(clipped):
    host, seed = parts()
    monitor = GradientMonitor(host, {"s": seed})
    if clipped:
        monitor.clip_grad_norm_(1.0)
    inferred(host, seed)
    monitor.measure()
    assert int(monitor.count) == 1
    agree(monitor, host, seed)
    truth = norm(host, seed)
    for _ in range(2):  # again, with what is there now
        assert float(monitor.clip_grad_norm_(truth / 2)) == pytest.approx(truth, rel=1e-6)
        assert norm(host, seed) == pytest.approx(truth / 2, rel=1e-4)
        truth /= 2


def test_a_seed_that_is_not_finite_is_quarantined_in_inference_mode_too():
    host, seed = parts()
    monitor = GradientMonitor(host, {"s": seed}, alphas={"s": Behind()}, quarantine=True)
    inferred(host, seed, spoil=seed)
    before = norm(host)
    monitor.measure()
    assert (norm(host), norm(seed)) == (before, 0.0)


class Behind:
    behind, alpha = True, None


# --- quantised weights ---


class Quantised(torch.Tensor):
    """torchao's kind: a wrapper that says bfloat16, holds int8 and a scale, and has no arithmetic but dequantize()."""

    @staticmethod
    def __new__(cls, data, scale):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.bfloat16, requires_grad=False)

    def __init__(self, data, scale):
        self.data_, self.scale = data, scale

    def dequantize(self):
        return self.data_.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), named=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(arguments[0].data_, arguments[0].scale)
        raise NotImplementedError(f"{function} is not implemented")


def test_a_quantised_seed_moves_as_far_as_what_it_stands_for():
    host, _ = parts()
    bias = nn.Parameter(torch.zeros(4))
    weight = Quantised(torch.ones(4, 4, dtype=torch.int8), 2.0)
    monitor = GradientMonitor(host, {"s": [weight, bias]})
    with torch.no_grad():
        weight.scale = 3.0
        bias.fill_(4.0)
    truth = math.sqrt(16 * 1.0 + 4 * 16.0) / math.sqrt(16 * 4.0)
    assert monitor.read()["s"].displacement == pytest.approx(truth, rel=1e-6)


def test_a_seed_whose_weights_are_integers_says_why_nobody_knows_how_far_it_moved():
    host, _ = parts()
    weight = nn.Parameter(torch.ones(4, 4, dtype=torch.uint8), requires_grad=False)
    known = GradientMonitor(host, {"s": [weight]}).read()["s"]
    assert known.displacement is None
    assert "quantised (torch.uint8)" in known.reason


# --- sparse gradients ---


def test_sparse_gradients_with_repeated_rows_are_summed_before_they_are_rounded():
    torch.manual_seed(0)
    indices = torch.randint(3, (1, 300))
    values = torch.randn(300, 8, dtype=torch.bfloat16)
    gradient = torch.sparse_coo_tensor(indices, values, (3, 8), check_invariants=True)
    truth = torch.sparse_coo_tensor(indices, values.double(), (3, 8), check_invariants=True).to_dense().square().sum()
    found = ops.segmented_sumsq([gradient], [0], 1)
    assert float(found) == pytest.approx(float(truth), rel=1e-6)


# --- clipping ---


def test_a_write_that_no_counter_sees_is_clipped_without_reuse():
    host, seed = parts()
    monitor = GradientMonitor(host, {"s": seed})
    for reuse in (True, True, False):
        host.zero_grad()
        seed.zero_grad()
        backward(host, seed)
        monitor.measure()
        for p in (*host.parameters(), *seed.parameters()):
            p.grad.data.mul_(100.0)
        truth = norm(host, seed)
        total = float(monitor.clip_grad_norm_(1.0, reuse=reuse))
    assert total == pytest.approx(truth, rel=1e-6)
    assert norm(host, seed) == pytest.approx(1.0, rel=1e-4)


def test_a_controller_hands_on_that_nothing_is_to_be_reused():
    net = nn.Sequential(nn.Linear(4, 4), SeedSlot(), nn.Linear(4, 2))
    growth = GrowthController(net, torch.optim.SGD(net.parameters(), lr=0.1), sinks=[])
    growth.germinate("1", nn.Linear(4, 4))
    growth.clip_grad_norm_(1.0)
    net(torch.randn(3, 4)).sum().backward()
    growth.measure()
    host = [net[0], net[2]]
    for p in net.parameters():
        p.grad.data.mul_(100.0)
    growth.clip_grad_norm_(1.0, reuse=False)
    assert norm(*host) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("limit", [torch.tensor(0.5), torch.tensor([0.5], dtype=torch.float64), torch.tensor(2)])
def test_the_limit_may_be_a_tensor(limit):
    host, seed = parts()
    monitor = GradientMonitor(host, {"s": seed})
    for _ in range(2):
        backward(host, seed)
        for p in host.parameters():
            p.grad.mul_(50.0)
        monitor.measure()
        monitor.clip_grad_norm_(limit)
        assert norm(host, seed) == pytest.approx(float(limit), rel=1e-4)


@pytest.mark.parametrize("limit", [torch.tensor([1.0, 2.0]), torch.tensor(-1.0), torch.tensor(math.nan), math.nan])
def test_a_limit_that_is_none_is_refused(limit):
    host, seed = parts()
    with pytest.raises(ConfigurationError, match="max_norm must be above 0"):
        GradientMonitor(host, {"s": seed}).clip_grad_norm_(limit)


ACTIONS = ("measure", "clip", "apart", "write", "torch")


ORDERS = [*itertools.permutations(ACTIONS, 3), ("clip",) * 3, ("apart", "apart", "clip")]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_clipping_twice_is_right_in_every_order(order):
    """Against fp64 twins of the gradients that are clipped by the formula."""
    host, seed = parts()
    monitor = GradientMonitor(host, {"s": seed})
    for run in range(3):
        host.zero_grad()
        seed.zero_grad()
        backward(host, seed, run)
        owned = [(p, side) for side, module in enumerate((host, seed)) for p in module.parameters()]
        truth = [p.grad.double().clone() for p, _ in owned]
        limit = 0.2
        for action in ("measure", *order):
            limit *= 0.7
            squares = [sum(float(g.square().sum()) for g, (_, side) in zip(truth, owned) if side == s) for s in (0, 1)]
            together, apart = [math.sqrt(sum(squares))] * 2, [math.sqrt(square) for square in squares]
            norms = together
            if action == "measure":
                monitor.measure()
                continue
            if action == "write":
                for p, _ in owned:
                    p.grad.mul_(3.0)
                truth = [3.0 * g for g in truth]
                continue
            if action == "torch":
                torch.nn.utils.clip_grad_norm_([p for p, _ in owned], limit)
            else:
                norms = apart if action == "apart" else together
                found = monitor.clip_grad_norm_(limit, apart=action == "apart")
                assert float(found) == pytest.approx(norms[0], rel=1e-5)
            truth = [g * min(1.0, limit / (norms[side] + 1e-6)) for g, (_, side) in zip(truth, owned)]
            for g, (p, _) in zip(truth, owned):
                assert torch.allclose(p.grad.double(), g, rtol=1e-5, atol=1e-9)
    assert monitor.read()["s"].status == MEASURED


class Elsewhere:
    """Coefficients on a device whose values nobody may look at."""

    device = types.SimpleNamespace(type="elsewhere")

    def __init__(self, values):
        self.values = values

    def __getitem__(self, index):
        return self.values[index]


@pytest.mark.parametrize(("coefficient", "expected"), [(0.5, [0.5, 1.0]), (1.0, [1.0, 2.0]), (-1.0, [0.0, 0.0])])
def test_sparse_gradients_are_scaled_and_cleared_without_a_look_at_the_coefficient(coefficient, expected):
    """As on a GPU, where looking would wait."""
    value = math.nan if coefficient < 0.0 else 2.0
    gradient = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.tensor([1.0, value]), (3,), check_invariants=True)
    coefficients = Elsewhere(torch.tensor([coefficient], dtype=torch.float64))
    reference.scale_segments_(Listed([gradient], [0]), coefficients, clear=True)
    assert gradient._values().tolist() == expected
