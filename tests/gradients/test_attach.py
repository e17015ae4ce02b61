"""``attach`` with several optimizers: each one's gradients before its own step, one sample per round of steps."""

import gc
import itertools
import weakref

import pytest
import torch
from muon import Muon
from torch import nn
from used import Used

from seedtriton import ConfigurationError, GradientMonitor, WiringError
from seedtriton.gradients.row import EXTRA, SUMSQ


class Overwriting(torch.optim.Optimizer):
    """As copies of Muon do: momentum and update are made in ``p.grad`` itself."""

    def __init__(self, params, lr=0.02):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(7.0).sign_()
                    parameter.sub_(parameter.grad, alpha=group["lr"])


class Wrapped(torch.optim.Optimizer):
    """As accelerate's: an Optimizer by name, whose ``__init__`` is never called."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)

    def step(self, closure=None):
        return self.optimizer.step(closure)


MAKERS = {
    "nesterov foreach": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "overwriting": Overwriting,
    "muon": Muon,
    "adamw fused": lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=True),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-3, momentum=0.9),
}
SCALED = ("nesterov foreach", "adamw fused", "adamw", "overwriting")


class Loop:
    """A host and a seed with an optimizer each, a parameter in none, and a blend factor."""

    def __init__(
        self, first="adamw", last="adamw", scaler=None, attached=True, given=True, quarantine=False
    ):
        torch.manual_seed(0)
        self.host, self.seed, self.loose = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.alpha = torch.zeros((), requires_grad=True)
        self.a = MAKERS[first]([*self.seed.parameters()])
        self.b = MAKERS[last]([*self.host.parameters()])
        self.scaler = scaler
        self.monitor = GradientMonitor(
            [self.host, self.loose], {"a": self.seed}, alphas={"a": self.alpha}, quarantine=quarantine
        )
        self.used = Used(
            self.monitor, [*self.host.parameters(), self.loose.weight], [[*self.seed.parameters()]]
        )
        if attached:
            self.monitor.attach(self.a, self.b, scaler=scaler if given else None)

    def backward(self, step, spoil=()):
        torch.manual_seed(step)
        hidden = self.host(torch.randn(8, 4)).tanh()
        loss = (self.loose(self.seed(hidden)) + self.alpha * hidden).square().mean()
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        for module in spoil:
            module.weight.grad[0, 0] = float("inf")

    @property
    def scale(self):
        return 1.0 if self.scaler is None else self.scaler.get_scale()

    def weights(self):
        return [p.detach().clone() for p in (*self.host.parameters(), *self.seed.parameters())]


def of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("cleared", ["behind all", "one by one", "one by one in place"])
@pytest.mark.parametrize(("first", "last"), list(itertools.permutations(MAKERS, 2)))
def test_every_optimizer_is_measured_with_the_gradients_that_it_uses(first, last, cleared):
    loop, twin = Loop(first, last), Loop(first, last, attached=False)
    for step in range(4):
        for each in (loop, twin):
            each.backward(step)
            for optimizer in (each.a, each.b):
                each.used.note(of(optimizer))
                if optimizer is each.b:
                    each.used.note([each.loose.weight])
                optimizer.step()
                if cleared != "behind all":
                    optimizer.zero_grad(set_to_none=cleared == "one by one")
            each.used.close()
            for module in (each.host, each.seed, each.loose):
                module.zero_grad()
    loop.used.check()
    assert twin.monitor.count == 0
    assert all(torch.equal(a, b) for a, b in zip(loop.weights(), twin.weights()))


def test_what_is_clipped_between_the_steps_is_measured_as_it_is_used():
    loop = Loop("adamw", "overwriting")
    for step in range(3):
        loop.backward(step)
        loop.used.note(of(loop.a))
        loop.a.step()
        nn.utils.clip_grad_norm_(loop.host.parameters(), 1e-2)
        loop.used.note([*of(loop.b), loop.loose.weight])
        loop.b.step()
        loop.used.close()
        for module in (loop.host, loop.seed, loop.loose):
            module.zero_grad()
    loop.used.check()


def test_our_own_clipping_between_the_steps_sums_what_it_clips():
    loop = Loop("adamw", "adamw")
    loop.monitor.clip_grad_norm_(0.5)
    loop.backward(0)
    loop.a.step()
    loop.a.zero_grad()
    left = [*loop.host.parameters(), loop.loose.weight]
    expected = torch.cat([p.grad.flatten() for p in left]).double().norm()
    total = loop.monitor.clip_grad_norm_(1e-2)
    assert float(total) == pytest.approx(float(expected), rel=1e-6)
    clipped = torch.cat([p.grad.flatten() for p in left]).double().norm()
    assert float(clipped) == pytest.approx(1e-2, rel=1e-4)
    loop.b.step()
    # The sample's sums were of both sides, the gradients that are left are not.
    total = loop.monitor.clip_grad_norm_(1.0)
    assert float(total) == pytest.approx(1e-2, rel=1e-4)


@pytest.mark.parametrize("unscaled", ["none", "first", "last", "both"])
@pytest.mark.parametrize(("first", "last"), list(itertools.product(SCALED, repeat=2)))
def test_the_loss_scale_is_that_of_each_optimizer(first, last, unscaled):
    loop = Loop(first, last, torch.amp.GradScaler("cpu", init_scale=1024.0))
    for step in range(3):
        loop.backward(step)
        slope = loop.alpha.grad.item() / 1024.0
        loop.used.note([*of(loop.a), *of(loop.b), loop.loose.weight], scale=1024.0)
        for name, optimizer in (("first", loop.a), ("last", loop.b)):
            if unscaled in (name, "both"):
                loop.scaler.unscale_(optimizer)
        loop.scaler.step(loop.a)
        loop.a.zero_grad()
        loop.scaler.step(loop.b)
        loop.scaler.update()
        loop.used.close()
        for module in (loop.host, loop.seed, loop.loose):
            module.zero_grad()
        assert loop.monitor.ring[step, 1, EXTRA].item() == pytest.approx(-slope)
        assert loop.alpha.grad == 0.0
    loop.used.check()
    assert loop.monitor.read()["a"].dropped == 0


@pytest.mark.parametrize(("first", "last"), [("adamw", "adamw fused"), ("adamw fused", "adamw"), ("adamw fused",) * 2])
def test_optimizers_that_unscale_by_themselves_say_their_scale_without_the_scaler(first, last):
    loop = Loop(first, last, torch.amp.GradScaler("cpu", init_scale=1024.0), given=False)
    loop.backward(0)
    slope = loop.alpha.grad.item() / 1024.0
    loop.used.note([*of(loop.a), *of(loop.b), loop.loose.weight], scale=1024.0)
    loop.used.close()
    loop.scaler.step(loop.a)
    loop.scaler.step(loop.b)
    loop.used.check()
    assert loop.monitor.ring[0, 1, EXTRA].item() == pytest.approx(-slope)


def scaled_round(loop, step, spoil=(), stepping="ab"):
    """One round under a scaler; whether it is a sample."""
    loop.backward(step, spoil)
    loop.used.note([*of(loop.a), *of(loop.b), loop.loose.weight], scale=loop.scale)
    for name, optimizer in (("a", loop.a), ("b", loop.b)):
        if name in stepping:
            loop.scaler.step(optimizer)
    loop.scaler.update()
    for module in (loop.host, loop.seed, loop.loose):
        module.zero_grad()


@pytest.mark.parametrize(("first", "last"), list(itertools.product(["adamw", "adamw fused"], repeat=2)))
@pytest.mark.parametrize("spoiled", ["first", "last", "both"])
def test_a_step_that_the_scaler_skips_spoils_its_own_sample_alone(first, last, spoiled):
    loop = Loop(first, last, torch.amp.GradScaler("cpu", init_scale=1024.0))
    scaled_round(loop, 0)
    loop.used.close()
    spoil = [module for name, module in (("first", loop.seed), ("last", loop.host)) if spoiled in (name, "both")]
    scaled_round(loop, 1, spoil)
    # Whoever does not unscale by itself is not called when its step is skipped: the last one then closes no sample.
    closed = last == "adamw fused" or spoiled == "first"
    (loop.used.close if closed else loop.used.drop)()
    for step in (2, 3):
        scaled_round(loop, step)
        loop.used.close()
    loop.used.check()
    found = loop.monitor.read()["a"]
    assert (found.samples, found.dropped) == (3, int(closed))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("side", ["a", "b"])
def test_a_step_that_is_skipped_because_of_a_parameter_nobody_watches_drops_the_sample(side, fused):
    loop = Loop(*["adamw fused" if fused else "adamw"] * 2, torch.amp.GradScaler("cpu", init_scale=1024.0))
    stranger = nn.Linear(1, 1)
    getattr(loop, side).add_param_group({"params": [*stranger.parameters()]})
    loop.backward(0)
    (stranger(torch.ones(1)) * float("inf")).sum().backward()
    loop.scaler.step(loop.a)
    loop.scaler.step(loop.b)
    found = loop.monitor.read()["a"]
    assert (found.samples, found.dropped) == (0, int(fused or side == "a"))


def test_sums_of_a_round_that_the_scaler_cut_short_are_in_no_later_sample():
    """The last one is skipped, and the first rests in the round behind it."""
    loop = Loop("adamw", "adamw", torch.amp.GradScaler("cpu", init_scale=1024.0))
    scaled_round(loop, 0, [loop.host])
    loop.used.drop()
    scaled_round(loop, 1, stepping="b")
    loop.used.close()
    loop.used.check()


def test_a_last_step_that_is_skipped_is_seen_through_a_wrapper():
    """The scaler knows the wrapper that its ``step`` was given, the hook the optimizer inside."""
    found = []
    for wrap in (lambda optimizer: optimizer, Wrapped):
        loop = Loop("adamw", "adamw", torch.amp.GradScaler("cpu", init_scale=1024.0), attached=False)
        inside, loop.b = loop.b, wrap(loop.b)
        loop.monitor.attach(loop.a, loop.b, scaler=loop.scaler)
        assert loop.monitor._progress.steps.optimizers() == [loop.a, inside]
        scaled_round(loop, 0, [loop.host])
        loop.used.drop()
        scaled_round(loop, 1, stepping="b")
        loop.used.close()
        loop.used.check()
        found.append(loop.monitor.read()["a"])
    assert found[0] == found[1]
    assert found[0].samples == 1


def test_a_scaler_that_is_switched_off_is_none():
    loop = Loop(scaler=torch.amp.GradScaler("cpu", enabled=False))
    for step in range(2):
        scaled_round(loop, step)
        loop.used.close()
    loop.used.check()


@pytest.mark.parametrize("none", [(), ([],), ((), [])])
def test_no_optimizer_at_all_is_refused(none):
    loop = Loop(attached=False)
    with pytest.raises(ConfigurationError, match="in the order in which they step"):
        loop.monitor.attach(*none)


def test_a_scaler_that_is_updated_between_the_steps_ends_no_round():
    """As GANs do: each loss has its backward pass, its step and its update."""
    loop = Loop("overwriting", "adamw", torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1))
    for step in range(3):
        loop.backward(2 * step)
        loop.used.note(of(loop.a), scale=loop.scale)
        loop.scaler.step(loop.a)
        loop.scaler.update()
        for module in (loop.host, loop.seed, loop.loose):
            module.zero_grad()
        loop.backward(2 * step + 1)
        loop.used.note([*of(loop.b), loop.loose.weight], scale=loop.scale)
        loop.scaler.step(loop.b)
        loop.scaler.update()
        for module in (loop.host, loop.seed, loop.loose):
            module.zero_grad()
        loop.used.close()
    loop.used.check()


def test_an_optimizer_that_rests_is_measured_as_its_gradients_are_when_the_last_one_steps():
    loop = Loop("overwriting", "adamw")
    for step in range(5):
        loop.backward(step)
        loop.used.note([*of(loop.a), *of(loop.b), loop.loose.weight])
        if step % 2:
            loop.a.step()
            loop.a.zero_grad()
        loop.b.step()
        loop.b.zero_grad()
        loop.used.close()
    loop.used.check()


def test_rounds_without_the_last_one_are_no_samples_and_leave_nothing_behind():
    loop = Loop("overwriting", "adamw")
    for step in range(6):
        loop.backward(step)
        loop.used.note([*of(loop.a), *of(loop.b), loop.loose.weight])
        loop.a.step()
        if step % 3 == 2:
            loop.b.step()
            loop.used.close()
        loop.used.drop()
        for module in (loop.host, loop.seed, loop.loose):
            module.zero_grad()
    loop.used.check()


def test_optimizers_that_step_behind_the_last_one_were_measured_when_it_stepped():
    loop = Loop("overwriting", "overwriting")
    for step in range(3):
        loop.backward(step)
        loop.used.note([*of(loop.a), *of(loop.b), loop.loose.weight])
        loop.b.step()
        loop.a.step()
        loop.used.close()
        for module in (loop.host, loop.seed, loop.loose):
            module.zero_grad()
    loop.used.check()


ORDERS = [(0, 1, 2), (1, 0, 2), (2, 1, 0), (1, 2, 0)]
RESTS = [(), (0,), (1,), (0, 2), (1, 2)]


@pytest.mark.parametrize(
    ("order", "rest"),
    # In another order than was told, rounds without the last one cannot be told apart.
    [(order, rest) for order, rest in itertools.product(ORDERS, RESTS) if 2 not in rest or order == (0, 1, 2)],
)
def test_some_may_rest_and_step_in_another_order_than_was_told(order, rest):
    """They rest in every second round. Only what the last one closes is a sample."""
    torch.manual_seed(0)
    modules = [nn.Linear(4, 4) for _ in range(3)]
    optimizers = [Overwriting([*module.parameters()]) for module in modules]
    monitor = GradientMonitor(modules[0], {"a": modules[1], "b": modules[2]})
    monitor.attach(*optimizers)
    used = Used(monitor, [*modules[0].parameters()], [[*module.parameters()] for module in modules[1:]])
    for step in range(6):
        nn.Sequential(*modules)(torch.randn(8, 4)).square().mean().backward()
        for place in [place for place in order if not (step % 2 and place in rest)]:
            used.note(of(optimizers[place]))
            if place == 2:
                used.note([p for module in modules for p in module.parameters()])
                used.close()
            optimizers[place].step()
            optimizers[place].zero_grad()
        used.drop()
        for module in modules:
            module.zero_grad()
    used.check()


def test_a_parameter_of_two_optimizers_counts_once_with_what_the_first_one_used():
    torch.manual_seed(0)
    host, seed = nn.Linear(4, 4), nn.Linear(4, 4)
    monitor = GradientMonitor(host, {"a": seed})
    optimizers = [Overwriting([*host.parameters()]), Overwriting([host.weight, seed.weight]), Muon([seed.bias])]
    monitor.attach(*optimizers)
    used = Used(monitor, [*host.parameters()], [[*seed.parameters()]])
    for _ in range(3):
        seed(host(torch.randn(8, 4))).square().mean().backward()
        for optimizer in optimizers:
            used.note(of(optimizer))
            optimizer.step()
        used.close()
        for module in (host, seed):
            module.zero_grad()
    used.check()


def test_an_optimizer_that_the_monitor_knows_but_is_not_attached_to_is_looked_up_at_the_scaler():
    loop = Loop("adamw", "adamw", torch.amp.GradScaler("cpu", init_scale=1024.0))
    third = torch.optim.AdamW([loop.loose.weight])
    loop.monitor.watch(third)
    loop.backward(0)
    loop.used.note([*of(loop.a), *of(loop.b), loop.loose.weight], scale=1024.0)
    loop.used.close()
    loop.scaler.unscale_(third)
    loop.scaler.step(loop.a)
    loop.scaler.step(loop.b)
    loop.used.check()


def test_a_seed_that_leaves_between_the_steps_of_a_round_is_in_no_sample():
    torch.manual_seed(0)
    host, left, right = (nn.Linear(4, 4) for _ in range(3))
    monitor = GradientMonitor(host, {"left": left, "right": right})
    optimizers = [torch.optim.SGD([*m.parameters()], lr=0.1) for m in (left, right, host)]
    monitor.attach(*optimizers)
    hidden = host(torch.randn(8, 4))
    (left(hidden) + right(hidden)).square().mean().backward()
    expected = [torch.cat([p.grad.flatten() for p in m.parameters()]).double().square().sum() for m in (host, right)]
    optimizers[0].step()
    optimizers[1].step()
    monitor.remove_seed("left")
    optimizers[2].step()
    torch.testing.assert_close(monitor.ring[0, :, SUMSQ], torch.stack(expected), rtol=1e-6, atol=0)


def test_a_seed_that_is_not_finite_is_quarantined_before_its_own_step():
    loop, alone = Loop("adamw", "adamw", quarantine=True), Loop("adamw", "adamw", attached=False)
    for each in (loop, alone):
        each.backward(0)
    loop.seed.weight.grad[1, 2] = float("nan")
    before = loop.seed.weight.detach().clone()
    loop.a.step()
    assert torch.equal(loop.seed.weight.grad, torch.zeros(4, 4))
    assert torch.equal(loop.seed.bias.grad, torch.zeros(4))
    torch.testing.assert_close(loop.seed.weight, before * (1 - 1e-2 * 1e-2))  # weight decay alone
    loop.b.step()
    alone.b.step()
    assert torch.equal(loop.host.weight, alone.host.weight)
    assert torch.equal(loop.host.weight.grad, alone.host.weight.grad)
    found = loop.monitor.read()["a"]
    assert (found.samples, found.dropped) == (0, 1)


def test_a_closure_is_refused_by_every_one_of_several():
    torch.manual_seed(0)
    modules = [nn.Linear(2, 2) for _ in range(3)]
    optimizers = [torch.optim.SGD([*m.parameters()], lr=0.1) for m in modules]
    monitor = GradientMonitor(modules[0], {"a": modules[1], "b": modules[2]})
    monitor.attach(*optimizers)
    for optimizer in optimizers:
        with pytest.raises(WiringError, match="closure"):
            optimizer.step(lambda: 0.0)
    assert monitor.count == 0


def test_no_gradient_lives_longer_and_the_handle_ends_every_hook():
    loop = Loop("adamw", "adamw")
    handle = loop.monitor.attach(loop.a, loop.b)
    handle.remove()
    loop.backward(0)
    gradient = weakref.ref(loop.seed.weight.grad)
    loop.a.step()
    loop.a.zero_grad()
    gc.collect()
    assert gradient() is None
    loop.b.step()
    assert loop.monitor.count == 1  # by the hooks of the loop alone
    monitor = weakref.ref(loop.monitor)
    loop.used = loop.monitor = None
    gc.collect()
    assert monitor() is None
    loop.a.step()


def test_steps_without_any_gradient_are_an_empty_sample():
    loop = Loop("adamw", "adamw")
    loop.a.step()
    loop.b.step()
    assert loop.monitor.read()["a"].empty == 1


# --- a step that is none ---


@pytest.mark.parametrize("maker", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("rate", [1e-3, torch.tensor(1e-3)], ids=["number", "tensor"])
def test_the_step_that_torch_makes_to_have_a_state_is_neither_counted_nor_measured(maker, rate):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = maker(model.parameters(), lr=rate)
    monitor = GradientMonitor(model[0], {"s": model[1]}, optimizers=optimizer)
    monitor.attach(optimizer)
    get_optimizer_state_dict(model, optimizer)
    assert (monitor.steps_taken(), int(monitor.count)) == (0, 0)
    assert (len(optimizer.state) > 0) == (maker is torch.optim.AdamW)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert (monitor.steps_taken(), int(monitor.count)) == (1, 1)


@pytest.mark.parametrize("spoil", ["rate", "gradient", "nothing", "none", "closure", "state"])
def test_a_step_that_trains_nothing_counts_where_it_is_one_of_the_loops(spoil):
    """The first one of a warm-up has a rate of zero, one of a dead network gradients of zero."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 if spoil == "rate" else 0.0)
    monitor = GradientMonitor([model.weight], {"s": [model.bias]}, optimizers=optimizer)
    for parameter in model.parameters():
        parameter.grad = None if spoil == "none" else torch.full_like(parameter, float(spoil == "gradient"))
    if spoil == "state":
        optimizer.state[model.weight]["own"] = 1
        optimizer.param_groups[0]["params"] = [model.bias]
    optimizer.step(*([lambda: torch.zeros(())] if spoil == "closure" else []))
    assert monitor.steps_taken() == 1
