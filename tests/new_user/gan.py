"""A GAN on a ring of points whose generator grows: two losses, two optimizers, no accuracy.

    python tests/new_user/gan.py
"""

import torch
from torch import nn

from seedtriton import AlphaSchedule, GrowthController, SeedSlot

torch.manual_seed(0)
EPOCHS, STEPS, BATCH = 8, 40, 128


class Seed(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, width))

    def forward(self, x):
        return x + self.body(x)


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.slot = SeedSlot()
        self.last = nn.Linear(8, 2)

    def forward(self, noise):
        return self.last(self.slot(self.first(noise)))


def real(count):
    angle = torch.rand(count) * 6.2832
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(count, 2)


bce = nn.functional.binary_cross_entropy_with_logits
generator, discriminator = Generator(), nn.Sequential(nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
generator_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.99))
discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.99))

growth = GrowthController(
    generator, generator_optimizer, tag="generator", mode="permissive", schedule=AlphaSchedule(steps=80)
)
growth.germinate("slot", Seed(8))

for epoch in range(EPOCHS):
    for _ in range(STEPS):
        fake = generator(torch.randn(BATCH, 4))
        truth, lie = discriminator(real(BATCH)), discriminator(fake.detach())
        (bce(truth, torch.ones_like(truth)) + bce(lie, torch.zeros_like(lie))).backward()
        discriminator_optimizer.step()
        discriminator_optimizer.zero_grad()

        lie = discriminator(fake)
        bce(lie, torch.ones_like(lie)).backward()
        growth.measure(tag="generator")
        generator_optimizer.step()
        generator_optimizer.zero_grad()
        discriminator_optimizer.zero_grad()
    for verdict in growth.end_epoch():
        print(f"epoch {epoch + 1:2d}  {verdict}")

print(growth.slots["slot"].stage)
