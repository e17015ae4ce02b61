"""What the kernels could have been: blocks, warps, items, grids and launches beside each other, on a GPU.

python -m bench.performance.variants [--seconds N]

Every one measures the same gradients as part "telemetry" of run.py does, and is compared with float64 first. Bits may
differ where additions come in another order, so a choice is made here once, and not at run time.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from bench import machine
from bench.performance import contenders, shapes
from bench.performance.contenders import Call, Contender, Work
from bench.performance.run import Bench, Case, describe, file_name, show

# Attribute by attribute of a module of kernels/, what is put in its place.
Changes = dict[tuple[Any, str], Any]


def variants() -> dict[str, Changes]:
    """By name; the first is the library as it is."""
    from seedtriton.kernels import _plan, _tables, gradient_sums

    def blocks(size: int) -> Changes:
        # The cached constants would not see it.
        constants = gradient_sums._constants.__wrapped__
        sizes = dict.fromkeys(gradient_sums.BLOCK_BYTES, size)
        return {(gradient_sums, "BLOCK_BYTES"): sizes, (gradient_sums, "_constants"): constants}

    def options(**others: Any) -> Changes:
        return {(_tables, "OPTIONS"): _tables.OPTIONS | others}

    def items(size: int) -> Changes:
        return {(_plan, "chunk_bytes"): lambda total: size << 10}

    def launched(**options: Any) -> Changes:
        launch = gradient_sums._launch_sums
        return {(gradient_sums, "_launch_sums"): lambda *given: launch(*given[:6], **options)}

    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 2
    return {
        "as it is": {},
        "blocks of 2 KiB": blocks(2048),
        "blocks of 8 KiB": blocks(8192),
        "8 warps": options(num_warps=8),
        "8 warps, blocks of 8 KiB": options(num_warps=8) | blocks(8192),
        "2 warps, blocks of 2 KiB": options(num_warps=2) | blocks(2048),
        "64 registers": options(maxnreg=64),
        "48 registers": options(maxnreg=48),
        **{f"items of {size} KiB": items(size) for size in (16, 32, 64, 128, 256)},
        "4 programs for each multiprocessor": launched(programs=4 * multiprocessors, two_launches=False),
        "two launches": launched(programs=None, two_launches=True),
    }


@contextmanager
def put(changes: Changes) -> Iterator[None]:
    """With these in place."""
    before = {(module, name): getattr(module, name) for module, name in changes}
    for (module, name), value in changes.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)


def under(changes: Changes, build: Callable[[Work], Call]) -> Callable[[Work], Call]:
    """``build``, and all that its calls do, with these changes; a monitor has tables of its own, so none are shared."""

    def make(work: Work) -> Call:
        call = build(work)

        def run() -> Any:
            with put(changes):
                return call.run()

        return replace(call, run=run)

    return make


def cases() -> list[Case]:
    both = ("bf16", "fp32")
    names = [(name, 2) for name in ("ResNet-50", "GPT-2", "1000 x 1K", "Llama-3-8B / 8")] + [("one 1B", 1)]
    found = [Case("telemetry", name, dtype, segments) for name, segments in names for dtype in both]
    tenth = shapes.scaled(shapes.resnet50(), 0.1)
    return [*(Case("telemetry", "ResNet-50 / 10", dtype, 2, sizes=tenth) for dtype in both), *found]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("bench/results"))
    parser.add_argument(
        "--seconds", type=float, help="begin no case after that long; the file says which were left out"
    )
    parser.add_argument("--budget", type=float, help="seconds of repeats for each variant")
    asked = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("no CUDA device is available, and on a CPU these kernels do not run")
    bench = Bench("cuda", None, None, seconds=asked.seconds, budget=asked.budget)
    build = next(one for one in contenders.TASKS["telemetry"] if one.name == "seedtriton").build
    chosen = [Contender(name, under(changes, build)) for name, changes in variants().items()]
    rows = []
    for case in cases():
        found = bench.measure(case, chosen)
        for one in found:
            # More tables than the library keeps: of the time on the CPU most would be that of making them anew.
            one |= {"cpu_us_median": None, "wall_us_median": None}
        rows += found
        for one in found:
            show(one)
    command = "python -m bench.performance.variants " + " ".join(sys.argv[1:] if arguments is None else arguments)
    header = machine.header(command) | describe("cuda") | {"left_out": bench.left_out}
    path = asked.output / file_name("variants", header["device"], header["date"])
    path.write_text(json.dumps({"header": header, "anchors": bench.anchors, "rows": rows}, indent=1) + "\n")
    print(path)
    return int(any("WrongAnswer" in one["note"] for one in rows))


if __name__ == "__main__":
    sys.exit(main())
