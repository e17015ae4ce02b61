"""A small network with a slot, its data, and what a sample must say of gradients that were really used, in fp64."""

import math
import pathlib
import re

import torch
from torch import nn

from seedtriton import AlphaSchedule, Gate, GateThresholds, SeedSlot

WIDTH = 16
# With these a seed goes on by epochs alone: what is tested here is the client, not the gates.
EASY = GateThresholds(
    min_training_improvement=None, min_training_epochs=2, min_samples=4, min_blend_gain_t=None, min_live_share=0.2,
    max_accuracy_drop=None, min_gradient_ratio=0.0, min_blending_epochs=50,
)  # fmt: skip
# With these it goes on as fast as that, to the end.
LOOSE = GateThresholds(
    min_training_improvement=None, min_training_epochs=1, min_samples=2, min_blend_gain_t=None, min_live_share=0.1,
    max_accuracy_drop=None, min_gradient_ratio=0.0, max_harm_t=None, min_blending_epochs=1,
    min_holding_epochs=1, min_displacement=0.0,
)  # fmt: skip
GROWTH = {"thresholds": EASY, "schedule": AlphaSchedule(steps=30), "auto_advance": [Gate.G1, Gate.G2], "sinks": []}


class Adapter(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return x + self.drop(torch.relu(self.inner(self.norm(x))))


class Bad(Adapter):
    """Large gradients, and from its tenth pass with gradients on some that are not finite."""

    def __init__(self):
        super().__init__()
        self.passes = 0

    def forward(self, x):
        self.passes += torch.is_grad_enabled()
        return super().forward(x) * (float("nan") if self.passes > 10 else 30.0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.slot = nn.Linear(8, WIDTH), SeedSlot()
        self.drop, self.last = nn.Dropout(0.2), nn.Linear(WIDTH, 4)

    def forward(self, x):
        return self.last(self.drop(self.slot(torch.relu(self.first(x)))))


def data(count=72, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, generator=generator)
    return torch.utils.data.TensorDataset(x, (x[:, :4] + x[:, 4:]).argmax(1))


class Truth:
    """The sums of squares of host and seed, noted where the gradients are whole and nobody has clipped them."""

    def __init__(self):
        self.samples = []

    def note(self, slot, parameters):
        own = {id(p) for p in slot.parameters()}
        held = [p for p in parameters if p.grad is not None]
        squares = {id(p): float((p.grad.detach().double() ** 2).sum()) for p in held}
        seed = math.fsum(squares[id(p)] for p in held if id(p) in own)
        self.samples.append((math.fsum(squares.values()) - seed, seed))

    def check(self, evidence, steps=None):
        """The evidence is of the newest of these samples, each once."""
        assert evidence.samples + evidence.dropped <= len(self.samples)
        newest = self.samples[-evidence.samples :]
        host, seed = (math.fsum(column) for column in zip(*newest))
        wanted = math.sqrt(seed / evidence.samples) / (math.sqrt(host / evidence.samples) + 1e-8)
        assert abs(evidence.ratio - wanted) <= 1e-6 * wanted
        if steps is not None:
            assert (evidence.samples, evidence.optimizer_steps) == (steps, steps)


def documented(client):
    """The blocks of Python in a client's section of docs/clients.md."""
    text = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "clients.md").read_text("utf-8")
    section = text.partition(f"\n## {client}\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)


def host_of(module):
    """The host's parameters and buffers by name."""
    return {name: value.clone() for name, value in module.state_dict().items() if ".slot." not in f".{name}"}


def differences(one, other):
    """Names whose values differ in a bit, in nested states; an empty list where there are none."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else ["tensor"]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"keys {set(one) ^ set(other)}"]
        return [f"{key}.{found}" for key in one for found in differences(one[key], other[key])]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return ["length"]
        return [f"{i}.{found}" for i, (a, b) in enumerate(zip(one, other)) for found in differences(a, b)]
    return [] if one == other or (one != one and other != other) else [f"{one!r} is not {other!r}"]
