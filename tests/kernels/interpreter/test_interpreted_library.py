"""The library on the kernels: ops and monitor with ``SEEDTRITON_BACKEND=triton`` give what eager torch gives."""

import copy

import pytest
import torch
from torch import nn

from seedtriton import FlatGradients, GradientMonitor, GrowthController, SeedSlot, WiringError
from seedtriton.gradients import backend as backends
from seedtriton.gradients import ops, reference
from seedtriton.gradients.row import EXTRA, SUMSQ
from seedtriton.kernels import _launch

# Before Triton 3.7 it also leaned on a conversion that numpy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning")


@pytest.fixture
def through(monkeypatch):
    """Switch the backend, and count the launches of the one that has some."""
    _launch.release()  # a ring may lie where another one lay in an earlier test
    launches = []
    launch = _launch.Tables.launch

    def counting(self, kernel, *rest):
        launches.append(kernel)
        return launch(self, kernel, *rest)

    monkeypatch.setattr(_launch.Tables, "launch", counting)

    def switch(backend):
        monkeypatch.setenv("SEEDTRITON_BACKEND", backend)
        launches.clear()
        return launches

    return switch


def tensors():
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(size, generator=generator) for size in (1, 63, 1000, 4097)]
    made += [torch.randn(513, generator=generator).bfloat16(), torch.randn(77, generator=generator).half()]
    made += [torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last), torch.randn(0)]
    return made


def outsiders():
    """What the kernel cannot take."""
    sparse = torch.sparse_coo_tensor([[0, 2, 0]], torch.tensor([[1.0], [2.0], [3.0]]), (4, 1), check_invariants=True)
    return [
        torch.randn(5).double(),
        torch.randn(3, dtype=torch.complex64),
        torch.ones(1).expand(7),
        torch.randn(8, 8)[:, ::2],
        sparse,
    ]


@pytest.mark.parametrize("more", [[], outsiders()], ids=["plain", "with what the kernel cannot take"])
def test_sums_are_the_same_through_both_backends_within_1e_6_of_fp64(through, more):
    given = tensors() + more
    segments = [index % 3 for index in range(len(given))]
    truth = torch.zeros(4, dtype=torch.float64)
    for tensor, segment in zip(given, segments):
        values = torch.view_as_real(tensor) if tensor.is_complex() else tensor.to_dense()
        truth[segment] += values.double().square().sum()
    for backend in ("torch", "triton"):
        launches = through(backend)
        found = ops.segmented_sumsq(given, segments, 4)
        assert len(launches) == (1 if backend == "triton" else 0)
        torch.testing.assert_close(found, truth, rtol=1e-6, atol=0)


def test_only_what_the_kernel_cannot_take_still_gives_a_sum(through):
    through("triton")
    assert ops.segmented_sumsq([torch.ones(3).double()], [1], 2).tolist() == pytest.approx([0.0, 3.0])


def test_scaling_is_the_same_through_both_backends(through):
    results = []
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        launches = through(backend)
        given = tensors() + [t for t in outsiders() if not reference.overlaps_itself(t)]
        ops.scale_(given, torch.tensor(0.3))
        assert len(launches) == (1 if backend == "triton" else 0)
        results.append([t.to_dense() for t in given])
    for eager, kernel in zip(*results):
        # The interpreter cuts fp32 off to bf16 where a device rounds.
        torch.testing.assert_close(kernel, eager, rtol=2**-7 if eager.dtype == torch.bfloat16 else 0, atol=0)


def test_a_bad_list_is_the_same_error_through_both_backends(through):
    for backend in ("torch", "triton"):
        through(backend)
        with pytest.raises(ValueError, match="outside"):
            ops.segmented_sumsq([torch.ones(2)], [3], 2)
        with pytest.raises(ValueError, match="share memory"):
            ops.scale_([torch.ones(1).expand(4)], 0.5)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4, sparse=True)
        self.first = nn.Linear(4, 6)
        self.slot = SeedSlot()
        self.last = nn.Linear(6, 3).bfloat16()

    def forward(self, tokens):
        x = self.slot(torch.tanh(self.first(self.embed(tokens))))
        return self.last(x.bfloat16())


def evidence(backend, through, steps=4):
    """Real training with a mixed host: sparse, fp32 and bf16 gradients, a seed with its alpha.

    The limit clips nothing: clipped bf16 gradients would differ, which the interpreter cuts off.
    """
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    growth = GrowthController(model, optimizer, sinks=[], window=3)
    growth.germinate("slot", nn.Linear(6, 6), probe=torch.randn(2, 6))
    for number in range(steps):
        model(torch.randint(5, (8,))).float().square().mean().backward()
        launches = through(backend)
        growth.measure()
        measured = len(launches)
        growth.clip_grad_norm_(1e6)
        # Before the first clip nobody noted what was measured: that one sums anew.
        expected = (1, 3 if number == 0 else 2)
        assert (measured, len(launches)) == (expected if backend == "triton" else (0, 0))
        optimizer.step()
        optimizer.zero_grad()
    return growth.monitor, growth.evidence()["slot"]


def test_the_monitor_needs_one_launch_to_measure_and_one_to_clip_and_sees_what_eager_sees(through):
    (eager_monitor, eager), (kernel_monitor, kernel) = evidence("torch", through), evidence("triton", through)
    assert kernel.samples == eager.samples == 3
    torch.testing.assert_close(kernel_monitor.ring, eager_monitor.ring, rtol=1e-5, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(kernel_monitor.summary, eager_monitor.summary, rtol=1e-5, atol=1e-12)
    assert kernel.ratio == pytest.approx(eager.ratio, rel=1e-5)
    assert kernel.blend_gain == pytest.approx(eager.blend_gain, rel=1e-4)


def test_an_alpha_that_the_kernel_cannot_take_goes_through_eager_torch(through):
    launches = through("triton")
    host, seed = nn.Linear(2, 2), nn.Linear(2, 2)
    alpha = torch.zeros((), dtype=torch.float64, requires_grad=True)
    monitor = GradientMonitor(host, {"a": seed}, alphas={"a": alpha})
    x = host(torch.ones(1, 2))
    (x + alpha * seed(x)).sum().backward()
    slope = alpha.grad.item()
    monitor.measure()
    assert launches == []
    assert monitor.ring[0, 1, EXTRA].item() == pytest.approx(-slope)
    assert alpha.grad == 0


def test_doctor_checks_the_kernels(through, monkeypatch, capsys):
    from seedtriton.cli import main

    launches = through("triton")
    assert main(["doctor"]) == 0
    assert len(launches) == 1
    assert "interpreter" in capsys.readouterr().out


def test_a_tensor_listed_twice_is_scaled_twice_through_both_backends(through):
    for backend in ("torch", "triton"):
        through(backend)
        tensor, other = torch.ones(9), torch.ones(3)
        ops.scale_([tensor, other, tensor], torch.tensor(0.5))
        assert (tensor.unique().tolist(), other.unique().tolist()) == ([0.25], [0.5])


def test_the_norm_of_a_clipped_step_is_not_overwritten_by_the_next(through):
    through("triton")
    host, seed = nn.Linear(4, 4), nn.Linear(4, 4)
    monitor = GradientMonitor(host, {"a": seed})
    norms = []
    for scale in (1.0, 3.0):
        for parameter in (*host.parameters(), *seed.parameters()):
            parameter.grad = torch.full_like(parameter, scale)
        monitor.measure()
        norms.append(monitor.clip_grad_norm_(1.0))
        expected = torch.cat([p.grad.flatten() for p in (*host.parameters(), *seed.parameters())]).norm()
        torch.testing.assert_close(expected, torch.tensor(1.0))
    assert [norm.item() for norm in norms] == pytest.approx([40**0.5, 3 * 40**0.5])


@pytest.mark.parametrize("collect", [False, True])
def test_each_tensor_is_named_in_the_same_launch_whatever_the_kernel_cannot_take(through, collect):
    readings = []
    for backend in ("torch", "triton"):
        launches = through(backend)
        torch.manual_seed(0)
        model = nn.ModuleDict({"table": nn.Embedding(9, 4, sparse=True), "in": nn.Linear(4, 5), "out": nn.Linear(5, 2)})
        wide, none = nn.Parameter(torch.randn(3, dtype=torch.float64)), nn.Parameter(torch.zeros(0, 2))
        monitor = GradientMonitor([model["table"], model["in"], wide, none], {"a": model["out"]})
        if collect:
            monitor.collect_in_backward()
        states, found = [], []
        for step in range(6):
            model.zero_grad(set_to_none=True)
            model["in"].requires_grad_(step != 1)
            loss = model["out"](model["in"](model["table"](torch.tensor([1, 1, 5])))).square().sum()
            (loss * (float("inf") if step == 3 else 1.0) + (wide.float() ** 2).sum() + none.sum()).backward()
            launches.clear()
            monitor.measure()
            assert len(launches) == (1 if backend == "triton" else 0)
            states.append(monitor.tensors())
            found += states[-1]
        assert sum(reading.state.startswith("not finite, first in sample 4") for reading in states[3]) == 5
        assert {r.name: r.first_not_finite for r in states[5] if r.norm}.items() >= {"a.bias": 4, "2": None}.items()
        readings.append(found)
    for eager, kernel in zip(*readings, strict=True):
        assert (eager[:3], eager[5:]) == (kernel[:3], kernel[5:])
        numbers = [(-1.0, -1.0) if each.norm is None else each[3:5] for each in (eager, kernel)]
        assert numbers[1] == pytest.approx(numbers[0], rel=1e-5, nan_ok=True)


def test_a_monitor_that_changes_its_backend_reads_the_newest_sample(through):
    host, seed = nn.Linear(2, 2), nn.Linear(2, 2)
    monitor = GradientMonitor(host, {"a": seed})
    for value, backend in enumerate(("torch", "triton", "torch", "triton"), start=1):
        through(backend)
        for parameter in (*host.parameters(), *seed.parameters()):
            parameter.grad = torch.full_like(parameter, float(value))
        monitor.measure()
        if value != 3:
            assert [(r.rms, r.sample) for r in monitor.tensors()] == [(pytest.approx(value), value)] * 4


@pytest.mark.parametrize("order", [("triton",), ("torch", "triton"), ("triton", "torch")], ids="+".join)
@pytest.mark.parametrize("bad", [None, 1, 2])
def test_micro_batches_are_numbered_alike_whoever_measured_the_one_before(through, bad, order):
    host, seed = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*host.parameters(), *seed.parameters()], lr=0.0)
    monitor = GradientMonitor(host, {"a": seed}, optimizers=optimizer)
    for step in range(1, 4):
        for micro in range(1, 4):
            through(order[(step + micro) % len(order)])
            for parameter in (*host.parameters(), *seed.parameters()):
                parameter.grad = torch.full_like(parameter, float(micro))
            if (step, micro) == (2, bad):
                seed.bias.grad[0] = float("nan")
            monitor.measure()
            extra = int(step > 2 or (step == 2 and bad is not None and micro > bad)) if bad else 0
            found = {reading.name: reading for reading in monitor.tensors()}
            assert {reading.sample for reading in found.values()} == {monitor.count.item()} == {step + extra}
            assert found["weight"].rms == pytest.approx(micro)
            assert found["a.bias"].first_not_finite == (2 if bad and (step, micro) >= (2, bad) else None)
        optimizer.step()


@pytest.fixture
def uploads(monkeypatch):
    made = []
    upload = _launch.Tables.upload
    monkeypatch.setattr(_launch.Tables, "upload", lambda *args: made.append(1) or upload(*args))
    return made


@pytest.fixture
def buffers(monkeypatch):
    """Every buffer that reaches the kernels; None: they look at each address."""
    found = []
    find = _launch.find_tables

    def finding(*args, **options):
        if args[4][0] == "record":  # not the sums of a read
            found.append((args[8], args[9]))  # flat, settled
        return find(*args, **options)

    monkeypatch.setattr(_launch, "find_tables", finding)
    return found


def test_flat_gradients_upload_once_and_measure_the_same(through, uploads):
    rows = []
    for flat in (False, True):
        through("triton")
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
        gradients = FlatGradients(model) if flat else None
        monitor = GradientMonitor(model[0], {"a": model[1]}, flat=gradients)
        uploads.clear()
        keep = []
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            keep.append(torch.empty(4096))  # moves what is allocated next
            model(torch.randn(4, 5)).square().sum().backward()
            monitor.measure()
        if flat:
            assert len(uploads) == 1
        rows.append(monitor.ring[:3].nan_to_num())
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-6, atol=0)


@pytest.mark.usefixtures("gloo")
def test_the_buckets_of_ddp_are_used_and_followed_when_ddp_lays_them_out_anew(through, buffers):
    through("triton")
    # The order of use is not that of registration, so the second layout of the buckets is another one.
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)])
    model.forward = lambda x: model[0](torch.tanh(model[2](torch.tanh(model[1](x)))))
    plain = copy.deepcopy(model)
    plain.forward = lambda x: plain[0](torch.tanh(plain[2](torch.tanh(plain[1](x)))))
    ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    monitor = GradientMonitor(model, {"a": model[1], "b": model[2]}, flat="auto")
    expected = GradientMonitor(plain, {"a": plain[1], "b": plain[2]})
    layouts = set()
    for step in range(5):
        x = torch.randn(3, 4) * 10.0**step
        for net, seen in ((ddp, monitor), (plain, expected)):
            net.zero_grad(set_to_none=step % 2 == 1)
            net(x).square().sum().backward()
            seen.measure()
        (flat, settled), (none, _) = buffers[-2:]
        assert flat.numel() == sum(p.numel() for p in model.parameters())
        assert (settled, none) == (False, None)
        layouts.add(tuple(p.grad.data_ptr() - flat.data_ptr() for p in model.parameters()))
    assert len(layouts) > 1  # DDP did move them
    torch.testing.assert_close(monitor.ring[:5], expected.ring[:5], rtol=1e-6, atol=0, equal_nan=True)


def test_gradients_that_change_places_within_one_buffer_are_never_read_at_the_old_ones(through, uploads, buffers):
    through("triton")
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    monitor = GradientMonitor([model[0], model[2]], {"a": model[1]}, flat="auto")
    for order in ((0, 1, 2), (0, 1, 2), (1, 0, 2), (2, 0, 1)):
        buffer = torch.randn(48)
        for index, place in enumerate(order):
            buffer[16 * place : 16 * place + 16] *= 10.0**index
            model[index].weight.grad = buffer[16 * place : 16 * place + 16].view(4, 4)
        monitor.measure()
        row = monitor.ring[int(monitor.count) - 1, :, SUMSQ]
        assert row[1].item() == pytest.approx(model[1].weight.grad.square().sum().item(), rel=1e-5)
        assert buffers[-1][0].data_ptr() == buffer.data_ptr()
    assert len(uploads) == 3


def test_gradients_in_several_buffers_are_measured_one_by_one(through, buffers):
    through("triton")
    host, seed = nn.Linear(3, 3), nn.Linear(3, 3)
    monitor = GradientMonitor(host, {"a": seed}, flat="auto")
    seed(host(torch.ones(2, 3))).sum().backward()
    monitor.measure()
    assert [buffer for buffer, _ in buffers] == [None]
    expected = torch.cat([p.grad.flatten() for p in seed.parameters()]).norm().item()
    assert monitor.read()["a"].seed_norm == pytest.approx(expected, rel=1e-5)


def capture(monkeypatch):
    stream, _ = _launch._stream(torch.device("cpu"))
    monkeypatch.setattr(_launch, "_stream", lambda _: (stream, 1))


def move(parameter):
    parameter.grad = parameter.grad.clone()


@pytest.mark.parametrize("place, name", [
    (lambda m: m[0][0].weight, r"the gradient of parameter '0\.weight' of the host \(shape \(4, 3\)\) moved from 0x"),
    (lambda m: m[1].bias, r"the gradient of parameter 'bias' of seed 'a' \(shape \(4,\)\) moved from 0x"),
    (lambda m: m[2], r"the gradient of parameter 1 of seed 'bare' \(shape \(5,\)\) moved from 0x"),
    (lambda m: m[3], r"the gradient of the blend factor of seed 'a' moved from 0x"),
])  # fmt: skip
def test_what_moved_before_a_capture_is_named_by_its_parameter(place, name, through, monkeypatch):
    through("triton")
    host, seed = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 4)
    bare, alpha = torch.zeros(5, requires_grad=True), torch.zeros((), requires_grad=True)
    other = torch.zeros(2, requires_grad=True)
    monitor = GradientMonitor(host, {"a": seed, "bare": [other, bare]}, alphas={"a": alpha})
    for parameter in (*host.parameters(), *seed.parameters(), bare, other, alpha):
        parameter.grad = torch.ones_like(parameter)
    monitor.measure()
    alpha.grad.fill_(3.0)
    capture(monkeypatch)
    monitor.measure()  # nothing moved
    move(place((host, seed, bare, alpha)))
    with pytest.raises(WiringError, match=name + r".*set_to_none=False"):
        monitor.measure()
    assert monitor.count == 2


def test_the_name_is_right_although_other_gradients_do_not_go_through_the_kernel(through, monkeypatch):
    through("triton")
    first, host, seed = nn.Embedding(3, 2, sparse=True), nn.Linear(2, 2), nn.Linear(2, 2)
    monitor = GradientMonitor([first, host], {"a": seed})
    for parameter in (*host.parameters(), *seed.parameters()):
        parameter.grad = torch.ones_like(parameter)
    first(torch.tensor([0, 1])).sum().backward()
    monitor.measure()
    capture(monkeypatch)
    move(host.weight)
    with pytest.raises(WiringError, match=r"the gradient of parameter '1\.weight' of the host"):
        monitor.measure()


def test_a_capture_without_a_measurement_before_it_says_so(through, monkeypatch):
    through("triton")
    host, seed = nn.Linear(3, 3), nn.Linear(3, 3)
    monitor = GradientMonitor(host, {"a": seed})
    seed(host(torch.ones(2, 3))).sum().backward()
    capture(monkeypatch)
    with pytest.raises(WiringError, match="these tensors were not measured before the capture"):
        monitor.measure()


def test_clipping_in_a_capture_names_what_moved(through, monkeypatch):
    through("triton")
    host, seed = nn.Linear(3, 3), nn.Linear(3, 3)
    monitor = GradientMonitor(host, {"a": seed})
    seed(host(torch.ones(2, 3))).sum().backward()
    monitor.measure()
    monitor.clip_grad_norm_(1e3)
    move(seed.weight)
    monitor.measure()
    capture(monkeypatch)
    with pytest.raises(WiringError, match=r"the gradient of parameter 'weight' of seed 'a' .* moved from"):
        monitor.clip_grad_norm_(1e3)


def test_explicit_gradients_that_moved_are_named_by_their_parameter(through, monkeypatch):
    through("triton")
    host, seed = nn.Linear(3, 3), nn.Linear(3, 3)
    monitor = GradientMonitor(host, {"a": seed})
    grads = {p: torch.ones_like(p) for p in (*host.parameters(), *seed.parameters())}
    monitor.measure(gradients=grads)
    capture(monkeypatch)
    grads[seed.bias] = torch.ones(3)
    with pytest.raises(WiringError, match=r"the gradient of parameter 'bias' of seed 'a'"):
        monitor.measure(gradients=grads)


# --- a launch that fails ---


@pytest.fixture
def broken(monkeypatch):
    """Every launch fails as a compiler, a driver or a launcher of another version might; afterwards all is well."""

    def launch(self, *rest):
        raise TypeError("this runner takes no constexprs")

    monkeypatch.setenv("SEEDTRITON_BACKEND", "triton")
    monkeypatch.setattr(_launch.Tables, "launch", launch)
    _launch.release()
    yield
    backends._failed.clear()
    backends._choose.cache_clear()


def test_a_launch_that_fails_is_said_once_and_the_numbers_are_right(broken, caplog):
    def once():
        torch.manual_seed(0)
        host, seed = nn.Linear(5, 7), nn.Linear(7, 3)
        monitor = GradientMonitor(host, {"a": seed})
        for _ in range(3):
            seed(host(torch.randn(4, 5))).square().sum().backward()
            monitor.measure()
        norm = monitor.clip_grad_norm_(0.1)
        return monitor.read()["a"], norm, [p.grad.clone() for p in (*host.parameters(), *seed.parameters())]

    evidence, norm, gradients = once()
    said = [record for record in caplog.records if "could not be launched" in record.message]
    assert len(said) == 1
    assert "TypeError: this runner takes no constexprs" in said[0].message
    assert ops.backend_of("cpu") == ("torch", "a launch has failed: TypeError: this runner takes no constexprs")
    backends._failed.clear()
    backends._choose.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEEDTRITON_BACKEND", "torch")
        want, want_norm, want_gradients = once()
    assert (evidence.ratio, evidence.samples) == (want.ratio, want.samples)
    assert torch.equal(norm, want_norm)
    assert all(map(torch.equal, gradients, want_gradients))


@pytest.mark.parametrize("call", ["sums", "scale"])
def test_the_operations_go_on_as_well(broken, call):
    found = [torch.arange(4.0), torch.ones(3)]
    if call == "sums":
        assert ops.segmented_sumsq(found, [0, 1], 2).tolist() == [14.0, 3.0]
    else:
        ops.scale_(found, 0.5)
        assert found[0].tolist() == [0.0, 0.5, 1.0, 1.5]
    assert ops.backend_of("cpu").name == "torch"


def test_what_stands_for_other_tensors_is_never_read_at_address_0(through):
    """A wrapper subclass, as DTensor is one, has elements and no address; a signature that is known is no excuse."""
    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
            made.inner = inner
            return made

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            def unwrapped(value):
                if isinstance(value, (list, tuple)):
                    return type(value)(map(unwrapped, value))
                return value.inner if isinstance(value, Wrapper) else value

            return func(*unwrapped(args), **(kwargs or {}))

    through("triton")
    plain, other = torch.arange(4.0), torch.ones(3)
    assert ops.segmented_sumsq([plain, other], [0, 1], 2).tolist() == [14.0, 3.0]
    assert ops.segmented_sumsq([plain, Wrapper(2 * other)], [0, 1], 2).tolist() == [14.0, 12.0]
