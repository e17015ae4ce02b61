"""With and without the monitor, training is the same bit for bit; clipping before measuring is noticed."""

import copy
import math

import pytest
import torch
from torch import nn

from seedtriton import GradientMonitor, QualityGates, SeedStatus, Stage

STEPS = 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.seed = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16))
        self.dropout = nn.Dropout(0.2)
        self.last = nn.Linear(16, 3)

    def forward(self, x, alpha):
        x = torch.relu(self.first(x))
        return self.last(self.dropout(x + alpha * self.seed(x)))


OPTIMIZERS = {
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


def train(original, make, autocast, set_to_none, monitored):
    """Weights, gradients, optimizer state and random state after a few steps, and the evidence."""
    torch.manual_seed(1)
    model = copy.deepcopy(original)
    optimizer = make(model.parameters())
    alpha = torch.ones((), requires_grad=True)
    monitor = None
    if monitored:
        monitor = GradientMonitor(model, {"a": model.seed}, alphas={"a": alpha}, optimizers=optimizer)
    x, y = torch.randn(32, 6), torch.randint(3, (32,))

    def closure():
        optimizer.zero_grad(set_to_none=set_to_none)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(model(x, alpha), y)
        loss.backward()
        if monitor:
            monitor.measure()
        return loss

    for _ in range(STEPS):
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        if monitor:
            monitor.read()
    tensors = [*model.parameters(), *(p.grad for p in model.parameters()), torch.get_rng_state()]
    kept = [value for state in optimizer.state.values() for value in state.values()]
    tensors += [value for value in kept if isinstance(value, torch.Tensor)]
    return tensors, monitor and monitor.read()["a"]


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_measuring_and_reading_change_no_bit_of_a_training(make, autocast, set_to_none):
    model = Net()
    plain, _ = train(model, make, autocast, set_to_none, monitored=False)
    found, evidence = train(model, make, autocast, set_to_none, monitored=True)
    assert len(found) == len(plain)
    assert all(torch.equal(a, b) for a, b in zip(found, plain))
    assert not torch.equal(found[0], model.first.weight)
    assert evidence.samples >= STEPS
    assert math.isfinite(evidence.ratio)
    assert evidence.in_optimizer
    assert evidence.optimizer_steps == STEPS
    assert evidence.displacement > 0.0


@pytest.mark.parametrize("accumulated", [1, 3])
def test_clipping_a_training_is_torchs_clipping(accumulated):
    trained = []
    for monitored in (False, True):
        torch.manual_seed(1)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        monitor = GradientMonitor(model, {"a": model.seed}, optimizers=optimizer)
        for _ in range(STEPS):
            for _ in range(accumulated):
                loss = nn.functional.cross_entropy(model(torch.randn(16, 6), 1.0), torch.randint(3, (16,)))
                loss.backward()
            if monitored:
                monitor.measure()
                monitor.clip_grad_norm_(0.3)
            else:
                nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
            optimizer.zero_grad()
        trained.append(list(model.parameters()))
        assert monitor.read()["a"].samples == (STEPS if monitored else 0)
    torch.testing.assert_close(trained[0], trained[1], rtol=1e-5, atol=1e-7)


def clip_apart(model, max_norm):
    seed = {id(p) for p in model.seed.parameters()}
    nn.utils.clip_grad_norm_([p for p in model.parameters() if id(p) not in seed], max_norm)
    nn.utils.clip_grad_norm_(model.seed.parameters(), max_norm)


CLIPPING = {
    "no": lambda model: None,
    "together": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.05),
    "apart": lambda model: clip_apart(model, 0.02),
    "host alone": lambda model: nn.utils.clip_grad_norm_([*model.first.parameters(), *model.last.parameters()], 0.05),
    "seed alone": lambda model: nn.utils.clip_grad_norm_(model.seed.parameters(), 0.02),
    "too high to matter": lambda model: clip_apart(model, 1e3),
}


def clipped(clip, dtype=torch.float32, steps=40, alpha=1.0):
    """The evidence of a training that clips first and measures then."""
    torch.manual_seed(1)
    model = Net().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = GradientMonitor(model, {"a": model.seed}, optimizers=optimizer)
    for _ in range(steps):
        nn.functional.cross_entropy(model(torch.randn(16, 6, dtype=dtype), alpha), torch.randint(3, (16,))).backward()
        clip(model)
        monitor.measure()
        optimizer.step()
        optimizer.zero_grad()
    return monitor.read()["a"]


def clipping_check(evidence):
    verdict = QualityGates().judge(Stage.BLENDING, SeedStatus(seed="a", stage=Stage.TRAINING, evidence=evidence))
    return next(check for check in verdict.checks if check.question == "clipping")


@pytest.mark.parametrize("how", ["apart", "host alone", "seed alone"])
def test_gradients_clipped_apart_before_measuring_are_refused(how):
    check = clipping_check(clipped(CLIPPING[how]))
    assert (check.passed, check.name) == (False, "clipped_before_measuring")
    assert check.value == 1.0
    assert "measure before you clip" in check.reason


@pytest.mark.parametrize("how", ["no", "together", "too high to matter"])
def test_clipping_that_leaves_the_ratio_alone_is_not_refused(how):
    check = clipping_check(clipped(CLIPPING[how]))
    assert (check.passed, check.name) == (True, "not_clipped_before_measuring")
    assert check.value < 0.2


def test_clipping_a_tiny_seed_together_with_its_host_is_not_refused():
    evidence = clipped(CLIPPING["together"], alpha=1e-3)
    assert evidence.ratio < 1e-2
    assert clipping_check(evidence).passed is True


def test_clipping_by_value_is_not_seen_as_the_documentation_says():
    for limit in (1e-9, 1e-3):
        found = clipped(lambda model, limit=limit: nn.utils.clip_grad_value_(model.parameters(), limit))
        assert found.plateau_share < 0.5


def still(host_lr, seed_lr, steps=40):
    """The whole data in every batch, and no dropout."""
    torch.manual_seed(1)
    host, seed = nn.Linear(6, 16), nn.Linear(16, 16)
    optimizer = torch.optim.SGD(
        [{"params": host.parameters(), "lr": host_lr}, {"params": seed.parameters(), "lr": seed_lr}]
    )
    monitor = GradientMonitor(host, {"a": seed}, optimizers=optimizer)
    x = torch.randn(32, 6)
    for _ in range(steps):
        hidden = host(x)
        (hidden.square().mean() + seed(hidden.detach()).square().mean()).backward()
        monitor.measure()
        optimizer.step()
        optimizer.zero_grad()
    return monitor.read()["a"]


def test_nothing_that_moves_is_not_called_clipping():
    evidence = still(0.0, 0.0)
    assert evidence.plateau_share == 0.0
    assert clipping_check(evidence).passed is True
    assert evidence.displacement == 0.0  # what refuses it


def test_a_host_that_stands_still_before_a_seed_that_learns_is_not_called_clipping():
    evidence = still(0.0, 0.1)
    assert evidence.displacement > 0.0
    assert clipping_check(evidence).passed is True
