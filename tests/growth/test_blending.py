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


def in_stage(stage, operator, network=Mlp, alpha=0.0, **arguments):
    model = network()
    inputs = torch.randn(network.shape)
    model.slot.germinate(model.seed(), probe=features_of(model, inputs), blend=operator, **arguments)
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


@pytest.mark.parametrize("operator", BLENDS)
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_blended_the_hosts_gradient_is_the_true_one(operator, alpha):
    """By finite differences through host, seed and gate: what a step of the optimizer will do to the loss."""
    slot, x = SeedSlot(), torch.randn(3, 5, 6).double()
    slot.germinate(Residual(6), probe=x, blend=operator)
    for stage in (Stage.TRAINING, Stage.BLENDING):
        slot.move(stage)
    slot.set_alpha(alpha)
    x.requires_grad_()
    slot(x).pow(3).sum().backward()
    along = torch.randn_like(x)
    with torch.no_grad():
        ends = [slot(x + sign * 1e-6 * along).pow(3).sum() for sign in (1, -1)]
    torch.testing.assert_close((x.grad * along).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("operator", BLENDS)
@pytest.mark.parametrize("network", NETWORKS)
def test_an_isolated_blend_leaves_the_host_its_own_path_alone(operator, network):
    model, inputs = in_stage(Stage.BLENDING, operator, network, alpha=0.25, isolate_blending=True)
    plain, _ = in_stage(Stage.BLENDING, operator, network, alpha=0.25)
    plain.load_state_dict(model.state_dict())
    x, upstream = features_of(model.eval(), inputs).requires_grad_(), None
    found = []
    for slot in (model.slot, plain.eval().slot):
        out = slot(x)
        upstream = torch.randn_like(out) if upstream is None else upstream
        out.backward(upstream)
        found.append((out, x.grad, slot.alpha.grad, [p.grad for p in slot.parameters()]))
        x.grad = None
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], 0.75 * upstream)
    assert not torch.allclose(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][2:], found[1][2:])  # the seed, the gate and alpha learn as without
    for stage in (Stage.HOLDING, Stage.FOSSILIZED):  # once alpha has arrived the host is coupled
        model.slot.move(stage)
        model.slot(x).backward(upstream)
        torch.testing.assert_close(x.grad, found[1][1])
        x.grad = None


def test_an_isolated_blend_is_told_saved_and_gone_with_its_seed():
    events, models = [], []
    for _ in range(2):
        model = Mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        models.append((model, GrowthController(model, optimizer, sinks=[events.append])))
    (first, growth), (second, resumed) = models
    growth.germinate("slot", Residual(7), isolate_blending=True)
    assert [event["isolate_blending"] for event in events if event["event"] == "germinated"] == [True]
    resumed.load_state_dict(growth.state_dict(), seeds={"slot": Residual(7)})
    assert second.slot.isolate_blending
    growth.prune("slot")
    assert not first.slot.isolate_blending
    assert "isolate_blending" not in first.slot.lifecycle_state()


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


GATES = [
    # shape, dims, channel_dim, where the channels are, shape of the gate
    ((3, 6), (), None, 1, (3, 1)),
    ((3, 7, 6), (), None, 2, (3, 7, 1)),
    ((3, 7, 6), (1,), None, 2, (3, 1, 1)),
    ((7, 3, 6), (0,), None, 2, (1, 3, 1)),  # [T, B, C], one value per sample
    ((3, 6, 7), (), 1, 1, (3, 1, 7)),  # [B, C, L]
    ((3, 6, 7), (2,), 1, 1, (3, 1, 1)),
    ((3, 6, 7), (-1,), -2, 1, (3, 1, 1)),
    ((3, 6, 4, 5), (), None, 1, (3, 1, 4, 5)),
    ((3, 6, 4, 5), (2, 3), None, 1, (3, 1, 1, 1)),
    ((3, 4, 5, 6), (1,), -1, 3, (3, 1, 5, 1)),
    ((3, 6, 2, 4, 5), (2,), 1, 1, (3, 1, 1, 4, 5)),
    # What states of 0.1 mean: all but the first and the channels.
    ((3, 6), None, None, 1, (3, 1)),
    ((3, 7, 6), None, None, 2, (3, 1, 1)),
    ((3, 6, 4, 5), None, None, 1, (3, 1, 1, 1)),
]


@pytest.mark.parametrize("shape, dims, channel_dim, at, wanted", GATES)
def test_the_gate_is_one_value_for_what_is_pooled_and_nothing_else_is(shape, dims, channel_dim, at, wanted):
    network, features = GateNetwork(6, dims, channel_dim).double(), torch.randn(shape, dtype=torch.float64)
    value = network(features)
    assert value.shape == wanted
    pooled = features
    for dim, size in enumerate(wanted):
        if size == 1 and dim != at:
            pooled = pooled.mean(dim, keepdim=True)
    hidden = torch.relu(pooled.movedim(at, -1) @ network.squeeze.weight.T + network.squeeze.bias)
    expected = torch.sigmoid(hidden @ network.excite.weight.T + network.excite.bias).movedim(-1, at)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    assert ((value > 0) & (value < 1)).all()


@pytest.mark.parametrize("batch", [0, 1], ids=["[B, T, C]", "[T, B, C]"])
def test_a_gate_unless_told_mixes_neither_samples_nor_positions(batch):
    """In a causal model position t must not see t + 1, whichever dimension the batch is."""
    slot, x = SeedSlot(), torch.randn(4, 5, 6)
    slot.germinate(Residual(6), probe=x, blend="gate")
    for stage in (Stage.TRAINING, Stage.BLENDING):
        slot.move(stage)
    slot.set_alpha(0.5)
    other = x.clone()
    other.select(batch, 3).normal_()  # another sample
    other.select(1 - batch, 3).normal_()  # a later position
    rows = (slice(0, 3), slice(0, 3))
    assert torch.equal(slot(x)[rows], slot(other)[rows])


def test_what_a_gate_pools_is_told_saved_and_loaded():
    events, models = [], []
    for _ in range(2):
        model = nn.Sequential(nn.Conv1d(3, 6, 1), SeedSlot())
        models.append((model, GrowthController(model, torch.optim.SGD(model.parameters(), 0.1), sinks=[events.append])))
    (first, growth), (second, resumed) = models
    x = torch.randn(2, 3, 7)
    growth.germinate(
        "1", conv1d_seed(), probe=torch.randn(2, 6, 7), blend="gate", gate_dims=(2,), channel_dim=1
    )
    told = next(event for event in events if event["event"] == "germinated")
    assert (list(told["gate_dims"]), told["channel_dim"]) == ([2], 1)
    assert first[1].gate.squeeze.weight.shape == (8, 6)
    resumed.load_state_dict(growth.state_dict(), seeds={"1": conv1d_seed})
    second.load_state_dict(first.state_dict())
    for model in (first, second):
        model[1].move(Stage.BLENDING)
        model[1].set_alpha(0.5)
    assert torch.equal(first(x), second(x))
    assert second[1].gate(torch.randn(2, 6, 7)).shape == (2, 1, 1)


def conv1d_seed():
    return nn.Conv1d(6, 6, 3, padding=1)


@pytest.mark.parametrize("given", [False, True], ids=["in the slot", "given"])
def test_a_state_of_0_1_keeps_its_pooled_gate(given):
    slot = SeedSlot()
    slot.germinate(Residual(6), probe=torch.randn(2, 5, 6), blend="gate")
    old = slot.lifecycle_state()
    for key in ("gate_dims", "channel_dim", "random"):
        del old[key]
    loaded = SeedSlot()
    if not given:
        loaded.germinate(Residual(6), probe=torch.randn(2, 5, 6), blend="gate")
    loaded.load_lifecycle_state(old, Residual(6) if given else None)
    assert loaded.gate(torch.randn(2, 5, 6)).shape == (2, 1, 1)
    assert loaded.lifecycle_state() == old


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
        ({"blend": "gate", "probe": torch.randn(2, 4), "gate_dims": (2,)}, WiringError, "do not fit"),
        ({"blend": "gate", "probe": torch.randn(2, 4), "channel_dim": -3}, WiringError, "do not fit"),
        ({"blend": "gate", "probe": torch.randn(2, 4), "gate_dims": (0, -2)}, WiringError, "twice"),
        ({"blend": "gate", "probe": torch.randn(2, 4), "gate_dims": (-1,)}, WiringError, "channels"),
        ({"blend": "gate", "probe": torch.randn(2, 4), "gate_dims": 2}, ConfigurationError, "gate_dims"),
        ({"blend": "gate", "probe": torch.randn(2, 4), "gate_dims": (True,)}, ConfigurationError, "gate_dims"),
        ({"blend": "gate", "probe": torch.randn(2, 4), "channel_dim": "1"}, ConfigurationError, "channel_dim"),
        ({"blend": "add", "gate_dims": (1,)}, ConfigurationError, "of blend 'gate'"),
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
