"""A script of a user who checks types: read by mypy --strict and pyright against the installed wheel, never run.

Each ``type: ignore`` below is a mistake that both have to see: where one is not needed they say so.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from seedtriton import (
    AlphaSchedule,
    BatchMeans,
    BlendProbe,
    Check,
    Gate,
    GateThresholds,
    GradientMonitor,
    GrowthController,
    Lifecycle,
    PairProbe,
    ProgressThreshold,
    QualityGates,
    SeedEvidence,
    SeedSlot,
    SeedStatus,
    SeedtritonError,
    Stage,
    TrustRegion,
    Verdict,
    insert_slot,
    load_grown,
    merge_fossils,
    ops,
    restore_slots,
)
from seedtriton.report import Event, JsonLinesSink, numbers
from seedtriton.testing import assert_isolated


class Host(nn.Module):
    """A network with one slot."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.slot = SeedSlot()
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Features through the slot."""
        features: Tensor = self.last(self.slot(self.first(x)))
        return features


def losses(model: nn.Module) -> Tensor:
    """The loss of each sample."""
    found: Tensor = model(torch.randn(16, 4)).square().mean(dim=1)
    return found


def means(model: nn.Module) -> BatchMeans:
    """The losses of two batches."""
    return BatchMeans([losses(model).mean().item()] * 2, [16, 16])


def told(event: Event) -> None:
    """A sink."""
    print(numbers(event))


def batches() -> Iterator[Tensor]:
    """Three of them."""
    yield from torch.randn(3, 16, 4)


def train() -> dict[str, Stage]:
    """The loop of the README."""
    model = Host()
    optimizer = torch.optim.AdamW(model.parameters())
    ratio = ProgressThreshold(early=0.02, mid=0.05, late=0.1)
    growth = GrowthController(
        model,
        optimizer,
        thresholds=GateThresholds(min_gradient_ratio=ratio).without("min_samples"),
        schedule=AlphaSchedule(steps=10, curve="cosine"),
        evaluate=losses,
        total_epochs=3,
        auto_advance=[Gate.G1, Gate.G2],
        sinks=[told, JsonLinesSink("events.jsonl")],
    )
    first: Verdict = growth.germinate("slot", lambda: nn.Linear(8, 8), isolation=TrustRegion(rho=0.1), lr=1e-3)
    for batch in batches():
        model(batch).sum().backward()
        growth.measure()
        total: Tensor = growth.clip_grad_norm_(1.0)
        print(total)
        optimizer.step()
        optimizer.zero_grad()
    verdicts: list[Verdict] = growth.end_epoch(accuracy=0.5)
    refused: list[tuple[str, Check]] = [(verdict.seed, check) for verdict in verdicts for check in verdict.failed]
    known: dict[str, SeedEvidence] = growth.evidence()
    blend_gain: float | None = known["slot"].blend_gain
    one: BlendProbe = growth.probe("slot", means)
    two: PairProbe = growth.probe(["slot", "other"])
    print(first, refused, blend_gain, one.gain, two.interaction, growth.epoch, growth.progress)
    assert_isolated(lambda i: None, growth, steps=2)
    growth.end_epoch(accuracy="high")  # type: ignore[arg-type]
    growth.germinate(3, nn.Linear(8, 8))  # type: ignore[arg-type]
    GateThresholds(min_samples="many")  # type: ignore[arg-type]
    growth.no_such_name()  # type: ignore[attr-defined]
    return {name: slot.stage for name, slot in growth.slots.items()}


def deploy(path: str) -> list[str]:
    """Save, load and make plain modules of it."""
    saved = torch.load(path, weights_only=True)
    model = Host()
    restore_slots(model, saved["growth"], {"slot": lambda: nn.Linear(8, 8)})
    grown: nn.Module = load_grown(Host(), saved["model"], {"slot": nn.Linear(8, 8)})
    return merge_fossils(grown)


def without_slots(model: Host) -> float | None:
    """A monitor alone, and the operations underneath."""
    monitor = GradientMonitor(host=model.first, seeds={"last": model.last})
    monitor.measure()
    sums: Tensor = ops.segmented_sumsq([parameter.detach() for parameter in model.parameters()], [0, 0, 1, 1], 2)
    print(sums, insert_slot(model, "first").name)
    return monitor.read()["last"].ratio


def ask() -> bool:
    """Gates and stages without torch."""
    life = Lifecycle()
    try:
        life.move(Stage.GERMINATED, "because")
        verdict = QualityGates().judge(Stage.BLENDING, SeedStatus(seed="slot", stage=life.stage))
    except SeedtritonError:
        return False
    return verdict.passed
