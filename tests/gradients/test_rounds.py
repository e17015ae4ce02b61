"""One optimizer step, one sample, and the slope of exactly the gradients that the step uses."""

import copy
import math

import pytest
import torch
from torch import nn

from seedtriton import AlphaSchedule, ConfigurationError, GradientMonitor, GrowthController, SeedSlot, Stage
from seedtriton.gradients.rounds import PATIENCE
from seedtriton.gradients.row import EXTRA, SUMSQ


class Loop:
    """A blend by hand: out = x + alpha (s - x), of which the slope at alpha = 0 can be computed apart."""

    def __init__(self, **options):
        torch.manual_seed(0)
        self.host, self.seed = nn.Linear(4, 4), nn.Linear(4, 4)
        self.alpha = torch.zeros((), requires_grad=True)
        self.optimizer = torch.optim.SGD([*self.host.parameters(), *self.seed.parameters()], lr=1e-2)
        options = {"optimizers": self.optimizer, **options}
        self.monitor = GradientMonitor(self.host, {"a": self.seed}, alphas={"a": self.alpha}, **options)
        self.data = torch.Generator().manual_seed(1)
        self.true_gain = 0.0
        self.rows = []

    def backward(self, factor=1.0):
        """One batch; adds what it adds to the true gain of the gradients that are there now."""
        x = self.host(torch.randn(8, 4, generator=self.data))
        s = self.seed(x.detach())
        out = x + self.alpha * (s - x)
        out.retain_grad()
        # The seed learns too, by a loss of its own.
        (factor * (out.square().mean() + s.square().mean())).backward()
        self.true_gain -= float((out.grad.double() * (s - x).detach().double()).sum())
        return self

    def clear(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)
        self.true_gain = 0.0

    def replace(self, name):
        """Another parameter of the seed in place of one, which keeps a gradient that nobody clears."""
        old = getattr(self.seed, name)
        old.grad = torch.full_like(old, 3.0)
        setattr(self.seed, name, nn.Parameter(old.detach() * 0.5))
        group = self.optimizer.param_groups[0]
        group["params"] = [*self.host.parameters(), *self.seed.parameters()]
        return old

    def norms(self):
        return [
            float(sum(p.grad.double().square().sum() for p in part.parameters())) for part in (self.host, self.seed)
        ]

    def step(self, set_to_none=True):
        self.rows.append((*self.norms(), self.true_gain))
        self.optimizer.step()
        self.clear(set_to_none)

    def check(self, rows=None):
        """Every row of the ring is that of a step, in order, and there is no other."""
        rows = self.rows if rows is None else rows
        assert int(self.monitor.count) == len(rows)
        for found, (host, seed, gain) in zip(self.monitor.ring, rows):
            assert found[0, SUMSQ].item() == pytest.approx(host, rel=1e-5)
            assert found[1, SUMSQ].item() == pytest.approx(seed, rel=1e-5)
            assert found[1, EXTRA].item() == pytest.approx(gain, rel=1e-5)


BOTH = pytest.mark.parametrize("set_to_none", [True, False])


@BOTH
@pytest.mark.parametrize("micro", [1, 2, 3, 5])
def test_measuring_every_micro_batch_gives_the_samples_of_the_steps(micro, set_to_none):
    loop = Loop()
    for _ in range(6):
        for _ in range(micro):
            loop.backward()
            loop.monitor.measure()
        loop.step(set_to_none)
    loop.check()
    assert loop.monitor.read()["a"].samples == 6


@BOTH
def test_measured_once_behind_several_micro_batches_the_slope_is_of_all_of_them(set_to_none):
    loop = Loop()
    for micro in (1, 3, 2):
        for _ in range(micro):
            loop.backward()
        loop.monitor.measure()
        loop.step(set_to_none)
    loop.check()


@BOTH
@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("factor", [1.0, 100.0, math.nan, math.inf])
def test_a_batch_that_was_dropped_leaves_nothing_behind(factor, measured, set_to_none):
    loop = Loop()
    for number in range(6):
        if number % 2:
            loop.backward(factor)
            if measured and math.isfinite(factor):
                loop.monitor.measure()
            loop.clear(set_to_none)
        loop.backward().backward()
        loop.monitor.measure()
        loop.step(set_to_none)
    loop.check()


@BOTH
def test_a_second_loss_through_the_seed_is_gone_with_its_gradients(set_to_none):
    """A generator's loss through a discriminator, an attack, the first pass of SAM: backward, then zero_grad."""
    loop = Loop()
    for _ in range(4):
        loop.backward()
        loop.monitor.measure()
        loop.step(set_to_none)
        loop.backward(37.0)  # and never measured
        loop.clear(set_to_none)
    loop.check()


@BOTH
def test_a_seed_without_a_gradient_of_its_own_keeps_the_slope_of_all_micro_batches(set_to_none):
    """Where the script blends by itself at alpha = 0, nothing reaches the seed."""
    loop = Loop()
    for number in range(4):
        for _ in range(3):
            x = loop.host(torch.randn(8, 4, generator=loop.data))
            s = loop.seed(x.detach())
            out = x + loop.alpha * (s - x)
            out.retain_grad()
            out.square().mean().backward()
            loop.true_gain -= float((out.grad.double() * (s - x).detach().double()).sum())
        loop.monitor.measure()
        if number == 2:  # and one that is dropped
            loop.clear(set_to_none)
            continue
        loop.step(set_to_none)
    rows = loop.rows
    assert [row[1] for row in rows] == [0.0] * 3
    loop.check()


def test_gradients_that_were_clipped_or_scaled_are_not_taken_for_cleared_ones():
    loop = Loop()
    loop.backward()
    loop.monitor.measure()
    with torch.no_grad():
        for parameter in loop.seed.parameters():
            parameter.grad.mul_(0.5)
    loop.backward()
    loop.monitor.measure()
    assert loop.monitor.ring[0, 1, EXTRA].item() == pytest.approx(loop.true_gain, rel=1e-5)


def test_without_known_optimizers_every_call_is_a_sample():
    loop = Loop(optimizers=())
    for _ in range(3):
        loop.backward()
        loop.monitor.measure()
    assert loop.monitor.read()["a"].samples == 3


def test_overflows_stay_counted_whoever_tells_of_them():
    for told in (True, False):
        loop, scaler = Loop(), torch.amp.GradScaler("cpu", init_scale=4.0)
        for number in range(6):
            factor = math.inf if number in (1, 2, 4) else 1.0
            x = loop.host(torch.randn(8, 4, generator=loop.data))
            scaler.scale((x + loop.alpha * (loop.seed(x) - x)).square().mean() * factor).backward()
            if told:
                loop.monitor.measure(scaler)
            else:
                scaler.unscale_(loop.optimizer)
                loop.monitor.measure()
            scaler.step(loop.optimizer)
            scaler.update()
            loop.optimizer.zero_grad()
        found = loop.monitor.read()["a"]
        assert (found.samples, found.dropped, found.optimizer_steps) == (3, 3, 3)


def test_an_overflow_in_one_of_several_micro_batches_is_one_dropped_sample():
    loop, scaler = Loop(), torch.amp.GradScaler("cpu", init_scale=4.0)
    for number in range(4):
        for micro in range(3):
            factor = math.inf if (number, micro) == (2, 0) else 1.0
            x = loop.host(torch.randn(8, 4, generator=loop.data))
            scaler.scale((x + loop.alpha * (loop.seed(x) - x)).square().mean() * factor).backward()
            loop.monitor.measure(scaler)
        scaler.step(loop.optimizer)
        scaler.update()
        loop.optimizer.zero_grad()
    found = loop.monitor.read()["a"]
    assert (found.samples, found.dropped) == (3, 1)


def test_nobody_waits_for_ever_for_an_optimizer_that_does_not_step():
    loop = Loop()
    for _ in range(PATIENCE + 9):
        loop.backward()
        loop.monitor.measure()
    assert int(loop.monitor.count) == 10


def test_a_seed_that_comes_or_begins_anew_between_measurements_loses_no_sample():
    loop = Loop()
    loop.backward()
    loop.monitor.measure()
    loop.monitor.reset("a")
    loop.backward()
    loop.monitor.measure()
    assert loop.monitor.read()["a"].samples == 1


def test_a_window_that_begins_anew_because_parameters_changed_loses_no_sample():
    loop = Loop()
    loop.backward()
    loop.monitor.measure()
    loop.seed.weight = nn.Parameter(loop.seed.weight.detach().clone())
    loop.monitor.read()
    loop.backward()
    loop.monitor.measure()
    assert loop.monitor.read()["a"].samples == 1


@pytest.mark.parametrize("every", [1, 2, 5])
def test_each_kth_step_is_measured_and_the_slope_is_that_step_s_alone(every):
    loop = Loop()
    for _ in range(11):
        for _ in range(2):
            loop.backward()
            loop.monitor.measure(every=every)
        loop.step()
    loop.check(loop.rows[::every])


@pytest.mark.parametrize("every", [0, -1, 1.5, True, None])
def test_an_impossible_stride_is_refused_and_nothing_is_measured(every):
    loop = Loop().backward()
    with pytest.raises(ConfigurationError, match=f"every must be a whole number.*got {every!r}"):
        loop.monitor.measure(every=every)
    assert int(loop.monitor.count) == 0


def test_a_copy_looks_after_its_own_slope():
    loop = Loop(optimizers=())
    loop.backward()
    host, seed, alpha, monitor = copy.deepcopy((loop.host, loop.seed, loop.alpha, loop.monitor))
    monitor.measure()
    optimizer = torch.optim.SGD([*host.parameters(), *seed.parameters()], lr=1e-2)
    for _ in range(2):  # dropped, then used
        optimizer.zero_grad()
        before = None if alpha.grad is None else alpha.grad.clone()
        x = host(torch.ones(2, 4))
        (x + alpha * (seed(x) - x)).square().mean().backward()
    expected = float(before - alpha.grad)
    monitor.measure()
    assert monitor.ring[1, 1, EXTRA].item() == pytest.approx(expected, rel=1e-5)


def test_a_seed_of_which_the_smallest_parameter_is_frozen_keeps_the_slope_of_all_micro_batches():
    loop = Loop()
    loop.seed.bias.requires_grad_(False)
    gains = []
    for _ in range(4):
        for _ in range(3):
            loop.backward()
        loop.monitor.measure()
        gains.append(loop.true_gain)
        loop.optimizer.step()
        loop.clear()
    assert loop.monitor.ring[:4, 1, EXTRA].tolist() == pytest.approx(gains, rel=1e-5)


def test_what_is_frozen_is_noticed_between_two_micro_batches_without_a_sample_more():
    loop = Loop()
    for step in range(1, 5):
        if step == 3:
            loop.host.bias.requires_grad_(False)
            loop.host.bias.grad = None
        for _ in range(3):
            loop.backward()
            loop.monitor.measure()
        loop.optimizer.step()
        loop.clear()
        assert int(loop.monitor.count) == step
    assert loop.monitor.read()["a"].samples == 2  # the step in which it was frozen, and the one after it


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("later", [0, 1, 2])
def test_a_step_with_a_seed_in_quarantine_is_one_sample_and_none_of_that_seed(later, scaled):
    """Its gradients are those of the later micro-batches alone: neither they nor their slope are of the loss."""
    loop, scaler = Loop(quarantine=True), torch.amp.GradScaler("cpu", init_scale=1.0) if scaled else None
    if scaled:
        scaler.scale(torch.zeros(()))
    other = nn.Linear(4, 4)
    loop.optimizer.add_param_group({"params": list(other.parameters())})
    loop.monitor = GradientMonitor(
        loop.host, {"a": loop.seed, "b": other}, alphas={"a": loop.alpha}, quarantine=True, optimizers=loop.optimizer
    )

    def measure():
        other(torch.ones(4)).sum().backward()
        loop.backward().monitor.measure(scaler)

    measure()
    loop.seed.weight.grad[0, 0] = math.nan
    loop.monitor.measure(scaler)
    assert not any(p.grad.any() for p in loop.seed.parameters())
    for _ in range(later):
        measure()
    loop.monitor.measure(scaler)
    assert bool(later) == any(bool(p.grad.any()) for p in loop.seed.parameters())
    loop.step()
    loop.true_gain = 0.0
    measure()
    loop.step()
    found = loop.monitor.read()
    assert (found["a"].samples, found["a"].dropped) == (1, 1)
    assert (found["b"].samples, found["b"].dropped) == (2, 0)
    assert found["a"].blend_gain == pytest.approx(loop.rows[-1][2], rel=1e-5)
    host = math.sqrt((loop.rows[0][0] + loop.rows[1][0]) / 2)
    assert found["b"].host_norm == pytest.approx(host, rel=1e-5)


@pytest.mark.parametrize("before", [False, True], ids=["attached", "measured before and after"])
def test_the_slope_of_what_clipping_puts_in_quarantine_is_in_no_gain(before):
    loop = Loop(quarantine=True)
    if not before:
        loop.monitor.attach(loop.optimizer)
    for step in range(4):
        if before:
            loop.backward().monitor.measure()
        loop.backward()
        if step % 2:
            loop.seed.weight.grad[0, 0] = math.nan
            loop.true_gain = 0.0
        loop.monitor.clip_grad_norm_(1e9, apart=True)
        if before:
            loop.monitor.measure()
        loop.step()
    assert [seed for _, seed, _ in loop.rows][1::2] == [0.0, 0.0]
    loop.check()


@BOTH
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_dropped_batch_leaves_nothing_behind_where_a_replaced_parameter_keeps_its_gradient(name, set_to_none):
    loop = Loop()
    loop.backward().monitor.measure()
    loop.step(set_to_none)
    old = loop.replace(name)
    loop.backward(37.0)  # and never measured, so that nobody has noticed
    loop.clear(set_to_none)
    loop.backward().monitor.measure()
    loop.step(set_to_none)
    assert old.grad.eq(3.0).all()
    loop.check()


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_where_a_replaced_parameter_keeps_its_gradient_every_micro_batch_counts(name):
    """Of a seed without a gradient of its own, as by hand at alpha = 0: to be zero is not to be cleared."""
    loop = Loop()
    loop.backward().monitor.measure()
    loop.step()
    old = loop.replace(name)
    for p in loop.seed.parameters():
        p.register_hook(torch.zeros_like)
    for _ in range(3):
        loop.backward().monitor.measure()
    loop.step()
    assert old.grad.eq(3.0).all()
    loop.check()


@pytest.mark.parametrize("read", [False, True], ids=["measured", "read"])
def test_a_seed_that_is_replaced_between_two_micro_batches_has_its_own_gain_alone(read):
    loop = Loop()
    loop.backward()
    loop.monitor.measure()
    loop.true_gain = 0.0
    for name in ("weight", "bias"):
        setattr(loop.seed, name, nn.Parameter(getattr(loop.seed, name).detach() * 0.5))
    if read:  # else it is noticed by the measurement itself
        loop.monitor.read()
    loop.backward()
    loop.monitor.measure()
    assert int(loop.monitor.count) == 1
    assert loop.monitor.ring[0, 1, EXTRA].item() == pytest.approx(loop.true_gain, rel=1e-5)


# --- through the controller ---


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.slot, self.last = nn.Linear(4, 6), SeedSlot(), nn.Linear(6, 1)

    def forward(self, x):
        return self.last(self.slot(torch.tanh(self.first(x))))


def grown(**options):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    growth = GrowthController(model, optimizer, sinks=[], schedule=AlphaSchedule(steps=10), **options)
    growth.germinate("slot", nn.Linear(6, 6))
    return model, optimizer, growth


@pytest.mark.parametrize("micro, every, attached", [(1, 1, 0), (3, 1, 0), (1, 5, 0), (2, 3, 0), (1, 1, 1), (2, 1, 1)])
def test_alpha_moves_once_per_optimizer_step(micro, every, attached):
    model, optimizer, growth = grown()
    growth._mover.move(growth._lives["slot"], Stage.BLENDING, "forced", "script")
    if attached:
        growth.monitor.attach(optimizer)
    for number in range(1, 13):
        for _ in range(micro):
            model(torch.randn(4, 4)).square().mean().backward()
            if not attached:
                growth.measure(every=every)
        optimizer.step()
        optimizer.zero_grad()
        assert growth.step == number
        assert (model.slot.alpha_value == 1.0) == (number >= 10)
    assert growth.evidence()["slot"].samples == -(-12 // every)


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("micro, every", [(1, 1), (3, 1), (2, 3)])
def test_steps_are_counted_alike_with_and_without_a_seed(micro, every, seeded):
    model, optimizer, growth = grown(pruned_epochs=9)
    if not seeded:
        growth.prune("slot")
    for number in range(1, 8):
        for _ in range(micro):
            model(torch.randn(4, 4)).square().mean().backward()
            growth.measure(every=every)
        optimizer.step()
        optimizer.zero_grad()
        assert growth.step == number


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("arguments", [{"every": 0}, {"every": 1.5}, {"tag": "generator"}])
def test_impossible_arguments_are_refused_before_the_first_seed_as_well(arguments, seeded):
    _, _, growth = grown()
    if not seeded:
        growth.prune("slot")
    with pytest.raises(ConfigurationError):
        growth.measure(**arguments)
    assert growth.step == 0


@pytest.mark.parametrize("stage", [Stage.TRAINING, Stage.BLENDING])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("probe", [None, torch.zeros(2, 6)], ids=["looked at", "probed"])
def test_the_slope_of_a_dropped_batch_is_in_no_gain_whatever_the_stage(stage, set_to_none, probe):
    gains = {}
    for dropped in (False, True):
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        growth = GrowthController(model, optimizer, sinks=[], schedule=AlphaSchedule(steps=10))
        growth.germinate("slot", nn.Linear(6, 6), probe=probe)
        if stage is Stage.BLENDING:
            growth._mover.move(growth._lives["slot"], Stage.BLENDING, "forced", "script")
            model.slot.set_alpha(0.4)
        for batch in torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(1)):
            if dropped:
                (7 * model(batch + 1)).square().mean().backward()
                optimizer.zero_grad(set_to_none=set_to_none)
            model(batch).square().mean().backward()
            growth.monitor.measure()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        gains[dropped] = growth.monitor.ring[:3, 1, EXTRA].tolist()
    assert all(gains[False])
    assert gains[True] == pytest.approx(gains[False], rel=1e-5)


def test_a_discriminator_is_measured_by_its_own_loss_alone():
    model, optimizer, growth = grown(tag="discriminator")
    generator = nn.Linear(2, 4)
    theirs = torch.optim.SGD(generator.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        growth.measure(tag="discriminator")
        optimizer.step()
        theirs.zero_grad()
        (100 * model(generator(torch.randn(8, 2)))).square().mean().backward()
        growth.measure(tag="generator")
        theirs.step()
    assert growth.step == 5
    assert growth.evidence()["slot"].samples == 5
    with pytest.raises(ConfigurationError, match="say which loss it is now"):
        growth.measure()


def test_a_slope_that_nobody_gives_is_none_however_often_a_step_is_measured():
    for calls in (1, 2):
        loop = Loop()
        parameters = [*loop.host.parameters(), *loop.seed.parameters()]
        for _ in range(6):
            loop.backward()
            for _ in range(calls):
                loop.monitor.measure(gradients=[(p, p.grad) for p in parameters])
            loop.optimizer.step()
        found = loop.monitor.read()["a"]
        assert (found.samples, found.blend_gain) == (6, None)


def test_a_load_ends_the_step_that_was_being_measured():
    loop, saved = Loop(), None
    for _ in range(4):
        loop.backward()
        loop.monitor.measure()
        saved = copy.deepcopy(loop.monitor.state_dict())
        loop.optimizer.step()
        loop.clear()
    loop.backward()
    loop.monitor.measure()
    loop.monitor.load_state_dict(saved)
    loop.backward()
    loop.monitor.measure()
    assert int(loop.monitor.count) == 5


def test_after_a_load_nothing_is_clipped_by_the_norms_that_were_loaded():
    loop = Loop()
    loop.backward().monitor.measure()
    loop.monitor.clip_grad_norm_(1.0)
    loop.optimizer.step()
    loop.clear()
    saved = copy.deepcopy(loop.monitor.state_dict())
    loop.backward(1e3).monitor.measure()
    loop.monitor.load_state_dict(saved)
    truth = math.sqrt(sum(loop.norms()))
    assert float(loop.monitor.clip_grad_norm_(0.5)) == pytest.approx(truth, rel=1e-5)


def test_backward_adds_the_slope_to_a_tensor_of_ours_and_leaves_none_of_its_own():
    """What it leaves may lie in a CUDA graph of torch.compile, and the next replay writes over it."""
    host, seed, alpha = (nn.Parameter(torch.ones(())) for _ in range(3))
    monitor = GradientMonitor([host], {"s": [seed]}, alphas={"s": alpha})
    found = []
    alpha.register_hook(lambda gradient: found.append(alpha.grad))
    for factor in (2.0, 3.0):
        (host + factor * alpha * seed).backward()
        assert alpha.grad is found[-1]
        monitor.measure()
    assert found[0] is found[1]
    assert monitor.ring[:2, 1, EXTRA].tolist() == [-2.0, -3.0]
