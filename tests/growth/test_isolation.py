"""Behind the host: invisible to it, bounded for the seed, and a leak is counted."""

import pytest
import torch
from networks import Cnn, Mlp, Residual, TransformerBlock
from torch import nn

from seedtriton import GateThresholds, SeedSlot, Stage, StraightThrough, TrustRegion
from seedtriton.growth.isolation import behind, leaks, towards
from seedtriton.growth.slot import ISOLATION_CHECKS
from seedtriton.testing import assert_isolated

ISOLATIONS = [StraightThrough(), TrustRegion(0.1), TrustRegion(1.0), TrustRegion(0.3, "norm")]


def in_training(model, isolation, seed=None):
    model.slot.germinate(seed or model.seed(), isolation=isolation)
    model.slot.move(Stage.TRAINING)
    return model


@pytest.mark.parametrize("isolation", ISOLATIONS)
@pytest.mark.parametrize("network", [Mlp, Cnn, TransformerBlock])
def test_output_and_host_gradients_are_bit_identical_to_the_network_without_the_seed(network, isolation):
    model = in_training(network(), isolation)
    inputs = torch.randn(network.shape)
    gradients = assert_isolated(model, inputs)
    assert len(gradients) == 4
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


def test_bit_identical_in_channels_last():
    model = in_training(Cnn(), TrustRegion()).to(memory_format=torch.channels_last)
    inputs = torch.randn(Cnn.shape).to(memory_format=torch.channels_last)
    assert len(assert_isolated(model, inputs)) == 4
    features = model.norm(model.first(inputs))
    assert model.slot(features).is_contiguous(memory_format=torch.channels_last)


def test_bit_identical_under_bf16_autocast():
    model = in_training(Mlp(), TrustRegion())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(assert_isolated(model, torch.randn(Mlp.shape))) == 4


def test_assert_isolated_notices_a_seed_that_touches_the_host():
    class Thief(nn.Module):
        def __init__(self, host):
            super().__init__()
            self.own = nn.Linear(7, 7)
            self.host = [host]

        def forward(self, x):
            return self.own(x) + self.host[0].first.bias.sum()

    model = Mlp()
    in_training(model, TrustRegion(), Thief(model))
    with pytest.raises(AssertionError, match=r"first\.bias"):
        assert_isolated(model, torch.randn(Mlp.shape))


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_a_nan_in_the_seed_reaches_neither_the_output_nor_a_host_gradient(isolation):
    model = in_training(Mlp(), isolation)
    with torch.no_grad():
        model.slot.seed.expand.weight.fill_(float("nan"))
    inputs = torch.randn(Mlp.shape)
    assert_isolated(model, inputs)
    output = model(inputs)
    output.sum().backward()
    assert output.isfinite().all()
    assert model.first.weight.grad.isfinite().all()
    assert model.slot.alpha.grad.isnan()


def test_a_seed_that_writes_into_its_input_cannot_reach_the_host():
    seed = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(7, 7))
    model = in_training(Mlp(), TrustRegion(), seed)
    assert_isolated(model, torch.randn(Mlp.shape))


def test_a_frozen_host_still_lets_the_seed_learn():
    model = in_training(Mlp(), TrustRegion())
    for parameter in (*model.first.parameters(), *model.last.parameters()):
        parameter.requires_grad_(False)
    model(torch.randn(Mlp.shape)).square().sum().backward()
    assert model.slot.seed.contract.weight.grad.abs().sum() > 0
    assert model.slot.alpha.grad != 0


def gradients_behind(isolation, host, seed, upstream):
    host, seed = host.clone().requires_grad_(), seed.clone().requires_grad_()
    alpha = torch.zeros((), requires_grad=True)
    behind(host, seed, alpha, isolation).backward(upstream)
    return host.grad, seed.grad, alpha.grad


def test_straight_through_hands_on_the_gradient_as_it_is():
    h, s, g = torch.randn(3, 4, 5)
    to_host, to_seed, to_alpha = gradients_behind(StraightThrough(), h, s, g)
    assert torch.equal(to_host, g)
    assert torch.equal(to_seed, g)
    torch.testing.assert_close(to_alpha, (g * (s - h)).sum())


def test_a_trust_region_hands_the_seed_its_rule_and_nobody_else():
    for isolation in ISOLATIONS:
        h, s, g = torch.randn(3, 4, 5, dtype=torch.float64)
        to_host, to_seed, to_alpha = gradients_behind(isolation, h, s, g)
        assert torch.equal(to_host, g)
        assert torch.equal(to_seed, towards(g, h, s - h, isolation))
        torch.testing.assert_close(to_alpha, (g * (s - h)).sum().float())


def test_the_slope_for_alpha_is_summed_wider_than_bf16():
    h, s, g = (torch.randn(3, 20_000) + 1).bfloat16()
    _, _, to_alpha = gradients_behind(StraightThrough(), h, s, g)
    assert to_alpha.dtype == torch.float32
    truth = (g.double() * (s - h).double()).sum()
    assert abs(to_alpha.double() / truth - 1) < 1e-5


def test_behind_passes_gradcheck_for_the_slope_along_the_blend():
    """alpha.grad is the derivative of the loss along host + alpha (seed - host), at alpha = 0."""
    h, s, target = torch.randn(3, 4, 5, dtype=torch.float64)
    alpha = torch.zeros((), requires_grad=True)
    (behind(h, s, alpha, TrustRegion()) - target).square().sum().backward()
    step = 1e-6
    difference = sum(sign * (h + sign * step * (s - h) - target).square().sum() for sign in (1, -1)) / (2 * step)
    torch.testing.assert_close(alpha.grad.double(), difference, rtol=1e-5, atol=1e-6)


def test_leaks_counts_foreign_leaves_once_each():
    own, foreign = nn.Linear(3, 3), nn.Linear(3, 3)
    clean = own(torch.randn(2, 3))
    assert leaks(clean, own.parameters()) == 0
    dirty = own(foreign(torch.randn(2, 3))) + foreign.weight.sum()
    assert leaks(dirty, own.parameters()) == 2
    assert leaks(torch.ones(2), own.parameters()) == 0
    assert leaks(foreign.weight, own.parameters()) == 1


def test_a_leak_is_counted_as_a_violation_in_checked_forward_passes_only():
    class Leaky(Residual):
        def forward(self, x):
            return super().forward(x) + 0 * outside.sum()

    outside = nn.Parameter(torch.ones(1))
    model = in_training(Mlp(), TrustRegion(), Leaky(7))
    for expected in (*range(1, ISOLATION_CHECKS + 1), ISOLATION_CHECKS, ISOLATION_CHECKS):
        model(torch.randn(Mlp.shape))
        assert model.slot.isolation_violations == expected
    model.slot.check_isolation_again()
    model(torch.randn(Mlp.shape))
    assert model.slot.isolation_violations == ISOLATION_CHECKS + 1


def test_a_leak_in_the_probe_is_more_than_a_gate_forgives():
    class Leaky(Residual):
        def forward(self, x):
            return super().forward(x) + 0 * outside.sum()

    outside = nn.Parameter(torch.ones(1))
    slot = SeedSlot()
    slot.germinate(Leaky(7), probe=torch.randn(2, 7))
    assert slot.isolation_violations > GateThresholds().max_isolation_violations


def test_a_clean_seed_violates_nothing():
    model = in_training(Cnn(), TrustRegion())
    for _ in range(3):
        model.slot.check_isolation_again()
        model(torch.randn(Cnn.shape))
    assert model.slot.isolation_violations == 0
