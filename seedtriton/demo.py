"""The demo: a small host on real data, a healthy seed and one that was sabotaged on purpose.

What happens is decided by the library's defaults and the gates; nothing here sets a metric.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import torch

from .core.lifecycle import RESTING, Stage
from .core.verdict import Verdict
from .demo_tasks import HEALTHY, SABOTAGED, TASKS, Task
from .growth.controller import GrowthController
from .report.events import Event
from .report.plots import lifecycle_figure
from .report.runs import read_events
from .report.sinks import JsonLinesSink

PATIENCE = 20  # epochs behind the host after which the script gives a refused seed up


@dataclasses.dataclass
class Result:
    """What a run ended with."""

    accuracies: list[float | None]
    losses: list[float]
    verdicts: list[tuple[int, Verdict]]  # with the epoch


Show = Callable[[int, "float | None", float, "GrowthController | None"], None]


def train(task: Task, seed: int, *, grow: bool, sinks: list[Any], show: Show) -> Result:
    """Train the host, with seeds or without; the same batches either way. ``show`` speaks where no table is drawn."""
    torch.manual_seed(seed)
    model = task.host()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    growth = GrowthController(model, optimizer, evaluate=task.losses, sinks=sinks) if grow else None
    batches = torch.Generator().manual_seed(seed)
    result = Result([], [], [])
    with contextlib.nullcontext(False) if growth is None else growth.live() as drawn:
        for epoch in range(1, task.epochs + 1):
            if growth is not None and epoch == task.germination + 1:
                _germinate(growth, task)
            for batch in torch.randperm(len(task.train[1]), generator=batches).split(task.batch):
                task.loss(model, batch).backward()
                if growth is not None:
                    growth.measure()
                optimizer.step()
                optimizer.zero_grad()
            accuracy, loss = task.evaluate(model)
            result.accuracies.append(accuracy)
            result.losses.append(loss)
            if growth is not None:
                for verdict in growth.end_epoch(accuracy=accuracy, loss=loss):
                    result.verdicts.append((epoch, verdict))
                    _give_up(growth, verdict)
            if not drawn:
                show(epoch, accuracy, loss, growth)
    return result


def _germinate(growth: GrowthController, task: Task) -> None:
    growth.germinate(HEALTHY, task.seed(), probe=task.probes[HEALTHY])
    growth.germinate(SABOTAGED, task.seed(), probe=task.probes[SABOTAGED], add_to_optimizer=False)


def _give_up(growth: GrowthController, verdict: Verdict) -> None:
    lifecycle = growth.slots[verdict.seed].lifecycle
    if not verdict and lifecycle.stage is Stage.TRAINING and lifecycle.epochs_in_stage >= PATIENCE:
        reasons = "; ".join(check.name for check in verdict.failed)
        growth.prune(verdict.seed, f"refused for {PATIENCE} epochs: {reasons}")


def run(folder: str = "runs/demo", seed: int = 0, task: str = "digits") -> int:
    """Run the demo; 0 when the healthy seed was fossilised and the sabotaged one never passed G2.

    Raises:
        ConfigurationError: something that the task needs is not installed.
        OSError: the folder cannot be written.
    """
    # Two OpenMP threads on a busy machine make these small matrices 5 to 270 times slower.
    torch.set_num_threads(1)
    chosen = TASKS[task](seed)
    place = pathlib.Path(folder)
    events_file = place / "events.jsonl"
    events_file.unlink(missing_ok=True)
    sink = JsonLinesSink(events_file)
    begun = time.perf_counter()
    grown = train(chosen, seed, grow=True, sinks=[sink, _say_moves], show=_say_line)
    print("the same host, the same batches, without growth ...")
    plain = train(chosen, seed, grow=False, sinks=[], show=_quiet)
    for epoch, (accuracy, loss) in enumerate(zip(plain.accuracies, plain.losses), start=1):
        sink({"event": "baseline", "epoch": epoch, "accuracy": accuracy, "loss": loss})
    sink.close()
    events = read_events(events_file)
    _closing_table(chosen, grown, plain, events, time.perf_counter() - begun)
    _picture(events, place / "lifecycle.png", f"Two seeds behind one host: {chosen.title}, {chosen.epochs} epochs")
    print(f"events   {events_file}")
    return int(not _as_expected(events))


def _as_expected(events: list[Event]) -> bool:
    fossil = any(event["event"] == "fossilized" and event["seed"] == HEALTHY for event in events)
    asked = [event for event in events if event["event"] == "gate" and event["gate"] == "G2"]
    refused = [event["passed"] for event in asked if event["seed"] == SABOTAGED]
    return fossil and bool(refused) and not any(refused)


def _picture(events: list[Event], path: pathlib.Path, title: str) -> None:
    try:
        lifecycle_figure(events, path, title)
    except ImportError:
        print("picture  not drawn: matplotlib is not installed (pip install 'seedtriton[demo]')")
    else:
        print(f"picture  {path}")


def _say_moves(event: Event) -> None:
    if event["event"] == "germinated":
        place = "in the optimizer" if event["in_optimizer"] else "in NO optimizer (sabotage)"
        print(f"epoch {event['epoch']:3d}  {event['seed']}: germinated, {event['parameters']} parameters, {place}")
    elif event["event"] == "stage" and event["source"] not in map(str, RESTING):
        print(f"epoch {event['epoch']:3d}  {event['seed']}: {event['source']} -> {event['target']}")


def _quiet(epoch: int, accuracy: float | None, loss: float, growth: GrowthController | None) -> None:
    """Say nothing."""


def _say_line(epoch: int, accuracy: float | None, loss: float, growth: GrowthController | None) -> None:
    if epoch % 5 == 0:
        known = "" if accuracy is None else f"accuracy {accuracy:.3f}  "
        print(f"epoch {epoch:3d}  {known}loss {loss:.3f}  {_seeds_in_words(growth)}")


def _seeds_in_words(growth: GrowthController | None) -> str:
    if growth is None:
        return ""
    slots = growth.slots.items()
    return "  ".join(f"{name} {slot.stage} a={slot.alpha_value:.2f}" for name, slot in slots if slot.seed is not None)


def _closing_table(task: Task, grown: Result, plain: Result, events: list[Event], seconds: float) -> None:
    print()
    print("verdicts")
    last_refusal: dict[tuple[str, str], tuple[int, Verdict]] = {}
    for epoch, verdict in grown.verdicts:
        if verdict:
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
    at, worst = grown.losses[task.germination - 1], max(grown.losses[task.germination :])
    print(f"\n{'':22}{'accuracy    ' if task.classes else ''}loss")
    for name, result in (("with growth", grown), ("without, same steps", plain)):
        accuracy = "" if result.accuracies[-1] is None else f"{result.accuracies[-1]:8.4f}  "
        print(f"  {name:20}{accuracy}{result.losses[-1]:.4f}")
    print(f"  loss at germination {at:.4f}, highest afterwards {worst:.4f}; {seconds:.1f} s\n")
