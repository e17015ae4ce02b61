"""The rule behind the host: its formula, its bound, its rest, and that no usual optimizer runs away with it."""

import copy
import itertools
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Mlp, Residual
from scripts import Script, TwoSlots
from torch import nn
from torch.nn import functional as F

from bench.optimizers import Muon
from bench.tasks import TASKS, convolution, digits_cnn
from seedtriton import ConfigurationError, SeedSlot, Stage, StateDictError, StraightThrough, TrustRegion
from seedtriton.gradients.marks import Mark
from seedtriton.growth.isolation import NORM, RULES, behind, radius, towards

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Of the result in units of its own rounding: the last one, and fp32's of the parts.
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def elementwise(g, h, d, rho):
    """The formula as the design writes it, in fp64 and element by element, with a radius for each sample."""
    found = []
    for one_g, one_h, one_d in zip(*(x.double().flatten(1).tolist() for x in (g, h, d))):
        radius = rho * (sum(x * x for x in one_h) / len(one_h)) ** 0.5
        found.append([(a * radius + abs(a) * b) / (radius + abs(b)) for a, b in zip(one_g, one_d)])
    return torch.tensor(found, dtype=torch.float64).view(g.shape)


def some(dtype, shape=(6, 5, 7)):
    """Gradient, features and the seed's contribution, this of the size of the trust region."""
    g, h, d = torch.randn(3, *shape)
    return g.to(dtype), (3 * h).to(dtype), (0.6 * d).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rule_is_its_formula(dtype):
    g, h, d = some(dtype)
    found = towards(g, h, d, TrustRegion(0.3))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), elementwise(g, h, d, 0.3), rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


def test_every_sample_has_the_radius_of_its_own_features():
    h = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], dtype=torch.float64)
    own = 0.2 * (12.5**0.5), 0.2 * (0.125**0.5)
    # One on which the features are all zero has no scale, and takes that of all of them.
    shared = 0.2 * ((25 + 0.25) / 6) ** 0.5
    torch.testing.assert_close(radius(h, 0.2).flatten(), torch.tensor([*own, shared], dtype=torch.float64))
    assert radius(h.view(3, 2, 1, 1), 0.2).shape == (3, 1, 1, 1)
    # Without a dimension of samples it is one sample.
    for features in (h.flatten(), h.flatten()[0]):
        expected = torch.tensor(0.2 * features.square().mean().item() ** 0.5, dtype=torch.float64)
        torch.testing.assert_close(radius(features, 0.2), expected)
    assert torch.equal(radius(torch.zeros(3, 2), 0.2), torch.zeros(3, 1))
    assert radius(h.half(), 0.2).dtype == torch.float32
    # The largest number of half precision is no infinity here.
    assert radius(torch.full((2, 64), 65504.0, dtype=torch.float16), 0.2).isfinite().all()


def test_the_older_rule_is_its_formula():
    g, h, d = some(torch.float64)
    weight = g.norm() / (0.3 * h.norm())
    torch.testing.assert_close(towards(g, h, d, TrustRegion(0.3, NORM)), g + weight * d)
    assert torch.equal(towards(g, torch.zeros_like(h), d, TrustRegion(0.3, NORM)), g)


magnitudes = st.floats(-30, 15).map(lambda exponent: 10.0**exponent)


@given(st.sampled_from(DTYPES), magnitudes, magnitudes, magnitudes, st.integers(0, 2**32))
def test_no_element_is_longer_than_straight_throughs_even_after_rounding(dtype, of_g, of_h, of_d, random_seed):
    generator = torch.Generator().manual_seed(random_seed)
    g, h, d = (torch.randn(64, generator=generator, dtype=torch.float64) for _ in range(3))
    largest = min(torch.finfo(dtype).max / 8, 1e15)
    g, h, d = ((size * x).clamp(-largest, largest).to(dtype) for size, x in ((of_g, g), (of_h, h), (of_d, d)))
    found = towards(g, h, d, TrustRegion())
    assert found.isfinite().all()
    assert bool((found.abs() <= g.abs()).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_seed_is_at_rest_at_the_edge_of_the_region_and_only_there(dtype):
    g = torch.tensor([[0.3, -5.0, 1e-4, -1.0]], dtype=dtype)
    h = torch.tensor([[1.0, -1.0, 1.0, 1.0]], dtype=dtype)  # root mean square 1
    edge = -0.25 * g.sign()
    assert torch.equal(towards(g, h, edge, TrustRegion(0.25)), torch.zeros_like(g))
    inside, outside = towards(g, h, edge / 2, TrustRegion(0.25)), towards(g, h, edge * 2, TrustRegion(0.25))
    assert torch.equal(inside.sign(), g.sign())
    assert torch.equal(outside.sign(), -g.sign())


def test_the_seed_gets_the_whole_gradient_on_its_way_in_the_wrong_direction():
    g, h, d = some(torch.float32)
    found = towards(g, h, d.abs() * g.sign(), TrustRegion())
    assert torch.equal(found, g)
    assert torch.equal(towards(g, h, torch.zeros_like(d), TrustRegion()), g)


def test_where_the_gradient_is_zero_nothing_pulls():
    g, h, d = some(torch.float32)
    g[::2] = 0.0
    assert torch.equal(towards(g, h, 100 * d, TrustRegion())[::2], torch.zeros_like(g[::2]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_scale_it_is_the_gradient(dtype):
    g, h, d = some(dtype)
    d[0] = 0.0
    for contribution in (d, 1000 * d):
        assert torch.equal(towards(g, torch.zeros_like(h), contribution, TrustRegion()), g)
    nothing = torch.zeros(0, 3, dtype=dtype)
    assert towards(nothing, nothing, nothing, TrustRegion()).shape == (0, 3)


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_does_not_depend_on_the_loss_scale(rule):
    g, h, d = some(torch.float32)
    plain, scaled = (towards(scale * g, h, d, TrustRegion(0.2, rule)) for scale in (1.0, 65536.0))
    torch.testing.assert_close(scaled, 65536.0 * plain)
    if rule != NORM:
        assert torch.equal(scaled, 65536.0 * plain)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_visible(dtype, bad, rule):
    g, h, d = some(dtype)
    for broken, where in ((g, 0), (d, 1)):
        broken = broken.clone()
        broken.view(-1)[3] = bad
        parts = [g, d]
        parts[where] = broken
        found = towards(parts[0], h, parts[1], TrustRegion(0.2, rule))
        assert not found.view(-1)[3].isfinite()
        if rule != NORM:
            assert found.isfinite().sum() == found.numel() - 1
    # A seed that diverges while its gradient happens to be zero is seen as well.
    d.view(-1)[3], g.view(-1)[3] = bad, 0.0
    assert not towards(g, h, d, TrustRegion(0.2, rule)).view(-1)[3].isfinite()


@pytest.mark.parametrize("rule", RULES)
def test_in_a_second_differentiation_it_is_a_constant(rule):
    h, s, g = torch.randn(3, 4, 5, dtype=torch.float64)
    seed, alpha = s.clone().requires_grad_(), torch.zeros((), requires_grad=True)
    out = behind(h, seed, alpha, TrustRegion(0.2, rule))
    (found,) = torch.autograd.grad(out, seed, g.requires_grad_(), create_graph=True)
    assert torch.equal(found, towards(g, h, s - h, TrustRegion(0.2, rule)))
    assert not found.requires_grad


@pytest.mark.parametrize("batched", [(0, 0, 0), (0, None, None), (None, 0, 0), (None, None, 0)], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_the_rule_goes_through_vmap_whatever_is_batched(rule, batched):
    parts = [torch.randn(3, 4, 5, dtype=torch.float64) for _ in range(3)]
    given_ = [x if dim == 0 else x[0] for x, dim in zip(parts, batched)]
    found = torch.func.vmap(lambda g, h, d: towards(g, h, d, TrustRegion(0.3, rule)), in_dims=batched)(*given_)
    for index in range(3):
        one = [x[index] if dim == 0 else x[0] for x, dim in zip(parts, batched)]
        torch.testing.assert_close(found[index], towards(*one, TrustRegion(0.3, rule)))


def gradients(function, host, seed, upstream):
    host, seed = host.clone().requires_grad_(), seed.clone().requires_grad_()
    alpha = torch.zeros((), requires_grad=True)
    function(host, seed, alpha).backward(upstream)
    return host.grad, seed.grad, alpha.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_in_one_graph_it_is_the_same_rule(dtype):
    torch._dynamo.reset()
    g, h, d = some(dtype)
    isolation, seed = TrustRegion(0.3), h + d
    # Inductor takes most of a test's time for each graph: what it does to doubles, it does to floats.
    backend = "aot_eager" if dtype in (torch.float64, torch.float16) else "inductor"
    compiled = torch.compile(
        lambda host, seed, alpha: behind(host, seed, alpha, isolation), fullgraph=True, backend=backend
    )
    to_host, to_seed, _ = gradients(compiled, h, seed, g)
    assert torch.equal(to_host, g)
    # The difference may be rounded to the dtype, or be used as wide as it was computed.
    truth = elementwise(g, h, seed.double() - h.double(), 0.3)
    torch.testing.assert_close(to_seed.double(), truth, rtol=2 * ROUNDING[dtype], atol=2 * ROUNDING[dtype])
    assert bool((to_seed.abs() <= g.abs()).all())


def test_a_compiled_slot_follows_when_its_isolation_changes():
    torch._dynamo.reset()
    model = Mlp()
    model.slot.germinate(model.seed(), probe=torch.randn(2, 7))
    model.slot.move(Stage.TRAINING)
    compiled, x = torch.compile(model, fullgraph=True, backend="aot_eager"), torch.randn(Mlp.shape)
    for isolation in (TrustRegion(), TrustRegion(0.2, NORM), TrustRegion(1.0), StraightThrough()):
        model.slot.isolation = isolation
        found = []
        for one in (model, compiled):
            model.zero_grad()
            one(x).square().sum().backward()
            found.append([p.grad.clone() for p in model.slot.seed.parameters()])
        for eager, graph in zip(*found):
            torch.testing.assert_close(graph, eager)


@pytest.mark.parametrize("rho", [0.0, -1.0, float("nan"), float("inf"), True, "1"])
def test_impossible_rho_is_refused(rho):
    with pytest.raises(ConfigurationError, match="least must be a finite number above 0"):
        TrustRegion(least=rho)

    with pytest.raises(ConfigurationError, match="rho"):
        TrustRegion(rho)


@pytest.mark.parametrize("rule", ["norms", None, 1, "Elementwise"])
def test_an_unknown_rule_is_refused_with_those_that_are_known(rule):
    with pytest.raises(ConfigurationError, match=r"rule must be one of \['elementwise', 'norm'\]"):
        TrustRegion(rule=rule)
    assert TrustRegion().rule == "elementwise"


# --- a seed in training -----------------------------------------------------------------------------


class Net(nn.Module):
    """The network that 0.1's rule ran away with: digits, one convolution, SGD with momentum."""

    def __init__(self):
        super().__init__()
        self.first, self.slot, self.last = nn.Conv2d(1, 6, 3, padding=1), SeedSlot(), nn.Linear(6 * 16, 10)

    def forward(self, x):
        return self.last(self.slot(F.max_pool2d(torch.relu(self.first(x)), 2)).flatten(1))


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.expand, self.contract = convolution(6, 16), convolution(16, 6)

    def forward(self, x):
        return x + self.contract(torch.relu(self.expand(x)))


OPTIMIZERS = {
    "SGD 0.01": lambda parameters: torch.optim.SGD(parameters, 0.01, 0.9),
    "SGD 0.05": lambda parameters: torch.optim.SGD(parameters, 0.05, 0.9),
    "SGD 0.1": lambda parameters: torch.optim.SGD(parameters, 0.1, 0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, 3e-3),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 3e-3),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, 1e-3),
    "Muon": lambda parameters: Muon(parameters, 0.01),
}


def learn(model, optimizer, batches):
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def plant(model, optimizer, seed, isolation):
    model.slot.germinate(seed, isolation=isolation)
    optimizer.add_param_group({"params": list(seed.parameters())})
    model.slot.move(Stage.TRAINING)


def displacement(isolation, warm, batches):
    """Of the seed after all batches, behind a copy of the warm host."""
    model, optimizer, seed = copy.deepcopy(warm)
    plant(model, optimizer, seed, isolation)
    mark = Mark.of(list(seed.parameters()), 0)
    learn(model, optimizer, batches)
    return mark.displacement(list(seed.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_seed_moves_no_further_than_straight_through_from_the_first_step(name):
    """Medians of five random seeds after 100 steps; none of them runs away."""
    found = {StraightThrough(): [], TrustRegion(): []}
    for random_seed in range(5):
        torch.manual_seed(random_seed)
        model, stream = Net(), digits_cnn().batches(random_seed)
        optimizer = OPTIMIZERS[name](model.parameters())
        learn(model, optimizer, itertools.islice(stream, 60))
        warm, batches = (model, optimizer, Branch()), list(itertools.islice(stream, 100))
        for isolation, moved in found.items():
            moved.append(displacement(isolation, warm, batches))
    straight, ours = (statistics.median(moved) for moved in found.values())
    assert ours <= straight
    assert max(found[TrustRegion()]) < 1.5


def test_the_older_rule_is_longer_than_straight_through_at_the_first_step():
    """What these tests guard against: a gradient as long as the contribution is wide."""
    g, h, d = some(torch.float32)
    assert towards(g, h, d, TrustRegion(0.2, NORM)).norm() > 1.2 * g.norm()
    assert towards(g, h, 1000 * d, TrustRegion(0.2, NORM)).norm() > 100 * g.norm()
    assert towards(g, h, 1000 * d, TrustRegion()).norm() <= g.norm()


def accumulated(model, x, y, parts):
    """The seed's gradient of the mean loss over all samples, from so many backward passes."""
    parameters = list(model.slot.seed.parameters())
    for parameter in parameters:
        parameter.grad = None
    for some_x, some_y in zip(x.chunk(parts), y.chunk(parts)):
        (F.cross_entropy(model(some_x), some_y) * len(some_x) / len(x)).backward()
    return torch.cat([parameter.grad.flatten() for parameter in parameters])


@pytest.mark.parametrize("steps", [0, 60])
def test_micro_batches_of_few_classes_give_the_gradient_of_the_whole_batch(steps):
    """Medians of five random seeds: 64 samples in the order of their classes, at once, in eights and one by one."""
    found = {8: [], 64: []}
    for random_seed in range(5):
        torch.manual_seed(random_seed)
        model, stream = Net(), digits_cnn().batches(random_seed)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        learn(model, optimizer, itertools.islice(stream, 60))
        plant(model, optimizer, Branch(), TrustRegion())
        learn(model, optimizer, itertools.islice(stream, steps))
        x, y = next(stream)
        order = y.argsort()
        whole = accumulated(model, x[order], y[order], 1)
        for parts, pairs in found.items():
            one = accumulated(model, x[order], y[order], parts)
            pairs.append((F.cosine_similarity(one, whole, 0).item(), (one.norm() / whole.norm()).item()))
    for pairs in found.values():
        cosine, length = (statistics.median(values) for values in zip(*pairs))
        assert cosine >= 0.99
        assert abs(length - 1) <= 0.03


@pytest.mark.parametrize("name", ["spirals", "regression", "characters"])
def test_cutting_a_batch_changes_nothing_but_the_order_of_sums(name):
    """With one radius for a call, the cosine of 64 micro-batches was 0.924 on the spirals, their length 1.19."""
    task = TASKS[name]()
    torch.manual_seed(0)
    model, stream = task.make_host().double(), task.batches(0)
    model.slot.germinate(task.seed().double())
    model.slot.move(Stage.TRAINING)
    x, y = next(stream)
    x, y = (data.double() if data.is_floating_point() else data for data in (x, y))
    order = y.flatten(1).double().mean(1).argsort() if y.dim() > 1 else y.argsort()
    parameters = list(model.slot.seed.parameters())
    found = []
    for parts in (1, 8, len(x)):
        for parameter in parameters:
            parameter.grad = None
        for index in order.chunk(parts):
            (task.losses(model(x[index]), y[index]).sum() / len(x)).backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=1e-9, atol=1e-12)


# --- its saved state --------------------------------------------------------------------------------


def test_a_region_is_halved_down_to_its_least():
    found, widths = TrustRegion(0.2), []
    while found.narrower() is not found:
        found = found.narrower()
        widths.append(found.rho)
    assert widths == [0.1, 0.05, 0.025, 0.0125]
    assert TrustRegion(0.2, least=0.15).narrower() == TrustRegion(0.15, least=0.15)
    for fixed in (TrustRegion(0.2, NORM), TrustRegion(0.2, least=0.2), TrustRegion(0.01)):
        assert fixed.narrower() is fixed


@pytest.mark.parametrize(
    "isolation",
    [TrustRegion(), TrustRegion(0.3, "norm"), TrustRegion(0.7), StraightThrough(), TrustRegion(0.3, least=0.3)],
)
def test_the_state_carries_the_rule_of_the_isolation(isolation):
    source, target = SeedSlot(), SeedSlot()
    source.germinate(Residual(4), isolation=isolation)
    state = source.lifecycle_state()
    target.load_lifecycle_state(state, Residual(4))
    assert target.isolation == isolation
    assert target.lifecycle_state() == state


def test_a_state_without_a_rule_is_of_the_release_that_had_one_only():
    """Seeds that 0.1 trained go on by its rule; what 0.1 could say is written as 0.1 wrote it."""
    slot = SeedSlot()
    slot.germinate(Residual(4), isolation=TrustRegion(0.3, "norm"))
    old = slot.lifecycle_state()
    assert old.keys() == {
        "version", "lifecycle", "alpha", "rho", "blend", "channels", "dtype", "frozen", "isolation_violations",
        "checks_due", "preserves_shape", "copy_input", "random",
    }  # fmt: skip
    slot.isolation = TrustRegion()
    assert slot.lifecycle_state().keys() == old.keys() | {"rule"}
    restored = SeedSlot()
    restored.load_lifecycle_state(old, Residual(4))
    assert restored.isolation == TrustRegion(0.3, "norm")


@pytest.mark.parametrize("rule", ["norms", None, 3])
def test_an_unknown_rule_in_a_state_is_refused_and_changes_nothing(rule):
    slot = SeedSlot()
    slot.germinate(Residual(4))
    before = slot.lifecycle_state()
    with pytest.raises(StateDictError, match="rule"):
        slot.load_lifecycle_state({**before, "rule": rule})
    assert slot.lifecycle_state() == before


# --- through the controller -------------------------------------------------------------------------


def test_a_seed_that_runs_away_is_refused_by_name_and_held_by_the_rule_it_does_not():
    """SGD with momentum at a learning rate that is far too high for the seed."""
    found = {}
    for isolation in (StraightThrough(), TrustRegion()):
        torch.manual_seed(0)
        model = TwoSlots()
        script = Script(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
        script.growth.germinate("early", Residual(6, 16), isolation=isolation, lr=2.0)
        script.epochs(2)
        found[isolation] = (script.growth.evidence()["early"].displacement, script.epoch()[0])
    displacement, verdict = found[StraightThrough()]
    assert "weights_ran_away" in {check.name for check in verdict.failed}
    assert "weights_moved" in {check.name for check in verdict.checks if check.passed}
    assert verdict.passed is False
    ours, verdict = found[TrustRegion()]
    assert next(check.name for check in verdict.checks if check.question == "runaway") == "weights_bounded"
    assert ours < 2.0 < 500.0 < displacement
