"""``python -m seedtriton demo | doctor | plot``."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from collections.abc import Sequence

import torch

from .core.errors import SeedtritonError
from .gradients import ops

# The distributions that install a module called triton.
TRITONS = ("triton", "triton-rocm", "pytorch-triton-rocm", "triton-xpu", "pytorch-triton-xpu", "triton-windows")
TOLERANCE = 1e-6


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of these ``arguments``, those of the process unless told; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m seedtriton", description="Grow a network while it trains.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="a host grows on real digits; one seed is sabotaged")
    demo.add_argument("--folder", default="runs/demo", help="where events and picture go (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    commands.add_parser("doctor", help="versions, device, backend and why; checks one operation against fp64")
    plot = commands.add_parser("plot", help="draw the life of the seeds from a file of events")
    plot.add_argument("events", help="JSON lines written by JsonLinesSink")
    plot.add_argument("picture", help="PNG to write")
    options = parser.parse_args(arguments)
    try:
        if options.command == "demo":
            from .demo import run

            return run(options.folder, options.seed)
        if options.command == "plot":
            from .report.plots import lifecycle_figure, read_events

            lifecycle_figure(read_events(options.events), options.picture)
            return 0
        return doctor()
    except (SeedtritonError, OSError, ImportError) as error:
        print(f"{parser.prog}: {error}")
        return 1


def doctor() -> int:
    """Print what is installed, what runs and why, and check one operation; 1 when it is wrong."""
    device = _device()
    print(f"seedtriton  {_version('seedtriton') or 'not installed, running from source'}")
    print(f"python      {platform.python_version()} on {platform.platform()}")
    print(f"torch       {torch.__version__}")
    found = [f"{name} {version}" for name in TRITONS if (version := _version(name))]
    print(f"triton      {', '.join(found) or 'not installed'}")
    print(f"device      {device}{f' ({torch.cuda.get_device_name(device)})' if device.type == 'cuda' else ''}")
    backend = ops.backend_of(device)
    print(f"backend     {backend.name}: {backend.reason}")
    error = _worst_error(device)
    good = error <= TOLERANCE
    print(f"check       segmented_sumsq against fp64: relative error {error:.1e}, at most {TOLERANCE:.0e}")
    print("all is well" if good else "WRONG: the sums on this device cannot be trusted; please report it")
    return int(not good)


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
