"""A plain training loop: two groups of parameters, no slots. Run: python examples/raw_loop.py."""

import torch
from torch import nn

from seedtriton import GradientMonitor

torch.manual_seed(0)
torch.set_num_threads(1)
backbone, adapter, head = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)
optimizer = torch.optim.AdamW([*backbone.parameters(), *adapter.parameters(), *head.parameters()], lr=3e-3)
monitor = GradientMonitor(host=[backbone, head], seeds={"adapter": adapter}, optimizers=optimizer)

inputs = torch.randn(512, 16)
labels = (inputs[:, :4] + inputs[:, 4:8]).argmax(dim=1)


def step(batch: torch.Tensor) -> torch.Tensor:
    """One optimizer step; its loss. The adapter is in the forward pass, so this host does feel it."""
    features = torch.relu(backbone(inputs[batch]))
    loss = nn.functional.cross_entropy(head(features + adapter(features)), labels[batch])
    loss.backward()
    monitor.measure()  # after backward, before clipping and the step
    monitor.clip_grad_norm_(1.0)  # by the pass of measure(), from the second step on; returns the norm
    optimizer.step()
    optimizer.zero_grad()
    return loss


if __name__ == "__main__":
    for number in range(1, 101):
        loss = step(torch.randint(512, (64,)))
        if number % 25 == 0:
            evidence = monitor.read()["adapter"]  # the one place that waits for the device
            print(f"step {number:3d}  loss {loss.item():.3f}  {evidence.reason}")
    assert evidence.in_optimizer
    assert evidence.displacement > 0.01
