"""The optimizers of the benchmarks: Muon's steps are torch's, and each takes a seed's group."""

import pytest
import torch

from bench.optimizers import OPTIMIZERS, Muon, orthogonal
from bench.tasks import TASKS


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3), (4, 2, 3, 3)])
def test_a_matrix_goes_to_its_orthogonal_factor(shape):
    matrix = torch.randn(shape).flatten(1)
    singular = torch.linalg.svdvals(orthogonal(matrix))
    assert bool(((singular > 0.3) & (singular < 1.3)).all())
    assert torch.equal(orthogonal(torch.zeros(3, 4)), torch.zeros(3, 4))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon to compare with")
@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9)])
def test_matrices_take_torchs_steps(shape):
    """torch iterates in bf16, so to its rounding."""
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, shape[0] * shape[1]).view(shape)) for _ in range(2))
    optimizers = Muon([ours], lr=0.02), torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.01)
    for step in range(5):
        for parameter, optimizer in zip((ours, theirs), optimizers):
            parameter.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=0)


def test_the_rest_takes_adamws_steps():
    ours, theirs = torch.nn.Parameter(torch.ones(7)), torch.nn.Parameter(torch.ones(7))
    optimizers = Muon([ours], lr=0.02, rest=0.5, weight_decay=0.1), torch.optim.AdamW([theirs], 0.01, weight_decay=0.2)
    for step in range(5):
        for parameter, optimizer in zip((ours, theirs), optimizers):
            parameter.grad = torch.randn(7, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_task_trained_by_another_optimizer_has_its_rate_and_the_same_data(name):
    task = TASKS["regression"]()
    other = task.trained_by(name)
    optimizer = other.make_optimizer(other.make_host())
    assert optimizer.param_groups[0]["lr"] == other.lr == (OPTIMIZERS[name].lr or task.lr)
    assert other.train is task.train
