"""assert_isolated: finds every way in which a seed has been known to disturb a host, names it, and leaves no trace."""

import random

import numpy
import pytest
import torch
from networks import Mlp, Residual
from same import same
from torch import nn

from seedtriton import ConfigurationError, GrowthController, SeedSlot, Stage, WiringError, step_if_grads
from seedtriton.rewind import same as bits_same
from seedtriton.testing import assert_invisible, assert_isolated


class Host(nn.Module):
    """With Dropout, whose masks follow the random numbers, and a norm with buffers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.norm = nn.BatchNorm1d(6, affine=False)
        self.slot = SeedSlot()
        self.drop = nn.Dropout(0.2)
        self.late = SeedSlot()
        self.last = nn.Linear(6, 3)
        self.scale = 1.0

    def forward(self, x):
        return self.last(self.late(self.drop(self.slot(torch.tanh(self.norm(self.first(x))))))) * self.scale


class Script:
    def __init__(self, seed=None, optimizer=None):
        torch.manual_seed(0)
        self.model = Host()
        self.optimizer = (optimizer or (lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9)))(self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, gamma=0.5)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        self.growth = GrowthController(self.model, self.optimizer, schedulers=[self.scheduler], sinks=[])
        self.x, self.y = torch.randn(8, 12, 5), torch.randint(0, 3, (8, 12))
        self.growth.germinate("slot", Residual(6) if seed is None else seed(self.model))

    def backward(self, number):
        loss = nn.functional.cross_entropy(self.model(self.x[number % 8]), self.y[number % 8])
        self.scaler.scale(loss).backward()

    def close(self):
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def step(self, number):
        self.backward(number)
        self.growth.measure(self.scaler)
        self.close()

    def check(self, step=None, **options):
        assert_isolated(step or self.step, self.growth, self.scaler, self.scheduler, **options)

    def parameters(self):
        return list(self.model.parameters())

    def everything(self):
        return {
            "model": self.model.state_dict(),
            "growth": self.growth.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "gradients": [None if p.grad is None else p.grad.clone() for p in self.model.parameters()],
            "random": (torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())),
            "calls": getattr(self.model.slot.seed, "calls", None),
        }


class Reaching(Residual):
    """A seed that knows its host, and does ``what(host, seed, output)`` in every forward pass."""

    def __init__(self, host, what):
        super().__init__(6)
        self.host, self.what, self.calls = [host], what, 0

    def forward(self, x):
        self.calls += 1
        output = super().forward(x)
        changed = self.what(self.host[0], self, output)
        return output if changed is None else changed


def reaching(what):
    return lambda host: Reaching(host, what)


# --- isolated ---


@pytest.mark.parametrize("optimizer", [
    lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
    lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
])  # fmt: skip
def test_a_seed_that_keeps_to_itself_passes(optimizer):
    Script(optimizer=optimizer).check()


def test_everything_is_afterwards_as_it_was_before_and_goes_on_as_if_nobody_had_looked():
    """With a seed that counts its calls and draws from every generator; a check that fails leaves no trace either."""

    def noisy(host, seed, output):
        random.random()
        numpy.random.rand()

    ends = []
    for looks in (False, True):
        random.seed(0)
        numpy.random.seed(0)
        script = Script(reaching(noisy))
        for number in range(3):
            script.step(number)
        script.backward(3)  # in the middle of an accumulation
        if looks:
            before, seed, gradients = script.everything(), script.model.slot.seed, [p.grad for p in script.parameters()]
            script.check(steps=4)
            with pytest.raises(AssertionError, match="clipped together"):
                script.check(foreign_clip(script))
            assert same(script.everything(), before)
            assert script.model.slot.seed is seed
            assert all(p.grad is gradient for p, gradient in zip(script.parameters(), gradients))
        for number in range(3, 9):
            script.step(number)
        ends.append({**script.everything(), "evidence": repr(script.growth.evidence())})
    assert same(*ends)


def test_a_step_that_fails_leaves_no_trace_either():
    script = Script()
    before = script.everything()

    def fails(number):
        script.step(number)
        if number == 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        script.check(fails)
    assert same(script.everything(), before)


def test_the_second_run_has_no_seed_anywhere():
    script, seen = Script(), []

    def step(number):
        groups, names = len(script.optimizer.param_groups), script.growth.monitor.seeds
        seen.append((groups, names, script.model.slot.stage, len(list(script.model.parameters()))))
        script.step(number)

    script.check(step, steps=2)
    assert seen == [(2, ("slot",), Stage.TRAINING, 8), (1, (), Stage.DORMANT, 4)] * 2


def test_several_seeds_are_taken_out_together_and_the_one_that_leaks_is_named():
    script = Script()
    script.growth.germinate("late", Residual(6))
    script.check()
    script.growth.prune("late")
    script.model.late.vacate()
    script.growth.germinate("late", Reaching(script.model, lambda host, seed, output: output + host.last.bias.sum()))
    with pytest.raises(AssertionError, match="a leak: the seed in 'late'"):
        script.check()


def test_what_is_blended_is_host():
    """It stays in both runs, and what trains behind it is compared with that."""
    script = Script()
    script.model.slot.move(Stage.BLENDING)
    script.model.slot.set_alpha(0.5)
    with pytest.raises(WiringError, match="no seed trains behind the host"):
        script.check()
    script.growth.germinate("late", Residual(6))
    stages = []
    script.check(lambda number: (stages.append(script.model.slot.stage), script.step(number)), steps=2)
    assert stages == [Stage.BLENDING] * 4


def test_no_event_tells_of_it():
    script, events = Script(), []
    script.growth.telemetry.sinks.append(events.append)
    script.check(steps=1)
    assert events == []
    script.growth.prune("slot")
    assert events, "but of what the script does they tell again"


class Counter:
    def __init__(self):
        self.number, self.seen = 0, {"last": []}

    def following(self):
        self.number += 1
        self.seen["last"].append(self.number)
        return self.seen["last"][-1]


def test_objects_of_the_users_own_are_put_back_if_they_are_given():
    script, counter = Script(), Counter()

    def step(number):
        script.step(counter.following())

    assert_isolated(step, script.growth, script.scaler, counter)
    assert vars(counter) == {"number": 0, "seen": {"last": []}}
    with pytest.raises(AssertionError, match="does not repeat"):
        script.check(step)


def test_generators_and_frozen_parameters_are_put_back():
    script = Script()
    script.model.generator = generator = torch.Generator()
    script.model.first.register_forward_hook(
        lambda module, inputs, output: output + torch.randn(output.shape, generator=generator)
    )

    def step(number):
        script.step(number)
        script.model.last.bias.requires_grad_(number == 1)

    script.check(step, steps=3)
    assert script.model.last.bias.requires_grad
    assert torch.equal(generator.get_state(), torch.Generator().get_state())


@pytest.mark.parametrize("left, right, equal", [
    (torch.tensor([0.0]), torch.tensor([-0.0]), False),
    (torch.tensor([torch.nan]), torch.tensor([torch.nan]), True),
    (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), False),
    (torch.tensor([[1.0, 2.0]]), torch.tensor([1.0, 2.0]), False),
    (torch.eye(2), torch.eye(2).to_sparse(), True),
    ({"a": (1.0, [2])}, {"a": (1.0, [2])}, True),
    ({"a": (1.0, [2])}, {"a": (1.0, [3])}, False),
    ([1], [1, 2], False),
    (1, 1.0, False),
    (None, torch.zeros(1), False),
])  # fmt: skip
def test_the_same_means_every_bit(left, right, equal):
    assert bits_same(left, right) is equal


# --- not isolated, and why ---


def foreign_clip(script, limit=0.01):
    def step(number):
        script.backward(number)
        script.scaler.unscale_(script.optimizer)
        nn.utils.clip_grad_norm_(script.model.parameters(), limit)
        script.close()

    return step


def test_clipping_together_is_named():
    script = Script()
    with pytest.raises(AssertionError, match=r"after step 1 of 10: parameter 'first\.weight'") as caught:
        script.check(foreign_clip(script))
    message = str(caught.value)
    assert "host and seed are clipped together" in message
    assert "growth.clip_grad_norm_(max_norm)" in message
    script.check(foreign_clip(script, 1e6))  # a limit that nothing reaches couples nothing


def test_nan_through_clipping_is_named():
    """In a loop that does not measure, so that nobody can keep it from the host."""
    script = Script(reaching(lambda host, seed, output: output * torch.nan))

    def step(number):
        nn.functional.cross_entropy(script.model(script.x[number % 8]), script.y[number % 8]).backward()
        nn.utils.clip_grad_norm_(script.model.parameters(), 0.1)
        script.optimizer.step()
        script.optimizer.zero_grad()

    with pytest.raises(AssertionError, match=r"is not finite with the seed.*the seed's gradients are not finite"):
        script.check(step)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_because_of_the_seed_is_named(fused):
    script = Script(
        reaching(lambda host, seed, output: output * torch.nan if seed.calls > 2 else None),
        lambda p: torch.optim.AdamW(p, lr=1e-2, fused=fused),
    )

    def step(number):
        script.backward(number)
        script.scaler.unscale_(script.optimizer)
        script.growth.measure(script.scaler)
        script.close()

    with pytest.raises(AssertionError, match=r"after step 3 of 10: .*GradScaler skipped.*512 with it, 2048 without"):
        script.check(step)


def test_a_step_that_the_script_itself_skips_is_counted():
    script = Script(reaching(lambda host, seed, output: output * torch.nan))

    def step(number):
        script.backward(number)
        if all(bool(p.grad.isfinite().all()) for p in script.model.parameters()):
            script.optimizer.step()
        script.optimizer.zero_grad()

    with pytest.raises(AssertionError, match="1 optimizer steps without the seed, 0 with it"):
        script.check(step)


def test_noise_from_the_hosts_generator_is_named():
    """In the seed's backward pass, where no slot can keep it apart: the host's next mask is another."""

    def noise(host, seed, output):
        output.register_hook(lambda gradient: gradient + 0.01 * torch.randn_like(gradient))

    with pytest.raises(AssertionError, match=r"after step 2 of 10: .*shared random numbers.*torch's on the CPU"):
        Script(reaching(noise)).check()


def test_a_generator_of_its_own_is_no_disturbance():
    generator = torch.Generator()

    def noise(host, seed, output):
        return output + 0.01 * torch.randn(output.shape, generator=generator)

    Script(reaching(noise)).check()


@pytest.mark.parametrize("draw, name", [(random.random, "Python's random"), (numpy.random.rand, "numpy's")])
def test_other_generators_are_told_apart(draw, name):
    """A host that drops a layer now and then asks Python's or numpy's generator."""

    def draws(host, seed, output):
        draw()

    script = Script(reaching(draws))
    script.model.first.register_forward_hook(lambda module, inputs, output: output * (1.0 + (draw() > 0.5)))
    with pytest.raises(AssertionError, match=f"shared random numbers.*{name}"):
        script.check()


def test_a_leak_is_named_with_its_slot():
    with pytest.raises(AssertionError, match=r"after step 1 of 10: .*a leak: the seed in 'slot' reaches"):
        Script(reaching(lambda host, seed, output: output + host.last.bias.sum())).check()


def test_a_leak_that_no_graph_shows_is_told_from_the_gradients():
    def tunes(host, seed, output):
        host.scale = 1.0 + float(output.detach().mean().abs())

    with pytest.raises(AssertionError, match="a leak: backward gives the host other gradients"):
        Script(reaching(tunes)).check()


def test_a_buffer_that_both_update_is_named():
    def twice(host, seed, output):
        with torch.no_grad():
            host.norm(output)

    with pytest.raises(AssertionError, match=r"after step 1 of 10: buffer 'norm\.running_mean'.*buffer 'norm"):
        Script(reaching(twice)).check()


def test_an_optimizer_that_mixes_its_groups_is_named():
    class Normalised(torch.optim.SGD):
        """Divides by the norm of all gradients, out of sight of the gradients themselves."""

        def step(self):
            norm = sum(p.grad.square().sum() for g in self.param_groups for p in g["params"]).sqrt()
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.sub_(parameter.grad / norm, alpha=0.1)

    script = Script(optimizer=lambda p: Normalised(p, lr=0.1))
    script.scaler = torch.amp.GradScaler("cpu", enabled=False)
    with pytest.raises(AssertionError, match="the optimizer's own arithmetic"):
        script.check()


def test_a_state_of_the_optimizer_counts_when_no_weight_has_changed_yet():
    class Remembering(torch.optim.SGD):
        def step(self):
            norm = sum(p.grad.norm() for group in self.param_groups for p in group["params"])
            super().step()
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["norm"] = norm.clone()

    script = Script(optimizer=lambda p: Remembering(p, lr=0.1))
    script.scaler = torch.amp.GradScaler("cpu", enabled=False)
    with pytest.raises(AssertionError, match=r"Remembering's norm of parameter 'first\.weight' is not what it is"):
        script.check()


def test_a_scale_counts_when_the_hosts_own_optimizer_has_stepped():
    script = Script()
    script.growth.prune("slot")
    script.model.slot.vacate()
    seed = Reaching(script.model, lambda host, seed, output: output * torch.nan)
    script.growth.germinate("slot", seed, add_to_optimizer=False)
    of_seed = torch.optim.SGD(seed.parameters(), lr=0.1)

    def step(number):
        script.backward(number)
        step_if_grads(script.scaler, of_seed)
        script.close()

    with pytest.raises(AssertionError, match=r"GradScaler 0's scale is 512\.0 with the seed, 1024\.0 without"):
        assert_isolated(step, script.growth, script.scaler, of_seed)


@pytest.mark.parametrize("inside", [True, False])
def test_what_trains_beside_the_model_is_host_too(inside):
    """A module that is given, and a parameter that an optimizer alone knows."""
    beside = nn.Linear(1, 1)
    script = Script(reaching(lambda host, seed, output: output + beside.bias))
    script.optimizer.add_param_group({"params": list(beside.parameters())})
    script.scheduler.base_lrs.append(0.5)

    def step(number):
        beside(torch.ones(1)).backward()
        script.step(number)

    name = r"Linear\.bias" if inside else r"SGD\[1\]"
    with pytest.raises(AssertionError, match=f"after step 1 of 10: parameter '{name}'.*a leak"):
        assert_isolated(step, script.growth, script.scaler, script.scheduler, *([beside] if inside else []))


def test_a_change_of_gradients_that_is_no_clip_is_told_from_one():
    script = Script()

    def step(number):
        script.backward(number)
        noise = script.model.slot.seed.expand.weight.grad.mean() if script.model.slot.seed else 0.0
        for parameter in script.model.parameters():
            parameter.grad.add_(noise)
        script.close()

    with pytest.raises(AssertionError, match="not by one factor"):
        script.check(step)


def test_a_step_that_does_not_repeat_is_told_from_a_seed_that_disturbs():
    script = Script()
    batches = iter(range(10**6))
    with pytest.raises(AssertionError, match="the step itself, which does not repeat"):
        script.check(lambda number: script.step(next(batches)))


def test_a_scaler_that_was_not_given_shows_as_a_step_that_does_not_repeat():
    """Its scale grows on and on: seen here because half precision rounds otherwise at another scale."""
    script = Script()

    def step(number):
        with torch.autocast("cpu", dtype=torch.float16):
            script.backward(number)
        script.growth.measure(script.scaler)
        script.close()
        script.scaler.update(new_scale=script.scaler.get_scale() * 1.1)

    script.check(step, steps=3)
    with pytest.raises(AssertionError, match="does not repeat"):
        assert_isolated(step, script.growth, script.scheduler)


# --- what it refuses, and how it was called once ---


def test_it_refuses_what_is_no_controller_no_count_and_no_seed():
    script = Script()
    with pytest.raises(ConfigurationError, match=r"the loop's GrowthController, .*got Host"):
        assert_isolated(script.step, script.model)
    for steps in (0, -1, 1.5, True):
        with pytest.raises(ConfigurationError, match="steps must be"):
            script.check(steps=steps)
    script.growth.prune("slot")
    with pytest.raises(WiringError, match="no seed trains behind the host"):
        script.check()


def test_a_step_in_which_no_seed_learns_shows_nothing():
    script, other = Script(), Script()
    with pytest.raises(WiringError, match=r"no seed got a gradient in 10 steps.*\['slot'\]"):
        script.check(lambda number: None)
    with pytest.raises(WiringError, match="no seed got a gradient"):
        script.check(other.step, steps=1)


def test_a_host_may_be_frozen_in_part():
    script = Script()
    script.model.first.requires_grad_(False)
    script.check()
    script.model.last.requires_grad_(False)
    with pytest.raises(WiringError, match="nothing of the host learns"):
        script.check()


def test_a_loop_without_backward_counts():
    script = Script()

    def step(number):
        loss = nn.functional.cross_entropy(script.model(script.x[number % 8]), script.y[number % 8])
        for parameter, gradient in zip(script.parameters(), torch.autograd.grad(loss, script.parameters())):
            parameter.grad = gradient
        script.optimizer.step()
        script.optimizer.zero_grad()

    script.check(step)


def test_a_seed_in_no_optimizer_counts():
    script = Script()
    script.growth.prune("slot")
    script.growth.germinate("late", Residual(6), add_to_optimizer=False)
    script.check()


def test_a_seed_that_the_step_itself_lets_in_is_refused():
    script = Script()

    def step(number):
        script.step(number)
        if number == 1 and script.model.slot.seed is not None:
            script.model.slot.move(Stage.BLENDING)

    with pytest.raises(ConfigurationError, match="the seed in 'slot' moved to BLENDING in step 2"):
        script.check(step)


def test_one_pass_of_a_model_is_still_checked_under_the_old_name():
    model = Mlp()
    model.slot.germinate(model.seed())
    model.slot.move(Stage.TRAINING)
    inputs = torch.randn(Mlp.shape)
    found = [
        assert_invisible(model, inputs),
        assert_isolated(model, inputs),
        assert_isolated(model, inputs, lambda output: output.square().sum()),
        assert_isolated(model, inputs, loss=lambda output: output.square().sum()),
    ]
    assert all(same(gradients, found[0]) for gradients in found)
    assert len(found[0]) == 4


def test_an_output_that_is_nan_with_and_without_the_seed_is_the_same():
    model = Mlp()
    inputs = torch.randn(Mlp.shape)
    inputs[0, 0] = float("nan")
    assert assert_invisible(model, inputs) == {}
