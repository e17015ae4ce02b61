"""The demo: a small host on real digits, a healthy seed and one that was sabotaged on purpose.

What happens is decided by the library's defaults and the gates; nothing here sets a metric.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .core.errors import ConfigurationError
from .core.lifecycle import RESTING, Stage
from .core.verdict import Verdict
from .growth.controller import GrowthController
from .growth.slot import SeedSlot
from .report.events import Event
from .report.plots import lifecycle_figure, read_events
from .report.sinks import JsonLinesSink

EPOCHS = 60
GERMINATION = 20  # epoch before which no seed is there
PATIENCE = 20  # epochs behind the host after which the script gives a refused seed up
HEALTHY, SABOTAGED = "healthy", "sabotaged"


class Host(nn.Module):
    """A convolutional classifier of 8x8 digits that is too small for them, with two places for seeds."""

    def __init__(self, channels: int = 6) -> None:
        """Make the layers and two empty slots, named after what the demo does to them."""
        super().__init__()
        self.first = nn.Conv2d(1, channels, 3, padding=1)
        self.sabotaged = SeedSlot()
        self.second = nn.Conv2d(channels, channels, 3, padding=1, stride=2)
        self.healthy = SeedSlot()
        self.last = nn.Linear(channels, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [batch, 1, 8, 8] in, logits [batch, 10] out."""
        x = self.sabotaged(torch.relu(self.first(pixels)))
        x = self.healthy(torch.relu(self.second(x)))
        return torch.as_tensor(self.last(x.mean(dim=(2, 3))))


class Seed(nn.Module):
    """A residual block: x + conv(relu(conv(x)))."""

    def __init__(self, channels: int, hidden: int = 16) -> None:
        """Make both layers."""
        super().__init__()
        self.expand = nn.Conv2d(channels, hidden, 3, padding=1)
        self.contract = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Features in, features of the same shape out."""
        return x + torch.as_tensor(self.contract(torch.relu(self.expand(x))))


@dataclasses.dataclass
class Digits:
    """scikit-learn's bundled handwritten digits, split into training and validation."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]

    @classmethod
    def load(cls, seed: int) -> Digits:
        """1300 images to train on, 497 to validate, split by ``seed``."""
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise ConfigurationError("the demo needs scikit-learn: pip install 'seedtriton[demo]'") from None
        pixels, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        x = torch.tensor(pixels, dtype=torch.float32)[order].view(-1, 1, 8, 8) / 16
        y = torch.tensor(labels)[order]
        return cls((x[:1300], y[:1300]), (x[1300:], y[1300:]))

    def losses(self, model: nn.Module) -> Tensor:
        """Loss of each validation image: what the gates may ask."""
        pixels, labels = self.validation
        return nn.functional.cross_entropy(model(pixels), labels, reduction="none")


@dataclasses.dataclass
class Result:
    """What a run ended with."""

    accuracies: list[float]
    losses: list[float]
    verdicts: list[tuple[int, Verdict]]  # with the epoch


Show = Callable[[int, float, float, "GrowthController | None"], None]


def train(data: Digits, seed: int, *, grow: bool, sinks: list[Any], show: Show, epochs: int = EPOCHS) -> Result:
    """Train the host, with seeds or without; the same batches either way."""
    torch.manual_seed(seed)
    model = Host()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    growth = GrowthController(model, optimizer, evaluate=data.losses, sinks=sinks) if grow else None
    batches = torch.Generator().manual_seed(seed)
    result = Result([], [], [])
    pixels, labels = data.train
    for epoch in range(1, epochs + 1):
        if growth is not None and epoch == GERMINATION + 1:
            _germinate(growth, model)
        for batch in torch.randperm(len(labels), generator=batches).split(64):
            loss = nn.functional.cross_entropy(model(pixels[batch]), labels[batch])
            loss.backward()
            if growth is not None:
                growth.measure()
            optimizer.step()
            optimizer.zero_grad()
        accuracy, validation_loss = evaluate(model, data)
        result.accuracies.append(accuracy)
        result.losses.append(validation_loss)
        if growth is not None:
            for verdict in growth.end_epoch(accuracy=accuracy, loss=validation_loss):
                result.verdicts.append((epoch, verdict))
                _give_up(growth, verdict)
        show(epoch, accuracy, validation_loss, growth)
    return result


def evaluate(model: nn.Module, data: Digits) -> tuple[float, float]:
    """Validation accuracy and loss."""
    pixels, labels = data.validation
    model.eval()
    with torch.no_grad():
        logits = model(pixels)
    model.train()
    accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
    return accuracy, nn.functional.cross_entropy(logits, labels).item()


def _germinate(growth: GrowthController, model: Host) -> None:
    channels = model.second.out_channels
    growth.germinate(HEALTHY, Seed(channels), probe=torch.zeros(4, channels, 4, 4))
    growth.germinate(SABOTAGED, Seed(channels), probe=torch.zeros(4, channels, 8, 8), add_to_optimizer=False)


def _give_up(growth: GrowthController, verdict: Verdict) -> None:
    lifecycle = growth.slots[verdict.seed].lifecycle
    if not verdict.passed and lifecycle.stage is Stage.TRAINING and lifecycle.epochs_in_stage >= PATIENCE:
        reasons = "; ".join(check.name for check in verdict.failed)
        growth.prune(verdict.seed, f"refused for {PATIENCE} epochs: {reasons}")


def run(folder: str = "runs/demo", seed: int = 0) -> int:
    """Run the demo; 0 when the healthy seed was fossilised and the sabotaged one never passed G2."""
    # Two OpenMP threads on a busy machine make these small matrices 5 to 270 times slower.
    torch.set_num_threads(1)
    place = pathlib.Path(folder)
    events_file = place / "events.jsonl"
    events_file.unlink(missing_ok=True)
    sink = JsonLinesSink(events_file)
    data = Digits.load(seed)
    begun = time.perf_counter()
    with _progress() as (show, say):
        grown = train(data, seed, grow=True, sinks=[sink, _say_moves(say)], show=show)
        say("the same host, the same batches, without growth ...")
        plain = train(data, seed, grow=False, sinks=[], show=lambda *_: None)
    for epoch, accuracy in enumerate(plain.accuracies, start=1):
        sink({"event": "baseline", "epoch": epoch, "accuracy": accuracy, "loss": plain.losses[epoch - 1]})
    sink.close()
    events = read_events(events_file)
    _closing_table(grown, plain, events, time.perf_counter() - begun)
    _picture(events, place / "lifecycle.png")
    print(f"events   {events_file}")
    return int(not _as_expected(events))


def _as_expected(events: list[Event]) -> bool:
    fossil = any(event["event"] == "fossilized" and event["seed"] == HEALTHY for event in events)
    asked = [event for event in events if event["event"] == "gate" and event["gate"] == "G2"]
    refused = [event["passed"] for event in asked if event["seed"] == SABOTAGED]
    return fossil and bool(refused) and not any(refused)


def _picture(events: list[Event], path: pathlib.Path) -> None:
    try:
        lifecycle_figure(events, path, f"Two seeds behind one host: handwritten digits, {EPOCHS} epochs")
    except ImportError:
        print("picture  not drawn: matplotlib is not installed (pip install 'seedtriton[demo]')")
    else:
        print(f"picture  {path}")


def _say_moves(say: Callable[[str], None]) -> Callable[[Event], None]:
    def sink(event: Event) -> None:
        if event["event"] == "germinated":
            place = "in the optimizer" if event["in_optimizer"] else "in NO optimizer (sabotage)"
            say(f"epoch {event['epoch']:3d}  {event['seed']}: germinated, {event['parameters']} parameters, {place}")
        elif event["event"] == "stage" and event["source"] not in map(str, RESTING):
            say(f"epoch {event['epoch']:3d}  {event['seed']}: {event['source']} -> {event['target']}")

    return sink


@contextlib.contextmanager
def _progress() -> Iterator[tuple[Show, Callable[[str], None]]]:
    """A bar where rich is installed and somebody looks; otherwise a line every five epochs."""
    try:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        rich = False
    else:
        rich = sys.stdout.isatty()
    if not rich:

        def show_line(epoch: int, accuracy: float, loss: float, growth: GrowthController | None) -> None:
            if epoch % 5 == 0:
                print(f"epoch {epoch:3d}  accuracy {accuracy:.3f}  loss {loss:.3f}  {_seeds_in_words(growth)}")

        yield show_line, print
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("growing", total=EPOCHS, state="")

        def show_bar(epoch: int, accuracy: float, loss: float, growth: GrowthController | None) -> None:
            state = f"accuracy {accuracy:.3f}  {_seeds_in_words(growth)}"
            bar.update(task, completed=epoch, state=state)

        yield show_bar, lambda text: bar.console.print(text, highlight=False)


def _seeds_in_words(growth: GrowthController | None) -> str:
    if growth is None:
        return ""
    slots = growth.slots.items()
    return "  ".join(f"{name} {slot.stage} a={slot.alpha_value:.2f}" for name, slot in slots if slot.seed is not None)


def _closing_table(grown: Result, plain: Result, events: list[Event], seconds: float) -> None:
    print()
    print("verdicts")
    last_refusal: dict[tuple[str, str], tuple[int, Verdict]] = {}
    for epoch, verdict in grown.verdicts:
        if verdict.passed:
            print(f"  epoch {epoch:3d}  {verdict.seed:10s} {verdict.gate} passed  -> {verdict.target}")
            last_refusal.pop((verdict.seed, str(verdict.gate)), None)
        else:
            last_refusal[verdict.seed, str(verdict.gate)] = (epoch, verdict)
    for epoch, verdict in last_refusal.values():
        print(f"  epoch {epoch:3d}  {verdict.seed:10s} {verdict.gate} refused, for the last time, because")
        for check in verdict.failed:
            print(f"               {check.name}: {check.reason}")
    for event in events:
        if event["event"] == "pruned":
            print(f"  epoch {event['epoch']:3d}  {event['seed']:10s} pruned: {event['reason']}")
    at, worst = grown.losses[GERMINATION - 1], max(grown.losses[GERMINATION:])
    print("\n                      accuracy    loss")
    print(f"  with growth           {grown.accuracies[-1]:.4f}  {grown.losses[-1]:.4f}")
    print(f"  without, same steps   {plain.accuracies[-1]:.4f}  {plain.losses[-1]:.4f}")
    print(f"  loss at germination {at:.4f}, highest afterwards {worst:.4f}; {seconds:.1f} s\n")
