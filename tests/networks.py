"""Small networks and seeds that several tests share."""

import torch
from torch import nn

from seedtriton import SeedSlot


class Residual(nn.Module):
    def __init__(self, features, hidden=8, make=nn.Linear):
        super().__init__()
        self.expand, self.contract = make(features, hidden), make(hidden, features)

    def forward(self, x):
        return x + self.contract(torch.relu(self.expand(x)))


class Scaled(nn.Module):
    """Multiplies the features: towards 0 the squared output falls, away from it it rises."""

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x):
        return self.factor * x


def conv(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Mlp(nn.Module):
    shape = (6, 5)

    def __init__(self, after=None):
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.slot = SeedSlot()
        self.after = after or nn.Tanh()
        self.last = nn.Linear(7, 3)

    def forward(self, x):
        return self.last(self.after(self.slot(torch.tanh(self.first(x)))))

    def seed(self):
        return Residual(7)


class Cnn(nn.Module):
    """ReLU in place right behind the slot, batch norm, channels_last when the input is."""

    shape = (4, 3, 6, 6)

    def __init__(self):
        super().__init__()
        self.first = conv(3, 8)
        self.norm = nn.BatchNorm2d(8)
        self.slot = SeedSlot()
        self.relu = nn.ReLU(inplace=True)
        self.last = conv(8, 2)

    def forward(self, x):
        return self.last(self.relu(self.slot(self.norm(self.first(x)))))

    def seed(self):
        return Residual(8, make=conv)


class TransformerBlock(nn.Module):
    shape = (2, 5, 8)

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.slot = SeedSlot()
        self.feed = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        y = self.norm(x)
        x = self.slot(x + self.attention(y, y, y, need_weights=False)[0])
        return x + self.feed(x)

    def seed(self):
        return Residual(8)
