"""A run that grows a network through every stage, and can stop and go on at any step; also a program of its own."""

import sys

import torch
from torch import nn

from seedtriton import AlphaSchedule, Gate, GateThresholds, GrowthController, SeedSlot, StraightThrough, TrustRegion

STEPS = 64  # of which four make an epoch
THRESHOLDS = GateThresholds(
    min_training_improvement=None, min_training_epochs=2, min_samples=4, min_blend_gain_t=None, min_live_share=0.2,
    max_accuracy_drop=None, min_gradient_ratio=0.0, min_blending_epochs=1, min_holding_epochs=2,
)  # fmt: skip


class Seed(nn.Module):
    def __init__(self):
        super().__init__()
        self.expand, self.drop, self.contract = nn.Linear(6, 12), nn.Dropout(0.2), nn.Linear(12, 6)

    def forward(self, x):
        return x + self.contract(self.drop(torch.relu(self.expand(x))))


SEEDS_BY_SLOT = {"early": Seed, "late": Seed}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.early, self.second = nn.Linear(8, 6), SeedSlot(), nn.Linear(6, 6)
        self.late, self.last = SeedSlot(), nn.Linear(6, 4)

    def forward(self, x):
        return self.last(self.late(torch.relu(self.second(self.early(torch.relu(self.first(x)))))))


class Run:
    def __init__(self, **growth):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.model = Net()
        teacher = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        self.x = torch.randn(STEPS, 16, 8)
        self.y = teacher(self.x).argmax(dim=-1)
        self.equip(**growth)

    def equip(self, **growth):
        """An optimizer of what the model has now, its schedule, and a controller."""
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.1)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.99)
        self.log = []
        self.growth = GrowthController(
            self.model, self.optimizer, thresholds=THRESHOLDS, schedule=AlphaSchedule(steps=6, target=0.7),
            schedulers=[self.scheduler], embargoed_epochs=2, sinks=[self.note],
            auto_advance=[Gate.G1, Gate.G2, Gate.G3, Gate.G5], **growth,
        )  # fmt: skip
        self.step = 0

    def note(self, event):
        self.log.append({name: value for name, value in event.items() if name != "run"})  # of each process its own

    def act(self):
        """What the script decides before this step."""
        growth, probe = self.growth, self.x[0, :2, :6]
        if self.step == 3:
            growth.germinate("early", Seed(), probe=probe, blend="gate", isolation=TrustRegion(0.3), lr=2e-2)
        elif self.step == 6:
            growth.germinate("late", Seed(), isolation=StraightThrough(), schedule=AlphaSchedule(steps=10))
        elif self.step == 22:
            growth.prune("late", "not wanted", initiator="policy", steps=4)
        elif self.step == 48:
            growth.germinate("late", Seed(), blend="multiply")

    def one(self):
        self.act()
        loss = nn.functional.cross_entropy(self.model(self.x[self.step]), self.y[self.step])
        loss.backward()
        self.growth.measure()
        self.growth.clip_grad_norm_(1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.step % 4 == 0:
            self.scheduler.step()
            self.log += [str(verdict) for verdict in self.growth.end_epoch(accuracy=1 / (1 + float(loss.detach())))]

    def state(self):
        return {
            "growth": self.growth.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": torch.random.get_rng_state(),
            "step": self.step,
        }

    def load(self, saved):
        self.growth.load_state_dict(saved["growth"], seeds=SEEDS_BY_SLOT)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        torch.random.set_rng_state(saved["random"])
        self.step = saved["step"]

    def finish(self):
        while self.step < STEPS:
            self.one()
        evidence = {name: known.state_dict() for name, known in self.growth.evidence().items()}
        return {"state": self.state(), "evidence": evidence, "log": self.log}


def main(folder):
    """Finish every run that was saved in the folder."""
    for step in range(STEPS):
        run = Run()
        run.load(torch.load(f"{folder}/{step}.pt", weights_only=True))
        torch.save(run.finish(), f"{folder}/{step}.done.pt")


if __name__ == "__main__":
    main(sys.argv[1])
