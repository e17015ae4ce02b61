"""From the ring to evidence: all that a read needs in one copy, perhaps still under way, then a sample per row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.evidence import Sample, SeedEvidence, collect_evidence
from .progress import Progress
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


@dataclass(frozen=True)
class Reader:
    """How a packed ring is read.

    Attributes:
        window: rows of the ring.
        eps: added to the host's norm in the ratio.
        host_floor: host norm below which the ratio is undefined.
        vanishing: whether vanishing tensors were counted.
        exploding: whether exploding ones were.
    """

    window: int
    eps: float
    host_floor: float
    vanishing: bool
    exploding: bool

    def evidence(
        self, packed: Sequence[float], seeds: Mapping[str, Sequence[Tensor]], progress: Progress
    ) -> dict[str, SeedEvidence]:
        """The evidence of every seed, by name.

        Args:
            packed: the numbers of ``pack``, on the host.
            seeds: the parameters of every seed, in the order of the segments.
            progress: steps taken and marks.
        """
        segments = 1 + len(seeds)
        count = int(packed[0])
        since = [int(value) for value in packed[1 : 1 + segments]]
        ring = len(packed) - self.window * segments * QUANTITIES
        known = progress.unpacked(packed[1 + segments : ring], list(seeds))
        rows = packed[ring:]
        evidence = {}
        for index, (name, parameters) in enumerate(seeds.items()):
            first = max(since[index + 1], count - self.window)
            samples = [
                self._sample(rows, number % self.window, index + 1, segments) for number in range(first, count)
            ]
            evidence[name] = collect_evidence(
                name,
                samples,
                parameters=sum(p.requires_grad and p.numel() > 0 for p in parameters),
                eps=self.eps,
                host_floor=self.host_floor,
                frozen=not any(parameter.requires_grad for parameter in parameters),
                **progress.facts(name, parameters, samples, first, known[name]),
            )
        return evidence

    def _sample(self, rows: Sequence[float], row: int, segment: int, segments: int) -> Sample:
        host = row * segments * QUANTITIES
        seed = host + segment * QUANTITIES
        return Sample(
            host_sumsq=rows[host + SUMSQ],
            seed_sumsq=rows[seed + SUMSQ],
            host_tensors=int(rows[host + TENSORS]),
            seed_tensors=int(rows[seed + TENSORS]),
            host_elements=int(rows[host + ELEMENTS]),
            seed_elements=int(rows[seed + ELEMENTS]),
            live_tensors=int(rows[seed + LIVE]),
            gain=rows[seed + EXTRA],
            skipped=rows[host + EXTRA] != 0.0,
            seed_vanishing=int(rows[seed + VANISHING]) if self.vanishing else None,
            seed_exploding=int(rows[seed + EXPLODING]) if self.exploding else None,
        )


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
