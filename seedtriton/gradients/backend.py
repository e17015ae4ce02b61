"""Triton or eager torch, for one device, and the reason in words.

``SEEDTRITON_BACKEND=auto|triton|torch`` decides; "auto" takes Triton where it can run. Triton itself is
imported here and in kernels/ only, and only when a tensor lies on a device that it can serve.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import re
from functools import lru_cache
from typing import NamedTuple

import torch

logger = logging.getLogger("seedtriton")

VARIABLE = "SEEDTRITON_BACKEND"
CHOICES = ("auto", "triton", "torch")
ACCELERATORS = ("cuda", "xpu")  # ROCm calls itself cuda
# Triton 3.2 and 3.3, of torch 2.6 and 2.7, cannot compile the kernels.
OLDEST = (3, 4)
_PACKAGES = ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-rocm", "triton-xpu")

# Where a launch has failed, by the type of the device, and how: nobody tries again.
_failed: dict[str, str] = {}


class LaunchError(Exception):
    """A launch has failed by no fault of its arguments, and ``give_up`` knows of it."""


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
    if kind in _failed:
        return Backend("torch", f"a launch has failed: {_failed[kind]}")
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


def give_up(device: torch.device, error: Exception) -> None:
    """From now on eager torch for tensors on such a device: a launch has failed, by no fault of its arguments."""
    words = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason'}"
    _failed[device.type] = words[:300]
    _choose.cache_clear()
    logger.error(
        "a Triton kernel could not be launched on %s (%s); seedtriton goes on in eager torch, with the same numbers, "
        "and more slowly. %s=torch says so from the start; please report it with `python -m seedtriton doctor`",
        device, words, VARIABLE, exc_info=error,
    )  # fmt: skip


@lru_cache(maxsize=1)
def _triton_missing() -> str:
    """Why Triton cannot be used at all; empty when it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if importlib.util.find_spec("seedtriton.kernels.gradient_sums") is None:
        # A checkout without symbolic links (git's default on Windows) has a text file instead of kernels/.
        return "seedtriton.kernels is missing (a checkout without symbolic links?)"
    version = triton_version()
    if version is not None and version < OLDEST:
        return "Triton {}.{} cannot compile the kernels, {}.{} or newer can".format(*version, *OLDEST)
    return ""


def triton_version() -> tuple[int, int] | None:
    """Major and minor number of the Triton that is installed, without importing it; None when nobody says."""
    for package in _PACKAGES:
        try:
            numbers = re.match(r"(\d+)\.(\d+)", importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            continue
        return (int(numbers[1]), int(numbers[2])) if numbers else None
    return None
