"""The monitor in loops that people run: loss scaling, several optimizers, closures, hooks, reading late."""

import copy
import logging

import pytest
import torch
from torch import nn

from seedtriton import (
    ConfigurationError,
    FlatGradients,
    GradientMonitor,
    StateDictError,
    WiringError,
    step_if_grads,
)
from seedtriton.core.evidence import NEVER_MEASURED, NO_GRADIENT
from seedtriton.core.questions import in_optimizer
from seedtriton.gradients import loss_scale, progress, rounds
from seedtriton.gradients.row import LIVE, SUMSQ, TENSORS

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

    def stay(self):
        """A step of every optimizer that moves nothing: the next measurement is another sample."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["weight_decay"] = 0.0
            optimizer.step()

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
    monkeypatch.setattr(loss_scale, "_warned", False)
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


@pytest.mark.parametrize("unscale", [False, True])
def test_an_optimizer_without_gradients_is_not_stepped_and_the_scaler_goes_on(unscale):
    loop = Loop(optimizers=2)
    host, seed = loop.optimizers
    for grown in (False, True, False):
        hidden = loop.host(torch.randn(4, 4))
        loop.scaler.scale((loop.seed(hidden) if grown else hidden).square().mean()).backward()
        before = loop.seed.weight.clone()
        for optimizer in loop.optimizers if unscale else ():
            loop.scaler.unscale_(optimizer)
        if not grown:
            with pytest.raises(AssertionError, match="No inf checks were recorded"):  # why this function exists
                loop.scaler.step(seed)
        assert step_if_grads(loop.scaler, host) is True
        assert step_if_grads(loop.scaler, seed) is grown
        assert torch.equal(loop.seed.weight, before) is not grown
        loop.scaler.update()
        for optimizer in loop.optimizers:
            optimizer.zero_grad()


def test_step_if_grads_steps_as_the_scaler_does():
    left, right = Loop(), Loop()
    torch.manual_seed(1)
    for step in range(3):
        for loop in (left, right):
            torch.manual_seed(step)
            loop.scaler.scale(loop.loss() * (float("inf") if step == 1 else 1.0)).backward()
        left.scaler.step(left.optimizers[0])
        assert step_if_grads(right.scaler, right.optimizers[0])
        for loop in (left, right):
            loop.scaler.update()
            loop.optimizers[0].zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(left.seed.parameters(), right.seed.parameters()))
    assert left.scaler.get_scale() == right.scaler.get_scale()


def test_step_if_grads_works_with_a_scaler_that_is_switched_off():
    loop = Loop(scaled=False)
    before = loop.seed.weight.clone()
    assert not step_if_grads(loop.scaler, loop.optimizers[0])
    loop.loss().backward()
    assert step_if_grads(loop.scaler, loop.optimizers[0])
    assert not torch.equal(loop.seed.weight, before)


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
    x, calls = torch.randn(8, 4), 0

    def closure():
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = seed(host(x)).square().mean()
        loss.backward()
        monitor.measure()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    # The loss was asked for several times in each step; what the step went by in the end is its sample.
    assert calls >= 6
    assert monitor.read()["a"].samples == 2


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
    monkeypatch.setattr("seedtriton.gradients.reading.Transit.arrived", lambda self: arrived[0])
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
    monkeypatch.setattr("seedtriton.gradients.reading.Transit.arrived", lambda self: False)
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
            self.monitor.watch(optimizer)

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
    plain.monitor.watch(optimizer)
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
    kinds = plain.monitor.ring[:5, :, LIVE : TENSORS].sum(dim=(0, 1)).tolist()
    assert kinds[0] > kinds[1] + kinds[2] > kinds[1] > 0.0
    assert inside.monitor.read()["a"].samples == 5
    handle.remove()
    inside.loss().backward()
    inside.monitor.measure()
    assert inside.monitor.read()["a"].empty == 1


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


# Explicit gradients


def parameters(loop):
    return [*loop.host.parameters(), *loop.seed.parameters()]


FORMS = {
    "zip": lambda tensors, grads: zip(tensors, grads),
    "dict": lambda tensors, grads: dict(zip(tensors, grads)),
    "list, other order": lambda tensors, grads: [*zip(tensors, grads)][::-1],
}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gradients_of_a_functional_loop_are_measured_as_backwards_would_be(form, create_graph):
    plain, functional = Loop(scaled=False), Loop(scaled=False)
    tensors = [*parameters(functional), functional.alpha]
    for parameter in tensors:
        parameter.grad = torch.full_like(parameter, 7.0)  # somebody else's: neither read nor written
    for step in range(3):
        for loop in (plain, functional):
            torch.manual_seed(step)
            loop.batch_loss = loop.loss()
        plain.batch_loss.backward()
        plain.monitor.measure()
        plain.optimizers[0].zero_grad()
        grads = torch.autograd.grad(functional.batch_loss, tensors, create_graph=create_graph)
        before = [g.detach().clone() for g in grads]
        functional.monitor.measure(gradients=form(tensors, grads))
        assert all(torch.equal(a, b) for a, b in zip(grads, before))
    assert all(bool((parameter.grad == 7.0).all()) for parameter in tensors)
    assert torch.equal(plain.monitor.ring.nan_to_num(), functional.monitor.ring.nan_to_num())
    assert functional.monitor.read()["a"].blend_gain == plain.monitor.read()["a"].blend_gain != 0.0


def test_parameters_that_are_not_listed_or_unused_have_no_gradient(caplog):
    loop = Loop(scaled=False)
    loop.loss().backward()  # p.grad exists, and is not what is asked for
    host = [*loop.host.parameters()]
    grads = torch.autograd.grad(loop.host(torch.ones(1, 4)).sum(), parameters(loop), allow_unused=True)
    assert grads[-1] is None
    loop.monitor.measure(gradients=zip(parameters(loop), grads))
    assert loop.monitor.read()["a"].status == NO_GRADIENT
    loop.stay()
    loop.monitor.measure(gradients=zip(host[:1], grads))
    row = loop.monitor.ring[1, 0]
    assert row[SUMSQ].item() == pytest.approx(grads[0].square().sum().item())
    assert row[TENSORS] == 1
    loop.stay()
    loop.monitor.measure(gradients=())
    assert loop.monitor.read()["a"].empty == 1
    assert not caplog.records  # zero_grad has nothing to do with it


def wrong(loop):
    tensors, grads = parameters(loop), [torch.ones_like(p) for p in parameters(loop)]
    good = [*zip(tensors, grads)]
    return {
        "unknown": ([*good, (nn.Linear(3, 2).weight, torch.ones(2, 3))], WiringError, r"\(2, 3\).*neither host nor"),
        "shape": ([*good[1:], (tensors[0], torch.ones(4))], ConfigurationError, r"'weight' of the host.*shape \(4,\)"),
        "type": ([*good[:-1], (tensors[-1], 1.0)], ConfigurationError, r"'bias' of seed 'a'.*has float"),
        "twice": ([*good, good[0]], ConfigurationError, r"two for parameter 'weight' of the host"),
        "no pairs": (grads, ConfigurationError, r"zip\(parameters, grads\).*got Tensor"),
        "a pair of rows": ([torch.ones(2, 4)], ConfigurationError, r"zip\(parameters, grads\)"),
        "names": ({"weight": grads[0]}, ConfigurationError, r"dict by parameter"),
    }


@pytest.mark.parametrize("name", wrong(Loop(scaled=False)))
def test_gradients_that_do_not_fit_are_refused_and_nothing_is_measured(name):
    loop = Loop(scaled=False)
    loop.loss().backward()
    loop.monitor.measure()
    before = copy.deepcopy(loop.monitor.state_dict())
    gradients, error, words = wrong(loop)[name]
    with pytest.raises(error, match=words):
        loop.monitor.measure(gradients=gradients)
    assert torch.equal(loop.monitor.ring.nan_to_num(), before["ring"].nan_to_num())
    assert loop.monitor.count == before["count"] == 1
    assert loop.monitor.read()["a"].samples == 1


def test_clipping_after_explicit_gradients_sums_those_that_it_clips():
    loop, other = Loop(scaled=False), Loop(scaled=False)
    for each in (loop, other):
        each.monitor.clip_grad_norm_(0.5)  # the next measurement computes the coefficient for this limit
        torch.manual_seed(1)
        each.loss().backward()
    loop.monitor.measure()
    grads = [torch.full_like(p, 100.0) for p in parameters(loop)]
    loop.monitor.measure(gradients=zip(parameters(loop), grads))
    expected = nn.utils.clip_grad_norm_(parameters(other), 0.5)
    torch.testing.assert_close(loop.monitor.clip_grad_norm_(0.5), expected)
    for a, b in zip(parameters(loop), parameters(other)):
        torch.testing.assert_close(a.grad, b.grad)


def test_explicit_gradients_with_a_scaler_are_divided_by_its_scale(plain):
    loop = Loop()
    for step in range(12):
        loss = loop.loss()
        if step == OVERFLOW:
            continue
        tensors = [*parameters(loop), loop.alpha]
        grads = torch.autograd.grad(loop.scaler.scale(loss), tensors)
        loop.monitor.measure(loop.scaler, gradients=zip(tensors, grads))
        for parameter, grad in zip(tensors, grads):
            parameter.grad = grad / 1024.0
        loop.optimizers[0].step()
        loop.optimizers[0].zero_grad()
    assert_same(loop.monitor.read()["a"], plain)


def test_explicit_gradients_leave_flat_ones_and_collected_sums_alone():
    loop = Loop(scaled=False)
    flat = FlatGradients([loop.host, loop.seed])
    monitor = GradientMonitor(loop.host, {"a": loop.seed}, flat=flat)
    monitor.collect_in_backward()
    used = {}

    def use_up(parameter):
        used[parameter] = parameter.grad.clone()
        parameter.grad.zero_()

    for parameter in parameters(loop):
        parameter.register_post_accumulate_grad_hook(use_up)
    loop.loss().backward()
    expected = torch.cat([used[p].flatten() for p in loop.seed.parameters()]).norm().item()
    for parameter in parameters(loop):
        parameter.grad = torch.zeros_like(parameter)  # not in the buffer
    elsewhere = [parameter.grad for parameter in parameters(loop)]
    monitor.measure(gradients=[(p, torch.full_like(p, 2.0)) for p in parameters(loop)])
    assert all(p.grad is grad for p, grad in zip(parameters(loop), elsewhere))
    monitor.measure()
    norms = monitor.ring[:2, 1, SUMSQ].sqrt().tolist()
    assert norms == pytest.approx([(4.0 * 20) ** 0.5, expected])


def test_explicit_gradients_compile_whole():
    torch._dynamo.reset()
    loop, eager = Loop(scaled=False), Loop(scaled=False)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def measure(grads):
        loop.monitor.measure(gradients=zip(parameters(loop), grads))

    for _ in range(3):
        grads = torch.autograd.grad(loop.loss(), parameters(loop))
        measure(grads)
        eager.monitor.measure(gradients=zip(parameters(eager), grads))
        eager.stay()
    assert torch.equal(loop.monitor.ring.nan_to_num(), eager.monitor.ring.nan_to_num())
    assert loop.monitor.read()["a"].samples == 3


# Tags


class Adversaries:
    """A generator with a seed in it, and a discriminator whose loss also flows back into the generator."""

    def __init__(self, *tags):
        torch.manual_seed(0)
        self.host, self.seed, self.discriminator = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.alphas = [torch.zeros((), requires_grad=True) for _ in tags]
        self.monitors = {
            tag: GradientMonitor(self.host, {"a": self.seed}, alphas={"a": alpha}, tag=tag)
            for tag, alpha in zip(tags, self.alphas)
        }

    def backward(self, sign):
        hidden = self.host(torch.randn(8, 3))
        grown = hidden + sum(self.alphas) * (self.seed(hidden) - hidden) + self.seed(hidden.detach())
        (sign * self.discriminator(grown)).exp().mean().backward()

    def zero_grad(self):
        for module in (self.host, self.seed, self.discriminator):
            module.zero_grad()

    def run(self, steps=10, losses=("d", "g"), measured=("d", "g")):
        for step in range(steps):
            for tag in losses:
                torch.manual_seed(100 * step + ord(tag))
                self.backward(1.0 if tag == "d" else -3.0)
                for monitor in self.monitors.values() if tag in measured else ():
                    monitor.measure(tag=None if monitor.tag is None else tag)
                self.zero_grad()
        return {tag: monitor.read()["a"] for tag, monitor in self.monitors.items()}


def test_losses_of_different_tags_are_never_averaged_together():
    both = Adversaries("d", "g").run()
    alone = {tag: Adversaries("d", "g").run(losses=tag)[tag] for tag in "dg"}
    assert both == alone
    assert both["d"].samples == both["g"].samples == 10
    assert both["d"].ratio != both["g"].ratio
    assert both["d"].blend_gain * both["g"].blend_gain < 0.0
    mixed = Adversaries(None).run()[None]
    assert mixed.samples == 20
    assert mixed.seed_norm not in (both["d"].seed_norm, both["g"].seed_norm)


def test_another_tag_is_counted_nowhere_and_leaves_the_gradients_alone():
    made = Adversaries("g")
    made.backward(1.0)
    before = [p.grad.clone() for p in made.seed.parameters()]
    made.monitors["g"].measure(tag="d")
    assert all(torch.equal(p.grad, grad) for p, grad in zip(made.seed.parameters(), before))
    found = made.monitors["g"].read()["a"]
    assert (found.status, found.samples, found.dropped, found.empty) == (NEVER_MEASURED, 0, 0, 0)
    assert made.alphas[0].grad == 0.0  # or it would be added to that of the loss that counts


def test_another_tag_discards_what_was_collected_in_backward():
    made = Adversaries("g")
    monitor = made.monitors["g"]
    monitor.collect_in_backward()
    made.backward(1.0)
    monitor.measure(tag="d")
    made.zero_grad()
    made.backward(-3.0)
    monitor.measure(tag="g")
    expected = torch.cat([p.grad.flatten() for p in made.seed.parameters()]).norm().item()
    assert monitor.read()["a"].seed_norm == pytest.approx(expected)


def test_explicit_gradients_of_another_tag_are_checked_and_ignored():
    made = Adversaries("g")
    monitor = made.monitors["g"]
    made.alphas[0].grad = torch.ones(())
    pairs = [(p, torch.ones_like(p)) for p in made.seed.parameters()]
    monitor.measure(gradients=pairs, tag="d")
    assert (monitor.count, made.alphas[0].grad) == (0, 1.0)
    monitor.measure(gradients=pairs, tag="g")
    assert monitor.count == 1
    with pytest.raises(ConfigurationError, match="two for"):
        monitor.measure(gradients=pairs * 2, tag="d")


def test_a_tag_is_asked_for_by_both_sides_or_by_none():
    made = Adversaries("g", None)
    made.backward(1.0)
    slopes = [alpha.grad.item() for alpha in made.alphas]
    with pytest.raises(ConfigurationError, match=r"measures the loss 'g' alone.*measure\(tag=\.\.\.\)"):
        made.monitors["g"].measure()
    with pytest.raises(ConfigurationError, match=r"measures every call.*GradientMonitor\(\.\.\., tag='g'\)"):
        made.monitors[None].measure(tag="g")
    assert [alpha.grad.item() for alpha in made.alphas] == slopes
    assert made.monitors["g"].count == made.monitors[None].count == 0
    with pytest.raises(ConfigurationError, match="cannot know the loss"):
        made.monitors["g"].attach(torch.optim.SGD(made.seed.parameters()))
    with pytest.raises(ConfigurationError, match="tag must be a string or None, got 3"):
        GradientMonitor(made.host, {"a": made.seed}, tag=3)


def test_a_window_of_one_loss_is_not_loaded_into_a_monitor_of_another():
    made = Adversaries("g", "d")
    made.run(steps=2)
    with pytest.raises(StateDictError, match="of the loss 'g', the monitor's is 'd'"):
        made.monitors["d"].load_state_dict(made.monitors["g"].state_dict())
    assert made.monitors["d"].read()["a"].samples == 2
    fresh = Adversaries("g").monitors["g"]
    fresh.load_state_dict(made.monitors["g"].state_dict())
    assert fresh.read()["a"].ratio == made.monitors["g"].read()["a"].ratio


def test_tags_compile_whole_one_graph_each():
    torch._dynamo.reset()
    made, eager = Adversaries("g"), Adversaries("g")
    graphs = []
    compiled = torch.compile(
        made.monitors["g"], fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph
    )
    for step in range(6):
        for tag, sign in (("d", 1.0), ("g", -3.0)):
            for each, measure in ((made, compiled), (eager, eager.monitors["g"])):
                torch.manual_seed(step)
                each.backward(sign)
                measure(tag=tag)
                each.zero_grad()
    assert len(graphs) == 2
    assert torch.equal(made.monitors["g"].ring.nan_to_num(), eager.monitors["g"].ring.nan_to_num())
    assert made.monitors["g"].read()["a"].samples == 6


# Kinds of gradients and of compilation


@pytest.mark.usefixtures("gloo")
def test_accumulation_under_no_sync_is_one_sample_of_the_sum():
    one, many = Loop(scaled=False), Loop(scaled=False)
    nets = [nn.Sequential(loop.host, loop.seed) for loop in (one, many)]
    ddp = nn.parallel.DistributedDataParallel(nets[1])
    for _ in range(3):
        batches = torch.randn(3, 4, 4)
        nets[0](batches).square().sum().backward()
        one.monitor.measure()
        with ddp.no_sync():
            for batch in batches[:-1]:
                ddp(batch).square().sum().backward()
        ddp(batches[-1]).square().sum().backward()
        many.monitor.measure()  # on steps that synchronise only
        for loop, net in zip((one, many), nets):
            loop.stay()
            net.zero_grad()
    left, right = one.monitor.read()["a"], many.monitor.read()["a"]
    assert left.samples == right.samples == 3
    assert (left.seed_norm, left.host_norm) == pytest.approx((right.seed_norm, right.host_norm), rel=1e-5)


def test_channels_last_sparse_and_tied_gradients_are_measured_as_dense_ones():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    words, out = nn.Embedding(9, 8, sparse=True), nn.Linear(8, 9, bias=False)
    tied = nn.Linear(8, 9, bias=False)
    tied.weight = out.weight
    monitor = GradientMonitor(nn.ModuleList([conv, words]), {"a": nn.ModuleList([out, tied])})
    image = torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last)
    features = conv(image).mean((2, 3)) + words(torch.tensor([[1, 1, 4], [2, 1, 1]])).sum(1)
    (out(features) + tied(features).square()).sum().backward()
    assert words.weight.grad.is_sparse
    assert not conv.weight.grad.is_contiguous()
    assert conv.weight.grad.is_contiguous(memory_format=torch.channels_last)
    monitor.measure()
    host = [conv.weight.grad, conv.bias.grad, words.weight.grad.to_dense()]
    found = monitor.read()["a"]
    assert found.host_norm == pytest.approx(torch.cat([g.flatten() for g in host]).norm().item(), rel=1e-6)
    assert found.seed_norm == pytest.approx(out.weight.grad.norm().item(), rel=1e-6)
    assert monitor.ring[0, 1, TENSORS] == 1


def test_reduce_overhead_gives_the_numbers_of_eager():
    """On a CPU this mode has no CUDA graphs to record; what is left is inductor, for model and monitor.

    Without biases and activations it needs no C++ compiler, and a tenth of the time.
    """
    torch._dynamo.reset()
    nets = [nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    monitors = [GradientMonitor(net[0], {"a": net[1]}) for net in nets]
    forward = torch.compile(nets[1], mode="reduce-overhead")
    measure = torch.compile(monitors[1], mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        x = torch.randn(8, 4)
        for net, take in ((nets[0], monitors[0]), (forward, measure)):
            net(x).square().mean().backward()
            take()
        for net in nets:
            net.zero_grad()
    torch.testing.assert_close(monitors[1].ring, monitors[0].ring, rtol=1e-5, atol=0, equal_nan=True)
    assert monitors[1].read()["a"].samples == 4


def test_freezing_under_a_compiled_measurement_is_seen():
    torch._dynamo.reset()
    loop = Loop(scaled=False)
    compiled = torch.compile(loop.monitor, fullgraph=True, backend="eager")

    def tensors():
        loop.host.zero_grad()
        loop.seed.zero_grad()
        loop.loss().backward()
        compiled()
        return loop.monitor.ring[int(loop.monitor.count) - 1, 1, TENSORS].item()

    assert tensors() == 2
    loop.seed.bias.requires_grad_(False)
    assert tensors() == 1
    loop.seed.bias.requires_grad_(True)
    assert tensors() == 2


# --- CUDA graphs, of which Python sees the capture alone; tests/gpu replays them ---


def test_what_is_captured_is_a_round_of_its_own(monkeypatch):
    """The measurement before a capture waits for a step that never comes; in every replay it would be replaced."""
    host, seed = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([host, seed], lr=0.1)
    monitor = GradientMonitor([host], {"s": [seed]}, optimizers=optimizer)
    host.grad, seed.grad = torch.ones(3), torch.ones(3)
    counts = []
    for captured in (False, True, True, False, False):
        monkeypatch.setattr(rounds, "capturing", lambda captured=captured: captured)
        monitor.measure()
        counts.append(int(monitor.count))
    assert counts == [1, 2, 2, 3, 3], "the first of each kind is a sample, the second one replaces it"


def test_steps_in_a_cuda_graph_are_not_said_to_be_known(monkeypatch):
    host, seed = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([host, seed], lr=0.1)
    monitor = GradientMonitor([host], {"s": [seed]}, optimizers=optimizer)
    host.grad, seed.grad = torch.ones(3), torch.ones(3)
    monitor.measure()
    optimizer.step()
    assert monitor.read()["s"].optimizer_steps == 1
    monkeypatch.setattr(progress, "capturing", lambda: True)
    optimizer.step()
    monkeypatch.undo()
    monitor.reset()
    monitor.measure()
    assert monitor.read()["s"].optimizer_steps is None, "the graph may be replayed, who knows"
    assert in_optimizer(monitor.read()["s"], required=True).passed


def test_steps_are_known_again_in_a_window_behind_the_last_that_was_captured(monkeypatch):
    host, seed = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([host, seed], lr=0.1)
    monitor = GradientMonitor([host], {"s": [seed]}, optimizers=optimizer)
    host.grad, seed.grad = torch.ones(3), torch.ones(3)
    monkeypatch.setattr(progress, "capturing", lambda: True)
    optimizer.step()
    monkeypatch.undo()
    for _ in range(2):
        monitor.measure()
        optimizer.step()
        assert monitor.read()["s"].optimizer_steps is None
    monitor.reset()
    monitor.measure()
    optimizer.step()
    assert monitor.read()["s"].optimizer_steps == 1


def test_a_state_that_is_loaded_knows_its_steps_whatever_was_captured_before(monkeypatch):
    host, seed = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([host, seed], lr=0.1)
    monitor = GradientMonitor([host], {"s": [seed]}, optimizers=optimizer)
    host.grad, seed.grad = torch.ones(3), torch.ones(3)
    monitor.measure()
    optimizer.step()
    saved = copy.deepcopy(monitor.state_dict())
    monkeypatch.setattr(progress, "capturing", lambda: True)
    optimizer.step()
    monkeypatch.undo()
    monitor.load_state_dict(saved)
    assert monitor.read()["s"].optimizer_steps == 1


def test_alpha_does_not_move_for_a_step_that_is_only_captured(monkeypatch):
    begun = []
    monitor = GradientMonitor([nn.Parameter(torch.ones(3))], {"s": [nn.Parameter(torch.ones(3))]})
    monitor.at_each_step(lambda: begun.append(1))
    for captured, times in ((False, 1), (True, 1), (False, 2)):
        monkeypatch.setattr(rounds, "capturing", lambda captured=captured: captured)
        monitor.measure()
        assert len(begun) == times


def test_a_captured_measurement_counts_no_steps(monkeypatch):
    monitor = GradientMonitor([nn.Parameter(torch.ones(3))], {"s": [nn.Parameter(torch.ones(3))]})
    monkeypatch.setattr(rounds, "capturing", lambda: True)
    with pytest.raises(ConfigurationError, match=r"captured in a CUDA graph.*every=2 out"):
        monitor.measure(every=2)
    assert int(monitor.count) == 0
