"""The harness itself: what a rank returns, raises, or where it hangs, comes back in time."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from parallel.harness import spawn, values


def total(rank, world, offset):
    number = torch.tensor([float(rank + offset)])
    dist.all_reduce(number)
    return world, float(number)


def test_what_every_rank_returns_comes_back_in_order():
    assert values(total, offset=10) == [(2, 21.0)] * 2
    assert values(total, world=3, offset=0) == [(3, 3.0)] * 3


def odd_one_out(rank, world, how):
    if rank == 1:
        if how == "raises":
            raise ValueError("no such batch")
        if how == "dies":
            os._exit(7)
        time.sleep(60)
    return rank


@pytest.mark.parametrize(
    "how, said",
    [("raises", "ValueError: no such batch"), ("dies", "died with exit code 7"), ("hangs", "still running")],
)
def test_a_rank_that_does_not_return_is_named_and_holds_nobody_up(how, said):
    first, second = spawn(odd_one_out, limit=2, how=how)
    assert first.value == 0
    assert first.error is None
    assert said in second.error
    assert how == "dies" or "odd_one_out" in second.where
    with pytest.raises(AssertionError, match=said):
        values(odd_one_out, limit=2, how=how)


def waits(rank, world):
    if rank == 0:
        dist.all_reduce(torch.ones(1))
    time.sleep(3)


def test_a_collective_ends_in_the_groups_timeout():
    first, second = spawn(waits, limit=20, timeout=[1, 9])
    assert "imed out" in first.error
    assert second.error is None


def backward(rank, world):
    weight = torch.ones(2, requires_grad=True)
    weight.sum().backward()
    return weight.grad.tolist()


def test_ranks_run_backward_after_pytest_did():
    torch.ones(2, requires_grad=True).sum().backward()
    assert values(backward) == [[1.0, 1.0]] * 2
