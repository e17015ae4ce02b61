"""From the ring to evidence: all that a read needs in one copy, perhaps still under way, then a sample per row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.evidence import Sample, SeedEvidence, collect_evidence
from .progress import Progress, SeedFacts
from .row import ELEMENTS, EXPLODING, EXTRA, LIVE, QUANTITIES, SUMSQ, TENSORS, VANISHING


class Latest(NamedTuple):
    """What ``GradientMonitor.latest`` returns.

    Attributes:
        evidence: by seed; empty until the first copy has arrived.
        age: optimizer steps since it left the device; None when nothing has arrived or no optimizer is known.
    """

    evidence: dict[str, SeedEvidence]
    age: int | None


@torch.no_grad()
def pack(ring: Tensor, count: Tensor, since: Tensor, progress: Sequence[Tensor]) -> Tensor:
    """Everything that a read needs, float64 on the ring's device: count, since, ``Progress.packed``, the ring."""
    parts = [count.view(1).double(), since.double(), *progress, ring.view(-1)]
    return torch.cat([part.to(ring.device) for part in parts])


class Unpacked(NamedTuple):
    """What was packed.

    Attributes:
        written: samples ever.
        since: the first that counts, of each segment.
        facts: of each seed, by name.
        rows: of the ring, flat.
    """

    written: int
    since: Sequence[int]
    facts: Mapping[str, SeedFacts]
    rows: Sequence[float]


@dataclass(frozen=True)
class Reader:
    """How a packed ring is read.

    Attributes:
        window: rows of the ring.
        columns: of each row.
        eps: added to the host's norm in the ratio.
        host_floor: host norm below which the ratio is undefined.
        vanishing: whether vanishing tensors were counted.
        exploding: whether exploding ones were.
    """

    window: int
    columns: int
    eps: float
    host_floor: float
    vanishing: bool
    exploding: bool

    def unpacked(
        self, packed: Sequence[float], seeds: Mapping[str, Sequence[Tensor]], progress: Progress
    ) -> Unpacked:
        """What this process has measured, and knows of every seed.

        Args:
            packed: the numbers of ``pack``, on the host.
            seeds: the parameters of every seed, in the order of the segments.
            progress: steps taken and marks.
        """
        segments = 1 + len(seeds)
        ring = len(packed) - self.window * self.columns * QUANTITIES
        known = progress.unpacked(packed[1 + segments : ring], list(seeds))
        facts = {name: progress.facts(name, parameters, known[name]) for name, parameters in seeds.items()}
        return Unpacked(int(packed[0]), [int(value) for value in packed[1 : 1 + segments]], facts, packed[ring:])

    def evidence(self, found: Unpacked, progress: Progress) -> dict[str, SeedEvidence]:
        """The evidence of every seed, by name; the rows have a column for each segment and no others."""
        count, since, facts, rows = found
        segments = len(since)
        evidence = {}
        for index, name in enumerate(facts, start=1):
            first = max(since[index], count - self.window)
            samples = [self._sample(rows, number % self.window, index, segments) for number in range(first, count)]
            told = progress.told(name, facts[name], samples, first)
            evidence[name] = collect_evidence(name, samples, eps=self.eps, host_floor=self.host_floor, **told)
        return evidence

    def _sample(self, rows: Sequence[float], row: int, segment: int, segments: int) -> Sample:
        host = row * segments * QUANTITIES
        seed = host + segment * QUANTITIES
        return Sample(
            host_sumsq=rows[host + SUMSQ],
            seed_sumsq=rows[seed + SUMSQ],
            host_tensors=_count(rows[host + TENSORS]),
            seed_tensors=_count(rows[seed + TENSORS]),
            host_elements=_count(rows[host + ELEMENTS]),
            seed_elements=_count(rows[seed + ELEMENTS]),
            live_tensors=_count(rows[seed + LIVE]),
            gain=rows[seed + EXTRA],
            skipped=rows[host + EXTRA] != 0.0,
            seed_vanishing=_count(rows[seed + VANISHING]) if self.vanishing else None,
            seed_exploding=_count(rows[seed + EXPLODING]) if self.exploding else None,
        )


def _count(number: float) -> float:
    """A count as an int, if it is one: of a tensor that is cut, parts are live or not."""
    return int(number) if number.is_integer() else number


class Transit:
    """A copy of a packed ring on its way to the host; pinned and asynchronous on a GPU, there at once on a CPU."""

    def __init__(self, packed: Tensor, names: tuple[str, ...], steps: int) -> None:
        self.names, self.steps = names, steps
        self._event = None
        if packed.device.type == "cpu":
            self.buffer = packed
            return
        self.buffer = torch.empty(packed.shape, dtype=packed.dtype, device="cpu", pin_memory=True)
        self.buffer.copy_(packed, non_blocking=True)
        self._event = torch.get_device_module(packed.device).Event()
        self._event.record()

    def arrived(self) -> bool:
        """Whether the copy is complete; never waits."""
        return self._event is None or bool(self._event.query())
