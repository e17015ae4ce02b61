"""Tasks that no limit and no rule was tuned on: other hosts, losses and host states than those of tasks.py.

Nothing here may be looked at to choose a constant of the library: then it would belong to the others. One was: that a
seed which overshoots gets a narrower trust region was found on the converged regression. The converged
hosts have trained ten times as long as usual; one of them, and the host of diabetes, has nothing left to gain by
growing, and blends that are forced on it do harm. Which sets of tasks there are stands at the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from bench.tasks import TASKS, Perceptron, Task, digits, digits_mlp, parts_of, regression, squared_errors
from seedtriton import SeedSlot

ROWS_OF_DIGITS = (1000, 398, 399)  # of each part


class Recurrent(nn.Module):
    """A GRU over a sequence, the slot behind it at every time, a linear layer on the last."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.first, self.slot = nn.GRU(inputs, width, batch_first=True), SeedSlot()
        self.last = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.slot(self.first(x)[0])[:, -1])


class Autoencoder(nn.Module):
    """Pixels to a few features and back, with a LayerNorm before the slot and a hidden layer behind it."""

    def __init__(self, pixels: int, width: int) -> None:
        super().__init__()
        self.first, self.norm, self.slot = nn.Linear(pixels, width), nn.LayerNorm(width), SeedSlot()
        self.back, self.last = nn.Linear(width, 2 * width), nn.Linear(2 * width, pixels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.slot(nn.functional.gelu(self.norm(self.first(x))))
        return self.last(nn.functional.gelu(self.back(x)))


class Block(nn.Module):
    """A pre-norm transformer block of two heads, with Dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.mix, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.between, self.drop = nn.LayerNorm(width), nn.Dropout(0.1)
        self.expand, self.contract = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, places, width = x.shape
        heads = self.mix(self.before(x)).view(n, places, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*heads)
        x = x + self.drop(self.out(mixed.transpose(1, 2).flatten(2)))
        return x + self.drop(self.contract(nn.functional.gelu(self.expand(self.between(x)))))


class Patches(nn.Module):
    """16 patches of 2 x 2 pixels, a transformer block, the slot, a linear layer on the mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch, self.place = nn.Linear(4, width), nn.Parameter(torch.randn(16, width) * 0.1)
        self.first, self.slot = Block(width), SeedSlot()
        self.norm, self.last = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.slot(self.first(self.patch(x) + self.place))).mean(dim=1))


class TwoViews(nn.Module):
    """An encoder of both views of a picture, one after the other in one batch; BatchNorm behind the slot."""

    def __init__(self, pixels: int, width: int, outputs: int = 16) -> None:
        super().__init__()
        self.first, self.slot, self.norm = nn.Linear(pixels, width), SeedSlot(), nn.BatchNorm1d(width)
        self.last = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 2, pixels] to [n, 2, outputs], of length 1."""
        found = self.last(torch.relu(self.norm(self.slot(torch.relu(self.first(x.flatten(0, 1)))))))
        return nn.functional.normalize(found, dim=-1).view(len(x), 2, -1)


class SetNetwork(nn.Module):
    """A linear layer on every element and the slot behind it, the mean and the largest over the set, two layers."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.first, self.slot = nn.Linear(inputs, width), SeedSlot()
        self.pooled, self.last = nn.Linear(2 * width, width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.slot(torch.tanh(self.first(x)))
        return self.last(torch.tanh(self.pooled(torch.cat([x.mean(dim=1), x.amax(dim=1)], dim=-1))))


def huber_losses(output: Tensor, target: Tensor) -> Tensor:
    """Huber's loss of each sample, [n]."""
    return nn.functional.smooth_l1_loss(output, target, reduction="none").flatten(1).mean(dim=1)


def binary_losses(output: Tensor, target: Tensor) -> Tensor:
    """Binary cross entropy of each sample, [n]; the mean over its labels."""
    return nn.functional.binary_cross_entropy_with_logits(output, target, reduction="none").mean(dim=1)


def sign_is_right(output: Tensor, target: Tensor) -> Tensor:
    """Whether each label is above one half where it should be."""
    return (output > 0) == (target > 0.5)


COMPARED = 64  # samples that are told from each other; as many as in a batch


def contrastive_losses(output: Tensor, target: Tensor) -> Tensor:
    """InfoNCE of each sample, [n]: its second view among those of its block, and the other way round.

    ``target`` says which picture it is: a batch drawn with replacement may have one twice, and it is no stranger to
    itself. In blocks, because the loss grows with the number of strangers.
    """
    losses = []
    for views, picture in zip(output.split(COMPARED), target.split(COMPARED)):
        alike = views[:, 0] @ views[:, 1].T / 0.2
        itself = (picture[:, None] == picture[None, :]).fill_diagonal_(False)
        alike, own = alike.masked_fill(itself, -torch.inf), alike.diagonal()
        losses.append((alike.logsumexp(0) + alike.logsumexp(1)) / 2 - own)
    return torch.cat(losses)


class PairedTask(Task):
    """A task whose truth is which inputs belong together: labels are shuffled by taking pairs apart."""

    def with_shuffled_labels(self, random_seed: int) -> Task:
        generator = torch.Generator().manual_seed(random_seed)

        def shuffled(views: Tensor) -> Tensor:
            return torch.stack([views[:, 0], views[torch.randperm(len(views), generator=generator), 1]], dim=1)

        parts = {name: getattr(self, name) for name in ("train", "probe", "truth")}
        return dataclasses.replace(self, **{name: (shuffled(views), which) for name, (views, which) in parts.items()})


def digits_rows() -> Task:
    """The digits row by row, from top to bottom; a GRU of 6 units."""
    pixels, labels = digits()
    parts = parts_of(pixels.view(-1, 8, 8), labels, ROWS_OF_DIGITS)
    return Task("digits GRU", **parts, host_of=lambda width: Recurrent(8, width, 10), width=6)


def denoising() -> Task:
    """The digits out of noise and holes; an autoencoder over 8 features, squared error."""
    pixels, _ = digits()
    generator = torch.Generator().manual_seed(0)
    seen = (torch.rand(pixels.shape, generator=generator) > 0.25) * pixels
    parts = parts_of(seen + 0.2 * torch.randn(pixels.shape, generator=generator), pixels, ROWS_OF_DIGITS)
    return Task(
        "denoising", **parts, host_of=lambda width: Autoencoder(64, width), width=8, losses=squared_errors, right=None
    )


def digits_patches() -> Task:
    """The digits as 16 patches; one transformer block of width 8."""
    pixels, labels = digits()
    patches = pixels.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
    parts = parts_of(patches, labels, ROWS_OF_DIGITS)
    return Task("digits ViT", **parts, host_of=Patches, width=8, batch=32)


def multilabel() -> Task:
    """Six signs of products of two of eight inputs, one in twenty wrong; host 8-12-6, binary cross entropy."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4000, 8, generator=generator)
    pairs = torch.tensor([(0, 1), (2, 3), (4, 5), (6, 7), (0, 3), (2, 5)])
    signs = inputs[:, pairs].prod(dim=-1) > 0
    targets = (signs ^ (torch.rand(signs.shape, generator=generator) < 0.05)).float()
    parts = parts_of(inputs, targets, (3000, 500, 500))
    return Task(
        "multilabel", **parts, host_of=lambda width: Perceptron(8, width, 6), width=12, losses=binary_losses,
        right=sign_is_right,
    )  # fmt: skip


def contrastive() -> Task:
    """Two views of each digit, moved by up to a pixel and with noise, to be found among those of 63 others."""
    pixels, _ = digits()
    generator = torch.Generator().manual_seed(0)
    trained, held = pixels[:1000].repeat(4, 1), pixels[1000 : 1000 + 6 * 2 * COMPARED]
    pictures = torch.cat([trained, held]).view(-1, 8, 8)
    views = []
    for _ in range(2):
        moves = torch.randint(-1, 2, (len(pictures), 2), generator=generator).tolist()
        moved = torch.stack([picture.roll(move, (0, 1)) for picture, move in zip(pictures, moves)]).flatten(1)
        views.append(moved + 0.1 * torch.randn(moved.shape, generator=generator))
    which = torch.cat([torch.arange(1000).repeat(4), torch.arange(1000, 1000 + len(held))])
    parts = parts_of(torch.stack(views, dim=1), which, (len(trained), len(held) // 2, len(held) // 2))
    return PairedTask(
        "contrastive", **parts, host_of=lambda width: TwoViews(64, width), width=8, losses=contrastive_losses,
        right=None, batch=COMPARED,
    )  # fmt: skip


def sets() -> Task:
    """Twelve points in a plane: how far apart are the two nearest and the two farthest; Huber's loss."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(3000, 12, 2, generator=generator)
    apart = torch.cdist(points, points)
    nearest = (apart + 1e3 * torch.eye(12)).amin(dim=(1, 2))
    targets = torch.stack([4 * nearest, apart.amax(dim=(1, 2))], dim=1)
    parts = parts_of(points, targets, (2000, 500, 500))
    return Task(
        "sets", **parts, host_of=lambda width: SetNetwork(2, width, 2), width=8, losses=huber_losses, right=None
    )


def diabetes() -> Task:
    """scikit-learn's diabetes: 442 patients, and more noise than a small host can explain; host 10-8-1."""
    from sklearn.datasets import load_diabetes

    inputs, targets = (torch.tensor(part, dtype=torch.float32) for part in load_diabetes(return_X_y=True))
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    inputs, targets = inputs[order] / inputs.std(), ((targets - targets.mean()) / targets.std())[order, None]
    parts = parts_of(inputs, targets, (222, 110, 110))
    return Task(
        "diabetes", **parts, host_of=lambda width: Perceptron(10, width, 1), width=8, losses=squared_errors,
        right=None, batch=32,
    )  # fmt: skip


def converged_digits() -> Task:
    """The digits' perceptron, four times as wide and after ten times as many steps alone: it lacks nothing."""
    return dataclasses.replace(digits_mlp().widened(4).warmed(3000), name="converged digits")


def converged_regression() -> Task:
    """The regression's host after ten times as many steps alone: it learns no more, but is still too small."""
    return dataclasses.replace(regression().warmed(3000), name="converged regression")


NEW_TASKS: dict[str, Callable[[], Task]] = {
    "digits_gru": digits_rows,
    "denoising": denoising,
    "digits_vit": digits_patches,
    "multilabel": multilabel,
    "contrastive": contrastive,
    "sets": sets,
    "diabetes": diabetes,
    "converged_digits": converged_digits,
    "converged_regression": converged_regression,
}
ALL_TASKS = TASKS | NEW_TASKS
SETS = {"first": TASKS, "new": NEW_TASKS, "all": ALL_TASKS}  # what --tasks takes beside the names of tasks


def chosen(words: Iterable[str]) -> list[str]:
    """Names of tasks for names of tasks and of sets, each once."""
    return list(dict.fromkeys(name for word in words for name in SETS.get(word, (word,))))
