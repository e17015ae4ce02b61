"""Measured against everyone, on the same work: python -m bench.performance --part norm|clip|telemetry|step|growth|all.

Every contender is compared with float64 before it is timed, and they take turns while they are. GPU time is that of
a CUDA graph that goes through sets of gradients larger than four times the L2; what cannot be captured has eager
times alone. On a CPU (--device cpu) the same report has no GPU columns. One JSON file for each device and day.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import pathlib
import random
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench import machine
from bench.performance import contenders, shapes
from bench.performance.contenders import TASKS, Call, Contender, Work
from seedtriton import GradientMonitor

PARTS = ("norm", "clip", "telemetry", "step", "growth")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "mixed": None}
FIELDS = (
    "task", "shape", "dtype", "contender", "elements", "bytes", "gpu_us_median", "gpu_us_p10", "gpu_us_p90",
    "cpu_us_median", "wall_us_median", "kernels", "syncs", "allocations", "peak_bytes", "rel_error",
    "copy_bandwidth_fraction", "note",
)  # fmt: skip
# Repeats, and seconds after which a contender has had enough of them (never before the least number).
REPEATS, LEAST, BUDGET = {"cuda": 200, "cpu": 51}, 7, {"cuda": 0.5, "cpu": 1.2}
SCALES = {"tiny": 1e-3}
CPU_ELEMENTS = 64e6  # what a shape is scaled to on a CPU, but for those below
WHOLE = ("ResNet-50", "GPT-2")
CPU_FLUSH = 64 << 20  # bytes, twice the last cache of most cores
# Different streams keep different tables of addresses, and the library keeps 32 tables: at most half for each kernel.
MOST_SETS = 12
BLOCK = 0.1  # of that time a block of calls takes at most, unless one call takes longer
QUEUE = 512  # kernels in flight at most while CPU time is taken: a full queue would make the CPU wait


class Case(NamedTuple):
    """One piece of work; ``coefficient`` is what clipping multiplies by, ``sizes`` what is in no list of shapes."""

    task: str
    shape: str
    dtype: str
    segments: int = 1
    host_to_seeds: float = 100.0
    coefficient: float = 1.0
    sizes: Sequence[tuple[int, ...]] | None = None

    @property
    def title(self) -> str:
        parts = [self.task]
        if self.task == "clip":
            parts.append("1" if self.coefficient == 1.0 else "below 1")
        return " ".join(parts)

    @property
    def what(self) -> str:
        """The shape, with its segments where there is more than the host."""
        many = f", {self.segments} segments {self.host_to_seeds:g}:1"
        return self.shape + (many if self.segments > 1 else "")


def cases(part: str) -> list[Case]:
    """All work of a part."""
    both, mixed = ("fp32", "bf16"), [(name, "mixed") for name in ("GPT-2", "Llama-3-8B / 8")]
    everything = [(name, dtype) for name in shapes.SHAPES for dtype in both] + [("GPT-2", "fp16"), *mixed]
    if part == "norm":
        return [Case(part, *one) for one in everything]
    if part == "clip":
        some = ("ResNet-50", "GPT-2", "Llama-3-8B / 8", "1000 x 1K")
        chosen = [(name, dtype) for name in some for dtype in both] + mixed[:1]
        return [Case(part, *one, coefficient=c) for one in chosen for c in (1.0, 0.5)]
    found = [Case(part, *one, segments=1 if one[0] == "one 1B" else 2) for one in everything]
    counts = [("GPT-2", 1, 100.0), ("GPT-2", 2, 1.0), ("1000 x 1K", 8, 1.0)]
    counts += [(name, count, 100.0) for name in WHOLE for count in (8, 64)]
    return found + [Case(part, name, "fp32", count, ratio) for name, count, ratio in counts]


def gradients_of(sizes: Sequence[tuple[int, ...]], dtype: str, device: torch.device, offset: int = 0) -> list[Tensor]:
    """Random gradients; "mixed" is bf16 with the vectors (norms and biases) in fp32."""
    generator = torch.Generator(device).manual_seed(0)
    found = []
    for size in sizes:
        kind = DTYPES[dtype] or (torch.float32 if len(size) == 1 else torch.bfloat16)
        memory = torch.empty(math.prod(size) + offset, dtype=kind, device=device)
        found.append(memory[offset:].view(size).normal_(0.0, 1e-3, generator=generator))
    return found


def copies(gradients: Sequence[Tensor], offset: int) -> list[Tensor]:
    """The same values in other memory, as far from its beginning."""
    memory = [torch.empty(g.numel() + offset, dtype=g.dtype, device=g.device)[offset:] for g in gradients]
    return [one.view(g.shape).copy_(g) for one, g in zip(memory, gradients)]


def row(case: Case, contender: str, **values: Any) -> dict[str, Any]:
    found = dict.fromkeys(FIELDS) | {"task": case.title, "shape": case.what, "dtype": case.dtype}
    return found | {"contender": contender, "note": ""} | values


class Bench:
    """A device, its anchors, and how much is measured on it."""

    def __init__(
        self,
        device: str,
        scale: float | None,
        repeats: int | None,
        seconds: float | None = None,
        budget: float | None = None,
    ) -> None:
        """Measure the anchors: what everything else is compared with.

        Args:
            device: "cuda" or "cpu".
            scale: shrinks every tensor; None: as they are.
            repeats: of every call; None: REPEATS.
            seconds: from now on, after which no case begins; those are in ``left_out``.
            budget: seconds after which a contender has had enough repeats; None: BUDGET.
        """
        self.until = math.inf if seconds is None else time.perf_counter() + seconds
        self.left_out: list[str] = []
        self.device = torch.device(device, 0) if device == "cuda" else torch.device(device)
        self.cuda = device == "cuda"
        self.scale = scale
        self.repeats = REPEATS[device] if repeats is None else repeats
        self.least = min(LEAST, self.repeats)
        self.budget = budget if budget is not None else BUDGET[device] if scale is None or self.cuda else 0.0
        self.properties: Any = torch.cuda.get_device_properties(self.device) if self.cuda else None
        self.cold_bytes = 4 * self.properties.L2_cache_size if self.cuda else 0
        # Written before every replay: it keeps the GPU busy until the graph has arrived, and clears the L2. On a CPU
        # before every call, as a backward pass would, so that nobody finds the code of a relative in the caches.
        size = self.cold_bytes if self.cuda else CPU_FLUSH if scale is None else 1
        self.flush = torch.empty(size, dtype=torch.uint8, device=self.device)
        self.anchors = self._anchors()

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def sizes(self, case: Case) -> tuple[list[tuple[int, ...]], str]:
        """The tensors of a case, and a note when they are fewer elements than their name says."""
        if case.sizes is not None:
            return list(case.sizes), ""
        whole = shapes.SHAPES[case.shape]()
        scale = self.scale
        if scale is None:
            capped = not self.cuda and case.shape not in WHOLE
            scale = min(1.0, CPU_ELEMENTS / shapes.elements(whole)) if capped else 1.0
        return shapes.scaled(whole, scale), "" if scale == 1.0 else f"scaled by {scale:.3g}"

    def _anchors(self) -> dict[str, Any]:
        """An empty kernel, a copy in bytes read plus written per second, and the norm of one flat tensor."""
        size = 1 << (28 if self.cuda else 26 if self.scale is None else 20)
        flat = torch.empty(size, device=self.device).normal_()
        other, one = torch.empty_like(flat), torch.ones(1, device=self.device)
        jobs = {
            "empty": Call(lambda: one.fill_(1.0)),
            "copy": Call(lambda: other.copy_(flat)),
            # In a graph a copy is the driver's, and slower than a kernel.
            "copy_kernel": Call(lambda: torch.add(flat, 1.0, out=other)),
            "flat_norm": Call(lambda: torch.linalg.vector_norm(flat)),
        }
        timed = self._replays if self.cuda else self._calls
        times = timed({name: [call] for name, call in jobs.items()}, ())
        median = {name: statistics.median(found) for name, found in times.items()}
        return {
            "empty_kernel_us": median["empty"] * 1e6,
            "copy_bytes_per_second": 2 * flat.nbytes / min(median["copy"], median["copy_kernel"]),
            "flat_norm_bytes_per_second": flat.nbytes / median["flat_norm"],
        }

    # -- one case --------------------------------------------------------------------------------------------------

    def measure(self, case: Case, chosen: Sequence[Contender] | None = None) -> list[dict[str, Any]]:
        """Rows of all contenders for one case; whatever fails is a row that says so, and no time left is no row."""
        if self._late(case):
            return []
        todo = [one for one in chosen or TASKS[case.task] if self.device.type in one.devices]
        try:
            return self._measure(case, todo)
        except Exception as error:
            return [row(case, one.name, note=_said(error)) for one in todo]
        finally:
            self._release()

    def _late(self, case: Case) -> bool:
        late = time.perf_counter() > self.until
        if late:
            self.left_out.append(f"{case.title}, {case.what}, {case.dtype}")
        return late

    def _measure(self, case: Case, todo: Sequence[Contender]) -> list[dict[str, Any]]:
        sizes, note = self.sizes(case)
        offset = shapes.OFFSETS.get(case.shape, 0)
        gradients = gradients_of(sizes, case.dtype, self.device, offset)
        segments = shapes.segments_of([g.numel() for g in gradients], case.segments, case.host_to_seeds)
        work = Work(gradients, segments, case.segments)
        total = contenders.truth_of(work)["total"]
        work.max_norm = total * (2.0 if case.coefficient == 1.0 else case.coefficient)
        truth = contenders.truth_of(work)
        size = sum(g.nbytes for g in gradients)
        number = max(1, min(MOST_SETS, math.ceil(self.cold_bytes / max(size, 1))))
        if self.cuda and number * size < self.cold_bytes:
            note = _joined(note, "hot: the sets are smaller than four L2")
        pristine = copies(gradients, offset) if case.coefficient < 1.0 else []
        works = [work]
        while len(works) < number:
            works.append(Work(copies(gradients, offset), segments, case.segments, work.max_norm))
        elements = sum(g.numel() for g in gradients)
        # The least that has to move: every byte once, and when clipping bites, a second read and a write.
        least = size * (3 if pristine else 1)

        rows: dict[str, dict[str, Any]] = {}
        calls: dict[str, list[Call]] = {}
        for one in todo:
            rows[one.name] = row(case, one.name, elements=elements, bytes=least, note=_joined(one.about, note))
            missing = one.missing()
            if missing:
                rows[one.name]["note"] = missing
                continue
            try:
                calls[one.name], rows[one.name]["rel_error"] = self._checked(case.task, one, works, truth, pristine)
            except Exception as error:
                rows[one.name]["note"] = _said(error)
        self._time(case, {one.name: one for one in todo}, calls, truth, pristine, rows)
        for one in rows.values():
            taken = one["gpu_us_median"] or (None if self.cuda else one["wall_us_median"])
            if taken:
                one["copy_bandwidth_fraction"] = least / taken * 1e6 / self.anchors["copy_bytes_per_second"]
        return list(rows.values())

    def _time(
        self,
        case: Case,
        by_name: Mapping[str, Contender],
        calls: dict[str, list[Call]],
        truth: dict[str, Any],
        pristine: Sequence[Tensor],
        rows: dict[str, dict[str, Any]],
    ) -> None:
        """Write what is counted and timed of these calls into their rows."""
        for name in list(calls):
            try:
                rows[name] |= self._counts(calls[name], pristine)
            except Exception as error:
                rows[name]["note"] = _said(error)
                del calls[name]
        if self.cuda:
            graphed = {name: sets for name, sets in calls.items() if by_name[name].capturable}

            def check(name: str, found: Any) -> None:
                contenders.error_of(case.task, calls[name][0], found, truth, by_name[name].tolerance)

            for name, found in self._replays(graphed, pristine, rows, check).items():
                tenths = statistics.quantiles(found, n=10)
                for key, value in (("median", statistics.median(found)), ("p10", tenths[0]), ("p90", tenths[-1])):
                    rows[name][f"gpu_us_{key}"] = value * 1e6
                if len(found) < self.repeats:
                    rows[name]["note"] = _joined(rows[name]["note"], f"{len(found)} replays")
            for name, (returned, wall) in self._blocks(calls, pristine, rows).items():
                rows[name] |= {"cpu_us_median": returned * 1e6, "wall_us_median": wall * 1e6}
        else:
            for name, found in self._calls(calls, pristine).items():
                median = statistics.median(found) * 1e6
                rows[name] |= {"cpu_us_median": median, "wall_us_median": median}

    def _checked(
        self, task: str, one: Contender, works: Sequence[Work], truth: dict[str, Any], pristine: Sequence[Tensor]
    ) -> tuple[list[Call], float]:
        """Its calls, one per set, the first of which has been found right."""
        sets = [one.build(work) for work in works]
        _restore(sets, pristine)
        with contenders.poisoned(sets[0]):
            found = sets[0].run()
        self.sync()
        error = contenders.error_of(task, sets[0], found, truth, one.tolerance)
        for call in sets:
            call.run()
        _restore(sets, pristine)
        return sets, error

    def _counts(self, sets: Sequence[Call], pristine: Sequence[Tensor]) -> dict[str, Any]:
        """Kernels, waits, allocations and extra memory of one call in the steady state."""
        if not self.cuda:
            return {}
        run = sets[0].run
        for _ in range(3):
            run()
        self.sync()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        # Not the warning that this mode is a prototype.
        syncs = sum("called a synchronizing" in str(one.message) for one in said)
        torch.cuda.reset_peak_memory_stats()
        before, held = torch.cuda.memory_stats(), torch.cuda.memory_allocated()
        run()
        after, peak = torch.cuda.memory_stats(), torch.cuda.max_memory_allocated() - held
        key = "allocation.all.allocated"
        self.sync()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*Profiler clears events")  # there is one cycle
            with torch.profiler.profile(activities=activities) as profile:
                run()
                self.sync()
        on_device = torch.autograd.DeviceType.CUDA
        kernels = sum(event.device_type == on_device for event in profile.events())
        _restore(sets, pristine)
        return {"kernels": kernels, "syncs": syncs, "allocations": after[key] - before[key], "peak_bytes": peak}

    # -- times -----------------------------------------------------------------------------------------------------

    def _turns(self, names: Sequence[str], once: Callable[[str], Any], number: int, least: int) -> dict[str, list[Any]]:
        """Turns of all, each time in another order: ``number`` for each, or fewer when its time is spent.

        In one order, whoever came after a close relative would find its data in the caches, every time.
        """
        order = random.Random(0)
        found: dict[str, list[Any]] = {name: [] for name in names}
        spent = dict.fromkeys(names, 0.0)
        waiting = list(names)
        while waiting:
            for name in order.sample(waiting, len(waiting)):
                begun = time.perf_counter()
                found[name].append(once(name))
                spent[name] += time.perf_counter() - begun
            waiting = [
                n for n in waiting if len(found[n]) < number and (len(found[n]) < least or spent[n] < self.budget)
            ]
        return found

    def _replays(
        self,
        calls: dict[str, list[Call]],
        pristine: Sequence[Tensor] = (),
        rows: dict[str, dict[str, Any]] | None = None,
        check: Callable[[str, Any], None] = lambda name, found: None,
    ) -> dict[str, list[float]]:
        """GPU seconds per call, one number per replay of a graph that holds one call for each set."""
        graphs = {}
        for name, sets in calls.items():
            try:
                graph, found = self._capture(sets, pristine)
                _restore(sets, pristine)
                with contenders.poisoned(sets[0]):
                    graph.replay()
                self.sync()
                check(name, found)
                graphs[name] = graph
            except Exception as error:
                if rows is None:
                    raise
                rows[name]["note"] = _joined(rows[name]["note"], f"not captured: {_said(error)}")
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def once(name: str) -> float:
            _restore(calls[name], pristine)
            self.flush.fill_(1)
            begin.record()
            graphs[name].replay()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) * 1e-3 / len(calls[name])

        for name in graphs:
            for _ in range(5):
                once(name)
        return self._turns(list(graphs), once, self.repeats, self.least)

    def _capture(self, sets: Sequence[Call], pristine: Sequence[Tensor]) -> tuple[Any, Any]:
        """One graph for all sets, and what the first will have found.

        Each is first run on a stream of its own, so that its addresses are uploaded and not those of the next.
        """
        runs = [call.inner or call.run for call in sets]
        for run in runs:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    run()
            self.sync()
        _restore(sets, pristine)
        self.sync()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = [run() for run in runs]
        return graph, found[0]

    def _blocks(
        self,
        calls: dict[str, list[Call]],
        pristine: Sequence[Tensor],
        rows: dict[str, dict[str, Any]],
        number: int | None = None,
    ) -> dict[str, tuple[float, float]]:
        """Seconds until a call returns, and until its work is done, in blocks with one wait at their end."""
        asked = number
        pilot = {}
        for name, sets in calls.items():
            self.sync()
            begun = time.perf_counter()
            sets[0].run()
            self.sync()
            pilot[name] = time.perf_counter() - begun

        def once(name: str) -> tuple[float, float]:
            sets = calls[name]
            number = asked or max(
                1, min(50, QUEUE // max(rows[name]["kernels"] or 1, 1), int(BLOCK * self.budget / pilot[name]))
            )
            if pristine:
                _restore(sets, pristine)
                number = min(number, len(sets))
            self.sync()
            begun = time.perf_counter()
            for index in range(number):
                sets[index % len(sets)].run()
            returned = time.perf_counter()
            self.sync()
            return (returned - begun) / number, (time.perf_counter() - begun) / number

        found = self._turns(list(calls), once, min(self.repeats, 30 if asked else 15), 30 if asked else self.least)
        medians = {}
        for name, times in found.items():
            returned, wall = (statistics.median(column) for column in zip(*times))
            medians[name] = returned, wall
        return medians

    def _calls(self, calls: dict[str, list[Call]], pristine: Any) -> dict[str, list[float]]:
        """Seconds per call on a CPU, where returning is being done."""

        def once(name: str) -> float:
            _restore(calls[name], pristine)
            self.flush.fill_(1)
            begun = time.perf_counter()
            calls[name][0].run()
            return time.perf_counter() - begun

        for name in calls:
            once(name)
        return self._turns(list(calls), once, self.repeats, self.least)

    def _release(self) -> None:
        """Graphs are gone when this is called: their tables may go too."""
        gc.collect()
        launch = sys.modules.get("seedtriton.kernels._launch")
        if launch is not None:
            launch.release()
        if self.cuda:
            torch.cuda.empty_cache()

    # -- a training loop ---------------------------------------------------------------------------------------------

    def step(self) -> list[dict[str, Any]]:
        """Seconds of a whole training step with AdamW: without clipping, with ours, with torch's."""
        big = self.cuda and self.scale is None
        layers, width, vocabulary, length = BIG_STEP if big else (2, 64, 512, 32)
        rows = []
        for kind in ("foreach", "fused"):
            case = Case("step", step_shape(layers, width, kind), "fp32")
            if self._late(case):
                continue
            loops, losses = {}, {}
            for name in STEPS:
                try:
                    loops[name] = _Loop(name, kind, layers, width, vocabulary, length, self.device)
                    losses[name] = [float(loops[name].run()) for _ in range(3)]
                except Exception as error:
                    loops.pop(name, None)
                    rows.append(row(case, name, note=_said(error)))
            for name in list(loops):
                error = max(abs(a / b - 1) for a, b in zip(losses[name], losses[STEPS[0]]))
                done = row(case, name, elements=loops[name].elements, bytes=4 * loops[name].elements, rel_error=error)
                rows.append(done)
                if not error <= 1e-3:
                    done["note"] = f"WrongAnswer: the loss is off by {error:.1e} from the one without clipping"
                    del loops[name]
            calls = {name: [Call(loop.run)] for name, loop in loops.items()}
            by_name = {one["contender"]: one for one in rows if one["shape"] == case.shape}
            for name in calls:
                by_name[name] |= self._counts(calls[name], ())
            for name, (returned, wall) in self._blocks(calls, (), by_name, number=1).items():
                by_name[name] |= {"cpu_us_median": returned * 1e6, "wall_us_median": wall * 1e6}
            del loops, calls
            self._release()
        return rows

    # -- how cost grows ----------------------------------------------------------------------------------------------

    def growth(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows for more tensors, elements and segments, and the slope of each line on log-log paper."""
        rows, fits = [], []
        for axis, points in growth_points(self.cuda and self.scale is None, self.scale).items():
            lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
            for number, sizes, segments in points:
                for case, asked in growth_cases(axis, number, sizes, segments):
                    for one in self.measure(case, asked):
                        rows.append(one | {"task": f"growth of {axis}", "shape": case.shape})
                        for field in ("gpu_us_median", "cpu_us_median"):
                            if one[field]:
                                lines.setdefault((one["contender"], field), []).append((number, one[field]))
            for (contender, field), line in lines.items():
                fits.append({"axis": axis, "contender": contender, "time": field, "slope": slope(line)})
        return rows, fits


def growth_points(big: bool, scale: float | None) -> dict[str, list[tuple[int, list[tuple[int, ...]], int]]]:
    """By axis: number, sizes of tensors, segments."""
    tensors = [10, 100, 1000, 10_000, *([100_000] if big else [])]
    elements = [10**power for power in range(3, 10 if big else 8)] + ([4 * 10**9] if big else [])
    counts = [1, 2, 4, 16, 64, 256, 1024]
    if scale is not None:
        tensors, elements, counts = [10, 30, 100], [1000, 10_000, 100_000], [1, 8, 64]
    return {
        "tensors": [(n, n * [(1024,)], 2) for n in tensors],
        "elements": [(n, [(n,)], 1) for n in elements],
        "segments": [(n, 2 * counts[-1] * [(1024,)], n) for n in counts],
    }


def growth_cases(
    axis: str, number: int, sizes: list[tuple[int, ...]], segments: int
) -> list[tuple[Case, list[Contender]]]:
    """The work of one point, and who does it."""
    asked = [one for one in TASKS["telemetry"] if one.name in ("seedtriton", "seedtriton flat", "P2 native")]
    asked.append(next(one for one in TASKS["norm"] if one.name == "P1 get_total_norm"))
    name, dtype = f"{number} {axis}", "bf16" if axis == "elements" else "fp32"
    return [
        (Case(task, name, dtype, segments, 1.0, sizes=sizes), [one for one in asked if one in TASKS[task]])
        for task in ("telemetry", "norm")
    ]


def slope(line: Sequence[tuple[float, float]]) -> float | None:
    """Exponent of time against size, by least squares over the upper half of the points: below is the floor."""
    upper = line[len(line) // 2 - (len(line) < 4) :] if len(line) > 2 else line
    xs, ys = zip(*((math.log(x), math.log(y)) for x, y in upper))
    return statistics.linear_regression(xs, ys).slope if len(set(xs)) > 1 else None


def _restore(sets: Sequence[Call], pristine: Sequence[Tensor]) -> None:
    """What clipping has scaled becomes what it was."""
    if pristine:
        with torch.no_grad():
            for call in sets:
                torch._foreach_copy_(list(call.clips), list(pristine))


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


# Layers, width, vocabulary and length of the training step on a GPU.
BIG_STEP = (12, 768, 50257, 512)


def step_shape(layers: int, width: int, kind: str) -> str:
    return f"transformer {layers} x {width}, AdamW {kind}, coefficient 1"


STEPS = ("off", "seedtriton", "seedtriton flat", "P1 clip_grad_norm_", "P2 native + clip")


class _Loop:
    """A small language model that trains on random tokens; the gradients stay far below the limit."""

    def __init__(
        self, name: str, kind: str, layers: int, width: int, vocabulary: int, length: int, device: torch.device
    ) -> None:
        torch.manual_seed(0)
        heads, limit = width // 64, 1e6
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, nn.functional.gelu, batch_first=True, norm_first=True
        )
        body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.model = nn.Sequential(nn.Embedding(vocabulary, width), body, nn.Linear(width, vocabulary, bias=False))
        self.model.to(device)
        self.tokens = torch.randint(0, vocabulary, (4, length + 1), device=device)
        parameters = list(self.model.parameters())
        self.elements = sum(map(Tensor.numel, parameters))
        options: dict[str, Any] = {"foreach": True} if kind == "foreach" else {"fused": True}
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, **options)
        self.flat = contenders.FlatGradients(self.model) if name == "seedtriton flat" else None
        self.finish: Callable[[], Any] = lambda: None
        if name.startswith("seedtriton"):
            monitor = GradientMonitor(self.model, {"head": self.model[2]}, flat=self.flat, optimizers=self.optimizer)
            self.finish = lambda: (monitor.measure(), monitor.clip_grad_norm_(limit))
        elif name.startswith("P1"):
            self.finish = lambda: nn.utils.clip_grad_norm_(parameters, limit, foreach=True)
        elif name.startswith("P2"):
            state = [torch.zeros(size, dtype=torch.float64, device=device) for size in ((2,), (128, 2, 2))]
            most = torch.tensor(limit, dtype=torch.float64, device=device)
            count = torch.zeros((), dtype=torch.int64, device=device)
            segments = torch.tensor([0] * (len(parameters) - 1) + [1], device=device)

            def native() -> None:
                gradients = [p.grad for p in parameters if p.grad is not None]
                found = contenders.epilogue(contenders.squares(gradients), segments, *state, count, most)
                torch._foreach_mul_(gradients, found[3].float())

            self.finish = native

    def run(self) -> Tensor:
        logits = self.model(self.tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten())
        loss.backward()
        self.finish()
        self.optimizer.step()
        if self.flat is not None:
            self.flat.zero_()
        else:
            self.optimizer.zero_grad()
        return loss.detach()


def describe(device: str) -> dict[str, Any]:
    """What a GPU result was measured with, besides what every header says."""
    try:
        import triton

        found: dict[str, Any] = {"triton": triton.__version__}
    except ImportError:
        found = {"triton": None}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,driver_version", "--format=csv,noheader"]
        try:
            clocks = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            clocks = None
        found |= {
            "device": properties.name,
            "cuda": torch.version.cuda,
            "l2_bytes": properties.L2_cache_size,
            "multiprocessors": properties.multi_processor_count,
            "clocks": clocks,
        }
    else:
        found["device"] = f"{torch.get_num_threads()} threads on a CPU"
    return found


def file_name(kind: str, name: str, date: str) -> str:
    return f"{kind}-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-{date}.json"


def write(
    output: pathlib.Path,
    device: str,
    header: dict[str, Any],
    part: str,
    anchors: Any,
    rows: Any,
    fits: Any,
    left_out: Sequence[str] = (),
) -> pathlib.Path:
    """Put a part into the file of this device and day; parts of another commit or torch are not kept beside it."""
    kind, name = ("gpu", header["device"]) if device == "cuda" else ("cpu", header["machine"])
    path = output / file_name(kind, name, header["date"])
    record: dict[str, Any] = {"header": header, "anchors": {}, "left_out": {}, "fits": [], "rows": []}
    same = ("commit", "torch", "device", "scale")
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        if all(known["header"].get(key) == header[key] for key in same):
            record = known | {"header": header}
    record["anchors"][part], record["left_out"][part] = anchors, list(left_out)
    record["rows"] = [one for one in record["rows"] if not _of(one, part)] + rows
    if part == "growth":
        record["fits"] = fits
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def _of(one: dict[str, Any], part: str) -> bool:
    return str(one["task"]).split()[0] == part


def show(one: dict[str, Any]) -> None:
    """One line on the terminal."""
    times = [one[key] for key in ("gpu_us_median", "cpu_us_median", "wall_us_median")]
    said = " ".join("      -   " if value is None else f"{value:10.1f}" for value in times)
    error = "   -   " if one["rel_error"] is None else f"{one['rel_error']:.1e}"
    print(f"{one['task']:12} {one['shape']:34} {one['dtype']:5} {one['contender']:24} {said} {error} {one['note']}")


def _scale(text: str) -> float:
    scale = SCALES.get(text) or float(text)
    if not 0.0 < scale <= 1.0:
        raise argparse.ArgumentTypeError(f"above 0 and at most 1, got {text}")
    return scale


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("bench/results"))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--scale", type=_scale, help='shrinks every tensor: a number up to 1, or "tiny"')
    parser.add_argument("--repeats", type=int, help="of every call; fewer where they take long")
    parser.add_argument(
        "--seconds", type=float, help="begin no case after that long; the file says which were left out"
    )
    parser.add_argument(
        "--budget", type=float, help="seconds of repeats for each contender, if they are not many before"
    )
    asked = parser.parse_args(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is available; --device cpu makes the report of the same form")
    if asked.repeats is not None and asked.repeats < 2:
        parser.error(f"--repeats is at least 2, got {asked.repeats}")
    begun = time.perf_counter()
    bench = Bench(asked.device, asked.scale, asked.repeats, asked.seconds, asked.budget)
    print(", ".join(f"{name} {value:.4g}" for name, value in bench.anchors.items()))
    print("times in µs: GPU, CPU until it returns, eager wall; relative error")
    wrong = 0
    command = "python -m bench.performance " + " ".join(sys.argv[1:] if arguments is None else arguments)
    for part in PARTS if asked.part == "all" else [asked.part]:
        header = machine.header(command) | describe(asked.device) | {"scale": asked.scale, "repeats": bench.repeats}
        rows: list[dict[str, Any]] = []
        fits: list[dict[str, Any]] = []
        if part == "growth":
            rows, fits = bench.growth()
        elif part == "step":
            rows = bench.step()
        for case in cases(part) if part in TASKS else ():
            found = bench.measure(case)
            rows += found
            for one in found:
                show(one)
        if part not in TASKS:
            for one in rows:
                show(one)
        for fit in fits:
            print(f"growth of {fit['axis']}: {fit['contender']}, {fit['time']}: exponent {fit['slope']}")
        header["clocks_after"] = describe(asked.device).get("clocks")
        left_out, bench.left_out = bench.left_out, []
        path = write(asked.output, asked.device, header, part, bench.anchors, rows, fits, left_out)
        wrong += sum(one["contender"].startswith("seedtriton") and "WrongAnswer" in one["note"] for one in rows)
        print(f"{part}: {path}, {time.perf_counter() - begun:.0f} s so far")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
