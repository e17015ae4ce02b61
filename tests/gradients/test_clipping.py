"""Clipping apart and quarantine: a seed that the host does not feel costs it nothing."""

import copy
import math

import pytest
import torch
from torch import nn

from seedtriton import ConfigurationError, GradientMonitor
from seedtriton.gradients import ops, reference
from seedtriton.gradients.row import APART, GUARDED, SUMMARY_HEAD, TOTAL_NORM, Listed, Rules

NAN, INF = math.nan, math.inf
SEEDS = ("a", "b")


class Holder:
    """Stands for a slot: a blend factor, and whether the host feels the seed."""

    def __init__(self, behind=True):
        self.alpha, self.behind = torch.zeros((), requires_grad=True), behind


class Loop:
    def __init__(self, *, behind=(True, True), dtype=torch.float32, **options):
        torch.manual_seed(0)
        self.host = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).to(dtype)
        self.seeds = {name: nn.Linear(4, 3).to(dtype) for name in SEEDS}
        self.holders = {name: Holder(is_behind) for name, is_behind in zip(SEEDS, behind)}
        self.monitor = GradientMonitor(self.host, self.seeds, alphas=self.holders, **options)

    def modules(self):
        return {"host": self.host, **self.seeds}

    def backward(self, spoil=None, value=NAN):
        """Gradients of every part by hand, a hundred times larger for each part than for the one before."""
        for scale, (name, module) in enumerate(self.modules().items()):
            for parameter in module.parameters():
                parameter.grad = torch.randn_like(parameter) * 100.0**scale
                if name == spoil:
                    parameter.grad.view(-1)[-1] = value
        return self

    def gradients(self):
        return {name: [p.grad.clone() for p in module.parameters()] for name, module in self.modules().items()}


def norm_of(gradients):
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients))


def clipped_by_torch(loop, groups, max_norm):
    """What torch makes of each group of parts, and the norm that it returns for it."""
    twin = copy.deepcopy(loop.gradients())
    norms = []
    for group in groups:
        parameters = [nn.Parameter(torch.empty_like(g)) for name in group for g in twin[name]]
        for parameter, gradient in zip(parameters, [g for name in group for g in twin[name]]):
            parameter.grad = gradient
        norms.append(nn.utils.clip_grad_norm_(parameters, max_norm))
    return twin, norms


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        for ours, theirs in zip(found[name], expected[name]):
            torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("max_norm", [0.5, 50.0, 1e9])
@pytest.mark.parametrize(
    "apart, behind, groups",
    [
        (True, (True, True), [("host",), ("a",), ("b",)]),
        (True, (True, False), [("host", "b"), ("a",)]),
        (True, (False, False), [("host", "a", "b")]),
        (False, (True, True), [("host", "a", "b")]),
    ],
)
def test_each_group_is_clipped_as_torch_clips_it_alone(apart, behind, groups, max_norm, measured):
    loop = Loop(behind=behind).backward()
    expected, norms = clipped_by_torch(loop, groups, max_norm)
    for _ in range(2):  # the second time the measurement knows limit and groups
        if measured:
            loop.monitor.measure()
        total = loop.monitor.clip_grad_norm_(max_norm, apart=apart)
        torch.testing.assert_close(total, norms[0], rtol=2e-6, atol=0.0)
        assert total.shape == ()
        assert total.dtype == torch.float32
        assert_close(loop.gradients(), expected)
        loop = Loop(behind=behind).backward() if not measured else loop
        if measured:
            torch.manual_seed(0)
            fresh = Loop(behind=behind).backward()
            for name, module in loop.modules().items():
                for parameter, gradient in zip(module.parameters(), fresh.gradients()[name]):
                    parameter.grad = gradient


def test_what_was_measured_together_is_clipped_apart_without_another_pass(monkeypatch):
    loop = Loop().backward()
    expected, norms = clipped_by_torch(loop, [("host",), ("a",), ("b",)], 0.5)
    loop.monitor.clip_grad_norm_(math.inf)  # only then it notes what it measures
    loop.monitor.measure()
    monkeypatch.setattr(ops, "segmented_sumsq", None)
    torch.testing.assert_close(loop.monitor.clip_grad_norm_(0.5, apart=True), norms[0], rtol=2e-6, atol=0.0)
    assert_close(loop.gradients(), expected)


def test_the_newest_row_of_a_full_ring_is_the_one_that_counts():
    loop = Loop(window=3)
    for _ in range(4):
        loop.backward()
        loop.monitor.measure()
    expected, _ = clipped_by_torch(loop, [("host",), ("a",), ("b",)], 0.5)
    loop.monitor.clip_grad_norm_(0.5, apart=True)
    assert_close(loop.gradients(), expected)


def test_an_error_for_a_norm_that_is_not_finite_speaks_of_the_host_when_seeds_are_apart():
    loop = Loop().backward(spoil="b")
    before = loop.gradients()
    assert math.isfinite(loop.monitor.clip_grad_norm_(1.0, error_if_nonfinite=True, apart=True))
    loop = Loop().backward(spoil="host")
    with pytest.raises(RuntimeError, match="total norm of the gradients is nan"):
        loop.monitor.clip_grad_norm_(1.0, error_if_nonfinite=True, apart=True)
    loop = Loop().backward(spoil="b")
    with pytest.raises(RuntimeError, match="is nan"):
        loop.monitor.clip_grad_norm_(1.0, error_if_nonfinite=True)
    assert_close(loop.gradients(), before)
    with pytest.raises(ConfigurationError, match="max_norm must be above 0, got 0"):
        loop.monitor.clip_grad_norm_(0.0, apart=True)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_without_quarantine_a_seed_that_is_not_finite_stays_as_torch_leaves_it(value):
    loop = Loop().backward(spoil="a", value=value)
    before = loop.gradients()
    loop.monitor.measure()
    assert_close(loop.gradients(), before)
    expected, _ = clipped_by_torch(loop, [("host",), ("a",), ("b",)], 1.0)
    loop.monitor.clip_grad_norm_(1.0, apart=True)
    assert_close(loop.gradients(), expected)
    assert not all(g.isfinite().all() for g in loop.gradients()["a"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_quarantine_zeroes_the_whole_seed_and_nothing_else(value, dtype):
    loop = Loop(dtype=dtype, quarantine=True)
    for name, module in loop.modules().items():
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
            if name == "a":
                parameter.grad.view(-1)[0] = value
                break  # its bias has no gradient at all
    loop.seeds["a"].bias.grad = torch.ones_like(loop.seeds["a"].bias)
    for parameter in (*loop.host.parameters(), *loop.seeds["b"].parameters()):
        parameter.grad = torch.randn_like(parameter)
    before = loop.gradients()
    loop.monitor.measure()
    assert all((g == 0).all() for g in loop.gradients()["a"])
    for name in ("host", "b"):
        assert all(map(torch.equal, loop.gradients()[name], before[name]))
    found = loop.monitor.read()
    assert (found["a"].samples, found["a"].dropped, found["a"].seed_not_finite) == (0, 1, 1)
    assert (found["b"].samples, found["b"].dropped, found["b"].seed_not_finite) == (1, 0, 0)


def test_quarantine_is_only_for_seeds_that_the_host_does_not_feel():
    loop = Loop(behind=(False, True), quarantine=True).backward(spoil="a")
    before = loop.gradients()
    loop.monitor.measure()
    assert_close(loop.gradients(), before)
    assert loop.monitor.clip_grad_norm_(1.0, apart=True).isnan()
    loop = Loop(behind=(False, True), quarantine=True).backward(spoil="host")
    loop.monitor.measure()
    assert loop.gradients()["host"][0].isnan().any(), "a host that is not finite is not hidden"


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("measured", [True, False])
def test_quarantine_holds_while_clipping(apart, measured):
    """With seeds together the others share a norm to which the seed in quarantine adds nothing."""
    loop = Loop(quarantine=True).backward(spoil="a")
    groups = [("host",), ("b",)] if apart else [("host", "b")]
    expected, norms = clipped_by_torch(loop, groups, 1.0)
    if measured:
        loop.monitor.measure()
    torch.testing.assert_close(loop.monitor.clip_grad_norm_(1.0, apart=apart), norms[0], rtol=2e-6, atol=0.0)
    found = loop.gradients()
    assert all((g == 0).all() for g in found.pop("a"))
    del expected["a"]
    assert_close(found, expected)


def test_explicit_gradients_are_put_in_quarantine_too():
    loop = Loop(quarantine=True)
    parameters = [p for module in loop.modules().values() for p in module.parameters()]
    gradients = [torch.ones_like(p) for p in parameters]
    gradients[-1][0] = NAN
    loop.monitor.measure(gradients=zip(parameters, gradients))
    assert (gradients[-1] == 0).all()
    assert (gradients[-2] == 0).all()
    assert (gradients[0] == 1).all()


def test_a_scaler_neither_skips_a_step_nor_halves_its_scale_for_a_seed_in_quarantine():
    scales = {}
    for quarantine in (True, False):
        loop = Loop(quarantine=quarantine)
        optimizer = torch.optim.SGD([p for m in loop.modules().values() for p in m.parameters()], 0.1)
        loop.monitor.watch(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
        scaler.scale(torch.zeros(()))
        loop.backward(spoil="a")
        before = loop.host[0].weight.detach().clone()
        loop.monitor.measure(scaler)
        scaler.unscale_(optimizer)
        loop.monitor.clip_grad_norm_(1.0, apart=True)
        scaler.step(optimizer)
        scaler.update()
        scales[quarantine] = scaler.get_scale(), not torch.equal(before, loop.host[0].weight)
    assert scales == {True: (4.0, True), False: (2.0, False)}


def test_the_first_clip_sees_what_was_written_since_the_measurement():
    loop = Loop().backward()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = torch.optim.SGD([p for m in loop.modules().values() for p in m.parameters()], 0.1)
    loop.monitor.watch(optimizer)
    scaler.scale(torch.zeros(()))
    loop.monitor.measure(scaler)
    scaler.unscale_(optimizer)
    with torch.no_grad():
        for module in loop.modules().values():
            for parameter in module.parameters():
                parameter.grad.mul_(2.0)
    expected = norm_of([g for part in loop.gradients().values() for g in part])
    assert loop.monitor.clip_grad_norm_(1.0).item() == pytest.approx(expected, rel=1e-5)


def test_sparse_and_wide_gradients_of_a_seed_are_put_in_quarantine():
    host, seed = nn.Linear(3, 3), nn.ModuleList([nn.Embedding(5, 2, sparse=True), nn.Linear(2, 2).double()])
    monitor = GradientMonitor(host, {"a": seed}, quarantine=True)
    host(torch.ones(1, 3)).sum().backward()
    (seed[1](seed[0](torch.tensor([1, 1, 3])).double()) * NAN).sum().backward()
    monitor.measure()
    assert (seed[0].weight.grad.to_dense() == 0).all()
    assert (seed[1].weight.grad == 0).all()
    assert host.weight.grad.isfinite().all()


# --- the formula ---


@pytest.mark.parametrize("modes", [(), (0, 0, 0), (0, APART, 0), (0, APART, APART | GUARDED), (0, GUARDED, GUARDED)])
@pytest.mark.parametrize(
    "sums", [(4.0, 9.0, 16.0), (4.0, NAN, 16.0), (4.0, INF, NAN), (NAN, 9.0, 16.0), (0.0, 0.0, 0.0)]
)
def test_the_summary_is_this_arithmetic(sums, modes):
    max_norm, eps = 2.0, 1e-8
    found = reference.summarize(torch.tensor(sums, dtype=torch.float64), Rules(max_norm, eps, modes=modes)).tolist()
    modes = modes or (0, 0, 0)
    gone = [bool(mode & GUARDED) and not math.isfinite(value) for value, mode in zip(sums, modes)]
    counted = [0.0 if lost else value for value, lost in zip(sums, gone)]
    total = math.sqrt(sum(value for value, mode in zip(counted, modes) if not mode & APART))

    def coefficient(norm):
        value = max_norm / (norm + 1e-6)
        return value if math.isnan(value) else min(1.0, value)

    each = [coefficient(math.sqrt(value) if mode & APART else total) for value, mode in zip(counted, modes)]
    assert found[TOTAL_NORM] == pytest.approx(total, nan_ok=True)
    assert found[1] == pytest.approx(coefficient(total), nan_ok=True)
    ratios = [math.sqrt(value) / (math.sqrt(sums[0]) + eps) for value in sums]
    assert found[SUMMARY_HEAD : SUMMARY_HEAD + 3] == pytest.approx(ratios, nan_ok=True)
    assert found[SUMMARY_HEAD + 3 : SUMMARY_HEAD + 6] == pytest.approx(
        [-1.0 if lost else value for value, lost in zip(each, gone)], nan_ok=True
    )
    assert found[SUMMARY_HEAD + 6 :] == [-1.0 if lost else 1.0 for lost in gone]


def test_segments_are_scaled_by_their_own_coefficient_and_those_at_one_are_not_written():
    tensors = [torch.full((3,), 2.0), torch.full((2,), 2.0), torch.full((2,), NAN), torch.full((2,), NAN)]
    versions = [tensor._version for tensor in tensors]
    coefficients = torch.tensor([1.0, 0.5, -1.0], dtype=torch.float64)
    reference.scale_segments_(Listed(tensors, [0, 1, 2, 0]), coefficients, clear=True)
    assert tensors[0].tolist() == [2.0] * 3
    assert tensors[1].tolist() == [1.0] * 2
    assert tensors[2].tolist() == [0.0] * 2
    assert tensors[3].isnan().all()
    assert [tensor._version == version for tensor, version in zip(tensors, versions)] == [True, False, False, True]
    plain = [torch.full((2,), 3.0)]
    reference.scale_segments_(Listed(plain, [2]), coefficients)
    assert plain[0].tolist() == [-3.0] * 2
