"""An ordinary training script that grows its network, for several tests."""

import torch
from networks import Residual
from torch import nn

from seedtriton import AlphaSchedule, GateThresholds, GrowthController, SeedSlot, Stage

THRESHOLDS = GateThresholds()


class TwoSlots(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.first = nn.Linear(8, width)
        self.early = SeedSlot()
        self.second = nn.Linear(width, width)
        self.late = SeedSlot()
        self.last = nn.Linear(width, 4)

    def forward(self, x):
        return self.last(self.late(torch.relu(self.second(self.early(torch.relu(self.first(x)))))))


class Script:
    """An ordinary training script: random teacher, AdamW, an accuracy per epoch."""

    def __init__(self, model=None, optimizer=None, thresholds=THRESHOLDS, measure=True, **options):
        torch.manual_seed(0)
        self.model = model or TwoSlots()
        self.optimizer = optimizer or torch.optim.AdamW(self.model.parameters(), lr=5e-3)
        self.events = []
        self.growth = GrowthController(
            self.model, self.optimizer, thresholds=thresholds, sinks=[self.events.append], **options
        )
        self.measure = measure
        teacher = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
        self.x = torch.randn(512, 8)
        self.y = teacher(self.x).argmax(dim=1).detach()
        self.generator = torch.Generator().manual_seed(1)

    def epoch(self):
        for batch in torch.randperm(len(self.x), generator=self.generator).split(32):
            nn.functional.cross_entropy(self.model(self.x[batch]), self.y[batch]).backward()
            if self.measure:
                self.growth.measure()
            self.optimizer.step()
            self.optimizer.zero_grad()
        with torch.no_grad():
            accuracy = float((self.model(self.x).argmax(dim=1) == self.y).double().mean())
        return self.growth.end_epoch(accuracy=accuracy)

    def epochs(self, count):
        return [self.epoch() for _ in range(count)]

    def of(self, event):
        return [entry for entry in self.events if entry["event"] == event]


def blending(script=None, slot="early", seed=None, **options):
    """A script whose seed in ``slot`` has just been let into BLENDING."""
    script = script or Script(schedule=AlphaSchedule(steps=8, curve="linear"))
    script.growth.germinate(slot, seed or Residual(6, 16), probe=torch.randn(2, 6), **options)
    while script.growth.slots[slot].stage is not Stage.BLENDING:
        script.epoch()
    return script
