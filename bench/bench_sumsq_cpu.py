"""Sum of squares of a model's gradients on a CPU: ours against torch's foreach norm, same gradients.

Every case is checked against float64 before it is timed. A noisy machine has good and bad seconds, so the
table compares medians of calls that took turns ("paired" in the raw output), not of runs one after the other.
"""

import platform
import statistics
import time

import pytest
import torch
from shapes import SHAPES, elements

from seedtriton import ops

SMOKE = 1000  # elements per tensor at most, when benchmarks are only run once (--benchmark-disable)
PAIRS = 41


def foreach(gradients):
    return torch.stack(torch._foreach_norm(gradients)).square().sum()


def ours(gradients):
    return ops.segmented_sumsq(gradients, [0] * len(gradients), 1)[0]


CONTENDERS = {"seedtriton": ours, "foreach_norm": foreach}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def paired_medians(gradients):
    """Seconds per call of each contender, taking turns."""
    times = {name: [] for name in CONTENDERS}
    for _ in range(PAIRS):
        for name, run in CONTENDERS.items():
            begun = time.perf_counter()
            run(gradients)
            times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(found) for name, found in times.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def bench_sumsq(benchmark, shape, dtype):
    torch.set_num_threads(2)
    shapes = SHAPES[shape]()
    if benchmark.disabled:
        shapes = [(min(SMOKE, elements([one])),) for one in shapes]
    generator = torch.Generator().manual_seed(0)
    gradients = [(torch.randn(one, generator=generator) * 1e-3).to(DTYPES[dtype]) for one in shapes]
    truth = float(sum(gradient.double().square().sum() for gradient in gradients))
    errors = {name: abs(float(run(gradients)) / truth - 1) for name, run in CONTENDERS.items()}
    assert errors["seedtriton"] <= 1e-6
    benchmark.group = f"{shape} {dtype}"
    benchmark.extra_info.update(
        shape=shape, dtype=dtype, elements=elements(shapes), relative_errors=errors, pairs=PAIRS,
        torch=torch.__version__, threads=torch.get_num_threads(), machine=platform.processor() or platform.machine(),
    )
    if not benchmark.disabled:
        benchmark.extra_info["paired_seconds"] = paired_medians(gradients)
    benchmark.pedantic(ours, args=(gradients,), rounds=15, warmup_rounds=2, iterations=1)
