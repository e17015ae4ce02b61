"""Sum of squares of a model's gradients on a CPU: ours against torch's foreach norm, same gradients.

Every case is checked against float64 before it is timed; the relative error stands beside the time.
"""

import platform

import pytest
import torch
from shapes import SHAPES, elements

from seedtriton import ops

SMOKE = 1000  # elements per tensor at most, when benchmarks are only run once (--benchmark-disable)


def foreach(gradients):
    return torch.stack(torch._foreach_norm(gradients)).square().sum()


def ours(gradients):
    return ops.segmented_sumsq(gradients, [0] * len(gradients), 1)[0]


CONTENDERS = {"seedtriton": ours, "foreach_norm": foreach}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def bench_sumsq(benchmark, shape, dtype, contender):
    torch.set_num_threads(2)
    shapes = SHAPES[shape]()
    if benchmark.disabled:
        shapes = [(min(SMOKE, elements([one])),) for one in shapes]
    generator = torch.Generator().manual_seed(0)
    gradients = [(torch.randn(one, generator=generator) * 1e-3).to(DTYPES[dtype]) for one in shapes]
    truth = float(sum(gradient.double().square().sum() for gradient in gradients))
    run = CONTENDERS[contender]
    error = abs(float(run(gradients)) / truth - 1)
    if contender == "seedtriton":
        assert error <= 1e-6
    benchmark.group = f"{shape} {dtype}"
    benchmark.extra_info.update(
        shape=shape, dtype=dtype, contender=contender, elements=elements(shapes), relative_error=error,
        torch=torch.__version__, threads=torch.get_num_threads(), machine=platform.processor() or platform.machine(),
    )
    benchmark.pedantic(run, args=(gradients,), rounds=15, warmup_rounds=2, iterations=1)
