"""Optimizers inside wrappers, as accelerate, Trainer, Lightning, schedule-free, Lookahead and SAM make them."""

import copy

import pytest
import torch
from torch import nn

from seedtriton import ConfigurationError, GradientMonitor, GrowthController, SeedSlot, WiringError


class Accelerated(torch.optim.Optimizer):
    """accelerate's: a torch Optimizer by name, whose ``__init__`` is never called."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def add_param_group(self, group):
        self.optimizer.add_param_group(group)

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)


class ScheduleFree:
    """schedule-free's: no Optimizer at all, with the one that steps in ``base``."""

    def __init__(self, base):
        self.base = base

    param_groups = property(lambda self: self.base.param_groups)
    state = property(lambda self: self.base.state)

    def add_param_group(self, group):
        self.base.add_param_group(group)

    def step(self, closure=None):
        self.base.step(closure)

    def zero_grad(self, set_to_none=True):
        self.base.zero_grad(set_to_none)


class Forwarding:
    """Lightning's: imitates the class of the optimizer, and hands on every attribute of it."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Lightning" + type(optimizer).__name__, (Forwarding, type(optimizer)), {})

    optimizer = property(lambda self: self._optimizer)

    def step(self, closure=None):
        self._optimizer.step(closure)

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


def lightning(optimizer):
    """Lightning's of earlier releases: a class made at run time, that shares the whole ``__dict__``."""

    class LightningOptimizer:
        def __init__(self, inner):
            self.__dict__ = {k: v for k, v in inner.__dict__.items() if k not in ("step", "__del__")}
            self._optimizer = inner

        optimizer = property(lambda self: self._optimizer)

        def step(self):
            self._optimizer.step()

    kind = type("Lightning" + type(optimizer).__name__, (LightningOptimizer, type(optimizer)), {})
    return kind(optimizer)


class Lookahead(torch.optim.Optimizer):
    """A real Optimizer around another one, that keeps a count in every group."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups
        for group in self.param_groups:
            group["counter"] = 0

    def add_param_group(self, group):
        group["counter"] = 0
        self.optimizer.add_param_group(group) if hasattr(self, "optimizer") else super().add_param_group(group)

    def step(self, closure=None):
        for group in self.param_groups:
            group["counter"] += 1
        return self.optimizer.step(closure)


class SAM(torch.optim.Optimizer):
    """Two steps per step, of which the base optimizer takes one."""

    def __init__(self, parameters, base, **settings):
        super().__init__(parameters, settings)
        self.base_optimizer = base(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups

    def first_step(self):
        pass

    def second_step(self):
        self.base_optimizer.step()


def nested(optimizer):
    return Accelerated(ScheduleFree(optimizer))


WRAPPERS = [Accelerated, ScheduleFree, Forwarding, lightning, Lookahead, nested]


def parts():
    torch.manual_seed(0)
    return nn.Linear(4, 4), nn.Linear(4, 4)


def backward(host, seed):
    seed(host(torch.randn(8, 4)).tanh()).pow(2).mean().backward()


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_steps_of_a_wrapped_optimizer_count(wrap):
    host, seed = parts()
    optimizer = wrap(torch.optim.SGD([*host.parameters(), *seed.parameters()], lr=0.1))
    monitor = GradientMonitor(host=host, seeds={"s": seed}, optimizers=optimizer)
    monitor.watch(optimizer)
    for _ in range(3):
        backward(host, seed)
        monitor.measure()
        optimizer.step()
        optimizer.zero_grad()
    known = monitor.read()["s"]
    assert (known.in_optimizer, known.optimizer_steps, known.samples) == (True, 3, 3)


def test_the_second_of_two_steps_of_sam_is_the_one_that_counts():
    host, seed = parts()
    optimizer = SAM([*host.parameters(), *seed.parameters()], torch.optim.SGD, lr=0.1)
    monitor = GradientMonitor(host=host, seeds={"s": seed}, optimizers=optimizer)
    backward(host, seed)
    optimizer.first_step()
    monitor.measure()
    optimizer.second_step()
    assert monitor.read()["s"].optimizer_steps == 1


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_attach_reaches_the_optimizer_inside(wrap):
    host, seed = parts()
    optimizer = wrap(torch.optim.SGD([*host.parameters(), *seed.parameters()], lr=0.1))
    monitor = GradientMonitor(host=host, seeds={"s": seed})
    monitor.attach(optimizer)
    backward(host, seed)
    optimizer.step()
    assert int(monitor.count) == 1


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_seed_joins_and_leaves_a_wrapped_optimizer(wrap):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), SeedSlot(), nn.Linear(4, 2))
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = wrap(inner)
    growth = GrowthController(net, optimizer, sinks=[])
    assert growth.optimizer is inner
    growth.germinate("1", nn.Linear(4, 4), lr=0.02)
    before = copy.deepcopy(net[1].seed.state_dict())
    assert [group["lr"] for group in inner.param_groups] == [0.1, 0.02]
    assert [group.get("counter") for group in inner.param_groups] == ([0, 0] if wrap is Lookahead else [None, None])
    net(torch.randn(8, 4)).pow(2).mean().backward()
    growth.measure()
    optimizer.step()
    assert not torch.equal(before["weight"], net[1].seed.weight)
    growth.prune("1")
    assert len(inner.param_groups) == len(optimizer.param_groups) == 1


def test_a_scaler_that_was_given_the_wrapper_is_understood():
    """After ``unscale_(wrapper)`` the gradients are true: divided once more they would be 1024 times too small."""
    host, seed = parts()
    optimizer = Lookahead(torch.optim.SGD([*host.parameters(), *seed.parameters()], lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monitor = GradientMonitor(host=host, seeds={"s": seed}, optimizers=optimizer)
    scaler.scale(seed(host(torch.ones(8, 4)).tanh()).pow(2).mean()).backward()
    scaler.unscale_(optimizer)
    monitor.measure(scaler)
    truth = sum(float(p.grad.double().pow(2).sum()) for p in seed.parameters()) ** 0.5
    assert monitor.read()["s"].seed_norm == pytest.approx(truth, rel=1e-6)


# --- refused by name ---


class Empty:
    param_groups = ()


class Masters:
    """Holds copies of the parameters in fp32 inside, as mixed-precision wrappers do."""

    def __init__(self, parameters):
        self.parameters = list(parameters)
        self.param_groups = [{"params": self.parameters}]
        self.optimizer = torch.optim.SGD([p.detach().clone().requires_grad_() for p in self.parameters], lr=0.1)

    def step(self):
        self.optimizer.step()


class ZeroRedundancyOptimizer(torch.optim.SGD):
    pass


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda ps: Empty(), ConfigurationError, "Empty is no torch optimizer and holds none"),
        (lambda ps: "sgd", ConfigurationError, "str is no torch optimizer"),
        (Masters, ConfigurationError, "Masters is no torch optimizer"),
        (lambda ps: ZeroRedundancyOptimizer(ps, lr=0.1), WiringError, "ZeroRedundancyOptimizer cannot .*fully_shard"),
    ],
)
def test_what_cannot_be_watched_is_refused_by_name(make, error, words):
    host, seed = parts()
    optimizer = make([*host.parameters(), *seed.parameters()])
    with pytest.raises(error, match=words):
        GradientMonitor(host=host, seeds={"s": seed}, optimizers=optimizer)
    monitor = GradientMonitor(host=host, seeds={"s": seed})
    with pytest.raises(error, match=words):
        monitor.watch(torch.optim.SGD(seed.parameters(), lr=0.1), optimizer)
    assert monitor.read()["s"].in_optimizer is None
    net = nn.Sequential(nn.Linear(4, 4), SeedSlot())
    with pytest.raises(error, match=words):
        GrowthController(net, make(list(net.parameters())), sinks=[])


class Container(torch.optim.Optimizer):
    """torchtitan's: steps every optimizer in it."""

    def __init__(self, optimizers):
        super().__init__([p for o in optimizers for g in o.param_groups for p in g["params"]], {})
        self.optimizers = optimizers

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()


def test_a_container_of_optimizers_is_watched_one_by_one_and_no_place_for_seeds():
    host, seed = parts()
    container = Container([torch.optim.SGD(m.parameters(), lr=0.1) for m in (host, seed)])
    monitor = GradientMonitor(host=host, seeds={"s": seed}, optimizers=container)
    backward(host, seed)
    container.step()
    assert monitor.read()["s"].optimizer_steps == 1
    net = nn.Sequential(nn.Linear(4, 4), SeedSlot())
    with pytest.raises(WiringError, match="Container steps 1 optimizers: give the one"):
        GrowthController(net, Container([torch.optim.SGD(net.parameters(), lr=0.1)]), sinks=[])


# --- optimizers that take a group and never step it, or cannot ---


class SingleDeviceMuon(torch.optim.SGD):
    pass


@pytest.mark.parametrize(
    "make, seed, words",
    [
        (lambda ps: torch.optim.LBFGS(ps), nn.Linear(4, 4), "parameters of its first group alone"),
        (lambda ps: torch.optim.Muon([p for p in ps if p.ndim == 2]), nn.Linear(4, 4), r"matrices alone.*'seed.bias'"),
        (
            lambda ps: SingleDeviceMuon([p for p in ps if p.ndim == 2], lr=0.1),
            nn.Linear(4, 4),
            r"1 other parameters, such as \['seed.bias'\]",
        ),
        (lambda ps: torch.optim.SparseAdam(ps), nn.Linear(4, 4), "sparse gradients alone"),
    ],
)
def test_a_seed_that_its_optimizer_cannot_step_is_refused_at_germination(make, seed, words):
    net = nn.Sequential(nn.Linear(4, 4), SeedSlot(), nn.Linear(4, 2))
    optimizer = make(list(net.parameters()))
    told = []
    growth = GrowthController(net, optimizer, sinks=[told.append])
    lifecycle, state = net[1].lifecycle.state_dict(), net[1].lifecycle_state()
    with pytest.raises(WiringError, match=f"cannot train this seed: .*{words}.*add_to_optimizer=False"):
        growth.germinate("1", seed)
    assert net[1].lifecycle.state_dict() == lifecycle
    assert net[1].seed is None
    assert net[1].lifecycle_state() == state
    assert len(optimizer.param_groups) == 1
    assert growth.monitor.seeds == ()
    assert told == []


def test_matrices_alone_may_join_muon_and_are_stepped():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), SeedSlot(), nn.Linear(4, 2, bias=False))
    growth = GrowthController(net, torch.optim.Muon(net.parameters(), lr=0.1), sinks=[])
    growth.germinate("1", nn.Linear(4, 4, bias=False))
    before = net[1].seed.weight.detach().clone()
    net(torch.randn(8, 4)).pow(2).mean().backward()
    growth.measure()
    growth.optimizer.step()
    assert not torch.equal(before, net[1].seed.weight)


def test_the_way_out_of_a_refusal_works():
    net = nn.Sequential(nn.Linear(4, 4), SeedSlot(), nn.Linear(4, 2))
    growth = GrowthController(net, torch.optim.LBFGS(net.parameters()), sinks=[])
    growth.germinate("1", nn.Linear(4, 4), add_to_optimizer=False)
    own = torch.optim.AdamW(net[1].seed.parameters())
    growth.monitor.watch(own)
    net(torch.randn(8, 4)).pow(2).mean().backward()
    growth.measure()
    own.step()
    known = growth.evidence()["1"]
    assert (known.in_optimizer, known.optimizer_steps) == (True, 1)
