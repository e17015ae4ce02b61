"""Fine-tuning an adapter in a network that somebody else has trained, watched by a monitor: no slots.

    python tests/new_user/fine_tuning.py
"""

import torch
from torch import nn

from seedtriton import GradientMonitor

torch.manual_seed(0)


class Net(nn.Module):
    """A backbone, an adapter in the forward pass, and a head."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(16, 32), nn.ReLU())
        self.adapter = nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 32))
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        x = self.backbone(x)
        return self.head(x + self.adapter(x))


inputs = torch.randn(1024, 16)
labels = (inputs[:, :4] + inputs[:, 4:8]).argmax(dim=1)
model = Net()
forgotten = torch.optim.AdamW([*model.backbone.parameters(), *model.head.parameters()], lr=1e-3)
monitor = GradientMonitor(host=model, seeds={"adapter": model.adapter}, optimizers=forgotten)


def train(optimizer, steps):
    for _ in range(steps):
        batch = torch.randint(1024, (64,))
        nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
        monitor.measure()
        monitor.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    return monitor.read()["adapter"]


first = train(forgotten, 40)
print("forgotten:", first)

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
monitor.watch(optimizer)
monitor.reset()
second = train(optimizer, 40)
print("trained:  ", second)

for reading in monitor.tensors()[:3]:
    print(f"{reading.name:20s} {reading.norm:.2e} {reading.state}")
