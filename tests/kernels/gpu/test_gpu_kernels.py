"""Every shared case on a CUDA device, and what only a device can show: bits, streams, graphs, launches."""

import pytest
import torch

pytest.importorskip("triton")

from kernel_cases import *  # noqa: F403
from kernel_cases import (
    DTYPES,
    Listed,
    Sample,
    _launch,
    gradient_scale,
    gradient_sums,
    kernel_record,
    random,
    tables,
)

from seedtriton.gradients.row import CLIP_COEFFICIENT, SUMSQ, LossScale
from seedtriton.kernels._uploads import STAGES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.skipif(_launch.INTERPRETED, reason="TRITON_INTERPRET is on: kernels would run on the CPU"),
    # What torch says of its own tools: this mode is a prototype; a profile has one cycle.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode", "ignore:.*Profiler clears events"),
]
SEGMENTS = (0, 1, 2, 0, 1, 2)


@pytest.fixture(scope="module")
def device():
    return "cuda:0"


def gradients(device, misaligned=0):
    sizes = (1_000_003, 65536, 3, 2_500_000, 8193, 700)
    return [random(n, dtype, device, misaligned) for n, dtype in zip(sizes, DTYPES * 2)]


def record(sample, tensors, segments=SEGMENTS, gains=(), gain_segments=(), **options):
    kernel_record(sample.ours, Listed(tensors, segments), Listed(gains, gain_segments), **options)


def test_the_device_really_runs_compiled_kernels(device):
    tensors = gradients(device)
    gradient_sums.segmented_sumsq(tensors, SEGMENTS, 3)
    assert len(tables()._runners) == 1


def test_same_bits_1000_times(device):
    tensors = gradients(device, 4)
    first = gradient_sums.segmented_sumsq(tensors, SEGMENTS, 3)
    same = torch.ones((), dtype=torch.bool, device=device)
    for _ in range(1000):
        same &= (gradient_sums.segmented_sumsq(tensors, SEGMENTS, 3) == first).all()
    assert bool(same)


def test_same_bits_on_streams_that_run_at_once(device):
    tensors = gradients(device)
    first = gradient_sums.segmented_sumsq(tensors, SEGMENTS, 3)
    torch.cuda.synchronize()
    found = []
    for stream in [torch.cuda.Stream(device) for _ in range(4)]:
        with torch.cuda.stream(stream):
            found += [gradient_sums.segmented_sumsq(tensors, SEGMENTS, 3) for _ in range(50)]
    torch.cuda.synchronize()
    assert all(torch.equal(first, sums) for sums in found)


def test_eager_equals_cuda_graph(device):
    tensors = gradients(device)
    gains = [torch.zeros((), device=device)]
    eager, graphed = Sample(3, device), Sample(3, device)
    coefficient = graphed.summary[CLIP_COEFFICIENT]
    for tensor in tensors:
        tensor.mul_(1e-6)  # so that nothing is clipped, and scaling leaves the gradients alone
    record(graphed, tensors, gains=gains, gain_segments=[2])
    gradient_scale.scale_(tensors, coefficient)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        record(graphed, tensors, gains=gains, gain_segments=[2])
        gradient_scale.scale_(tensors, coefficient)
    graphed.ours[1].zero_()
    for step in range(3):
        for tensor in tensors:
            tensor.copy_(torch.randn_like(tensor) * 1e-6)
        gains[0].fill_(step + 0.5)
        graph.replay()
        gains[0].fill_(step + 0.5)
        record(eager, tensors, gains=gains, gain_segments=[2])
    for ours, theirs in zip(eager.ours[:3], graphed.ours[:3]):
        assert torch.equal(ours[:3].nan_to_num(-1.0), theirs[:3].nan_to_num(-1.0)) if ours.ndim else ours == theirs
    for ours, theirs in zip(eager.ours[3].columns, graphed.ours[3].columns):
        assert torch.equal(ours, theirs)


def test_eager_calls_leave_a_captured_graph_alone(device):
    tensors = gradients(device)
    sample, other = Sample(3, device), Sample(3, device)
    record(sample, tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        record(sample, tensors)
    moved = [torch.zeros_like(tensor) for tensor in tensors]
    record(sample, moved)
    graph.replay()
    record(other, tensors)
    last = (sample.ours[1].item() - 1) % sample.ring.shape[0]
    assert torch.equal(sample.ring[last].nan_to_num(-1.0), other.ring[0].nan_to_num(-1.0))


def test_an_upload_inside_a_capture_is_an_error_that_names_the_tensor(device):
    tensors = gradients(device)
    sample = Sample(3, device)
    record(sample, tensors)
    moved = [*tensors[:2], tensors[2].clone(), *tensors[3:]]
    work = torch.zeros(1, device=device)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()

    def capture():
        with torch.cuda.graph(graph):
            work.add_(1.0)  # torch warns of graphs without any work
            record(sample, moved)

    with pytest.raises(RuntimeError, match="tensor 2 moved"):
        capture()


def test_more_than_2_31_elements(device):
    numel = 2**31 + 4099
    if torch.cuda.mem_get_info(0)[0] < 3 * numel:
        pytest.skip(f"needs {3 * numel >> 30} GiB of free device memory")
    tensor = torch.full((numel,), 0.5, dtype=torch.bfloat16, device=device)
    tensor[-1] = 3.0
    found = gradient_sums.segmented_sumsq([tensor], [0], 1)
    assert found.item() == (numel - 1) / 4 + 9.0
    gradient_scale.scale_([tensor], torch.tensor(2.0, device=device))
    assert (tensor[0].item(), tensor[-2].item(), tensor[-1].item()) == (1.0, 1.0, 6.0)


def test_no_synchronisation(device):
    tensors, sample = gradients(device), Sample(3, device)
    others = [tensor.clone() for tensor in tensors]
    coefficient = torch.ones((), device=device)
    # Before: kernels are compiled, and every pinned buffer exists.
    for _ in range(STAGES):
        for list_ in (tensors, others):
            record(sample, list_)
            gradient_scale.scale_(list_, coefficient)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for list_ in (tensors, tensors, others):
            record(sample, list_)
            gradient_scale.scale_(list_, coefficient)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_allocation(device):
    tensors, sample = gradients(device), Sample(3, device)
    others = [tensor.clone() for tensor in tensors]
    coefficient = torch.ones((), device=device)

    def run():
        for list_ in (tensors, others, tensors):
            record(sample, list_, scale=LossScale(coefficient, None, None))
            gradient_scale.scale_(list_, coefficient)

    for _ in range(STAGES):
        run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats(device)["allocation.all.allocated"]
    for _ in range(10):
        run()
    assert torch.cuda.memory_stats(device)["allocation.all.allocated"] == before


def test_one_kernel_per_call(device):
    tensors, sample = gradients(device), Sample(3, device)
    coefficient = torch.ones((), device=device)
    record(sample, tensors)
    gradient_scale.scale_(tensors, coefficient)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            record(sample, tensors)
            gradient_scale.scale_(tensors, coefficient)
        torch.cuda.synchronize()
    on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert sorted(on_device) == ["_scale_kernel"] * 5 + ["_sums_kernel"] * 5


def test_addresses_that_change_while_launches_are_queued(device):
    # 200 uploads without waiting: a pinned buffer rewritten too early would sum somebody else's gradients.
    lists = [[torch.full((5000,), float(k), device=device)] for k in range(1, 9)]
    gradient_sums.segmented_sumsq(lists[0], [0], 1)
    busy = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    for _ in range(10):
        busy = busy @ busy * 1e-3
    found = [gradient_sums.segmented_sumsq(lists[step % 8], [0], 1) for step in range(200)]
    assert [sums.item() for sums in found] == [5000.0 * (step % 8 + 1) ** 2 for step in range(200)]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_current():
    tensors = gradients("cuda:1")
    sample = Sample(3, "cuda:1")
    sample.record(tensors, SEGMENTS)
    sample.assert_same()
    with pytest.raises(_launch.Unsupported, match=r"tensor 1 .*cuda:0"):
        gradient_sums.segmented_sumsq([tensors[0], torch.zeros(3, device="cuda:0")], [0, 0], 1)


def test_compiled_gives_the_bits_of_eager(device):
    from seedtriton import ops

    tensors = gradients(device)
    compiled = torch.compile(lambda: ops.segmented_sumsq(tensors, list(SEGMENTS), 3), fullgraph=True)
    assert torch.equal(compiled(), ops.segmented_sumsq(tensors, SEGMENTS, 3))


def test_the_monitor_measures_and_clips_in_one_launch_each_and_as_torch_does(device):
    from seedtriton import GradientMonitor

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)).to(device)
    monitor = GradientMonitor(model[0], {"a": model[1]})
    for _ in range(3):
        model.zero_grad(set_to_none=True)
        model(torch.randn(8, 64, device=device)).square().sum().backward()
        expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            monitor.measure()
            total = monitor.clip_grad_norm_(1.0)
            torch.cuda.synchronize()
        torch.testing.assert_close(total, expected)
        clipped = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        torch.testing.assert_close(clipped, torch.tensor(1.0, device=device), rtol=1e-5, atol=0)
    # The limit is known from the second step on; then nothing but the two kernels runs.
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert sorted(name for name in kernels if "kernel" in name) == ["_scale_kernel", "_sums_kernel"]


def test_what_moved_inside_a_capture_is_named_by_its_parameter(device):
    from seedtriton import GradientMonitor, WiringError

    host, seed = torch.nn.Linear(64, 64, device=device), torch.nn.Linear(64, 64, device=device)
    monitor = GradientMonitor(host, {"a": seed})
    for parameter in (*host.parameters(), *seed.parameters()):
        parameter.grad = torch.ones_like(parameter)
    monitor.measure()
    work = torch.zeros(1, device=device)
    elsewhere = seed.bias.grad.clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()

    def capture():
        with torch.cuda.graph(graph):
            work.add_(1.0)  # torch warns of graphs without any work
            monitor.measure()

    seed.bias.grad, kept = elsewhere, seed.bias.grad
    with pytest.raises(WiringError, match=r"the gradient of parameter 'bias' of seed 'a' \(shape \(64,\)\) moved"):
        capture()
    seed.bias.grad = kept
    graph = torch.cuda.CUDAGraph()
    capture()  # in place again
    seed.weight.grad.fill_(3.0)
    graph.replay()
    assert monitor.read()["a"].samples == 2
    assert monitor.ring[1, 1, SUMSQ].item() == 9.0 * 64 * 64 + 64


def test_a_buffer_that_somebody_else_keeps_is_found_and_followed(device):
    from seedtriton import GradientMonitor

    model = torch.nn.Sequential(*[torch.nn.Linear(32, 32, bias=False, device=device) for _ in range(3)])
    monitor = GradientMonitor([model[0], model[2]], {"a": model[1]}, flat="auto")
    for step, order in enumerate(((0, 1, 2), (0, 1, 2), (1, 0, 2), (2, 0, 1))):
        buffer = torch.randn(3 * 1024, device=device)
        for index, place in enumerate(order):
            model[index].weight.grad = buffer[1024 * place : 1024 * place + 1024].view(32, 32)
        monitor.measure()
        expected = model[1].weight.grad.double().square().sum().item()
        assert monitor.ring[step, 1, SUMSQ].item() == pytest.approx(expected, rel=1e-6)


def test_gradients_on_another_device_are_measured_too(device):
    from seedtriton import GradientMonitor

    host, seed = torch.nn.Linear(64, 64, device=device), torch.nn.Linear(64, 64)
    monitor = GradientMonitor(host, {"a": seed})
    for parameter in (*host.parameters(), *seed.parameters()):
        parameter.grad = torch.randn_like(parameter)
    monitor.measure()
    found = monitor.read()["a"]
    for norm, module in ((found.host_norm, host), (found.seed_norm, seed)):
        expected = torch.cat([p.grad.double().flatten() for p in module.parameters()]).norm().item()
        assert norm == pytest.approx(expected, rel=1e-6)
