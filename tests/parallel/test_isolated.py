"""``assert_isolated`` on several ranks: it says what it says of one process, and leaves the training as it was."""

import pytest
import torch
from parallel.harness import batches, block, host, loss_of, mine, spawn, values, wrapped
from torch import nn

from seedtriton import GrowthController
from seedtriton.testing import assert_isolated


class Training:
    def __init__(self, rank, world, kind, together=False):
        self.inner, self.together = host(), together
        self.model = wrapped(self.inner, kind)
        self.optimizer = torch.optim.AdamW(self.inner.parameters(), 0.01)
        self.growth = GrowthController(self.model, self.optimizer, sinks=[])
        self.growth.germinate("slot", block(rank=rank))
        self.data = [mine(batch, rank, world) for batch in batches(8)]

    def step(self, number):
        loss_of(self.model, self.data[number]).backward()
        self.growth.measure()
        if self.together:
            nn.utils.clip_grad_norm_(self.inner.parameters(), 0.01)
        else:
            self.growth.clip_grad_norm_(0.01)
        self.optimizer.step()
        self.optimizer.zero_grad()


def trained(rank, world, kind, looked):
    run = Training(rank, world, kind)
    for number in range(4):
        if looked and number == 2:
            assert_isolated(run.step, run.growth, steps=3)
        run.step(number)
    known = run.growth.monitor.read()["slot"]
    local = [getattr(p, "_local_tensor", p).detach().clone() for p in run.inner.parameters()]
    return local, (known.samples, known.ratio, known.blend_gain)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_look_in_the_middle_leaves_no_trace(kind):
    with_a_look, without = (values(trained, 2, kind=kind, looked=looked) for looked in (True, False))
    for (found, said), (wanted, told) in zip(with_a_look, without):
        assert said == told
        assert said[0] == 4
        assert all(map(torch.equal, found, wanted))


def coupled(rank, world, kind):
    run = Training(rank, world, kind, together=True)
    assert_isolated(run.step, run.growth, steps=2)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_norm_over_both_is_found_on_every_rank(kind):
    for result in spawn(coupled, 2, kind=kind):
        assert "host and seed are clipped together" in result.error
