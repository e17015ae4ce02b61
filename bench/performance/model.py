"""GPU time on paper, for cards that nobody here has: launch, dependent trips, bytes over bandwidth, tail.

    python -m bench.performance.model            predictions for every row of the GPU report, into bench/results

A prediction is no measurement: it is written down before a GPU is seen, so that the first report of a real one tests
it. Figures of cards are public ones or estimates, and say which.
"""

from __future__ import annotations

import itertools
import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from bench import machine
from bench.performance import run, shapes
from bench.performance.contenders import TASKS, Contender
from bench.performance.run import Case
from seedtriton.kernels import _plan

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "results"


class Card(NamedTuple):
    """A GPU. Multiprocessors, datasheet bandwidth, L2, clock and fp64 lanes are the vendors' public figures.

    Attributes:
        name: as in tables.
        multiprocessors: or compute units.
        bandwidth: bytes per second of the datasheet.
        copy: fraction of it that a copy reaches, bytes read plus written, from published streams.
        l2: bytes.
        clock: Hz under load.
        doubles: fp64 operations per clock and multiprocessor.
        near: seconds of a trip to the L2, both partitions, from published microbenchmarks; an estimate.
        far: the same to memory.
        fence: seconds that a release and an acquire add to an atomic; an estimate.
        node: seconds of an empty kernel in a graph; an estimate.
        wavefront: threads of a warp.
        flops: fp32 per second outside tensor cores, of the datasheet.
    """

    name: str
    multiprocessors: int
    bandwidth: float
    copy: float
    l2: float
    clock: float
    doubles: int
    near: float
    far: float
    fence: float
    node: float
    wavefront: int = 32
    flops: float = 67e12

    @property
    def roof(self) -> float:
        """Bytes per second of a copy."""
        return self.bandwidth * self.copy


CARDS = (
    Card("H200", 132, 4.8e12, 0.90, 50e6, 1.75e9, 64, 0.27e-6, 0.65e-6, 0.5e-6, 2.0e-6),
    Card("H100 SXM", 132, 3.35e12, 0.90, 50e6, 1.75e9, 64, 0.27e-6, 0.65e-6, 0.5e-6, 2.0e-6),
    Card("A100 80GB", 108, 2.04e12, 0.86, 40e6, 1.41e9, 32, 0.20e-6, 0.50e-6, 0.5e-6, 2.0e-6, flops=19.5e12),
    Card("MI300X", 304, 5.3e12, 0.79, 256e6, 2.1e9, 64, 0.30e-6, 0.80e-6, 1.5e-6, 5.0e-6, 64, 163e12),
    Card("RTX 4090", 128, 1.008e12, 0.92, 72e6, 2.5e9, 2, 0.15e-6, 0.35e-6, 0.4e-6, 2.0e-6, flops=82e12),
)


class Design(NamedTuple):
    """What the kernels are. Counted in their compiled code; tests/bench/test_model.py compares what can be compared.

    Attributes:
        warps: of a program.
        step: bytes that a program reads per block.
        ahead: 128-bit loads of a thread in flight where an item has enough blocks.
        registers: per thread, at most.
        before: trips from the start of a program to its data.
        report: trips between its data and its end, where its tensor is not the last of a segment; one is an atomic.
        close: trips of the last program after its data, atomics among them, but for partial sums.
        atomics: of the last program.
        items_at_once: partial sums of a tensor that a program reads in one trip.
        tensors_at_once: sums of tensors that a program which closes a segment reads in one trip.
        doubles: fp64 operations of a program at the end of an item.
        scale_programs: of a scaling launch at most; None: one for each item.
    """

    warps: int = 4
    step: int = 4096
    ahead: int = 8
    registers: int = 72
    before: int = 1
    report: int = 2
    close: int = 8
    atomics: int = 3
    items_at_once: int = 1024
    tensors_at_once: int = 512
    doubles: int = 1200
    scale_programs: int | None = 2048


DESIGN = Design()
# Programs of which a multiprocessor holds at most, threads that it holds, registers that it has.
PROGRAMS, THREADS, REGISTERS = 32, 2048, 65536
# Seconds between the ends of a program and the start of its successor, and of a reduction over its warps.
DISPATCH, REDUCTION = 0.2e-6, 0.3e-6
# Seconds of a trip under load over one without.
LOADED = 1.5


class Items(NamedTuple):
    """A plan as the model needs it: bytes of each item, and how its tensors and segments are made of them."""

    sizes: Sequence[int]
    most_parts: int  # items of the largest tensor
    most_tensors: int  # of the largest segment


def items_of(sizes: Sequence[tuple[int, ...]], dtype: str, segments: Sequence[int], number: int) -> Items:
    kinds = [0 if dtype == "fp32" or (dtype == "mixed" and len(size) == 1) else 1 for size in sizes]
    plan = _plan.make_plan([math.prod(size) for size in sizes], kinds, segments, number)
    widths = [2 if kind else 4 for kind in plan.dtypes]
    return Items(
        [length * width for length, width in zip(plan.lengths, widths)],
        max(plan.parts),
        max(b - a for a, b in itertools.pairwise(plan.slot_starts)),
    )


def resident(card: Card, design: Design) -> int:
    """Programs that a multiprocessor holds."""
    threads = design.warps * card.wavefront
    return min(PROGRAMS, THREADS // threads, REGISTERS * card.wavefront // 32 // (design.registers * threads))


def _busy(card: Card, design: Design, items: Items, trips: int) -> float:
    """Seconds until every item is summed: by bandwidth, by the trips of the programs, or by fp64, whatever is last."""
    threads, at_once = design.warps * card.wavefront, card.multiprocessors * resident(card, design)
    flight = 16 * threads * min(design.ahead, max(1, max(items.sizes) // (16 * threads)))
    rounds = [math.ceil(size / flight) for size in items.sizes]
    fixed = trips * card.near + card.fence + REDUCTION + DISPATCH
    alone = fixed + max(rounds) * card.far
    together = sum(fixed + count * card.far * LOADED for count in rounds) / at_once
    doubles = len(items.sizes) * design.doubles / card.doubles / card.clock / card.multiprocessors
    # fp64 is in the way of nothing but itself while others load.
    return max(sum(items.sizes) / card.roof, together, doubles, alone) + card.far


def measure(card: Card, items: Items, row: bool = True, design: Design = DESIGN) -> float:
    """Seconds of one launch of the sums, with the row or without."""
    close = design.close if row else design.close - 4
    summed = math.ceil(items.most_parts / design.items_at_once) + math.ceil(items.most_tensors / design.tensors_at_once)
    tail = (close + summed) * card.near + design.atomics * card.fence
    return card.node + _busy(card, design, items, design.before + design.report) + tail


def scale(card: Card, items: Items, coefficient: float, design: Design = DESIGN) -> float:
    """Seconds of one launch that scales, or leaves at once where the coefficient is 1."""
    most = design.scale_programs or len(items.sizes)
    programs = min(len(items.sizes), most)
    waves = math.ceil(programs / (card.multiprocessors * resident(card, design)))
    # A program for each item asks for its segment and then for the coefficient; programs that go from item to item ask
    # for the coefficients alone before they leave.
    empty = card.node + card.far + waves * ((1 if design.scale_programs else 2) * card.near + DISPATCH)
    if coefficient == 1.0:
        return empty
    rounds = math.ceil(len(items.sizes) / most)
    return empty + 2 * sum(items.sizes) / card.roof + card.far + rounds * 2 * card.near


# -- others -----------------------------------------------------------------------------------------------------------

# Of the roof: what kernels of torch reach that read 16 bytes and 8 bytes per thread at once; estimates.
WIDE, NARROW = 0.9, 0.7
# Seconds of the CPU: an operation from Python; a wait for the device; estimates.
OPERATION, WAIT = 6e-6, 15e-6
CHUNK, BLOCKS, TENSORS = 65536, 320, 110  # of a launch of torch's multi_tensor_apply with 4 KB of arguments


class Work(NamedTuple):
    """A case in numbers."""

    tensors: int
    elements: int
    bytes: int
    chunks: int
    items: Items
    segments: int
    coefficient: float
    narrow: bool


def work_of(case: Case) -> Work:
    sizes = list(case.sizes) if case.sizes is not None else shapes.SHAPES[case.shape]()
    numels = [math.prod(size) for size in sizes]
    segments = shapes.segments_of(numels, case.segments, case.host_to_seeds)
    items = items_of(sizes, case.dtype, segments, case.segments)
    chunks = sum(math.ceil(numel / CHUNK) for numel in numels)
    return Work(
        len(sizes), sum(numels), sum(items.sizes), chunks, items, case.segments, case.coefficient, case.dtype != "fp32"
    )


def _foreach(card: Card, work: Work, passes: float = 1.0, extra: int = 0) -> float:
    """Seconds of launches of multi_tensor_apply: each drains before the next begins."""
    launches = max(math.ceil(work.chunks / BLOCKS), math.ceil(work.tensors / TENSORS))
    speed = card.roof * (NARROW if work.narrow else WIDE)
    return launches * (card.node + 2 * card.far) + extra * card.node + passes * work.bytes / speed


def _each(card: Card, work: Work, operations: int, passes: float, waits: int = 0) -> float:
    """Wall seconds of a loop over tensors: the CPU's or the GPU's, whichever is more."""
    on_cpu = work.tensors * operations * OPERATION + waits * WAIT
    on_gpu = work.tensors * operations * card.node + passes * work.bytes / (card.roof * WIDE)
    return max(on_cpu, on_gpu)


def _norm(card: Card, work: Work) -> float:
    cleanup = 2 + math.ceil(work.tensors / 400) + math.ceil(work.tensors / 128)  # zeros, root, stack, norm
    return _foreach(card, work, extra=cleanup + 1)


def _wide_pass(card: Card, work: Work) -> float:
    return card.node + 3 * card.far + work.bytes / (card.roof * 0.95)


def predict(card: Card, case: Case, contender: Contender) -> dict[str, float]:
    """{"gpu_us": ...}, or {"wall_us": ...} of what a CUDA graph cannot hold."""
    return _predict(card, work_of(case), case.task, contender)


def _predict(card: Card, work: Work, task: str, contender: Contender) -> dict[str, float]:
    seconds = _ours(card, work, task, contender.name) if contender.ours else _theirs(card, work, contender.name)
    return {"gpu_us" if contender.capturable else "wall_us": seconds * 1e6}


def _ours(card: Card, work: Work, task: str, name: str) -> float:
    if task == "norm" and name != "seedtriton measure":
        flat = Items(work.items.sizes, len(work.items.sizes), 1)
        return measure(card, flat if name == "seedtriton flat" else work.items, row=False) + card.node  # and its root
    found = measure(card, work.items)
    return found + scale(card, work.items, work.coefficient) if task == "clip" else found


def _theirs(card: Card, work: Work, name: str) -> float:
    width = work.bytes / max(work.elements, 1)
    if name.startswith("P1 clip"):
        return _norm(card, work) + 3 * card.node + _foreach(card, work, 2.0)
    if name.startswith("P1 "):
        return _norm(card, work)
    if name.startswith(("P2", "P3", "P4")):  # a dozen kernels of the epilogue, or three once compiled
        return _norm(card, work) + (12 if name.startswith("P2") else 3) * card.node
    if name.startswith("P5"):
        return _wide_pass(card, work) + (card.node if "dot" in name else 0.0)
    if name.startswith("P6"):  # bytes per element of its copies in fp64, and two waits for each segment
        copied = (width + 16) / width if "dual" in name else (width + 24) / width
        return _each(card, work, 1 if "dual" in name else 2, copied, 2 * work.segments) + _foreach(card, work, 0.0)
    if name.startswith("P7"):
        return _each(card, work, 4, (width + 16) / width, 1)
    if name.startswith("P8"):
        passes, clip = (1.0, 0) if "clip" not in name else (3.0, 1)
        return work.tensors * (1 + clip) * card.node + passes * work.bytes / (card.roof * WIDE) + 5 * card.node
    if name.startswith("P10"):  # scalar loads, four uploads, a sum of partial sums
        return 4 * WAIT + 6 * card.node + work.bytes / (card.roof * 0.45)
    if name.startswith("P12"):
        return _each(card, work, 1, 1.0 if work.coefficient == 1.0 else 3.0, work.tensors)
    raise ValueError(f"no prediction for {name!r}")


# -- a training step --------------------------------------------------------------------------------------------------


def step(card: Card, name: str) -> float:
    """Wall seconds of the training step of run.py: fp32 arithmetic, AdamW, and what ``name`` adds to them."""
    layers, width, vocabulary, length = run.BIG_STEP
    sizes = [(vocabulary, width), (vocabulary, width)]
    for _ in range(layers):
        sizes += [(3 * width, width), (3 * width,), (width, width), (width,), (4 * width, width), (4 * width,)]
        sizes += [(width, 4 * width), *5 * [(width,)]]
    work = work_of(Case("step", "", "fp32", 2, sizes=sizes))
    arithmetic = 6 * (work.elements - vocabulary * width) * 4 * length / (0.6 * card.flops)
    moved = 7 * work.bytes / card.roof  # AdamW reads four numbers and writes three
    if name.startswith("seedtriton"):
        added = measure(card, work.items) + scale(card, work.items, 1.0)
    elif name.startswith(("P1", "P2")):
        added = _norm(card, work) + _foreach(card, work, 2.0) + (12 if name.startswith("P2") else 3) * card.node
    else:
        added = 0.0
    return arithmetic + moved + added


# -- every row --------------------------------------------------------------------------------------------------------


def every_case() -> list[tuple[str, Case, list[Contender]]]:
    """What the GPU report measures: the task as its rows say it, the case, and who takes part."""
    found = []
    for part in run.PARTS:
        for case in run.cases(part) if part in TASKS else ():
            found.append((case.title, case, [one for one in TASKS[part] if "cuda" in one.devices]))
    for axis, points in run.growth_points(big=True, scale=None).items():
        for number, sizes, segments in points:
            for case, asked in run.growth_cases(axis, number, sizes, segments):
                found.append((f"growth of {axis}", case, asked))
    return found


def rows() -> list[dict[str, Any]]:
    """One for each row of the GPU report, with a prediction in µs for each card."""
    found: list[dict[str, Any]] = []
    for title, case, asked in every_case():
        work = work_of(case)
        for one in asked:
            told = {card.name: _predict(card, work, case.task, one) for card in CARDS}
            (kind,) = {key for each in told.values() for key in each}
            found.append(
                {"task": title, "shape": case.what if case.sizes is None else case.shape, "dtype": case.dtype,
                 "contender": one.name, "bytes": work.bytes * (3 if case.coefficient < 1.0 else 1), "time": kind}
                | {name: round(each[kind], 2) for name, each in told.items()}
            )  # fmt: skip
    for kind in ("foreach", "fused"):
        for name in run.STEPS:
            shape = run.step_shape(*run.BIG_STEP[:2], kind)
            found.append(
                {"task": "step", "shape": shape, "dtype": "fp32", "contender": name, "bytes": None, "time": "wall_us"}
                | {card.name: round(step(card, name) * 1e6, 1) for card in CARDS}
            )
    return found


# Goals of bench/NOTES.md, peer over ours: task, peer, shapes, dtypes, at least.
LARGE = ("GPT-2", "Llama-3-8B / 8", "200M + 2000 x 1K", "one 1B")
GOALS = (
    ("norm", "copy", LARGE, ("fp32", "bf16"), 0.90),
    ("norm", "copy", ("ResNet-50",), ("fp32", "bf16"), 0.75),
    ("norm", "P1 get_total_norm", LARGE, ("fp32",), 1.2),
    ("norm", "P1 get_total_norm", LARGE, ("bf16",), 1.4),
    ("norm", "P1 get_total_norm", ("ResNet-50",), ("fp32", "bf16"), 1.5),
    ("norm", "P1 get_total_norm", ("1000 x 64", "1000 x 1K"), ("fp32", "bf16"), 4.0),
    ("norm", "P5 vector_norm(flat)", LARGE, ("fp32",), 0.97),
    ("norm", "P7 double loop", LARGE, ("fp32",), 5.0),
    ("norm", "P7 double loop", LARGE, ("bf16",), 8.5),
    ("norm", "P10 NeMo-style", LARGE, ("fp32",), 1.15),
    ("norm", "P10 NeMo-style", LARGE, ("bf16",), 1.5),
    ("clip 1", "P1 clip_grad_norm_", ("GPT-2", "Llama-3-8B / 8"), ("fp32", "bf16"), 2.7),
    ("clip below 1", "P1 clip_grad_norm_", ("GPT-2", "Llama-3-8B / 8"), ("fp32", "bf16"), 1.1),
    ("telemetry", "P2 native", LARGE, ("fp32", "bf16"), 1.3),
    ("telemetry", "P2 native", ("ResNet-50",), ("fp32", "bf16"), 2.5),
    ("telemetry", "P2 native", ("1000 x 64", "1000 x 1K"), ("fp32", "bf16"), 5.0),
    ("telemetry", "P4 native graph", LARGE, ("fp32", "bf16"), 1.15),
    ("telemetry", "P4 native graph", ("ResNet-50",), ("fp32", "bf16"), 1.6),
    ("telemetry", "P4 native graph", ("1000 x 64", "1000 x 1K"), ("fp32", "bf16"), 3.0),
    ("telemetry", "P6 esper-lite dual", LARGE, ("fp32", "bf16"), 5.0),
    ("telemetry", "P6 esper-lite health", LARGE, ("fp32", "bf16"), 6.5),
)


def reached(found: Sequence[dict[str, Any]], card: Card, goal: tuple[Any, ...]) -> float:
    """The worst ratio that is predicted for a goal: theirs over ours, or the fraction of the copy."""
    task, peer, names, dtypes, _ = goal
    cases: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for one in found:
        if one["task"] == task and one["shape"].split(", ")[0] in names and one["dtype"] in dtypes:
            cases.setdefault((one["shape"], one["dtype"]), {})[one["contender"]] = one
    ratios = []
    for each in cases.values():
        theirs = each["seedtriton"]["bytes"] / card.roof * 1e6 if peer == "copy" else each[peer][card.name]
        ratios.append(theirs / each["seedtriton"][card.name])
    return min(ratios)


def record() -> dict[str, Any]:
    """All that is predicted, and from what."""
    found = rows()
    header = machine.header("python -m bench.performance.model") | {
        "prediction": "a model on paper, no measurement: no GPU was seen",
        "design": DESIGN._asdict(),
        "cards": [card._asdict() for card in CARDS],
    }
    goals = [
        {"task": goal[0], "peer": goal[1], "shapes": goal[2], "dtypes": goal[3], "goal": goal[4]}
        | {card.name: round(reached(found, card, goal), 2) for card in CARDS}
        for goal in GOALS
    ]
    return {"header": header, "goals": goals, "rows": found}


def main() -> int:
    done = record()
    path = FOLDER / f"predicted-gpu-{done['header']['date']}.json"
    # A line for each row: a page of changes is read when a model changes.
    parts = [f'"header": {json.dumps(done["header"], indent=1)}']
    parts += [
        f'"{name}": [\n' + ",\n".join(json.dumps(one) for one in done[name]) + "\n]" for name in ("goals", "rows")
    ]
    path.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
