"""Small learning tasks that need no download, each with a host that is too small for it and one slot.

What the readiness and the growth benchmark train. Data are split three ways: to train on, to be looked at
by the gate (its probe), and to say afterwards whether the verdict was right (the truth).

``TASKS`` are the five that limits and rules were settled on. Those that nothing was ever tuned on are in
new_tasks.py, and which sets there are stands at its end.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from bench.optimizers import ADAMW, OPTIMIZERS
from seedtriton import SeedSlot

Data = tuple[Tensor, Tensor]


class Residual(nn.Module):
    """``x + contract(relu(expand(x)))``, linear or convolutional."""

    def __init__(self, features: int, hidden: int, make: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.expand, self.contract = make(features, hidden), make(hidden, features)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.contract(torch.relu(self.expand(x)))


def convolution(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Perceptron(nn.Module):
    """Linear, ReLU, slot, linear."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.first, self.slot, self.last = nn.Linear(inputs, width), SeedSlot(), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.slot(torch.relu(self.first(x))))


class Convolutional(nn.Module):
    """Two convolutions, the slot behind the second, a linear layer on the mean over the picture."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, stride=2)
        self.slot, self.last = SeedSlot(), nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.slot(torch.relu(self.second(torch.relu(self.first(x)))))
        return self.last(x.mean(dim=(2, 3)))


class Characters(nn.Module):
    """One causal transformer block over characters, the slot between attention and head."""

    def __init__(self, symbols: int, length: int, width: int) -> None:
        super().__init__()
        self.symbol, self.place = nn.Embedding(symbols, width), nn.Parameter(torch.randn(length, width) * 0.1)
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.slot, self.out, self.last = SeedSlot(), nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        h = self.symbol(x) + self.place
        q, k, v = self.mix(self.norm(h)).chunk(3, dim=-1)
        h = h + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.last(self.out(self.slot(h)))


def classification_losses(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of each sample, [n]; the mean over the characters of a sequence."""
    losses = nn.functional.cross_entropy(output.flatten(0, -2), target.flatten(), reduction="none")
    return losses.view(len(target), -1).mean(dim=1)


def squared_errors(output: Tensor, target: Tensor) -> Tensor:
    """Squared error of each sample, [n]."""
    return (output - target).square().flatten(1).mean(dim=1)


def largest_is_right(output: Tensor, target: Tensor) -> Tensor:
    """Whether the largest of the last dimension is the target."""
    return output.argmax(dim=-1) == target


@dataclasses.dataclass(frozen=True)
class Task:
    """One task: data, host, and what fits into its slot."""

    name: str
    train: Data
    probe: Data
    truth: Data
    host_of: Callable[[int], nn.Module]  # by its width, which is also the features of the slot
    width: int
    layer: Callable[[int, int], nn.Module] = nn.Linear  # what a seed for it is built of
    losses: Callable[[Tensor, Tensor], Tensor] = classification_losses
    right: Callable[[Tensor, Tensor], Tensor] | None = largest_is_right  # of each answer; None where none can be
    batch: int = 64
    lr: float = 3e-3
    optimizer: str = ADAMW
    warm_steps: int = 300  # the host alone
    hidden: int = 32  # of the usual seed

    def make_host(self) -> nn.Module:
        """The host, with one empty slot called "slot"."""
        return self.host_of(self.width)

    def seed(self, hidden: int | None = None) -> nn.Module:
        """The usual seed: a residual block."""
        return Residual(self.width, hidden or self.hidden, self.layer)

    def trained_by(self, optimizer: str) -> Task:
        """The same task with another optimizer, at the learning rate that goes with it."""
        lr = OPTIMIZERS[optimizer].lr
        return dataclasses.replace(self, optimizer=optimizer, lr=self.lr if lr is None else lr)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """What trains ``model``."""
        return OPTIMIZERS[self.optimizer].make(model.parameters(), lr=self.lr)

    def batches(self, random_seed: int) -> BatchStream:
        """Batches for ever, drawn by ``random_seed``."""
        return BatchStream(self.train, self.batch, random_seed)

    def loss(self, model: nn.Module, data: Data) -> Tensor:
        """Mean loss of ``model`` on ``data``, 0-dim."""
        return self.losses(model(data[0]), data[1]).mean()

    def sample_losses(self, model: nn.Module, data: Data) -> Tensor:
        """Loss of each sample in eval mode, without gradient; [n]."""
        return self.losses(_outputs(model, data), data[1])

    def accuracy(self, model: nn.Module, data: Data) -> float | None:
        """Share of right answers; None where no answer is right or wrong, as in a regression."""
        if self.right is None:
            return None
        return self.right(_outputs(model, data), data[1]).double().mean().item()

    def widened(self, factor: int) -> Task:
        """The same task with a host ``factor`` times as wide."""
        return dataclasses.replace(self, width=factor * self.width)

    def warmed(self, steps: int) -> Task:
        """The same task with a host that trains alone for ``steps``."""
        return dataclasses.replace(self, warm_steps=steps)

    def with_shuffled_labels(self, random_seed: int) -> Task:
        """The same inputs with labels that have nothing to do with them, on all three parts."""
        generator = torch.Generator().manual_seed(random_seed)

        def shuffled(data: Data) -> Data:
            inputs, labels = data
            mixed = labels.flatten()[torch.randperm(labels.numel(), generator=generator)].view_as(labels)
            return inputs, mixed

        parts = {name: shuffled(getattr(self, name)) for name in ("train", "probe", "truth")}
        return dataclasses.replace(self, **parts)


def _outputs(model: nn.Module, data: Data) -> Tensor:
    """In eval mode, without gradient; the mode is put back."""
    training = model.training
    model.eval()
    with torch.no_grad():
        outputs: Tensor = model(data[0])
    model.train(training)
    return outputs


class BatchStream:
    """An endless stream of random batches, the same for the same random seed."""

    def __init__(self, data: Data, size: int, random_seed: int) -> None:
        self._data, self._size = data, size
        self._generator = torch.Generator().manual_seed(random_seed)

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> Data:
        index = torch.randint(len(self._data[1]), (self._size,), generator=self._generator)
        return self._data[0][index], self._data[1][index]


def parts_of(inputs: Tensor, targets: Tensor, sizes: tuple[int, int, int]) -> dict[str, Data]:
    """To train on, to probe and for the truth, one after the other."""
    names = ("train", "probe", "truth")
    return dict(zip(names, zip(inputs.split(list(sizes)), targets.split(list(sizes)))))


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits in random order: 64 pixels from 0 to 1, and which digit."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(pixels, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]


def digits_mlp() -> Task:
    """scikit-learn's handwritten digits; host 64-6-10."""
    parts = parts_of(*digits(), (1000, 398, 399))
    return Task("digits MLP", **parts, host_of=lambda width: Perceptron(64, width, 10), width=6)


def digits_cnn() -> Task:
    """The same digits as pictures; two convolutions of 6 channels."""
    pixels, labels = digits()
    parts = parts_of(pixels.view(-1, 1, 8, 8), labels, (1000, 398, 399))
    return Task(
        "digits CNN", **parts, host_of=Convolutional, width=6, layer=convolution, hidden=16, warm_steps=400,
    )  # fmt: skip


def spirals() -> Task:
    """Two spirals of one and three quarter turns, with noise; host 2-12-2."""
    generator = torch.Generator().manual_seed(0)
    count = 3000
    label = torch.randint(2, (count,), generator=generator)
    turn = torch.rand(count, generator=generator).sqrt() * 3.5 * math.pi
    angle = turn + label * math.pi
    noise = torch.randn(count, 2, generator=generator) * 0.02
    points = torch.stack([angle.cos(), angle.sin()], dim=1) * (turn / (3.5 * math.pi)).unsqueeze(1) + noise
    parts = parts_of(points * 2, label, (1000, 1000, 1000))
    return Task("spirals", **parts, host_of=lambda width: Perceptron(2, width, 2), width=12)


def regression() -> Task:
    """A sum of sines of three random directions of eight inputs, as growing-network papers use; host 8-10-1."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3000, 8, generator=generator)
    directions = torch.randn(8, 3, generator=generator) / 8**0.5
    targets = (2.0 * inputs @ directions).sin().sum(dim=1, keepdim=True)
    parts = parts_of(inputs, targets, (2000, 500, 500))
    return Task(
        "regression", **parts, host_of=lambda width: Perceptron(8, width, 1), width=10, losses=squared_errors,
        right=None,
    )  # fmt: skip


def characters() -> Task:
    """The next character of Python's own help texts; one transformer block of width 24 on 32 characters."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))[:120_000]
    symbols = sorted(set(text))
    codes = torch.tensor([symbols.index(symbol) for symbol in text])
    length = 32
    rows = codes[: len(codes) // (length + 1) * (length + 1)].view(-1, length + 1)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    held = 400
    parts = parts_of(rows[:, :-1], rows[:, 1:], (len(rows) - 2 * held, held, held))
    return Task(
        "characters", **parts, host_of=lambda width: Characters(len(symbols), length, width), width=24,
        batch=32, hidden=48, warm_steps=400,
    )  # fmt: skip


TASKS: dict[str, Callable[[], Task]] = {
    "digits_mlp": digits_mlp,
    "digits_cnn": digits_cnn,
    "spirals": spirals,
    "regression": regression,
    "characters": characters,
}
