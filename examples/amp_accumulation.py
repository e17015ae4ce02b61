"""Loss scaling and gradient accumulation with a slot. Run: python examples/amp_accumulation.py."""

import torch
from torch import nn

from seedtriton import GrowthController, SeedSlot

torch.manual_seed(0)
torch.set_num_threads(1)
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float16 if device == "cuda" else torch.bfloat16
ACCUMULATE = 4


class Seed(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.block(x)


model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), SeedSlot(), nn.Linear(8, 4)).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scaler = torch.amp.GradScaler(device, init_scale=1024.0)
growth = GrowthController(model, optimizer)
growth.germinate("2", Seed(8))

inputs = torch.randn(1536, 16, device=device)  # the last 512 are held out
labels = (inputs[:, :4] + inputs[:, 4:8]).argmax(dim=1)


def step(batches: torch.Tensor) -> None:
    """One optimizer step, of several micro-batches."""
    for batch in batches:
        with torch.autocast(device, dtype=dtype):
            loss = nn.functional.cross_entropy(model(inputs[batch]), labels[batch]) / len(batches)
        scaler.scale(loss).backward()
    growth.measure(scaler)  # once, of the whole gradient; before unscale_, which looks for infinities
    scaler.unscale_(optimizer)
    growth.clip_grad_norm_(1.0)  # the host by its norm, a seed behind it by its own
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@torch.no_grad()
def validate() -> float:
    """Loss of what is held out: no accuracy is needed."""
    return nn.functional.cross_entropy(model(inputs[1024:]), labels[1024:]).item()


if __name__ == "__main__":
    for epoch in range(14):
        for batches in torch.randperm(1024, device=device).view(-1, ACCUMULATE, 16):
            step(batches)
        for verdict in growth.end_epoch(loss=validate()):
            print(f"epoch {epoch + 1}  {verdict}")
    assert growth.slots["2"].lifecycle.history[-1]["target"] != "TRAINING", "the seed was never blended"
