"""What many ranks cost: exchanges and bytes, counted where they are made: python -m bench.parallel.

Times are of processes that share this machine, and so of waiting for each other: they are in the raw output, and no
table of them is made.
"""

import argparse
import datetime
import json
import os
import pathlib
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from bench.machine import header
from seedtriton import GrowthController, SeedSlot

ROOT = pathlib.Path(__file__).resolve().parent.parent
WIDTH, BATCH, STEPS = 32, 16, 8
WRAPS = ("DDP", "FSDP2")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        return x + self.layers(x)


def counted(ranks, call):
    """Exchanges and bytes of one call, as ``Ranks`` counts them, and its seconds."""
    before, begun = (ranks.collectives, ranks.bytes), time.perf_counter()
    call()
    return {
        "exchanges": ranks.collectives - before[0],
        "bytes": ranks.bytes - before[1],
        "seconds": time.perf_counter() - begun,
    }


def _measure(rank, world, wrap, seeds, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=limit)
    torch.manual_seed(0)
    places = [part for _ in range(seeds) for part in (SeedSlot(), Block())]
    network = nn.Sequential(Block(), *places)
    model = DistributedDataParallel(network) if wrap == "DDP" else fully_shard(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    growth = GrowthController(model, optimizer, sinks=[])
    ranks = growth.monitor.ranks
    found = {"germinate": [], "measure": [], "clip": [], "end_epoch": [], "state_dict": []}
    for name in growth.slots:
        found["germinate"].append(counted(ranks, lambda name=name: growth.germinate(name, Block())))
    for _ in range(2):
        for _ in range(STEPS):
            model(torch.randn(BATCH, WIDTH)).square().mean().backward()
            found["measure"].append(counted(ranks, growth.measure))
            found["clip"].append(counted(ranks, lambda: growth.clip_grad_norm_(1.0)))
            optimizer.step()
            optimizer.zero_grad()
        found["end_epoch"].append(counted(ranks, lambda: growth.end_epoch(loss=1.0)))
    found["state_dict"].append(counted(ranks, growth.state_dict))
    if rank == 0:
        pathlib.Path(folder, "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def measure(world, wrap, seeds):
    """The most exchanges and bytes that one call of each kind took, and the median of its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_measure, args=(world, wrap, seeds, folder), nprocs=world)
        found = json.loads(pathlib.Path(folder, "found.json").read_text(encoding="utf-8"))
    calls = {
        call: {
            "exchanges": max(one["exchanges"] for one in each),
            "bytes": max(one["bytes"] for one in each),
            "seconds": statistics.median(one["seconds"] for one in each),
        }
        for call, each in found.items()
    }
    return {"world": world, "wrap": wrap, "seeds": seeds, "calls": calls}


def markdown(record, name):
    """The table of docs/many-gpus.md, with links as from the README."""
    calls = list(record["runs"][0]["calls"])
    lines = [
        f"Exchanges / bytes per call and rank, a window of 128 samples; torch {record['torch']}, gloo "
        f"([raw output](bench/results/{name}), `{record['command']}`).",
        "",
        "| wrapped by | ranks | seeds | " + " | ".join(f"`{call}`" for call in calls) + " |",
        "|---|---|---|" + "---|" * len(calls),
    ]
    for run in record["runs"]:
        cells = [f"{run['calls'][call]['exchanges']} / {run['calls'][call]['bytes']}" for call in calls]
        lines.append(f"| {run['wrap']} | {run['world']} | {run['seeds']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.parallel", description=__doc__)
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    runs = [measure(world, wrap, seeds) for wrap in WRAPS for world in (2, 4) for seeds in (1, 2)]
    record = {**header("python -m bench.parallel"), "runs": runs}
    path = options.output or ROOT / "bench" / "results" / f"parallel-{record['date']}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(markdown(record, path.name))


if __name__ == "__main__":
    main()
