"""Scenarios on several ranks, each a process of its own with a time limit; and small networks to run in them.

A scenario is a function ``f(rank, world, **kwargs)`` at the top of a test module, and what it returns must pickle. Its
process is a fork of a server that has imported torch already and has never run a backward pass: a fork of pytest,
where autograd's threads live, would hang in its first one.
"""

import faulthandler
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from seedtriton import SeedSlot, Stage, StraightThrough

# Imported once, by the server: each takes up to seconds.
PRELOADED = (
    "pytest", "torch", "torch._dynamo", "torch._functorch.aot_autograd", "torch.distributed",
    "torch.distributed.algorithms.ddp_comm_hooks.default_hooks", "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.state_dict", "torch.distributed.device_mesh", "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel", "torch.utils.checkpoint", "seedtriton", "parallel.harness",
)  # fmt: skip
GRACE = 5  # seconds in which a rank at its limit has to say where it stands


class Result(NamedTuple):
    """What became of a rank: its value, or why there is none and where in the code that was."""

    value: Any = None
    error: str | None = None
    where: str = ""


def spawn(function, world=2, limit=30, timeout=None, **kwargs):
    """Run a scenario on ``world`` ranks with gloo; the ``Result`` of each. It returns ``limit`` + 5 s later at most.

    Args:
        function: the scenario.
        world: how many ranks.
        limit: seconds after which a rank is ended, wherever it stands.
        timeout: of collectives, seconds, or a list with one per rank; a little below ``limit`` unless told.
        kwargs: passed on.
    """
    context = multiprocessing.get_context("forkserver")
    timeouts = timeout if isinstance(timeout, (list, tuple)) else [timeout or max(1, limit - 2)] * world
    with tempfile.TemporaryDirectory() as folder, _server(context):
        ours, processes = [], []
        for rank in range(world):
            reading, writing = context.Pipe()
            arguments = (writing, function, rank, world, kwargs, folder, limit, timeouts[rank])
            process = context.Process(target=_run, args=arguments, daemon=True)
            process.start()
            writing.close()
            ours.append(reading)
            processes.append(process)
        try:
            results = _collect(ours, time.monotonic() + limit + GRACE)
            return [
                result or _ended(process, Path(folder, f"trace{rank}"), limit)
                for rank, (result, process) in enumerate(zip(results, processes))
            ]
        finally:
            for connection, process in zip(ours, processes):
                connection.close()  # what a rank that has answered waits for
                process.join(1)
                if process.is_alive():
                    process.kill()
                    process.join()


def values(function, world=2, limit=30, timeout=None, **kwargs):
    """The same where every rank has to come through: their values."""
    results = spawn(function, world, limit, timeout, **kwargs)
    bad = [f"rank {rank}: {r.error}\n{r.where}" for rank, r in enumerate(results) if r.error is not None]
    assert not bad, "\n".join(bad)
    return [result.value for result in results]


@contextmanager
def _server(context):
    """The server is a fresh Python: it has to find what pytest finds."""
    context.set_forkserver_preload(list(PRELOADED))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _collect(connections, end):
    results, open_ones = [None] * len(connections), list(connections)
    while open_ones and time.monotonic() < end:
        for connection in wait(open_ones, max(0, end - time.monotonic())):
            open_ones.remove(connection)
            with suppress(EOFError):  # the process has ended without an answer
                results[connections.index(connection)] = connection.recv()
    return results


def _ended(process, trace, limit):
    process.join(1)
    where = trace.read_text("utf-8") if trace.exists() else ""
    if "Timeout" in where or process.is_alive():
        return Result(error=f"still running after {limit} s", where=where)
    return Result(error=f"died with exit code {process.exitcode}", where=where)


def _run(connection, function, rank, world, kwargs, folder, limit, timeout):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    with open(f"{folder}/trace{rank}", "w") as trace:
        faulthandler.enable(trace)
        faulthandler.dump_traceback_later(limit, file=trace, exit=True)
        try:
            store = f"file://{folder}/store"
            waiting = timedelta(seconds=timeout)
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=waiting)
            connection.send(Result(function(rank, world, **kwargs)))
            connection.poll(limit)  # the others may still need this process: until all have answered
        except BaseException as error:
            connection.send(Result(error=f"{type(error).__name__}: {error}", where=traceback.format_exc()))
    os._exit(0)  # a group that somebody has left cannot be taken down in order


# --- networks ---


class Block(nn.Module):
    def __init__(self, width, make=nn.Linear):
        super().__init__()
        self.expand, self.contract = make(width, 2 * width), make(2 * width, width)

    def forward(self, x):
        return x + self.contract(torch.relu(self.expand(x)))


class Host(nn.Module):
    """Two blocks with a slot between them, all widths even, so that shards are even on two and four ranks."""

    inputs, outputs, width = 8, 4, 16

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(self.inputs, self.width), nn.Linear(self.width, self.outputs)
        self.before, self.slot, self.after = Block(self.width), SeedSlot(), Block(self.width)

    def forward(self, x):
        return self.last(self.after(self.slot(self.before(torch.relu(self.first(x))))))


def host(dtype=torch.float32, make=Host):
    """The same weights on every rank and in every dtype."""
    torch.manual_seed(1)
    return make().to(dtype)


def block(dtype=torch.float32, make=Block, rank=0):
    """A seed with weights of its rank's own."""
    torch.manual_seed(2 + rank)
    return make(Host.width).to(dtype)


def wrapped(model, kind):
    """By "ddp", by "fsdp" (FSDP2, in place), or not at all."""
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    return model


def plant(model, seed):
    """Put a seed into the host's slot, where it trains behind the host."""
    dtype = next(model.parameters()).dtype
    model.slot.germinate(seed, isolation=StraightThrough(), probe=torch.zeros(2, Host.width, dtype=dtype))
    model.slot.move(Stage.TRAINING)
    return seed


def batches(steps, size=16, dtype=torch.float32):
    """Global batches: features and targets."""
    generator = torch.Generator().manual_seed(3)
    draw = [torch.randn(2, size, Host.inputs, generator=generator, dtype=torch.float64) for _ in range(steps)]
    return [(x.to(dtype), y[:, : Host.outputs].to(dtype)) for x, y in draw]


def mine(batch, part, parts):
    """One of ``parts`` equal parts of a batch: a rank's, a micro-batch."""
    return tuple(tensor.chunk(parts)[part] for tensor in batch)


def loss_of(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def train(model, global_batches, part=(0, 1), lr=0.05):
    """Plain training on one part of each batch; the gradients of the last step, by parameter."""
    optimizer = torch.optim.SGD(model.parameters(), lr)
    for batch in global_batches:
        optimizer.zero_grad()
        loss_of(model, mine(batch, *part)).backward()
        optimizer.step()
    return gradients_of(model)


def gradients_of(model):
    found = getattr(model, "module", model).named_parameters()
    return {name: None if p.grad is None else p.grad.detach().clone() for name, p in found}


def truth(steps, seed=block, size=16):
    """What one process computes in float64 on the global batches."""
    model = host(torch.float64)
    plant(model, seed(torch.float64))
    return train(model, batches(steps, size, torch.float64))


def distance(found, wanted):
    """The largest relative distance between gradients of the same name; infinite if one has some the other has not."""
    if found.keys() != wanted.keys():
        return float("inf")
    worst = 0.0
    for name, want in wanted.items():
        if (want is None) != (found[name] is None):
            return float("inf")
        if want is not None:
            want, got = want.double(), found[name].double()
            worst = max(worst, float((got - want).norm() / want.norm().clamp(min=1e-30)))
    return worst
