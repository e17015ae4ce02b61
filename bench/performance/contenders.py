"""Who measures gradients, and how: the library and everything that a script could use in its place.

Each contender says what it computes, so that it is compared with float64 before it is timed; whether it waits for
the device; and whether a CUDA graph can hold it. Code of other systems is not copied: it is written anew from the
description of their arithmetic, and labelled so.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from seedtriton import FlatGradients, GradientMonitor
from seedtriton.gradients import ops
from seedtriton.gradients.row import CLIP_COEFFICIENT, CLIP_EPS, SUMMARY_HEAD, SUMSQ, TOTAL_NORM

WINDOW = 128
EPS = 1e-8
# How far an answer may be from float64 before it is another quantity. SINGLE sums up to 124 M fp32 numbers one after
# the other in fp32 (1.3e-2 on GPT-2, torch 2.13 on one thread), ROUNDED also rounds norms to bf16 or fp16. The error
# itself stands in the report beside the time.
EXACT, SINGLE, ROUNDED = 1e-6, 3e-2, 6e-2
CLIPPED = 1e-2  # of the sum of squares after clipping, every element of which was rounded to its dtype


class WrongAnswer(Exception):  # noqa: N818 - a verdict on a contender
    """A contender that does not compute what it says."""


@dataclass
class Work:
    """One set of gradients; segment 0 is the host."""

    gradients: list[Tensor]
    segments: list[int]
    num_segments: int = 1
    max_norm: float = math.inf

    @property
    def device(self) -> torch.device:
        return self.gradients[0].device

    def parameters(self) -> list[nn.Parameter]:
        """New parameters with these gradients; their values are one element each, expanded."""
        found = []
        for gradient in self.gradients:
            blank = torch.zeros((), dtype=gradient.dtype, device=gradient.device)
            found.append(nn.Parameter(blank.expand(gradient.shape)))
            found[-1].grad = gradient
        return found

    def flat(self) -> Tensor:
        return torch.cat([gradient.reshape(-1) for gradient in self.gradients])


@dataclass
class Call:
    """What is timed: ``run`` without arguments; ``answer`` makes numbers by name of what it returned.

    ``outputs`` are filled with NaN before a check, ``clips`` is what it scales in place, and ``inner`` stands
    for it where a graph is captured, because a graph cannot hold the replay of another.
    """

    run: Callable[[], Any]
    answer: Callable[[Any], dict[str, Any]] = lambda total: {"total": total}
    outputs: Sequence[Tensor] = ()
    clips: Sequence[Tensor] = ()
    inner: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Contender:
    """``missing`` says why it cannot run here, or None; ``about`` goes into the report's notes."""

    name: str
    build: Callable[[Work], Call]
    tolerance: float = EXACT
    syncs: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    capturable: bool = True
    about: str = ""
    missing: Callable[[], str | None] = field(default=lambda: None)

    @property
    def ours(self) -> bool:
        return self.name.startswith("seedtriton")


# -- ours ----------------------------------------------------------------------------------------------------------


def _monitor(work: Work, flat: bool = False) -> tuple[GradientMonitor, list[nn.Parameter]]:
    parameters = work.parameters()
    groups: list[list[nn.Parameter]] = [[] for _ in range(work.num_segments)]
    for parameter, segment in zip(parameters, work.segments):
        groups[segment].append(parameter)
    seeds = {f"seed{index}": group for index, group in enumerate(groups[1:])}
    kept = FlatGradients(parameters) if flat else None
    monitor = GradientMonitor(groups[0], seeds, window=WINDOW, flat=kept)
    monitor.max_norm = work.max_norm
    return monitor, parameters


def _read(monitor: GradientMonitor) -> dict[str, Any]:
    row = monitor.ring[(int(monitor.count) - 1) % WINDOW]
    return {
        "sums": row[:, SUMSQ],
        "total": monitor.summary[TOTAL_NORM],
        "coefficient": monitor.summary[CLIP_COEFFICIENT],
        "ratio": monitor.summary[SUMMARY_HEAD + 1 : SUMMARY_HEAD + monitor.ring.shape[1]],
    }


def _measure(work: Work, flat: bool = False) -> Call:
    monitor, _ = _monitor(work, flat)
    return Call(monitor.measure, lambda _: _read(monitor), (monitor.ring, monitor.summary))


def _flat_measure(work: Work) -> Call:
    return _measure(work, flat=True)


def _measure_and_clip(work: Work, flat: bool = False) -> Call:
    monitor, parameters = _monitor(work, flat)

    def run() -> Tensor:
        monitor.measure()
        return monitor.clip_grad_norm_(work.max_norm)

    clips = [parameter.grad if parameter.grad is not None else parameter for parameter in parameters]
    return Call(run, outputs=(monitor.ring, monitor.summary), clips=clips)


def _flat_measure_and_clip(work: Work) -> Call:
    return _measure_and_clip(work, flat=True)


def _sumsq(work: Work) -> Call:
    segments = [0] * len(work.gradients)
    return Call(lambda: ops.segmented_sumsq(work.gradients, segments, 1)[0].sqrt())


def _flat_sumsq(work: Work) -> Call:
    flat = [work.flat()]
    return Call(lambda: ops.segmented_sumsq(flat, [0], 1)[0].sqrt())


def _graphed(build: Callable[[Work], Call]) -> Callable[[Work], Call]:
    """The same as one replay of a CUDA graph."""

    def make(work: Work) -> Call:
        call = build(work)
        for _ in range(3):
            call.run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call.run()

        def run() -> Any:
            graph.replay()
            return found

        return replace(call, run=run, inner=call.run)

    return make


# -- torch ---------------------------------------------------------------------------------------------------------


def _total_norm(work: Work) -> Call:
    return Call(lambda: nn.utils.get_total_norm(work.gradients, foreach=True))


def _clip(work: Work, foreach: bool = True) -> Call:
    parameters = work.parameters()
    run = lambda: nn.utils.clip_grad_norm_(parameters, work.max_norm, foreach=foreach)  # noqa: E731
    return Call(run, clips=work.gradients)


def _foreach_norm(work: Work) -> Call:
    return Call(lambda: torch.stack(torch._foreach_norm(work.gradients)).square().sum().sqrt())


def squares(gradients: Sequence[Tensor]) -> Tensor:
    """Sum of squares of each tensor, fp32 [n], by the best native operation of this torch."""
    if hasattr(torch, "_foreach_powsum"):
        return torch.stack(torch._foreach_powsum(gradients, 2, dtype=torch.float32))
    return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).square()


def epilogue(
    sums: Tensor, segments: Tensor, start: Tensor, ring: Tensor, count: Tensor, max_norm: Tensor
) -> tuple[Tensor, ...]:
    """All that a measurement of ours leaves behind, but the counts of tensors, by operations of torch.

    ``start`` is fp64 zeros [segments]; ``ring`` is fp64 [window, segments, 2], of which one row is written;
    ``max_norm`` is 0-dim on the device, because a compiler may make new code for each new number.
    """
    by_segment = start.index_add(0, segments, sums.double())
    norms = by_segment.sqrt()
    ratio = norms[1:] / (norms[0] + EPS)
    total = by_segment.sum().sqrt()
    coefficient = (max_norm / (total + CLIP_EPS)).clamp(max=1.0)
    row = torch.stack([by_segment, by_segment.isfinite().double()], dim=1)
    ring.index_copy_(0, count.remainder(ring.shape[0]).view(1), row.unsqueeze(0))
    count.add_(1)
    return by_segment, ratio, total, coefficient


@lru_cache(maxsize=1)
def _compiled_epilogue() -> Callable[..., tuple[Tensor, ...]]:
    import torch._dynamo

    # One version for each of 1, 2 and more segments and for one tensor, all of them twice, because memory is
    # poisoned by a mode that Dynamo looks at: more than the 8 that it allows by itself.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(epilogue, dynamic=True, fullgraph=True)


def _native(work: Work, finish: Callable[..., tuple[Tensor, ...]] = epilogue) -> Call:
    options: dict[str, Any] = {"dtype": torch.float64, "device": work.device}
    segments = torch.tensor(work.segments, device=work.device)
    start = torch.zeros(work.num_segments, **options)
    ring = torch.zeros(WINDOW, work.num_segments, 2, **options)
    count = torch.zeros((), dtype=torch.int64, device=work.device)
    max_norm = torch.tensor(work.max_norm, **options)

    def run() -> tuple[Tensor, ...]:
        return finish(squares(work.gradients), segments, start, ring, count, max_norm)

    return Call(run, lambda found: dict(zip(("sums", "ratio", "total", "coefficient"), found)), (ring,))


def _native_compiled(work: Work) -> Call:
    return _native(work, _compiled_epilogue())


def _flat_norm(work: Work) -> Call:
    flat = work.flat()
    return Call(lambda: torch.linalg.vector_norm(flat, dtype=torch.float32))


def _flat_dot(work: Work) -> Call:
    flat = work.flat()
    return Call(lambda: torch.dot(flat, flat).sqrt())


def _one_by_one(work: Work) -> Call:
    """Per tensor in fp32, as FSDP1 does."""
    norm = torch.linalg.vector_norm
    return Call(lambda: norm(torch.stack([norm(gradient, dtype=torch.float32) for gradient in work.gradients])))


def _doubles(work: Work) -> Call:
    """As DeepSpeed ZeRO and ColossalAI: every tensor copied to fp64."""

    def run() -> float:
        total = torch.zeros((), dtype=torch.float64, device=work.device)
        for gradient in work.gradients:
            total += torch.linalg.vector_norm(gradient.double()) ** 2
        return total.item() ** 0.5

    return Call(run)


def _items(gradients: Sequence[Tensor]) -> float:
    return math.sqrt(sum(gradient.norm().item() ** 2 for gradient in gradients))


def _item_by_item(work: Work) -> Call:
    return Call(lambda: _items(work.gradients))


def _item_clip(work: Work) -> Call:
    """The loop that scripts write by hand: it asks the host, and leaves small gradients alone."""

    def run() -> float:
        total = _items(work.gradients)
        if total > work.max_norm:
            torch._foreach_mul_(work.gradients, work.max_norm / (total + CLIP_EPS))
        return total

    return Call(run, clips=work.gradients)


# -- others --------------------------------------------------------------------------------------------------------


def _esper(work: Work, health: bool = False) -> Call:
    """esper-lite's collector: per group fp64 copies (for health of clones), then the ratio and its EMA on the host."""
    groups: list[list[Tensor]] = [[] for _ in range(work.num_segments)]
    for gradient, segment in zip(work.gradients, work.segments):
        groups[segment].append(gradient)
    elements = [sum(map(Tensor.numel, group)) for group in groups]
    averages: dict[int, float] = {}

    def collect(group: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        tensors = [gradient.clone() for gradient in group] if health else group
        norms = torch.stack(torch._foreach_norm([tensor.double() for tensor in tensors]))
        total = norms.square().sum().sqrt()
        if not health:
            return total, None
        vanishing = (norms < 1e-7).double().mean()
        exploding = ((norms > 10.0) | norms.isfinite().logical_not()).double().mean()
        return total, (1.0 - 0.5 * vanishing - 0.8 * exploding).clamp(0.0, 1.0)

    def run() -> list[float]:
        found = [collect(group) for group in groups]
        if work.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        norms = [found[0][0].item()]
        for seed, (total, of_health) in enumerate(found[1:], start=1):
            host, own = norms[0], total.item()
            norms.append(own)
            if of_health is not None:
                of_health.item()
            ratio = (own / elements[seed] ** 0.5) / (host / elements[0] ** 0.5 + EPS)
            averages[seed] = 0.9 * averages.get(seed, ratio) + 0.1 * ratio
        return norms

    return Call(run, lambda norms: {"sums": [norm**2 for norm in norms]})


def _esper_health(work: Work) -> Call:
    return _esper(work, health=True)


def _nemo(work: Work) -> Call:
    from bench.performance import nemo_style

    return Call(lambda: nemo_style.total_norm(work.gradients))


def _needs_triton() -> str | None:
    """The launch of another system's kernel needs a GPU, or the interpreter."""
    if not importlib.util.find_spec("triton"):
        return "triton: not installed"
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "needs a GPU, or TRITON_INTERPRET=1"


PUBLISHED = "our re-implementation of the published algorithm"
CUDA = ("cuda",)

TASKS: dict[str, list[Contender]] = {
    "norm": [
        Contender("seedtriton", _sumsq, about="segmented_sumsq and a root"),
        Contender("seedtriton measure", _measure, about="the whole telemetry"),
        Contender("seedtriton flat", _flat_sumsq, about="gradients in one buffer"),
        Contender("seedtriton graph", _graphed(_sumsq), devices=CUDA),
        Contender("P1 get_total_norm", _total_norm, ROUNDED),
        Contender("P1 _foreach_norm", _foreach_norm, ROUNDED, about="_foreach_norm, stack, square, sum"),
        Contender("P5 vector_norm(flat)", _flat_norm, SINGLE),
        Contender("P5 dot(flat, flat)", _flat_dot, ROUNDED),
        Contender("P7 double loop", _doubles, syncs=True, capturable=False),
        Contender("P8 fp32 loop", _one_by_one, SINGLE),
        Contender("P10 NeMo-style", _nemo, syncs=True, capturable=False, missing=_needs_triton, about=PUBLISHED),
        Contender("P12 item loop", _item_by_item, ROUNDED, True, capturable=False),
    ],
    "clip": [
        Contender("seedtriton", _measure_and_clip, about="measure, then clip_grad_norm_"),
        Contender("seedtriton flat", _flat_measure_and_clip, about="gradients in one buffer"),
        Contender("seedtriton graph", _graphed(_measure_and_clip), devices=CUDA),
        Contender("P1 clip_grad_norm_", _clip, ROUNDED),
        Contender("P8 clip_grad_norm_ loop", lambda work: _clip(work, foreach=False), ROUNDED),
        Contender("P12 item loop", _item_clip, ROUNDED, True, capturable=False),
    ],
    "telemetry": [
        Contender("seedtriton", _measure, about="measure"),
        Contender("seedtriton flat", _flat_measure, about="gradients in one buffer"),
        Contender("seedtriton graph", _graphed(_measure), devices=CUDA),
        Contender("P2 native", _native, SINGLE, about="foreach and an eager epilogue"),
        Contender("P3 native compiled", _native_compiled, SINGLE, devices=CUDA, about="P2, its epilogue compiled"),
        Contender("P4 native graph", _graphed(_native_compiled), SINGLE, devices=CUDA, about="P3 in a CUDA graph"),
        Contender("P6 esper-lite dual", _esper, syncs=True, capturable=False, about=PUBLISHED),
        Contender("P6 esper-lite health", _esper_health, syncs=True, capturable=False, about=PUBLISHED),
    ],
}
# What an answer has to hold, at least.
REQUIRED = {"norm": {"total"}, "clip": {"total"}, "telemetry": {"sums"}}


def truth_of(work: Work) -> dict[str, Any]:
    """The right answers, every element squared and summed in float64."""
    sums = torch.zeros(work.num_segments, dtype=torch.float64)
    for gradient, segment in zip(work.gradients, work.segments):
        # In pieces, because a copy of everything in float64 would not fit beside it.
        for piece in gradient.reshape(-1).split(1 << 26):
            sums[segment] += piece.double().square().sum().item()
    norms = sums.sqrt()
    total = float(sums.sum().sqrt())
    coefficient = min(1.0, work.max_norm / (total + CLIP_EPS))
    return {"sums": sums, "total": total, "ratio": norms[1:] / (norms[0] + EPS), "coefficient": coefficient}


@contextmanager
def poisoned(call: Call) -> Any:
    """NaN in every output, and in all memory that torch hands out: what is not written is seen."""
    for output in call.outputs:
        output.fill_(math.nan)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def error_of(task: str, call: Call, found: Any, truth: dict[str, Any], tolerance: float) -> float:
    """The worst relative error of an answer; raises WrongAnswer when there is none, or it is too far off."""
    answer = call.answer(found)
    missing = REQUIRED[task] - answer.keys()
    if missing:
        raise WrongAnswer(f"no {sorted(missing)} in the answer")
    errors = {name: _relative(value, truth[name]) for name, value in answer.items()}
    for name, error in errors.items():
        # "not below": NaN is wrong.
        if not error <= tolerance:
            raise WrongAnswer(f"{name} is off by {error:.1e}, allowed is {tolerance:.0e}")
    if task == "clip":
        left = sum(float(truth_of(Work([tensor], [0]))["sums"]) for tensor in call.clips)
        wanted = (truth["total"] * truth["coefficient"]) ** 2
        if not abs(left / wanted - 1) <= CLIPPED + 2 * tolerance:
            raise WrongAnswer(f"the clipped gradients have a norm of {left**0.5:.6g}, not {wanted**0.5:.6g}")
    return max(errors.values())


def _relative(value: Any, true: Any) -> float:
    # float32 results are compared as what they are; 0-dim tensors, lists and floats alike.
    value, true = (torch.as_tensor(each, dtype=torch.float64, device="cpu").reshape(-1) for each in (value, true))
    if value.shape != true.shape:
        raise WrongAnswer(f"{value.numel()} numbers where {true.numel()} were expected")
    return float(((value - true).abs() / true.abs()).max()) if true.numel() else 0.0
