"""A two-block model of characters that grows by LoRA seeds: scheduler, clipping, accumulation, EMA.

    python tests/new_user/characters_with_lora.py
"""

import argparse
import inspect

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from seedtriton import AlphaSchedule, GrowthController, SeedSlot

torch.manual_seed(0)
WIDTH, LENGTH, EPOCHS, STEPS, PARTS = 24, 24, 12, 24, 2
text = torch.tensor([min(ord(letter), 127) for letter in inspect.getsource(argparse)])
train, held_out = text[: -85 * LENGTH], text[-85 * LENGTH :].view(-1, LENGTH)


class Block(nn.Module):
    """Causal attention and an MLP, with a slot behind them."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))
        self.slot = SeedSlot()

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        y = self.norm(x)
        x = x + self.attention(y, y, y, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return self.slot(x + self.mlp(x))


class Characters(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(128, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 128)

    def forward(self, tokens):
        x = self.embed(tokens) + self.place.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class LoRA(nn.Module):
    """Hands the features on, and adds a product of two thin matrices, the second of which begins at zero."""

    def __init__(self, rank=8):
        super().__init__()
        self.down = nn.Linear(WIDTH, rank, bias=False)
        self.up = nn.Linear(rank, WIDTH, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return x + self.up(self.down(x))


def losses(model, tokens=held_out):
    logits = model(tokens[:, :-1]).transpose(1, 2)
    return nn.functional.cross_entropy(logits, tokens[:, 1:], reduction="none").mean(dim=1)


def batches():
    for _ in range(STEPS):
        starts = torch.randint(len(train) - LENGTH, (PARTS, 8, 1))
        yield train[starts + torch.arange(LENGTH)]


model = Characters()
ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98))
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=EPOCHS * STEPS)
growth = GrowthController(
    model,
    optimizer,
    schedulers=[scheduler],
    schedule=AlphaSchedule(steps=2 * STEPS, curve="cosine"),
    evaluate=losses,
    total_epochs=EPOCHS,
)
growth.follow(ema)
for block in ("blocks.0.slot", "blocks.1.slot"):
    print(growth.germinate(block, LoRA(), lr=1e-2))

for epoch in range(EPOCHS):
    for batch in batches():
        for part in batch:
            (losses(model, part).mean() / PARTS).backward()
        growth.measure()
        growth.clip_grad_norm_(1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        ema.update_parameters(model)
    with torch.no_grad():
        now, average = losses(model).mean().item(), losses(ema).mean().item()
    verdicts = growth.end_epoch(loss=now)
    print(f"epoch {epoch + 1:2d}  loss {now:.3f}  average {average:.3f}")
    for verdict in verdicts:
        print("   ", verdict)

stages = {name: str(slot.stage) for name, slot in growth.slots.items()}
copied = {name: str(slot.stage) for name, slot in ema.module.named_modules() if isinstance(slot, SeedSlot)}
print(stages, "and in the average:", copied)
