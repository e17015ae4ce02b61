"""Kernels compiled as the launchers ask for them, without a GPU; and copies of them with one thing changed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from seedtriton.gradients.row import LAYOUT
from seedtriton.kernels import _launch, _row, gradient_sums

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

F32, F64 = torch.float32, torch.float64
VARIANTS = {
    "row": (9, F32, True, True, False),
    "row-fp64": (9, F64, True, True, False),
    "row-256-segments": (256, F32, True, True, False),
    "row-256-segments-fp64": (256, F64, True, True, False),
    "sums": (9, F32, False, True, False),
    "sums-fp64": (9, F64, False, True, False),
    "row-small-grid": (9, F32, True, True, True),
    "two-launches": (9, F32, True, False, False),
}
# The barrier between reading the count of samples and writing it, as the kernel's source has it.
BEFORE_THE_COUNT = """    # Everybody has read the count and the row before anybody writes.
    tl.debug_barrier()
"""


def compiled(kernel: Any, constants: Any, target: GPUTarget) -> Any:
    """The kernel compiled as the launcher asks for it; run-time arguments are never specialised."""
    values = iter(constants)
    names = [parameter.name for parameter in kernel.params]
    constexprs = {p.name: next(values) for p in kernel.params if p.is_constexpr}
    signature = {p.name: "constexpr" if p.is_constexpr else p.annotation_type for p in kernel.params}
    assert all(signature[name] for name in names)
    source = triton.compiler.ASTSource(kernel, signature, constexprs)
    return triton.compile(source, target=target, options=dict(_launch.OPTIONS))


def sums(variant: tuple[Any, ...], target: GPUTarget, kernel: Any = gradient_sums._sums_kernel) -> Any:
    """The sums kernel as the launcher asks for it: segments, lanes, epilogue, counters, persistent."""
    layout = LAYOUT if variant[2] else gradient_sums.SUMS_LAYOUT
    constants = gradient_sums._constants(*variant, 1e-6, layout, target.warp_size)
    return compiled(kernel, constants, target)


def expected_atomics(variant: tuple[Any, ...]) -> int:
    """One for tensors of several items, one for segments, one for the sample."""
    return 3 if variant[3] else 0


def broken(tmp_path: Path, old: str, new: str) -> Any:
    """``gradient_sums`` with one thing changed, from copies of its sources; fails if the thing is not there."""
    copies = []
    for original in (_row, gradient_sums):
        path = tmp_path / f"broken_{Path(original.__file__).name}"
        path.write_text(Path(original.__file__).read_text().replace(old, new))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        copies.append(importlib.util.module_from_spec(spec))
        spec.loader.exec_module(copies[-1])
    assert any(old in Path(original.__file__).read_text() for original in (_row, gradient_sums))
    row, sums_of = copies
    sums_of._row = row
    return sums_of
