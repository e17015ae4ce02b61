"""A seed that germinates after fully_shard: torchrun --standalone --nproc-per-node 2 examples/fsdp2.py."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from seedtriton import AlphaSchedule, GrowthController, SeedSlot, Stage

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
if device.type == "cuda":
    torch.cuda.set_device(device)
torch.set_num_threads(1)


class Seed(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.block(x)


torch.manual_seed(0)  # the same samples on every rank, of which each trains on its own part
inputs = torch.randn(1536, 16)
labels = (inputs[:, :4] + inputs[:, 4:8]).argmax(dim=1)
held_out = inputs[1024:].to(device), labels[1024:].to(device)
samples = TensorDataset(inputs[:1024], labels[:1024])
sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(samples, drop_last=True)
loader = DataLoader(samples, batch_size=64 // world, sampler=sampler, drop_last=True)

model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), SeedSlot(), nn.Linear(8, 4)).to(device)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
growth = GrowthController(model, optimizer, schedule=AlphaSchedule(steps=96))

torch.manual_seed(rank)  # as data loading does; the seed is the first rank's on all of them
growth.germinate("2", Seed(8))  # a plain module: it is sharded as its host is


@torch.no_grad()
def validate() -> float:
    """Loss of a part of what is held out; the gates take the mean over the ranks."""
    mine = slice(rank, None, world)
    return nn.functional.cross_entropy(model(held_out[0][mine]), held_out[1][mine]).item()


if __name__ == "__main__":
    for epoch in range(14):
        sampler.set_epoch(epoch)
        for x, y in loader:
            nn.functional.cross_entropy(model(x.to(device)), y.to(device)).backward()
            growth.measure()  # communicates nothing
            growth.clip_grad_norm_(1.0)  # one exchange of a few numbers
            optimizer.step()
            optimizer.zero_grad()
        for verdict in growth.end_epoch(loss=validate()):  # on every rank, and the same on every rank
            if rank == 0:
                print(f"epoch {epoch}: {verdict}")
    assert growth.slots["2"].stage in (Stage.HOLDING, Stage.FOSSILIZED), growth.slots["2"].stage
    dist.barrier()
    dist.destroy_process_group()
