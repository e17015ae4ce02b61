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

for step in range(100):
    batch = torch.randint(512, (64,))
    features = torch.relu(backbone(inputs[batch]))
    loss = nn.functional.cross_entropy(head(features + adapter(features)), labels[batch])
    loss.backward()
    monitor.measure()  # after backward, before clipping and the step
    total = monitor.clip_grad_norm_(1.0)  # uses the pass of measure(); stays on the device
    optimizer.step()
    optimizer.zero_grad()
    if step % 25 == 24:
        evidence = monitor.read()["adapter"]  # the one place that waits for the device
        print(f"step {step + 1:3d}  loss {loss.item():.3f}  {evidence.reason}")

assert evidence.in_optimizer
assert evidence.displacement > 0.01
