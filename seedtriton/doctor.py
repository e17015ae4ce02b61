"""What is installed, what runs and why, which of it was tested, and one operation checked against float64."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .gradients import ops

# The distributions that install a module called triton.
TRITONS = ("triton", "triton-rocm", "pytorch-triton-rocm", "triton-xpu", "pytorch-triton-xpu", "triton-windows")
TOLERANCE = 1e-6


Versions = tuple[str, str]  # the oldest that was tried, and the newest


class Client(NamedTuple):
    """An optional package, between which versions it was tried, and what it is for.

    Attributes:
        use: what would use it.
        extra: how to install it with seedtriton; None: by its own name.
        tried: its versions; None: any, its interface is old.
    """

    use: str
    extra: str | None = None
    tried: Versions | None = None


TORCH: Versions = ("2.6", "2.14")
TRITON: Versions = ("3.4", "3.8")
CLIENTS = {
    "transformers": Client("GrowthCallback for its Trainer", "hf", ("5.24", "5.24")),
    "lightning": Client("GrowthCallback for its Trainer", "lightning", ("2.6", "2.6")),
    "accelerate": Client("prepare_growth for a loop with it", "accelerate", ("1.15", "1.15")),
    "peft": Client("monitor_adapters", "peft", ("0.21", "0.21")),
    "matplotlib": Client("pictures: plot, demo", "demo", ("3.11", "3.11")),
    "rich": Client("growth.summary() in a box, growth.live()", "demo", ("15.0", "15.0")),
    "scikit-learn": Client("the digits of the demo", "demo", ("1.9", "1.9")),
    "tensorboard": Client("TensorBoardSink"),
    "wandb": Client("WandbSink"),
    "mlflow": Client("MlflowSink"),
}


def doctor() -> int:
    """Print what is installed, what runs and why, and check one operation; 1 when it is wrong."""
    device = _device()
    backend = ops.backend_of(device)
    print(f"seedtriton  {_version('seedtriton') or 'not installed, running from source'}")
    print(f"python      {platform.python_version()} on {platform.platform()}")
    print(f"torch       {torch.__version__}{_remark(torch.__version__, TORCH)}")
    tritons = [(name, version) for name in TRITONS if (version := _version(name))]
    words = [f"{name} {version}{_remark(version, TRITON)}" for name, version in tritons]
    print(f"triton      {', '.join(words) or 'not installed'}")
    print(f"device      {device}{f' ({torch.cuda.get_device_name(device)})' if device.type == 'cuda' else ''}")
    print(f"backend     {backend.name}: {backend.reason}")
    print("optional")
    for line in _clients():
        print(f"  {line}")
    error = _worst_error(device)
    good = error <= TOLERANCE
    print(f"check       segmented_sumsq against fp64: relative error {error:.1e}, at most {TOLERANCE:.0e}")
    print("all is well" if good else "WRONG: the sums on this device cannot be trusted; please report it")
    return int(not good)


def _clients() -> Iterator[str]:
    for name, client in CLIENTS.items():
        version = _version(name)
        what = name if client.extra is None else f"'seedtriton[{client.extra}]'"
        missing = f"not installed (pip install {what})"
        state = missing if version is None else f"{version}{_remark(version, client.tried)}"
        yield f"{name:13} {state}: {client.use}"


def _remark(version: str, tried: Versions | None) -> str:
    """What to say of a version that nobody has tried; as many of its numbers count as the limits have."""
    if tried is None:
        return ""
    old, new, own = map(_numbers, (*tried, version))
    if old <= own[: len(old)] and own[: len(new)] <= new:
        return ""
    known = tried[0] if tried[0] == tried[1] else " to ".join(tried)
    return f" (not tested: the tests run with {known})"


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return torch.device("xpu", torch.xpu.current_device())
    return torch.device("cpu")


def _worst_error(device: torch.device) -> float:
    """Largest relative error over three segments of mixed dtypes and odd sizes."""
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    tensors = [
        torch.randn(size, generator=generator).to(dtype) for dtype in dtypes for size in (1, 127, 4097, 100_003)
    ]
    segments = [index % 3 for index in range(len(tensors))]
    found = ops.segmented_sumsq([tensor.to(device) for tensor in tensors], segments, 3).cpu()
    truth = torch.zeros(3, dtype=torch.float64)
    for tensor, segment in zip(tensors, segments):
        truth[segment] += tensor.double().square().sum()
    worst = float(((found - truth) / truth).abs().max())
    return worst if worst == worst else float("inf")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
