"""Triton or eager torch, for one device, and the reason in words.

``SEEDTRITON_BACKEND=auto|triton|torch`` decides; "auto" takes Triton where it can run. Triton itself is
imported here and in kernels/ only, and only when a tensor lies on a device that it can serve.
"""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache
from typing import NamedTuple

import torch

VARIABLE = "SEEDTRITON_BACKEND"
CHOICES = ("auto", "triton", "torch")
ACCELERATORS = ("cuda", "xpu")  # ROCm calls itself cuda


class Backend(NamedTuple):
    """What runs, and why."""

    name: str  # "triton" or "torch"
    reason: str


def requested() -> str:
    """The value of ``SEEDTRITON_BACKEND``; ValueError names the variable and a value it does not know."""
    value = os.environ.get(VARIABLE, "auto")
    if value not in CHOICES:
        raise ValueError(f"{VARIABLE}={value!r} is unknown; set it to one of {', '.join(CHOICES)}")
    return value


def interpreting() -> bool:
    """Whether Triton's interpreter was switched on before the process started."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def choose(device: torch.device) -> Backend:
    """The backend for tensors on ``device``; ValueError for an impossible ``SEEDTRITON_BACKEND``."""
    wanted = requested()
    # The interpreter is a question for those alone who ask for Triton: looking costs a microsecond in every step.
    return _choose(device.type, wanted, wanted == "triton" and interpreting())


@lru_cache(maxsize=32)
def _choose(kind: str, wanted: str, interpreted: bool) -> Backend:
    if wanted == "torch":
        return Backend("torch", f"{VARIABLE}=torch")
    missing = _triton_missing()
    if wanted == "triton" and missing:
        raise ValueError(f"{VARIABLE}=triton, but {missing}; install Triton or set {VARIABLE}=auto")
    if kind in ACCELERATORS:
        if missing:
            return Backend("torch", missing)
        return Backend("triton", f"Triton is installed and serves {kind} tensors")
    if wanted == "triton":
        if kind == "cpu" and interpreted:
            return Backend("triton", f"{VARIABLE}=triton and TRITON_INTERPRET is on: the interpreter, on CPU tensors")
        raise ValueError(
            f"{VARIABLE}=triton, but Triton has no compiler for {kind} tensors; "
            f"set {VARIABLE}=auto, or TRITON_INTERPRET=1 to try the kernels on a CPU"
        )
    return Backend("torch", f"{kind} tensors: Triton's kernels are for {' and '.join(ACCELERATORS)}")


@lru_cache(maxsize=1)
def _triton_missing() -> str:
    """Why Triton cannot be used at all; empty when it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if importlib.util.find_spec("seedtriton.kernels.gradient_sums") is None:
        # A checkout without symbolic links (git's default on Windows) has a text file instead of kernels/.
        return "seedtriton.kernels is missing (a checkout without symbolic links?)"
    return ""
