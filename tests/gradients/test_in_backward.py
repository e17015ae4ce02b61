"""``collect_in_backward``: of what backward uses up the sum from before, of what it leaves the gradient itself."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from used import Used

from seedtriton import FlatGradients, GradientMonitor, WiringError
from seedtriton.gradients.row import EXTRA, SUMSQ


class Loop:
    """A host and a seed; each parameter may have an optimizer that steps in backward."""

    def __init__(self, seeds=1, collect=True, scaled=False):
        torch.manual_seed(0)
        self.host = nn.Linear(4, 4)
        self.grown = [nn.Linear(4, 4) for _ in range(seeds)]
        self.alpha = torch.zeros((), requires_grad=True)
        names = "ab"[:seeds]
        self.monitor = GradientMonitor(self.host, dict(zip(names, self.grown)), alphas={"a": self.alpha})
        self.used = Used(self.monitor, [*self.host.parameters()], [[*seed.parameters()] for seed in self.grown])
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        self.handle = self.monitor.collect_in_backward() if collect else None

    @property
    def seed(self):
        return self.grown[0]

    def parameters(self):
        return [p for module in (self.host, *self.grown) for p in module.parameters()]

    def step_in_backward(self, parameters=None, free="none", clip=None, scale=1.0):
        """After the collector's hooks; the truth is noted in a hook of its own in between."""
        for parameter in self.parameters() if parameters is None else parameters:
            optimizer = torch.optim.SGD([parameter], lr=0.1)

            def note(parameter):
                self.used.noted.pop(id(parameter), None)
                self.used.note([parameter], scale)

            def step(parameter, optimizer=optimizer):
                if clip is not None:
                    nn.utils.clip_grad_norm_([parameter], clip)
                optimizer.step()
                if free is not None:
                    optimizer.zero_grad(set_to_none=free == "none")

            parameter.register_post_accumulate_grad_hook(note)
            parameter.register_post_accumulate_grad_hook(step)

    def loss(self, step, seeds=None, factor=1.0):
        torch.manual_seed(step)
        hidden = self.host(torch.randn(8, 4)).tanh()
        grown = self.grown if seeds is None else seeds
        out = sum((seed(hidden) for seed in grown), start=self.alpha * hidden)
        return factor * out.square().mean()

    def backward(self, step, seeds=None, factor=1.0):
        self.scaler.scale(self.loss(step, seeds, factor)).backward()

    def fail(self):
        """A backward pass that has reached the seeds when it fails."""
        hidden = Fail.apply(self.host(torch.ones(1, 4)))
        loss = sum(seed(hidden).sum() for seed in self.grown)
        with pytest.raises(MemoryError):
            loss.backward()

    def clear(self, set_to_none=True):
        for module in (self.host, *self.grown):
            module.zero_grad(set_to_none=set_to_none)


@pytest.mark.parametrize("free", ["none", "zeros"])
def test_what_backward_uses_up_is_measured_as_it_was_before(free):
    loop = Loop()
    loop.step_in_backward(free=free)
    for step in range(4):
        loop.backward(step)
        loop.monitor.measure()
        loop.used.close()
    loop.used.check()
    assert loop.monitor.read()["a"].samples == 4


@pytest.mark.parametrize("stepping", [False, True])
def test_parameters_that_are_thawed_later_are_collected_before_the_hooks_that_step(stepping):
    loop = Loop(collect=False)
    loop.host.requires_grad_(False)
    loop.monitor.collect_in_backward()
    assert not any(p.requires_grad for p in loop.host.parameters())
    if stepping:
        loop.step_in_backward([*loop.seed.parameters()])
    for step in range(4):
        if step == 2:
            loop.host.requires_grad_(True)
            if stepping:
                loop.step_in_backward([*loop.host.parameters()])
        loop.backward(step)
        loop.used.note(loop.parameters())
        loop.monitor.measure()
        loop.used.close()
        loop.clear()
    loop.used.check()


def test_frozen_integers_have_no_hook_and_disturb_nobody():
    host, seed = nn.Linear(4, 4), nn.Linear(4, 4)
    host.register_parameter("packed", nn.Parameter(torch.ones(4, dtype=torch.uint8), requires_grad=False))
    monitor = GradientMonitor(host, {"a": seed})
    monitor.collect_in_backward()
    assert not host.packed.requires_grad
    seed(host(torch.ones(1, 4))).sum().backward()
    monitor.measure()
    assert monitor.read()["a"].samples == 1


class Fail(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise MemoryError("as when memory runs out in backward")


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("failing", [False, True])
def test_a_batch_that_is_dropped_is_in_no_later_sample(failing, set_to_none):
    """Also of a seed that has no gradient in the batch behind it, so that nothing newer replaces it."""
    loop = Loop(seeds=2)
    for step in range(3):
        if failing:
            loop.fail()
            assert loop.grown[1].weight.grad is not None
        else:
            loop.backward(100 + step, factor=50.0)
        loop.clear(set_to_none)
        loop.backward(step, seeds=loop.grown[:1])
        loop.used.note(loop.parameters())
        loop.monitor.measure()
        loop.used.close()
        loop.clear()
    loop.used.check()


def test_a_batch_that_fails_after_some_have_stepped_is_in_no_later_sample():
    loop = Loop(seeds=2)
    loop.step_in_backward()
    loop.fail()
    loop.used.drop()
    loop.backward(0, seeds=loop.grown[:1])
    loop.monitor.measure()
    loop.used.close()
    loop.used.check()


def test_accumulated_gradients_are_measured_as_their_sum():
    loop = Loop()
    for step in range(3):
        for micro in range(4):
            loop.backward(10 * step + micro)
        loop.used.note(loop.parameters())
        loop.monitor.measure()
        loop.used.close()
        loop.clear()
    loop.used.check()


def test_of_several_steps_in_backward_the_newest_counts():
    """``note`` keeps the newest too. Squares of gradients of different steps are never added."""
    loop = Loop(seeds=2)
    loop.step_in_backward()
    loop.backward(0)
    loop.backward(1, seeds=loop.grown[:1])
    loop.monitor.measure()
    loop.used.close()
    loop.used.check()


@pytest.mark.parametrize("when", ["before unscale_", "after unscale_", "attached", "attached, two", "attached, fused"])
def test_loss_scaling_is_divided_out_once(when):
    loop = Loop(scaled=True)
    groups = [loop.parameters()]
    if when == "attached, two":
        groups = [[*loop.seed.parameters()], [*loop.host.parameters()]]
    optimizers = [torch.optim.AdamW(group, lr=1e-3, fused="fused" in when) for group in groups]
    loop.monitor.watch(*optimizers)
    if "attached" in when:
        loop.monitor.attach(*optimizers, scaler=loop.scaler)
    for step in range(4):
        scale, spoiled = loop.scaler.get_scale(), step == 1
        loop.backward(step, factor=float("inf") if spoiled else 1.0)
        slope = loop.alpha.grad.item() / scale
        loop.used.note(loop.parameters(), scale)
        if when == "before unscale_":
            loop.monitor.measure(loop.scaler)
        if when == "after unscale_":
            loop.scaler.unscale_(optimizers[0])
            loop.monitor.measure(loop.scaler)
        for optimizer in optimizers:
            loop.scaler.step(optimizer)
        loop.scaler.update()
        loop.clear()
        if spoiled and "attached" in when and "fused" not in when:
            loop.used.drop()  # no step, no hook, no sample
            loop.alpha.grad = None
            continue
        loop.used.close()
        if not spoiled:
            assert loop.monitor.ring[int(loop.monitor.count) - 1, 1, EXTRA].item() == pytest.approx(-slope)
    loop.used.check()
    assert loop.monitor.read()["a"].samples == 3


def test_what_was_used_up_is_scaled_still_when_the_rest_is_unscaled():
    loop = Loop(scaled=True)
    optimizer = torch.optim.SGD(loop.host.parameters(), lr=0.1)
    loop.monitor.watch(optimizer)
    loop.step_in_backward([*loop.seed.parameters()], scale=1024.0)
    for step in range(2):
        loop.backward(step)
        loop.used.note(loop.parameters(), scale=1024.0)
        loop.scaler.unscale_(optimizer)
        loop.monitor.measure(loop.scaler)
        loop.used.close()
        loop.scaler.step(optimizer)
        loop.scaler.update()
        loop.clear()
    loop.used.check()


@pytest.mark.parametrize("stepping", [False, True])
def test_a_layer_that_is_shared_through_reentrant_checkpoint_is_counted_once(stepping):
    loop = Loop()
    if stepping:
        loop.step_in_backward()
    for _ in range(3):
        hidden = loop.host(torch.randn(2, 4))
        loop.seed(checkpoint(loop.seed, hidden, use_reentrant=True)).square().mean().backward()
        if not stepping:
            loop.used.note(loop.parameters())
        loop.monitor.measure()
        loop.used.close()
        loop.clear()
    loop.used.check()


def test_layers_under_reentrant_checkpoint_are_collected_whichever_pass_they_end_in():
    loop = Loop(seeds=2)
    loop.step_in_backward()
    for _ in range(2):
        hidden = torch.ones(2, 4, requires_grad=True)
        for layer in (loop.host, *loop.grown):
            hidden = checkpoint(layer, hidden, use_reentrant=True)
        hidden.square().mean().backward()
        loop.monitor.measure()
        loop.used.close()
    loop.used.check()


def test_a_tensor_that_is_no_leaf_is_refused_by_name_and_nothing_is_hooked():
    host, seed = nn.Linear(4, 4), nn.Linear(4, 4)
    computed = host.weight * 2.0
    computed.retain_grad()
    monitor = GradientMonitor([host], {"a": [*seed.parameters()], "b": [computed]})
    with pytest.raises(WiringError, match=r"parameter 0 of seed 'b' \(shape \(4, 4\)\) is no leaf.*computed from"):
        monitor.collect_in_backward()
    assert all(not p._post_accumulate_grad_hooks for p in (*host.parameters(), *seed.parameters()))
    seed(host(torch.ones(1, 4))).sum().backward()
    monitor.measure()
    assert monitor.read()["a"].live_share == 1.0


def test_a_seed_that_is_no_leaf_is_not_added_while_collecting():
    loop = Loop()
    with pytest.raises(WiringError, match="was computed from another tensor"):
        loop.monitor.add_seed("b", [loop.host.weight * 2.0])
    assert loop.monitor.seeds == ("a",)
    loop.backward(0)
    loop.used.note(loop.parameters())
    loop.monitor.measure()
    loop.used.close()
    loop.used.check()


def test_clipping_in_the_hook_that_steps_comes_after_the_sum():
    loop = Loop()
    loop.step_in_backward(clip=1e-3)
    for step in range(3):
        loop.backward(step)
        loop.monitor.measure()
        loop.used.close()
    loop.used.check()


def test_clipping_what_backward_has_used_up_is_refused_with_the_way_out():
    loop = Loop()
    loop.step_in_backward()
    loop.backward(0)
    for _ in range(2):  # before it is measured and behind it
        with pytest.raises(WiringError, match="none is left to clip: clip in the hook that steps"):
            loop.monitor.clip_grad_norm_(1.0)
        loop.monitor.measure()
    loop.monitor.measure()
    assert loop.monitor.read()["a"].samples == 1


def test_clipping_what_backward_left_alone_is_torchs():
    loop, twin = Loop(), Loop(collect=False)
    loop.backward(0)
    twin.backward(0)
    loop.monitor.measure()
    total = loop.monitor.clip_grad_norm_(1e-2)
    torch.testing.assert_close(total, nn.utils.clip_grad_norm_(twin.parameters(), 1e-2))
    for a, b in zip(loop.parameters(), twin.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_clipping_what_is_left_when_some_were_used_up_sums_what_it_clips():
    loop = Loop()
    loop.step_in_backward([*loop.seed.parameters()])
    loop.backward(0)
    loop.monitor.measure()
    left = torch.cat([p.grad.flatten() for p in loop.host.parameters()]).double()
    assert float(loop.monitor.clip_grad_norm_(1e-3)) == pytest.approx(float(left.norm()), rel=1e-6)


def test_clipping_after_a_sample_with_sums_from_backward_makes_a_pass_of_its_own():
    """The gradients that are left are those that an earlier sample was of, and untouched; the newest row is not."""
    loop = Loop()
    loop.step_in_backward([*loop.seed.parameters()])
    loop.backward(0, seeds=[])
    loop.host(torch.ones(1, 4)).sum().backward()
    loop.monitor.measure()
    left = torch.cat([p.grad.flatten() for p in loop.host.parameters()]).double().norm()
    loop.seed(torch.ones(1, 4)).sum().backward()
    loop.monitor.measure()
    assert loop.monitor.ring[1, 1, SUMSQ] > 0.0
    assert float(loop.monitor.clip_grad_norm_(1e-3)) == pytest.approx(float(left), rel=1e-6)


def test_clipping_nothing_because_it_was_cleared_is_torchs():
    loop = Loop()
    loop.step_in_backward([*loop.seed.parameters()])
    loop.backward(0)
    loop.monitor.measure()
    loop.clear()
    loop.host(torch.ones(1, 4)).sum().backward()
    loop.clear()
    assert loop.monitor.clip_grad_norm_(1.0) == 0.0


def test_what_is_used_up_between_the_steps_of_a_round_is_not_added_to_it():
    loop = Loop()
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in loop.host.parameters()]
    loop.monitor.attach(*optimizers)
    loop.step_in_backward([*loop.seed.parameters()])
    for step in range(3):
        loop.backward(2 * step)
        loop.used.note(loop.parameters())
        noted = dict(loop.used.noted)
        optimizers[0].step()
        loop.host(torch.randn(4, 4)).sum().backward(inputs=[loop.host.bias])
        loop.seed(torch.randn(4, 4)).sum().backward()
        loop.used.noted = {key: found for key, found in noted.items() if key != id(loop.host.bias)}
        loop.used.note([loop.host.bias])
        optimizers[1].step()
        loop.used.close()
        loop.clear()
    loop.used.check()


def test_what_a_loss_that_does_not_count_has_used_up_is_in_no_sample():
    host, left, right = (nn.Linear(4, 4) for _ in range(3))
    monitor = GradientMonitor(host, {"a": left, "b": right}, tag="g")
    monitor.collect_in_backward()
    for parameter in right.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    right(host(torch.ones(1, 4))).sum().backward()
    monitor.measure(tag="d")
    left(host(torch.ones(1, 4))).sum().backward()
    monitor.measure(tag="g")
    assert monitor.ring[0, 2].nan_to_num().tolist() == [0.0] * 7


def test_a_seed_that_left_is_in_no_sample_and_has_no_hook():
    loop = Loop(seeds=2)
    loop.step_in_backward()
    loop.backward(0)
    loop.monitor.remove_seed("a")
    loop.monitor.measure()
    noted = dict(loop.used.noted.values())
    assert sorted(noted) == [0, 1, 2]
    expected = [sum(float(g.square().sum()) for k, g in loop.used.noted.values() if k == kept) for kept in (0, 2)]
    assert loop.monitor.ring[0, :, SUMSQ].tolist() == pytest.approx(expected)
    assert len(loop.seed.weight._post_accumulate_grad_hooks) == 2  # those of the loop


def test_collecting_anew_puts_no_second_hook():
    loop = Loop()
    again = loop.monitor.collect_in_backward()
    assert not loop.handle.active
    assert len(loop.seed.weight._post_accumulate_grad_hooks) == 1
    loop.backward(0)
    loop.used.note(loop.parameters())
    loop.monitor.measure()
    loop.used.close()
    loop.used.check()
    again.remove()
    assert not loop.seed.weight._post_accumulate_grad_hooks


def test_a_gradient_that_is_freed_in_backward_is_gone_then():
    loop = Loop()
    seen = []
    loop.seed.weight.register_post_accumulate_grad_hook(lambda p: seen.append(weakref.ref(p.grad)))
    loop.step_in_backward()
    alive = []
    loop.host.bias.register_post_accumulate_grad_hook(lambda p: alive.append(seen[0]()))
    loop.backward(0)
    assert alive == [None]


def test_measuring_at_the_end_of_backward_itself_is_the_same_sample():
    loop, engine = Loop(), torch.autograd.Variable._execution_engine
    loop.host.weight.register_post_accumulate_grad_hook(lambda p: engine.queue_callback(loop.monitor.measure))
    loop.step_in_backward()
    for step in range(3):
        loop.backward(step)
        loop.used.close()
    loop.used.check()


def test_measuring_before_our_own_end_of_the_pass_is_the_same_sample():
    loop, engine = Loop(), torch.autograd.Variable._execution_engine
    loop.step_in_backward([*loop.seed.parameters()])
    for step in range(3):
        loss = loop.loss(step)
        loss.register_hook(lambda g: engine.queue_callback(loop.monitor.measure))
        loss.backward()
        loop.used.note(loop.parameters())
        loop.used.close()
        loop.clear()
    loop.used.check()


def test_parameters_whose_tensors_were_swapped_are_measured_though_torch_drops_every_hook():
    loop = Loop()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        loop.host.to(torch.bfloat16).to(torch.float32)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    loop.backward(0)
    loop.used.note(loop.parameters())
    loop.monitor.measure()
    loop.used.close()
    loop.used.check()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # compiled autograd looks at its own
def test_collecting_works_with_compiled_autograd():
    torch._dynamo.reset()
    host, seed = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    monitor = GradientMonitor(host, {"a": seed})
    monitor.collect_in_backward()
    host.weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))  # that of the seed stays
    x = torch.randn(8, 4)
    for step in range(2):
        expected = torch.autograd.grad(seed(host(x)).square().mean(), [host.weight, seed.weight])
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            seed(host(x)).square().mean().backward()
        seed.weight.grad.mul_(2.0)
        monitor.measure()
        sums = [k * float(gradient.double().square().sum()) for k, gradient in zip((1.0, 4.0), expected)]
        assert monitor.ring[step, :, SUMSQ].tolist() == pytest.approx(sums, rel=1e-6)
        seed.zero_grad()


def test_explicit_gradients_leave_what_was_collected_for_the_next_sample():
    loop = Loop()
    loop.step_in_backward()
    loop.backward(0)
    loop.monitor.measure(gradients=[(p, torch.zeros_like(p)) for p in loop.parameters()])
    loop.monitor.measure()
    loop.used.rows.append(torch.zeros_like(loop.monitor.ring[0, :, : EXTRA]))
    loop.used.rows[0][:, 4:] = torch.tensor([2.0, 20.0])
    loop.used.close()
    loop.used.check()


def test_flat_gradients_that_backward_left_alone_are_measured_where_they_lie():
    torch.manual_seed(0)
    host, seed = nn.Linear(3, 3), nn.Linear(3, 2)
    flat = FlatGradients([*host.parameters(), *seed.parameters()])
    monitor = GradientMonitor(host, {"a": seed}, flat=flat)
    monitor.collect_in_backward()
    seed(host(torch.randn(4, 3))).square().sum().backward()
    for parameter in (*host.parameters(), *seed.parameters()):
        parameter.grad.mul_(0.5)  # clipped, say
    right = [sum(p.grad.double().square().sum().item() for p in part.parameters()) for part in (host, seed)]
    monitor.measure()
    assert monitor.ring[0, :, SUMSQ].tolist() == pytest.approx(right)


@pytest.mark.parametrize("last", [False, True])
def test_flat_gradients_that_a_hook_wrote_to_are_measured_as_they_were_before(last):
    torch.manual_seed(0)
    host, seed = nn.Linear(3, 3), nn.Linear(3, 2)
    flat = FlatGradients([*host.parameters(), *seed.parameters()])
    monitor = GradientMonitor(host, {"a": seed}, flat=flat)
    monitor.collect_in_backward()
    written = host.weight if last else seed.weight  # backward comes to the host's last
    before = []

    def use_up(parameter):
        before.append(parameter.grad.double().square().sum().item())
        parameter.grad.zero_()

    written.register_post_accumulate_grad_hook(use_up)
    seed(host(torch.randn(4, 3))).square().sum().backward()
    lying = [sum(p.grad.double().square().sum().item() for p in part.parameters()) for part in (host, seed)]
    right = [lying[0] + last * before[0], lying[1] + (not last) * before[0]]
    monitor.measure()
    assert before[0] > 0.0
    assert monitor.ring[0, :, SUMSQ].tolist() == pytest.approx(right)
