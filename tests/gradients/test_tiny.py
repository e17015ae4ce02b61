"""Lists of small tensors on a CPU, whose plan knows their sizes alone; and what is looked at there, not computed."""

import math

import pytest
import torch
from torch import nn

from seedtriton import GradientMonitor
from seedtriton.gradients import reference, tensor_sums
from seedtriton.gradients.row import APART, GUARDED, QUANTITIES, SUMSQ, Rules
from seedtriton.gradients.tensor_sums import COPY, MANY, ROW, tensor_sumsq

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
INF, NAN = math.inf, math.nan

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")


@pytest.fixture(autouse=True)
def plans_of_their_own():
    """A plan remembers whether the last tensors were 1-D; not those of another test."""
    tensor_sums._tiny.cache_clear()


def truth(tensors):
    dense = [t.to_dense() if t.layout != torch.strided else t for t in tensors]
    dense = [torch.view_as_real(t) if t.is_complex() else t for t in dense]
    return torch.stack([t.double().square().sum() for t in dense])


def assert_right(tensors, rtol=1e-6):
    found = tensor_sumsq(tensors, torch.float32, CPU)
    torch.testing.assert_close(found, truth(tensors), rtol=rtol, atol=0.0)


def alone(monkeypatch):
    """Fails where a list is summed by the plan that looks at every tensor."""
    monkeypatch.setattr(tensor_sums, "_sumsq_of_any", None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unit", [1, 16, 32, 96])
def test_as_right_as_any_whatever_their_sizes_have_in_common(dtype, unit, monkeypatch):
    alone(monkeypatch)
    torch.manual_seed(unit)
    sizes = unit * torch.randint(1, ROW // unit + 1, (400,))
    assert sizes.sum() > COPY
    assert_right([torch.randn(size).to(dtype) for size in sizes.tolist()])
    # Equal elements round the same way again and again.
    assert_right([torch.full((size,), 1.1).to(dtype) for size in sizes.tolist()])


@pytest.mark.parametrize("count", [1, 2, 40])
def test_any_number_of_any_shape(count, monkeypatch):
    alone(monkeypatch)
    kinds = [
        torch.randn(7), torch.randn(()), torch.randn(8, 16), torch.randn(16, 8).t(), torch.empty(0), torch.empty(0, 3),
        torch.randn(1).expand(9), torch.randn(40)[::3], torch.randn(ROW), torch.randn(2, 3, 4, 5),
    ]  # fmt: skip
    for kind in kinds:
        assert_right([kind] * count)
    assert_right(kinds * count)


def test_mixed_dtypes_lose_nothing(monkeypatch):
    alone(monkeypatch)
    tensors = [torch.randn(size).to(dtype) for size in (3, 64) for dtype in DTYPES]
    tensors.append(torch.full((5,), 1e100, dtype=torch.float64))
    assert_right(tensors)
    assert_right(tensors[-1:], rtol=1e-14)


def test_lanes_are_those_of_the_squares():
    for tensors in ([torch.full((3,), 1e20)], [torch.full((32,), 1e20)]):
        assert tensor_sumsq(tensors, torch.float32, CPU).item() == INF
        torch.testing.assert_close(tensor_sumsq(tensors, torch.float64, CPU), truth(tensors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (32,), (8, 4), ()])
def test_nothing_is_written(dtype, shape):
    for count in (1, 3):
        tensors = [torch.full(shape, 3.0).to(dtype) for _ in range(count)]
        for _ in range(2):
            assert_right(tensors)
        assert all((t == 3.0).all() and t._version == 0 for t in tensors)


@pytest.mark.parametrize("few", [MANY - 1, MANY, 100])
def test_among_larger_ones_each_keeps_its_place(few):
    torch.manual_seed(few)
    tensors = [torch.randn(1 + n % ROW) for n in range(few)]
    for n, size in enumerate((ROW + 1, 5000, 40_000)):
        tensors.insert(n * few // 2, torch.randn(size))
    assert_right(tensors)


SIZES = [6, 40, 64, 6]
CHANGES = {
    "another shape": lambda t: t.view(2, -1),
    "half": torch.Tensor.half,
    "double": torch.Tensor.double,
    "fp8": lambda t: t.to(torch.float8_e4m3fn),
    "complex": lambda t: torch.complex(t, 2 * t),
    "sparse": torch.Tensor.to_sparse,
    "not contiguous": lambda t: t.repeat(2)[::2],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("whose", [(0,), (2,), range(len(SIZES))], ids=["first", "another", "all"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_the_sizes_do_not_tell_is_seen_in_every_call(change, whose):
    torch.manual_seed(0)
    tensors = [torch.randn(size) for size in SIZES]
    for _ in range(2):
        assert_right(tensors)
    changed = [change(t) if n in whose else t for n, t in enumerate(tensors)]
    for _ in range(2):
        assert_right(changed, rtol=1e-6)
    for _ in range(2):
        assert_right(tensors)


def test_sizes_that_only_add_up_to_the_same_are_other_sizes():
    assert_right([torch.ones(10), torch.ones(20)])
    assert tensor_sumsq([torch.ones(20), torch.ones(10)], torch.float32, CPU).tolist() == [20.0, 10.0]


def test_tensors_without_squares_are_refused():
    with pytest.raises(ValueError, match="no squares"):
        tensor_sumsq([torch.ones(3, dtype=torch.int64)], torch.float32, CPU)
    assert tensor_sumsq([torch.ones(3, device="meta")], torch.float32, torch.device("meta")).is_meta


# --- a monitor that has seen its parameters before ---


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 4, sparse=True)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.seed = nn.Linear(4, 4)

    def backward(self):
        x = self.table(torch.tensor([0, 3, 3]))
        for layer in (*self.layers, self.seed):
            x = torch.tanh(layer(x.to(layer.weight.dtype)))
        x.square().sum().backward()


def freeze(model):
    model.layers[0].requires_grad_(False)
    model.layers[0].zero_grad()


def widen(model):
    model.layers[1].weight.data, model.layers[1].bias.data = torch.randn(6, 4), torch.randn(6)
    model.layers[2].weight.data = torch.randn(4, 6)
    model.zero_grad()


def to_double(model):
    model.layers.double()
    model.zero_grad()


LATER = {
    "replaced": lambda model: setattr(model.layers[1], "weight", nn.Parameter(torch.randn(4, 4))),
    "frozen": freeze,
    "other sizes": widen,
    "another dtype": to_double,
    "dense, not sparse": lambda model: setattr(model.table, "sparse", False),
    "not there": lambda model: model.layers[0].register_full_backward_hook(
        lambda layer, *_: setattr(layer, "forgotten", True)
    ),
}


@pytest.mark.parametrize("change", LATER.values(), ids=LATER)
def test_a_monitor_measures_what_is_there_now(change):
    model = Model()
    monitor = GradientMonitor(model, {"s": model.seed})
    for _ in range(3):
        model.zero_grad()
        model.backward()
        monitor.measure()
    change(model)
    for _ in range(2):
        model.zero_grad()
        model.backward()
        for layer in model.layers:
            if hasattr(layer, "forgotten"):
                layer.weight.grad = None
        own = {id(p) for p in model.seed.parameters()}
        right = torch.zeros(2, 4, dtype=torch.float64)
        for p in model.parameters():
            if p.grad is not None:
                (square,) = truth([p.grad.coalesce().to_dense() if p.grad.is_sparse else p.grad])
                right[int(id(p) in own)] += torch.tensor([square, square != 0, 1, p.numel()], dtype=torch.float64)
        monitor.measure()
        row = monitor.ring[int(monitor.count) - 1]
        torch.testing.assert_close(row[:, [0, 1, 4, 5]], right, rtol=1e-6, atol=0.0)


def test_parameters_that_exchange_their_sizes_are_measured_each():
    host, seed = nn.Parameter(torch.ones(10)), nn.Parameter(torch.ones(20))
    monitor = GradientMonitor([host], {"s": [seed]})
    for sizes in ((10, 20), (20, 10)):
        for parameter, size in zip((host, seed), sizes):
            parameter.grad, parameter.data = None, torch.ones(size)
            parameter.grad = torch.ones(size)
        monitor.measure()
        assert monitor.ring[int(monitor.count) - 1, :, SUMSQ].tolist() == list(sizes)


# --- what is looked at on a CPU is what is computed elsewhere ---


def elsewhere(monkeypatch):
    monkeypatch.setattr(reference, "_on_host", lambda _: False)


TINY = torch.finfo(torch.float64).tiny
RULES = [Rules(vanishing_rms=low, exploding_rms=high) for low in (0.0, 1e-8, 0.5) for high in (0.5, 10.0, INF)]


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: f"{rules.vanishing_rms}-{rules.exploding_rms}")
def test_the_columns_are_those_of_every_operation(rules, monkeypatch):
    limits = [rms * rms * 4 for rms in (rules.vanishing_rms, rules.exploding_rms)]
    near = [math.nextafter(limit, to) for limit in limits for to in (0.0, INF)]
    found = {}
    for value in (0.0, 5e-324, TINY / 2, TINY, 1e-12, 1.0, 1e300, 1.7e308, INF, NAN, *limits, *near):
        for size in (4, 0):
            sums = torch.tensor([value, 1.0, 1.0], dtype=torch.float64)
            found[value, size] = sums, (size, 4, 4), reference.columns_of_sums(sums, (size, 4, 4), (1, 0, 1), 3, rules)
    elsewhere(monkeypatch)
    for sums, sizes, columns in found.values():
        right = reference.columns_of_sums(sums, sizes, (1, 0, 1), 3, rules)
        torch.testing.assert_close(columns, right, rtol=1e-15, atol=0.0, equal_nan=True)


def test_the_usual_columns_take_no_comparison_of_every_tensor(monkeypatch):
    monkeypatch.setattr(torch, "stack", None)
    sums = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert reference.columns_of_sums(sums, [4, 4], [0, 1], 2, Rules()).tolist() == [[1, 1, 0, 0], [2, 1, 0, 0]]


@pytest.mark.parametrize("modes", [(), (0, 0, 0), (0, GUARDED, GUARDED), (0, APART, 0)])
@pytest.mark.parametrize("max_norm", [2.0, INF])
def test_the_summary_is_that_of_tensors(modes, max_norm, monkeypatch):
    rules = Rules(max_norm, modes=modes)
    cases = [(4.0, 9.0, 16.0), (0.0, 0.0, 0.0), (0.0, 1.0, 0.0), (4.0, NAN, 1.0), (4.0, INF, 1.0), (NAN, 9.0, 1.0)]
    sums = [torch.tensor(case, dtype=torch.float64) for case in cases]
    found = [reference.summarize(one, rules) for one in sums]
    elsewhere(monkeypatch)
    for one, summary in zip(sums, found):
        torch.testing.assert_close(summary, reference.summarize(one, rules), rtol=1e-15, atol=0.0, equal_nan=True)


def test_the_rows_go_where_they_go_elsewhere(monkeypatch):
    def rows():
        model = Model()
        monitor = GradientMonitor(model, {"s": model.seed}, window=3)
        for _ in range(5):
            model.zero_grad()
            model.backward()
            monitor.measure()
        return monitor.ring

    here = rows()
    elsewhere(monkeypatch)
    assert here.shape == (3, 2, QUANTITIES)
    torch.testing.assert_close(here, rows(), rtol=1e-15, atol=0.0, equal_nan=True)
