"""A small CNN on handwritten digits with two slots; written with the documentation at hand and nothing else.

    python tests/new_user/cnn_with_slots.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from seedtriton import AlphaSchedule, GrowthController, SeedSlot
from seedtriton.telemetry import JsonLinesSink

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(labels))
train, held_out = order[:1280], order[1280:]


class ConvSeed(nn.Module):
    """Another residual block for the features of a stage."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, channels, 3, padding=1)
        )

    def forward(self, x):
        return x + self.body(x)


class CNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.early = SeedSlot()
        self.down = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.late = SeedSlot()
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))

    def forward(self, x):
        return self.head(self.late(self.down(self.early(self.stem(x)))))


def losses(model):
    return nn.functional.cross_entropy(model(images[held_out]), labels[held_out], reduction="none")


@torch.no_grad()
def accuracy(model):
    model.eval()
    share = (model(images[held_out]).argmax(1) == labels[held_out]).float().mean().item()
    model.train()
    return share


model = CNN()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
events = []
growth = GrowthController(
    model,
    optimizer,
    evaluate=losses,
    schedule=AlphaSchedule(steps=40),
    sinks=[events.append, JsonLinesSink("events.jsonl")],
)
growth.germinate("early", ConvSeed(4))

for epoch in range(14):
    for batch in train[torch.randperm(len(train))].split(64):
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        growth.measure()
        optimizer.step()
        optimizer.zero_grad()
    share = accuracy(model)
    for verdict in growth.end_epoch(accuracy=share):
        print(f"epoch {epoch + 1:2d}  accuracy {share:.3f}  {verdict}")
    if epoch == 4:  # the second one a little later
        growth.germinate("late", ConvSeed(6))
    if epoch == 6:
        print(growth.why("late"))

print(growth.summary())
