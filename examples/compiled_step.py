"""A compiled model with a slot, and a compiled monitor. Run: python examples/compiled_step.py."""

import torch
from torch import nn

from seedtriton import AlphaSchedule, GrowthController, SeedSlot

torch.manual_seed(0)
torch.set_num_threads(1)
device = "cuda" if torch.cuda.is_available() else "cpu"


class Seed(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.block(x)


model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), SeedSlot(), nn.Linear(8, 4)).to(device)
# On a CPU the default backend calls a C++ compiler for every graph, which takes longer than this whole run.
compiled = torch.compile(model, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
growth = GrowthController(model, optimizer, schedule=AlphaSchedule(steps=64))
growth.germinate("2", Seed(8), probe=torch.zeros(2, 8, device=device))

inputs = torch.randn(1536, 16, device=device)  # the last 512 are held out
labels = (inputs[:, :4] + inputs[:, 4:8]).argmax(dim=1)


def step(batch: torch.Tensor) -> torch.Tensor:
    """One optimizer step; its loss."""
    loss = nn.functional.cross_entropy(compiled(inputs[batch]), labels[batch])
    loss.backward()
    growth.measure()  # alpha moves in place: a whole ramp recompiles nothing
    optimizer.step()
    optimizer.zero_grad()
    return loss


if __name__ == "__main__":
    for epoch in range(16):
        for batch in torch.randperm(1024, device=device).split(64):
            loss = step(batch)
        with torch.no_grad():
            held_out = nn.functional.cross_entropy(model(inputs[1024:]), labels[1024:]).item()
        for verdict in growth.end_epoch(loss=held_out):
            answer = "passed" if verdict.passed else "refused"
            print(f"epoch {epoch + 1:2d}  loss {held_out:.3f}  {verdict.gate} {answer}")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    print(f"{growth.slots['2'].stage}, {graphs} graphs for the whole life")
    assert graphs <= 4, "a stage change costs at most one graph"
