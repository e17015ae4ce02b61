"""Every operator is the host at alpha = 0, a straight line in alpha, and the same behind the host and in the blend."""

import pytest
import torch
from networks import Cnn, Mlp, Residual, TransformerBlock
from torch import nn

from seedtriton import ConfigurationError, GrowthController, SeedSlot, Stage, WiringError
from seedtriton.growth.blending import BLENDS, GateNetwork, blend, candidate
from seedtriton.testing import assert_isolated

NETWORKS = [Mlp, Cnn, TransformerBlock]


def features_of(model, inputs):
    seen = []
    hook = model.slot.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    model(inputs)
    hook.remove()
    return seen[0]


def in_stage(stage, operator, network=Mlp, alpha=0.0):
    model = network()
    inputs = torch.randn(network.shape)
    model.slot.germinate(model.seed(), probe=features_of(model, inputs), blend=operator)
    for step in (Stage.TRAINING, Stage.BLENDING):
        if model.slot.stage is not stage:
            model.slot.move(step)
    model.slot.set_alpha(alpha)
    return model, inputs


def explicit(operator, host, seed, alpha, gate):
    if operator == "add":
        return host + alpha * (seed - host)
    if operator == "multiply":
        return host * (1 + alpha * torch.tanh(seed - host))
    return host + alpha * gate * (seed - host)


@pytest.mark.parametrize("operator", BLENDS)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_formula_of_each_operator(operator, alpha):
    host, seed = torch.randn(2, 5, 6, dtype=torch.float64)
    network = GateNetwork(6).double()
    weight = torch.tensor(alpha, dtype=torch.float64)
    found = blend(host, candidate(operator, host, seed, network), weight)
    expected = explicit(operator, host, seed, alpha, network(host))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_candidate_of_add_is_the_seeds_output_itself():
    host, seed = torch.randn(2, 5, 6)
    assert candidate("add", host, seed) is seed


@pytest.mark.parametrize("operator", BLENDS)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_alphas_gradient_is_the_slope_of_the_loss_even_at_zero(operator, alpha):
    host, seed, target = torch.randn(3, 5, 6, dtype=torch.float64)
    full = candidate(operator, host, seed, GateNetwork(6).double()).detach()

    def loss(weight):
        return (blend(host, full, weight) - target).pow(3).sum()

    weight = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    loss(weight).backward()
    step = 1e-6
    # A cubic loss on a straight line: the central difference is off by its third derivative times step squared.
    line = host + (alpha + step) * (full - host), host + (alpha - step) * (full - host)
    difference = ((line[0] - target).pow(3).sum() - (line[1] - target).pow(3).sum()) / (2 * step)
    torch.testing.assert_close(weight.grad, difference, rtol=1e-6, atol=1e-6)


def test_the_slope_is_multiplied_and_summed_wider_than_bf16():
    value = torch.full((4096,), 1 + 1 / 128, dtype=torch.bfloat16)
    alpha = torch.tensor(0.5, requires_grad=True)
    blend(torch.zeros_like(value), value, alpha).backward(value)
    assert alpha.grad == 4160.25  # in bf16 the square rounds to 1 + 1 / 64, and the sum to 4160


def test_multiply_leaves_the_hosts_gradient_uncoupled_from_the_difference():
    host, seed, upstream = torch.randn(3, 5, 6, dtype=torch.float64)
    host.requires_grad_()
    alpha = torch.tensor(0.3, dtype=torch.float64)
    blend(host, candidate("multiply", host, seed), alpha).backward(upstream)
    expected = upstream * (1 + 0.3 * torch.tanh(seed - host.detach()))
    torch.testing.assert_close(host.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("operator", BLENDS)
def test_gradients_at_the_ends_are_those_of_one_side(operator):
    host, seed, upstream = torch.randn(3, 5, 6)
    for alpha in (0.0, 1.0):
        leaves = [host.clone().requires_grad_(), seed.clone().requires_grad_()]
        network = GateNetwork(6)
        blend(leaves[0], candidate(operator, *leaves, network), torch.tensor(alpha)).backward(upstream)
        only = [host.clone().requires_grad_(), seed.clone().requires_grad_()]
        out = candidate(operator, *only, network) if alpha else only[0] + 0 * only[1]
        out.backward(upstream)
        for found, expected in zip(leaves, only):
            expected_gradient = torch.zeros_like(host) if expected.grad is None else expected.grad
            found_gradient = torch.zeros_like(host) if found.grad is None else found.grad
            torch.testing.assert_close(found_gradient, expected_gradient)


@pytest.mark.parametrize("shape", [(3, 6), (3, 7, 6), (3, 6, 4, 5)])
def test_the_gate_is_one_value_per_sample_from_pooled_channels(shape):
    network, features = GateNetwork(6).double(), torch.randn(shape, dtype=torch.float64)
    value = network(features)
    assert value.shape == (3, *[1] * (len(shape) - 1))
    channels_last = features.movedim(1, -1) if len(shape) == 4 else features
    pooled = channels_last.reshape(3, -1, 6).mean(1)
    hidden = torch.relu(pooled @ network.squeeze.weight.T + network.squeeze.bias)
    expected = torch.sigmoid(hidden @ network.excite.weight.T + network.excite.bias)
    torch.testing.assert_close(value.flatten(), expected.flatten(), rtol=1e-12, atol=0)
    assert ((value > 0) & (value < 1)).all()


def test_the_gate_is_small():
    for channels, hidden in ((4, 8), (64, 16)):
        network = GateNetwork(channels)
        assert [tuple(p.shape) for p in network.parameters()] == [(hidden, channels), (hidden,), (1, hidden), (1,)]


@pytest.mark.parametrize("operator", BLENDS)
@pytest.mark.parametrize("network", NETWORKS)
def test_behind_the_host_the_slope_is_the_one_at_the_beginning_of_the_blend(operator, network):
    """What TRAINING measures is what BLENDING will feel: the same number, by two ways."""
    behind, inputs = in_stage(Stage.TRAINING, operator, network)
    blended, _ = in_stage(Stage.BLENDING, operator, network)
    blended.load_state_dict(behind.state_dict())
    slopes = []
    for model in (behind.eval(), blended.eval()):
        model(inputs).square().sum().backward()
        slopes.append(model.slot.alpha.grad)
    assert slopes[0] != 0
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("operator", BLENDS)
@pytest.mark.parametrize("network", NETWORKS)
def test_behind_the_host_every_operator_is_invisible_and_everything_of_the_seed_learns(operator, network):
    model, inputs = in_stage(Stage.TRAINING, operator, network)
    learned = assert_isolated(model, inputs)
    assert len(learned) == (8 if operator == "gate" else 4)
    assert all(gradient.abs().sum() > 0 for gradient in learned.values())
    model(inputs)
    assert model.slot.isolation_violations == 0


@pytest.mark.parametrize("operator", BLENDS)
@pytest.mark.parametrize("network", NETWORKS)
def test_at_alpha_zero_a_nan_of_the_seed_reaches_neither_output_nor_a_gradient_of_the_host(operator, network):
    model, inputs = in_stage(Stage.BLENDING, operator, network)
    reference = network()
    reference.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("slot.")})
    with torch.no_grad():
        for parameter in model.slot.parameters():
            parameter.fill_(float("nan"))
    outputs = []
    for net in (model, reference):
        out = net(inputs)
        out.square().sum().backward()
        outputs.append(out)
    assert torch.equal(*outputs)
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if not name.startswith("slot."):
            assert torch.equal(parameter.grad, expected[name].grad)


def test_a_gate_lives_and_goes_with_its_seed():
    slot = SeedSlot()
    slot.germinate(Residual(4), probe=torch.randn(3, 4), blend="gate")
    assert {name.partition(".")[0] for name in slot.state_dict()} == {"alpha", "seed", "gate"}
    slot.eval()
    assert not slot.gate.training
    slot.move(Stage.PRUNED)
    assert list(slot.state_dict()) == []
    assert slot.gate is None
    assert slot.blend == "add"


def test_a_gate_is_made_for_the_probes_channels_and_dtype():
    slot = SeedSlot()
    seed = Residual(3, make=lambda i, o: nn.Conv2d(i, o, 1))
    slot.germinate(seed, probe=torch.randn(2, 3, 4, 4).double(), blend="gate")
    assert slot.gate.squeeze.weight.shape == (8, 3)
    assert slot.gate.squeeze.weight.dtype == torch.float64


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"blend": "gate"}, WiringError, "probe="),
        ({"blend": "max", "probe": torch.randn(2, 4)}, ConfigurationError, "add.*multiply.*gate"),
        ({"blend": "gate", "probe": torch.randn(2, 3, 3, 3, 4)}, WiringError, "2, 3 or 4 dimensions"),
    ],
)
def test_an_impossible_blend_is_refused_and_the_slot_stays_usable(arguments, error, words):
    slot = SeedSlot()
    with pytest.raises(error, match=words):
        slot.germinate(Residual(4), **arguments)
    assert slot.stage is Stage.DORMANT
    assert list(slot.parameters()) == []
    slot.germinate(Residual(4), probe=torch.randn(2, 4))


@pytest.mark.parametrize("named", [False, True])
def test_a_gate_is_in_the_optimizer_in_the_seeds_segment_and_out_again(named):
    model = Mlp()
    optimizer = torch.optim.SGD(model.named_parameters() if named else model.parameters(), lr=0.1, momentum=0.9)
    growth = GrowthController(model, optimizer, sinks=[])
    growth.germinate("slot", Residual(7), probe=torch.randn(3, 7), blend="gate")
    gate = {id(p) for p in model.slot.gate.parameters()}
    assert gate <= {id(p) for p in optimizer.param_groups[1]["params"]}
    segment_of = {id(p): s for p, s in zip(growth.monitor._watched.tracked, growth.monitor._watched.segments)}
    assert {segment_of[p] for p in gate} == {1}
    model(torch.randn(Mlp.shape)).square().sum().backward()
    growth.measure()
    optimizer.step()
    growth.prune("slot")
    assert len(optimizer.param_groups) == 1
    assert not gate & {id(p) for p in optimizer.state}


def test_a_compiled_ramp_of_every_operator_costs_no_recompilation():
    for operator in BLENDS:
        graphs = []
        torch._dynamo.reset()
        model, inputs = in_stage(Stage.BLENDING, operator)
        compiled = torch.compile(model, backend=lambda g, _, into=graphs: into.append(g) or g, fullgraph=True)
        for step in range(4):
            model.slot.set_alpha(step / 4)
            torch.testing.assert_close(compiled(inputs), model(inputs), rtol=0, atol=0)
        assert len(graphs) == 1
