"""The monitor in loops that people run: loss scaling, several optimizers, closures, hooks, reading late."""

import logging

import pytest
import torch
from torch import nn

from seedtriton import FlatGradients, GradientMonitor, WiringError, _loss_scale, reference
from seedtriton.evidence import NEVER_MEASURED, NO_GRADIENT

OVERFLOW = 5  # the step whose loss is made infinite


class Loop:
    """Host and seed in one optimizer or in two, with a GradScaler that may be switched off."""

    def __init__(self, fused=False, optimizers=1, scaled=True):
        torch.manual_seed(0)
        self.host, self.seed = nn.Linear(4, 4), nn.Linear(4, 4)
        self.alpha = torch.zeros((), requires_grad=True)
        groups = [[*self.host.parameters()], [*self.seed.parameters()]]
        if optimizers == 1:
            groups = [groups[0] + groups[1]]
        self.optimizers = [torch.optim.AdamW(group, lr=1e-3, fused=fused) for group in groups]
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        self.monitor = GradientMonitor(
            self.host, {"a": self.seed}, optimizers=self.optimizers, alphas={"a": self.alpha}
        )

    def loss(self):
        x = self.host(torch.randn(4, 4))
        return (x + self.alpha * self.seed(x) + self.seed(x)).square().mean()

    def run(self, where, steps=12, unscale=(0, 1), overflow=OVERFLOW):
        for step in range(steps):
            loss = self.loss()
            if step == overflow:
                if not self.scaler.is_enabled():
                    continue
                loss = loss * float("inf")
            self.scaler.scale(loss).backward()
            if where == "before":
                self.monitor.measure(self.scaler)
            for index in unscale[: len(self.optimizers)] if where == "after" else ():
                self.scaler.unscale_(self.optimizers[index])
            if where == "after":
                self.monitor.measure(self.scaler)
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
            self.scaler.update()
            for optimizer in self.optimizers:
                optimizer.zero_grad()
        return self.monitor.read()["a"]


@pytest.fixture
def plain():
    return Loop(scaled=False).run("after")


def assert_same(found, plain):
    """A scale that is a power of two changes no bit of the numbers."""
    assert (found.ratio, found.seed_norm, found.host_norm) == (plain.ratio, plain.seed_norm, plain.host_norm)
    assert found.samples == plain.samples == 11


@pytest.mark.parametrize("optimizers", [1, 2])
@pytest.mark.parametrize("where", ["before", "after"])
def test_loss_scaling_changes_no_number_and_the_skipped_step_is_dropped(where, optimizers, plain):
    found = Loop(optimizers=optimizers).run(where)
    assert_same(found, plain)
    assert found.blend_gain == pytest.approx(plain.blend_gain, rel=1e-6)
    assert found.dropped == 1


def test_fused_optimizers_are_measured_before_the_scaler_unscales_inside_the_step(plain):
    found = Loop(fused=True).run("before")
    assert_same(found, plain)
    assert found.dropped == 1


def test_a_disabled_scaler_changes_nothing(plain):
    assert Loop(scaled=False).run("before") == plain


def test_we_never_touch_the_scaler():
    loop = Loop()
    loop.scaler.scale(loop.loss()).backward()
    loop.monitor.measure(loop.scaler)
    assert not loop.scaler._per_optimizer_states
    loop.scaler.unscale_(loop.optimizers[0])  # a second unscale_ would raise
    loop.monitor.measure(loop.scaler)


def test_one_optimizer_unscaled_and_the_other_not_is_dropped_and_told_once(caplog, monkeypatch):
    monkeypatch.setattr(_loss_scale, "_warned", False)
    with caplog.at_level(logging.WARNING, logger="seedtriton"):
        found = Loop(optimizers=2).run("after", unscale=(0,))
    assert found.samples == 0
    assert found.dropped == 12
    assert len(caplog.records) == 1
    assert "one optimizer was unscaled and another was not" in caplog.text


def test_measuring_after_the_step_is_refused():
    loop = Loop()
    loop.scaler.scale(loop.loss()).backward()
    loop.scaler.step(loop.optimizers[0])
    with pytest.raises(WiringError, match=r"before scaler\.step"):
        loop.monitor.measure(loop.scaler)


def test_a_scaler_needs_known_optimizers():
    loop = Loop()
    monitor = GradientMonitor(loop.host, {"a": loop.seed})
    loop.scaler.scale(loop.loss()).backward()
    with pytest.raises(WiringError, match="optimizers"):
        monitor.measure(loop.scaler)


def test_clipping_before_unscaling_uses_the_unscaled_norm():
    loop, twin = Loop(), Loop(scaled=False)
    loop.scaler.scale(loop.loss()).backward()
    torch.manual_seed(0)
    twin = Loop(scaled=False)
    twin.loss().backward()
    loop.monitor.measure(loop.scaler)
    total = loop.monitor.clip_grad_norm_(1e-3)
    expected = nn.utils.clip_grad_norm_([*twin.host.parameters(), *twin.seed.parameters()], 1e-3)
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("optimizers", [1, 2])
def test_attach_measures_once_per_step_without_a_line_in_the_loop(fused, optimizers, plain):
    loop = Loop(fused=fused, optimizers=optimizers)
    loop.monitor.attach(*loop.optimizers, scaler=loop.scaler)
    found = loop.run("nowhere")
    assert_same(found, plain)
    # An optimizer that unscales by itself is called for an overflow step too; the others are not.
    assert found.dropped == int(fused)


def test_attach_ends_with_its_handle_and_with_the_monitor():
    loop = Loop(scaled=False)
    handle = loop.monitor.attach(*loop.optimizers)
    loop.run("nowhere", steps=3, overflow=None)
    handle.remove()
    assert loop.run("nowhere", steps=3, overflow=None).samples == 3
    loop.monitor.attach(*loop.optimizers)
    del loop.monitor
    loop.loss().backward()
    loop.optimizers[0].step()


def test_attach_counts_the_steps_of_an_optimizer_it_did_not_know():
    loop = Loop(scaled=False)
    monitor = GradientMonitor(loop.host, {"a": loop.seed})
    monitor.attach(*loop.optimizers)
    loop.run("nowhere", steps=4, overflow=None)
    found = monitor.read()["a"]
    assert (found.samples, found.optimizer_steps, found.in_optimizer) == (4, 4, True)


@pytest.mark.parametrize("call", [lambda o, c: o.step(c), lambda o, c: o.step(closure=c)])
def test_attach_refuses_a_closure_with_the_reason(call):
    loop = Loop(scaled=False)
    loop.monitor.attach(*loop.optimizers)
    with pytest.raises(WiringError, match="closure"):
        call(loop.optimizers[0], lambda: loop.loss())


def test_inside_a_closure_measuring_works():
    torch.manual_seed(0)
    host, seed = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizer = torch.optim.LBFGS([*host.parameters(), *seed.parameters()], max_iter=3)
    monitor = GradientMonitor(host, {"a": seed}, optimizers=optimizer)
    x = torch.randn(8, 4)

    def closure():
        optimizer.zero_grad()
        loss = seed(host(x)).square().mean()
        loss.backward()
        monitor.measure()
        return loss

    optimizer.step(closure)
    assert monitor.read()["a"].samples >= 3


def test_several_backward_passes_before_a_step_are_one_sample_of_their_sum():
    one, many = Loop(scaled=False), Loop(scaled=False)
    batches = torch.randn(3, 4, 4)
    for loop, groups in ((one, [batches]), (many, list(batches.unsqueeze(1)))):
        for group in groups:
            sum(loop.seed(loop.host(x)).square().sum() for x in group).backward()
        loop.monitor.measure()
    left, right = one.monitor.read()["a"], many.monitor.read()["a"]
    assert left.samples == right.samples == 1
    assert left.ratio == pytest.approx(right.ratio, rel=1e-6)


def test_measured_only_after_zero_grad_is_told_once_with_the_right_place(caplog):
    loop = Loop(scaled=False)
    with caplog.at_level(logging.WARNING, logger="seedtriton"):
        for _ in range(3):
            loop.loss().backward()
            loop.optimizers[0].step()
            loop.optimizers[0].zero_grad()
            loop.monitor.measure()
    assert len(caplog.records) == 1
    assert "after backward() and before zero_grad" in caplog.text
    found = loop.monitor.read()["a"]
    assert (found.status, found.empty) == (NO_GRADIENT, 3)


def test_strict_reading_raises_when_nothing_was_measured():
    loop = Loop(scaled=False)
    assert loop.monitor.read()["a"].status == NEVER_MEASURED
    with pytest.raises(WiringError, match=r"\['a'\] were never measured"):
        loop.monitor.read(strict=True)
    loop.loss().backward()
    loop.monitor.measure()
    loop.monitor.read(strict=True)


def test_the_latest_evidence_arrives_at_once_on_a_cpu_with_its_age():
    loop = Loop(scaled=False)
    loop.run("after", steps=4, overflow=None)
    latest = loop.monitor.latest()
    assert latest.evidence == loop.monitor.read()
    assert latest.age == 0


def test_the_latest_evidence_never_waits_for_a_copy_under_way(monkeypatch):
    """The half of the asynchronous path that a CPU can show: nothing new is sent while a copy is out."""
    loop = Loop(scaled=False)
    loop.run("after", steps=2, overflow=None)
    arrived = [False]
    monkeypatch.setattr("seedtriton.monitor._Transit.arrived", lambda self: arrived[0])
    assert loop.monitor.latest() == ({}, None)
    under_way = loop.monitor._transit
    loop.run("after", steps=3, overflow=None)
    assert loop.monitor.latest() == ({}, None)
    assert loop.monitor._transit is under_way
    arrived[0] = True
    latest = loop.monitor.latest()
    assert latest.evidence["a"].samples == 2
    assert latest.age == 3


def test_evidence_of_other_seeds_than_the_present_ones_is_not_handed_out(monkeypatch):
    loop = Loop(scaled=False)
    loop.run("after", steps=2, overflow=None)
    loop.monitor.latest()
    monkeypatch.setattr("seedtriton.monitor._Transit.arrived", lambda self: False)
    loop.monitor.add_seed("b", nn.Linear(2, 2))
    assert loop.monitor.latest() == ({}, None)


def test_compiled_measuring_costs_one_graph_for_fifty_steps_and_the_same_bits():
    torch._dynamo.reset()
    loop = Loop(scaled=False)
    eager = GradientMonitor(loop.host, {"a": loop.seed})
    graphs = []
    compiled = torch.compile(loop.monitor, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    for _ in range(50):
        loop.loss().backward()
        eager.measure()
        compiled()
        loop.optimizers[0].step()
        loop.optimizers[0].zero_grad(set_to_none=True)
    assert len(graphs) == 1
    columns = slice(0, 4)  # the last column is the blend gain, which only one of them measures
    assert torch.equal(loop.monitor.ring[..., columns], eager.ring[..., columns])
    assert loop.monitor.read()["a"].samples == 50
    assert loop.monitor.read()["a"].blend_gain is not None


class InBackward(Loop):
    """Every parameter has an optimizer of its own that steps in backward and frees the gradient."""

    def step_in_backward(self):
        for parameter in (*self.host.parameters(), *self.seed.parameters()):
            optimizer = torch.optim.SGD([parameter], lr=1e-2)

            def step(parameter, optimizer=optimizer):
                optimizer.step()
                parameter.grad = None

            parameter.register_post_accumulate_grad_hook(step)


def test_optimizers_that_step_in_backward_are_measured_while_it_runs():
    plain, inside = Loop(scaled=False), InBackward(scaled=False)
    for loop in (plain, inside):
        loop.monitor.vanishing_rms, loop.monitor.exploding_rms = 0.1, 0.2
    handle = inside.monitor.collect_in_backward()
    inside.step_in_backward()
    optimizer = torch.optim.SGD([*plain.host.parameters(), *plain.seed.parameters()], lr=1e-2)
    for _ in range(5):
        state = torch.random.get_rng_state()
        plain.loss().backward()
        plain.monitor.measure()
        optimizer.step()
        optimizer.zero_grad()
        torch.random.set_rng_state(state)
        inside.loss().backward()
        assert all(parameter.grad is None for parameter in inside.host.parameters())
        inside.monitor.measure()
    torch.testing.assert_close(inside.monitor.ring[:5], plain.monitor.ring[:5], rtol=1e-6, atol=0, equal_nan=True)
    kinds = plain.monitor.ring[:5, :, reference.LIVE : reference.TENSORS].sum(dim=(0, 1)).tolist()
    assert kinds[0] > kinds[1] + kinds[2] > kinds[1] > 0.0
    assert inside.monitor.read()["a"].samples == 5
    handle.remove()
    inside.loss().backward()
    inside.monitor.measure()
    assert inside.monitor.read()["a"].empty == 1


def test_what_is_collected_twice_is_one_tensor_with_the_squares_of_both():
    loop = Loop(scaled=False)
    loop.monitor.collect_in_backward()
    for passes in (1, 2):
        state = torch.random.get_rng_state()
        for _ in range(passes):
            torch.random.set_rng_state(state)
            loop.loss().backward()
            for parameter in (*loop.host.parameters(), *loop.seed.parameters()):
                parameter.grad = None
        torch.random.set_rng_state(state)
        loop.monitor.measure()
    once, twice = loop.monitor.ring[:2]
    torch.testing.assert_close(twice[:, reference.SUMSQ], 2 * once[:, reference.SUMSQ])
    assert torch.equal(twice[:, reference.LIVE : reference.EXTRA], once[:, reference.LIVE : reference.EXTRA])


def test_collecting_after_the_hooks_that_free_is_refused_with_the_way_out():
    loop = InBackward(scaled=False)
    loop.step_in_backward()
    loop.monitor.collect_in_backward()
    with pytest.raises(WiringError, match="before you register the hooks"):
        loop.loss().backward()


def test_a_seed_that_is_added_later_is_collected_too():
    loop = Loop(scaled=False)
    loop.monitor.collect_in_backward()
    other = nn.Linear(4, 4)
    loop.monitor.add_seed("b", other)
    (loop.loss() + other(torch.ones(1, 4)).sum()).backward()
    loop.monitor.measure()
    found = loop.monitor.read()
    norm = torch.cat([p.grad.flatten() for p in other.parameters()]).norm().item()
    assert found["b"].seed_norm == pytest.approx(norm)
    assert found["a"].live_share == 1.0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # compiled autograd looks at its own
def test_measuring_works_with_compiled_autograd():
    torch._dynamo.reset()
    plain, compiled = Loop(scaled=False), Loop(scaled=False)
    torch.manual_seed(1)
    plain.loss().backward()
    torch.manual_seed(1)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        compiled.loss().backward()
    plain.monitor.measure()
    compiled.monitor.measure()
    torch.testing.assert_close(plain.monitor.ring, compiled.monitor.ring, equal_nan=True)


def test_flat_gradients_are_put_back_before_measuring_and_change_no_number():
    before = Loop(scaled=False).run("after", overflow=None)
    flat = Loop(scaled=False)
    gradients = FlatGradients([flat.host, flat.seed])
    flat.monitor = GradientMonitor(
        flat.host, {"a": flat.seed}, optimizers=flat.optimizers, alphas={"a": flat.alpha}, flat=gradients
    )
    assert flat.run("after", overflow=None) == before
    flat.loss().backward()
    flat.monitor.measure()
    start = gradients.buffer.untyped_storage().data_ptr()
    assert all(p.grad.untyped_storage().data_ptr() == start for p in (*flat.host.parameters(), *flat.seed.parameters()))


def test_a_gradient_that_is_missing_is_not_measured_as_a_flat_zero():
    loop = Loop(scaled=False)
    gradients = FlatGradients([loop.host, loop.seed])
    monitor = GradientMonitor(loop.host, {"a": loop.seed}, flat=gradients)
    loop.host.zero_grad(set_to_none=True)
    loop.seed.zero_grad(set_to_none=True)
    loop.host(torch.ones(1, 4)).sum().backward()
    monitor.measure()
    assert monitor.read()["a"].status == NO_GRADIENT
