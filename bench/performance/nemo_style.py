"""Our re-implementation of the published algorithm of NeMo's Triton gradient norm (NVIDIA-NeMo/Automodel#3685).

Nothing is copied. What makes it what it is: a table of addresses, one launch for each dtype, fp64 for every
element, masked loads without a promise of alignment, a Python loop over chunks and four pageable copies per call.
"""

import torch
import triton
import triton.language as tl

CHUNK = 8192
BLOCK = 1024


@triton.jit
def partial_sums(
    addresses, numels, tensors, offsets, partials,
    DTYPE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """partials[program] = sum of x² over one chunk of one tensor."""
    program = tl.program_id(0)
    tensor = tl.load(tensors + program)
    offset = tl.load(offsets + program)
    numel = tl.load(numels + tensor)
    values = tl.load(addresses + tensor).to(tl.pointer_type(DTYPE))
    total = tl.zeros((), tl.float64)
    for begin in range(0, CHUNK, BLOCK):
        place = offset + begin + tl.arange(0, BLOCK)
        x = tl.load(values + place, mask=place < numel, other=0.0).to(tl.float64)  # [BLOCK]
        total += tl.sum(x * x)
    tl.store(partials + program, total)


DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def total_norm(gradients):
    """Norm of all gradients, fp64 0-dim, on their device."""
    total = None
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        chosen = [gradient for gradient in gradients if gradient.dtype == dtype and gradient.numel()]
        chunks = [(index, offset) for index, g in enumerate(chosen) for offset in range(0, g.numel(), CHUNK)]
        if not chunks:
            continue
        device = chosen[0].device
        columns = ([g.data_ptr() for g in chosen], [g.numel() for g in chosen], *zip(*chunks))
        tables = [torch.tensor(column, dtype=torch.int64).to(device) for column in columns]
        partials = torch.empty(len(chunks), dtype=torch.float64, device=device)
        partial_sums[(len(chunks),)](*tables, partials, DTYPES[dtype], CHUNK, BLOCK)
        total = partials.sum() if total is None else total + partials.sum()
    return total.sqrt()
