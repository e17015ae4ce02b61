"""What the demo grows: hosts that are too small for real data, each with two slots, "healthy" and "sabotaged"."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .core.errors import ConfigurationError
from .growth.slot import SeedSlot

HEALTHY, SABOTAGED = "healthy", "sabotaged"


class Residual(nn.Module):
    """A seed of two layers: x + layer(relu(layer(x)))."""

    def __init__(self, width: int, hidden: int, layer: Callable[[int, int], nn.Module] = nn.Linear) -> None:
        """Make both layers."""
        super().__init__()
        self.expand, self.contract = layer(width, hidden), layer(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Features in, features of the same shape out."""
        return x + torch.as_tensor(self.contract(torch.relu(self.expand(x))))


@dataclasses.dataclass(frozen=True)
class Task:
    """Data, a host for it, and what fits into its slots.

    Attributes:
        title: of the picture.
        train: inputs and targets.
        validation: likewise.
        host: makes the host.
        seed: makes a seed for either slot.
        probes: features of each slot, to try the seed on.
        epochs: of the whole run.
        germination: epoch behind which the seeds come.
        batch: samples of one.
        classes: whether answers are right or wrong, so that there is an accuracy; else the loss alone tells.
    """

    title: str
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    host: Callable[[], nn.Module]
    seed: Callable[[], nn.Module]
    probes: dict[str, Tensor]
    epochs: int
    germination: int
    batch: int
    classes: bool

    def losses(self, model: nn.Module) -> Tensor:
        """Loss of each validation sample, [n]: what the gates may ask."""
        return _losses(model(self.validation[0]), self.validation[1])

    def loss(self, model: nn.Module, chosen: Tensor) -> Tensor:
        """Mean loss of some samples to train on, 0-dim."""
        inputs, targets = self.train
        return _losses(model(inputs[chosen]), targets[chosen]).mean()

    def evaluate(self, model: nn.Module) -> tuple[float | None, float]:
        """Validation accuracy, where there is one, and loss."""
        inputs, targets = self.validation
        model.eval()
        with torch.no_grad():
            answers = model(inputs)
        model.train()
        accuracy = (answers.argmax(dim=-1) == targets).double().mean().item() if self.classes else None
        return accuracy, _losses(answers, targets).mean().item()


def _losses(answers: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each sample; of a text the mean over its characters."""
    losses = nn.functional.cross_entropy(answers.flatten(0, -2), targets.flatten(), reduction="none")
    return losses.view(len(targets), -1).mean(dim=1)


class DigitHost(nn.Module):
    """A convolutional classifier of 8x8 digits."""

    def __init__(self, channels: int) -> None:
        """Make the layers and two empty slots."""
        super().__init__()
        self.first = _conv(1, channels)
        self.sabotaged = SeedSlot()
        self.second = nn.Conv2d(channels, channels, 3, padding=1, stride=2)
        self.healthy = SeedSlot()
        self.last = nn.Linear(channels, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [batch, 1, 8, 8] in, logits [batch, 10] out."""
        x = self.sabotaged(torch.relu(self.first(pixels)))
        x = self.healthy(torch.relu(self.second(x)))
        return torch.as_tensor(self.last(x.mean(dim=(2, 3))))


def digits(seed: int) -> Task:
    """scikit-learn's handwritten digits, 1300 to train on and 497 to validate, split by ``seed``.

    Raises:
        ConfigurationError: no scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigurationError(
            "the demo with digits needs scikit-learn: pip install 'seedtriton[demo]'; `demo --task lm` needs nothing"
        ) from None
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x = torch.tensor(pixels, dtype=torch.float32)[order].view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)[order]
    channels = 6
    return Task(
        title="handwritten digits",
        train=(x[:1300], y[:1300]),
        validation=(x[1300:], y[1300:]),
        host=lambda: DigitHost(channels),
        seed=lambda: Residual(channels, 16, _conv),
        probes={HEALTHY: torch.zeros(4, channels, 4, 4), SABOTAGED: torch.zeros(4, channels, 8, 8)},
        epochs=60,
        germination=20,
        batch=64,
        classes=True,
    )


def _conv(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class LanguageHost(nn.Module):
    """A language model of characters: one causal attention and no layer behind it."""

    def __init__(self, symbols: int, length: int, width: int) -> None:
        """Make the layers and two empty slots."""
        super().__init__()
        self.symbol, self.place = nn.Embedding(symbols, width), nn.Parameter(torch.randn(length, width) * 0.1)
        self.sabotaged = SeedSlot()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.healthy = SeedSlot()
        self.out, self.last = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, text: Tensor) -> Tensor:
        """Codes [batch, length] in, logits [batch, length, symbols] of the character behind each out."""
        h = self.sabotaged(self.symbol(text) + self.place)
        q, k, v = self.mix(self.norm(h)).chunk(3, dim=-1)
        h = self.healthy(h + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return torch.as_tensor(self.last(self.out(h)))


def language(seed: int) -> Task:
    """The next character of Python's own help texts: 60 000 characters, a sixth of them to validate, by ``seed``."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))[:60_000]
    symbols = {symbol: code for code, symbol in enumerate(sorted(set(text)))}
    length, width = 32, 24
    codes = torch.tensor([symbols[symbol] for symbol in text])
    rows = codes[: len(codes) // (length + 1) * (length + 1)].view(-1, length + 1)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    held = len(rows) // 6
    probe = torch.zeros(4, length, width)
    return Task(
        title="characters of Python's help texts",
        train=(rows[held:, :-1], rows[held:, 1:]),
        validation=(rows[:held, :-1], rows[:held, 1:]),
        host=lambda: LanguageHost(len(symbols), length, width),
        seed=lambda: Residual(width, 48),
        probes={HEALTHY: probe, SABOTAGED: probe},
        epochs=36,
        germination=12,
        batch=32,
        classes=False,
    )


TASKS: dict[str, Callable[[int], Task]] = {"digits": digits, "lm": language}
