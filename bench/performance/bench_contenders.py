"""The contenders of contenders.py on a CPU, one group of pytest-benchmark for each piece of work.

    make bench                              medians, and how they compare within a group
    pytest bench --benchmark-disable        every case once, small: a smoke test

Every case is compared with float64 before it is timed. The figures of the README are run.py's, where
contenders take turns: a noisy machine has good and bad seconds.
"""

import pytest
import torch

from bench.performance import contenders, shapes
from bench.performance.run import CPU_ELEMENTS, SCALES, WHOLE, gradients_of

SHAPES = ("ResNet-50", "GPT-2", "1000 x 1K", "one 1B", "unaligned")
CASES = [
    (task, one, shape, dtype)
    for task in contenders.TASKS
    for shape in SHAPES
    for dtype in ("fp32", "bf16", "mixed")
    for one in contenders.TASKS[task]
    if "cpu" in one.devices and (task == "norm" or shape in SHAPES[:3]) and (dtype != "mixed" or shape == "GPT-2")
]


@pytest.mark.parametrize("task, one, shape, dtype", CASES, ids=lambda value: getattr(value, "name", value))
def bench_contender(benchmark, task, one, shape, dtype):
    if one.missing():
        pytest.skip(one.missing())
    torch.set_num_threads(1 if benchmark.disabled else 2)
    sizes = shapes.SHAPES[shape]()
    scale = 1.0 if shape in WHOLE else min(1.0, CPU_ELEMENTS / shapes.elements(sizes))
    sizes = shapes.scaled(sizes, SCALES["tiny"] if benchmark.disabled else scale)
    gradients = gradients_of(sizes, dtype, torch.device("cpu"), shapes.OFFSETS.get(shape, 0))
    number = 2 if task == "telemetry" and len(sizes) > 1 else 1
    segments = shapes.segments_of([gradient.numel() for gradient in gradients], number)
    # Far above the norm: a clipped gradient would be another one in the next round.
    work = contenders.Work(gradients, segments, number, max_norm=1e6)
    call = one.build(work)
    truth = contenders.truth_of(work)
    with contenders.poisoned(call):
        found = call.run()
    size = sum(gradient.nbytes for gradient in gradients)
    benchmark.group = f"{task}: {shape} {dtype}"
    benchmark.extra_info.update(
        contender=one.name, bytes=size, relative_error=contenders.error_of(task, call, found, truth, one.tolerance),
        torch=torch.__version__, threads=torch.get_num_threads(), about=one.about,
    )  # fmt: skip
    benchmark.pedantic(call.run, rounds=11, warmup_rounds=2, iterations=1)
    if not benchmark.disabled:
        benchmark.extra_info["gigabytes_per_second"] = size / benchmark.stats.stats.median / 1e9
