"""What the README promises of training scripts, where they run: no wait in any step, whole steps in a CUDA graph,
compiled models, loss scaling. The examples run on a GPU by themselves, in test_examples.py."""

import contextlib

import pytest
import torch
from networks import Residual
from torch import nn

from seedtriton import AlphaSchedule, FlatGradients, GradientMonitor, GrowthController, SeedSlot, Stage
from seedtriton.gradients import ops
from seedtriton.gradients.row import SUMSQ

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    # What torch says of its own doings: this mode is a prototype, and torch.compile begins with an empty graph.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode", "ignore:The CUDA Graph is empty"),
]
DEVICE = torch.device("cuda:0")
WIDTH, SAMPLES, BATCH = 8, 1024, 64


@contextlib.contextmanager
def no_waits():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Run:
    """A classifier that one seed improves; ``wrap`` makes what the loop calls of the model."""

    def __init__(self, wrap=lambda model: model, capturable=False, **options):
        torch.manual_seed(0)
        layers = nn.Linear(16, WIDTH), nn.ReLU(), SeedSlot(), nn.Linear(WIDTH, 4)
        self.model = nn.Sequential(*layers).to(DEVICE)
        self.forward = wrap(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3, capturable=capturable)
        self.growth = GrowthController(self.model, self.optimizer, schedule=AlphaSchedule(steps=64), **options)
        self.growth.germinate("2", Residual(WIDTH, 32), probe=torch.zeros(2, WIDTH, device=DEVICE))
        self.inputs = torch.randn(SAMPLES + 512, 16, device=DEVICE)
        self.labels = (self.inputs[:, :4] + self.inputs[:, 4:8]).argmax(dim=1)

    def backward(self, batch):
        nn.functional.cross_entropy(self.forward(self.inputs[batch]), self.labels[batch]).backward()

    def step(self, batch):
        self.backward(batch)
        self.growth.measure()
        self.growth.clip_grad_norm_(1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def epoch(self):
        with torch.no_grad():
            held_out = nn.functional.cross_entropy(self.model(self.inputs[SAMPLES:]), self.labels[SAMPLES:]).item()
        return self.growth.end_epoch(loss=held_out)

    @property
    def stage(self):
        return self.growth.slots["2"].stage


def batches():
    return torch.randperm(SAMPLES, device=DEVICE).split(BATCH)


def live(run, epochs=16, first=2):
    """Stages that were reached; no step but the ``first`` ones of an epoch waits for the GPU."""
    reached = [run.stage]
    for _ in range(epochs):
        parts = batches()
        for batch in parts[:first]:
            run.step(batch)
        with no_waits():
            for batch in parts[first:]:
                run.step(batch)
        run.epoch()
        if run.stage is not reached[-1]:
            reached.append(run.stage)
    return reached


LIFE = [Stage.TRAINING, Stage.BLENDING, Stage.HOLDING]


def test_no_step_of_a_life_waits_for_the_gpu():
    run = Run()
    assert ops.backend_of(DEVICE).name == "triton"
    assert live(run)[:3] == LIFE


def test_a_model_compiled_for_cuda_graphs_lives_as_an_eager_one():
    run = Run(lambda model: torch.compile(model, mode="reduce-overhead"))
    assert live(run, first=5)[:3] == LIFE  # a stage that is new is compiled, tried and captured


def test_a_life_under_loss_scaling_skips_the_step_with_an_infinity_and_measures_unscaled():
    run = Run()
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**14)
    monitor, seed = run.growth.monitor, run.growth.slots["2"].seed
    for number, batch in enumerate(batches()):
        with torch.autocast("cuda", dtype=torch.float16):
            loss = nn.functional.cross_entropy(run.forward(run.inputs[batch]), run.labels[batch])
        scaler.scale(loss).backward()
        if number == 3:
            run.model[0].weight.grad[0, 0] = torch.inf
        scale = scaler.get_scale()
        expected = sum((p.grad.double() / scale).square().sum().item() for p in seed.parameters())
        before = run.model[3].weight.detach().clone()
        run.growth.measure(scaler)
        assert monitor.ring[number, 1, SUMSQ].item() == pytest.approx(expected, rel=1e-6)
        scaler.unscale_(run.optimizer)
        run.growth.clip_grad_norm_(1.0)
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()
        assert torch.equal(before, run.model[3].weight) == (number == 3)
    found = monitor.read()["2"]
    assert (found.samples, found.dropped) == (SAMPLES // BATCH - 1, 1)


def test_whole_steps_in_a_cuda_graph_measure_what_an_eager_loop_does():
    order = batches()
    runs = [Run(capturable=True), Run(capturable=True)]
    eager, graphed = runs
    for run in runs:
        for batch in order[:3]:
            run.step(batch)
    batch = order[3].clone()
    run = graphed
    before = int(run.growth.monitor.count)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run.backward(batch)  # where its gradients will stay
        run.growth.measure()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.optimizer.zero_grad(set_to_none=False)
        run.backward(batch)
        run.growth.measure()
        run.optimizer.step()
    counted = int(run.growth.monitor.count)
    assert counted == before + 1, "the capture itself measures nothing"
    for other in order[4:10]:
        batch.copy_(other)
        graph.replay()
        eager.backward(other)
        eager.growth.measure()
        eager.optimizer.step()
        eager.optimizer.zero_grad()
    assert int(run.growth.monitor.count) == counted + 6, "one sample in each replay"
    assert run.growth.monitor.read()["2"].samples == counted + 6
    ours = run.growth.monitor.ring[counted : counted + 6, :, SUMSQ]
    theirs = eager.growth.monitor.ring[3:9, :, SUMSQ]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0.0)
    for one, other in zip(graphed.model.parameters(), eager.model.parameters()):
        torch.testing.assert_close(one, other)


def test_backward_in_a_cuda_graph_and_the_rest_of_the_step_outside():
    order = batches()
    eager, run = Run(), Run()
    for one in (eager, run):
        for batch in order[:3]:
            one.step(batch)
    batch = order[3].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run.backward(batch)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.optimizer.zero_grad(set_to_none=False)
        run.backward(batch)
    for number, other in enumerate(order[4:10]):
        batch.copy_(other)
        with no_waits() if number > 1 else contextlib.nullcontext():
            graph.replay()
            run.growth.measure()
            run.optimizer.step()
        eager.backward(other)
        eager.growth.measure()
        eager.optimizer.step()
        eager.optimizer.zero_grad()
    found, expected = (one.growth.monitor.read()["2"] for one in (run, eager))
    assert (found.samples, found.optimizer_steps) == (expected.samples, expected.optimizer_steps) == (9, 9)
    assert found.ratio == pytest.approx(expected.ratio, rel=1e-4)
    assert found.blend_gain == pytest.approx(expected.blend_gain, rel=1e-3)


def test_quarantine_writes_zeros_over_a_seeds_infinities_and_leaves_the_host():
    run = Run()
    first, *rest = batches()
    run.step(first)
    seed = run.growth.slots["2"].seed
    for batch in rest[:2]:
        run.backward(batch)
        host = run.model[0].weight.grad.clone()
        seed.expand.weight.grad[0, 0] = torch.nan
        run.growth.measure()
        assert torch.equal(run.model[0].weight.grad, host)
        assert all(not p.grad.any() for p in seed.parameters())
        run.optimizer.step()
        run.optimizer.zero_grad()
    found = run.growth.monitor.read()["2"]
    assert (found.samples, found.seed_not_finite) == (1, 2)


def test_fused_and_foreach_optimizers_and_flat_gradients_measure_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(DEVICE)
    flat = FlatGradients(model)
    for kind in ({"fused": True}, {"foreach": True}):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **kind)
        monitor = GradientMonitor(model[0], {"a": model[1]}, flat=flat, optimizers=optimizer)
        for step in range(3):
            flat.zero_()
            model(torch.randn(8, 64, device=DEVICE)).square().mean().backward()
            monitor.measure()
            expected = ops.segmented_sumsq([p.grad for p in model[1].parameters()], [0, 0], 1)
            assert monitor.ring[step, 1, SUMSQ].item() == pytest.approx(expected.item(), rel=1e-6)
            optimizer.step()
        assert monitor.read()["a"].samples == 3
