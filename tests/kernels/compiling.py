"""Kernels compiled as the launchers ask for them, without a GPU; and copies of them with one thing changed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from seedtriton.kernels import _launch, _row, gradient_sums

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def compiled(kernel: Any, constants: Any, target: GPUTarget) -> Any:
    """The kernel compiled as the launcher asks for it; run-time arguments are never specialised."""
    values = iter(constants)
    names = [parameter.name for parameter in kernel.params]
    constexprs = {p.name: next(values) for p in kernel.params if p.is_constexpr}
    signature = {p.name: "constexpr" if p.is_constexpr else p.annotation_type for p in kernel.params}
    assert all(signature[name] for name in names)
    source = triton.compiler.ASTSource(kernel, signature, constexprs)
    return triton.compile(source, target=target, options=dict(_launch.OPTIONS))


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
