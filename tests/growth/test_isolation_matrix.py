"""The promise, cell by cell: 30 steps with a seed behind the host leave it, bit for bit, as 30 steps without one.

Every cell is two scripts that share nothing: one grows a seed, the other never hears of one.
"""

import functools
import itertools
import pathlib
import subprocess
import sys

import pytest
import torch
from muon import Muon
from torch import nn
from torch.utils.checkpoint import checkpoint

from seedtriton import GrowthController, SeedSlot
from seedtriton.testing import assert_isolated

STEPS, BREAKS_AT = 30, 10
WIDTH, BATCH = 8, 6
ROOT = pathlib.Path(__file__).resolve().parents[2]


class Seed(nn.Module):
    """``x + f(x)``, which from step ``BREAKS_AT`` on is NaN or has infinite gradients if it is told to."""

    def __init__(self, *layers, breaks=None):
        super().__init__()
        self.layers, self.breaks, self.step = nn.Sequential(*layers), breaks, 0
        if breaks == "inf":
            for parameter in self.parameters():
                parameter.register_hook(lambda g: torch.full_like(g, torch.inf) if self.step >= BREAKS_AT else g)

    def forward(self, x):
        change = self.layers(x)
        return x + (change * torch.nan if self.breaks == "nan" and self.step >= BREAKS_AT else change)


def linear(*between, **options):
    return Seed(nn.Linear(WIDTH, 12), nn.ReLU(), *between, nn.Linear(12, WIDTH), **options)


SEEDS = {
    "healthy": linear,
    "dropout": lambda: linear(nn.Dropout(0.5)),
    "batch norm": lambda: linear(nn.BatchNorm1d(12)),
    "group norm, channels_last": lambda: Seed(
        nn.GroupNorm(2, WIDTH), nn.Conv2d(WIDTH, 4, 1), nn.ReLU(), nn.GroupNorm(2, 4), nn.Conv2d(4, WIDTH, 1)
    ),
    "nan": lambda: linear(breaks="nan"),
    "inf": lambda: linear(breaks="inf"),
}
OPTIMIZERS = {
    "sgd momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw foreach": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, foreach=True),
    "adamw fused": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, fused=True),
    "muon": lambda parameters: Muon(parameters, lr=0.02),
}
CLIPS = ("no clip", "clip bites", "clip does not bite")


class Net(nn.Module):
    """A host with everything that a seed could disturb: random numbers, buffers, a norm over the batch."""

    def __init__(self, images, reentrant):
        super().__init__()
        self.images, self.reentrant = images, reentrant
        self.first = nn.Conv2d(3, WIDTH, 3, padding=1) if images else nn.Linear(5, WIDTH)
        self.norm = nn.BatchNorm2d(WIDTH) if images else nn.BatchNorm1d(WIDTH)
        self.slot = SeedSlot()
        self.drop = nn.Dropout(0.2)
        self.last = nn.Conv2d(WIDTH, 3, 1) if images else nn.Linear(WIDTH, 3)

    def rest(self, x):
        return self.last(self.drop(self.slot(self.drop(torch.tanh(x)))))

    def forward(self, x):
        x = self.norm(self.first(x))
        x = checkpoint(self.rest, x, use_reentrant=True) if self.reentrant else self.rest(x)
        return x.mean((2, 3)) if self.images else x


class Script:
    """A training script; ``seed`` is a name of the table, or None for the one that has no seed."""

    def __init__(self, seed, optimizer, limit, loop, images):
        torch.manual_seed(0)
        self.model = Net(images, loop == "reentrant checkpoint")
        shape = (4 * BATCH, 3, 4, 4) if images else (4 * BATCH, 5)
        self.x, self.y = torch.randn(shape), torch.randint(0, 3, (4 * BATCH,))
        if images:
            self.model, self.x = (it.to(memory_format=torch.channels_last) for it in (self.model, self.x))
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=7)
        self.growth = GrowthController(self.model, self.optimizer, sinks=[])
        self.limit, self.loop, self.norms = limit, loop, []
        if seed is not None:
            self.growth.germinate("slot", SEEDS[seed]())
        torch.manual_seed(1)  # making a seed has drawn random numbers, and that is no part of a step

    def loss(self, number):
        rows = torch.arange(number * BATCH, (number + 1) * BATCH) % len(self.x)
        return nn.functional.cross_entropy(self.model(self.x[rows]).float(), self.y[rows])

    def clip(self):
        if self.limit is not None:
            self.norms.append(float(self.growth.clip_grad_norm_(self.limit)))

    def step(self, number):
        if isinstance(self.model.slot.seed, Seed):
            self.model.slot.seed.step = number
        LOOPS[self.loop](self, number)
        self.optimizer.zero_grad()

    def host(self):
        """Parameters, buffers, the optimizer's state for them and the loss scale, as bytes by name."""
        found = {}
        for name, parameter in self.model.named_parameters():
            if not name.startswith("slot."):
                found[name] = raw(parameter)
                for key, value in self.optimizer.state[parameter].items():
                    found[f"{key} of {name}"] = raw(value)
        found |= {name: raw(b) for name, b in self.model.named_buffers() if not name.startswith("slot.")}
        return found | {"scale": self.scaler.get_scale()}

    def run(self):
        states = []
        for number in range(STEPS):
            self.step(number)
            states.append(self.host())
        return states


def raw(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


# --- the loops, as the documentation shows them ---


def plain(script, number):
    script.loss(number).backward()
    script.growth.measure()
    script.clip()
    script.optimizer.step()


def accumulation(script, number):
    for micro in range(3):
        (script.loss(3 * number + micro) / 3).backward()
    script.growth.measure()
    script.clip()
    script.optimizer.step()


def scaled(script, number):
    script.scaler.scale(script.loss(number)).backward()
    script.growth.measure(script.scaler)
    if script.limit is not None:
        script.scaler.unscale_(script.optimizer)
        script.clip()
    script.scaler.step(script.optimizer)
    script.scaler.update()


def scaled_unscaled_first(script, number):
    script.scaler.scale(script.loss(number)).backward()
    script.scaler.unscale_(script.optimizer)
    script.growth.measure(script.scaler)
    script.clip()
    script.scaler.step(script.optimizer)
    script.scaler.update()


def autocast(script, number):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = script.loss(number)
    loss.backward()
    script.growth.measure()
    script.clip()
    script.optimizer.step()


UNSCALED_FIRST = "grad scaler, measured after unscale_"
LOOPS = {
    "plain": plain,
    "accumulation": accumulation,
    "grad scaler": scaled,
    UNSCALED_FIRST: scaled_unscaled_first,
    "bf16 autocast": autocast,
    "reentrant checkpoint": plain,
}

# Cells that cannot exist, and why. The tests below see to it that the reason is true.
TOO_LATE = "unscale_() has noted the seed's infinity before measure() could make it zero: the whole step is skipped"
IMPOSSIBLE = {(UNSCALED_FIRST, "nan"): TOO_LATE, (UNSCALED_FIRST, "inf"): TOO_LATE}

ROWS = [*itertools.product(OPTIMIZERS, CLIPS, LOOPS)]
CELLS = [(*row, seed) for row in ROWS for seed in SEEDS if (row[2], seed) not in IMPOSSIBLE]


def is_image(seed):
    return "channels_last" in seed


@functools.cache
def limit_of(optimizer, clip, loop, images):
    """A limit far below the host's norms, or just above the largest: host and seed together go beyond that one."""
    if clip == "no clip":
        return None
    if clip == "clip bites":
        return 0.05
    script = Script(None, optimizer, 1e6, loop, images)
    script.run()
    return 1.01 * max(script.norms)


@functools.cache
def without_seed(optimizer, clip, loop, images):
    script = Script(None, optimizer, limit_of(optimizer, clip, loop, images), loop, images)
    states = script.run()
    if clip != "no clip":
        bites = [norm > script.limit for norm in script.norms]
        assert all(bites) if clip == "clip bites" else not any(bites)
    assert len({state["first.weight"] for state in states}) == STEPS, "the host learns in every step"
    return states


def first_difference(optimizer, clip, loop, seed, steps=STEPS):
    """The first step and the names of what is another after it; None if the host is the same all along."""
    images = is_image(seed)
    expected = without_seed(optimizer, clip, loop, images)
    script = Script(seed, optimizer, limit_of(optimizer, clip, loop, images), loop, images)
    before = [parameter.detach().clone() for parameter in script.model.slot.parameters()]
    for number in range(steps):
        script.step(number)
        found = script.host()
        assert found.keys() == expected[number].keys()
        different = [name for name, value in expected[number].items() if found[name] != value]
        if different:
            return number, different
    assert not any(map(torch.equal, before, script.model.slot.parameters())), "the seed learns"
    return None


def test_the_matrix_is_whole():
    assert len(ROWS) * len(SEEDS) == len(CELLS) + len(OPTIMIZERS) * len(CLIPS) * len(IMPOSSIBLE) == 432


@pytest.fixture(scope="module")
def group_norm():
    """torch's backward of a group norm ends the process for some layouts: one cell is tried in another one first."""
    code = (
        "import sys; sys.path[:0] = ['tests', 'tests/growth']\n"
        "from test_isolation_matrix import Script\n"
        "Script('group norm, channels_last', 'sgd momentum', None, 'plain', True).step(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, f"the process ends with {done.returncode}: {done.stderr[-500:]}"


@pytest.mark.parametrize("optimizer, clip, loop, seed", [cell for cell in CELLS if not is_image(cell[3])])
def test_the_host_is_the_same(optimizer, clip, loop, seed):
    assert first_difference(optimizer, clip, loop, seed) is None


@pytest.mark.usefixtures("group_norm")
@pytest.mark.parametrize("optimizer, clip, loop, seed", [cell for cell in CELLS if is_image(cell[3])])
def test_the_host_is_the_same_with_images(optimizer, clip, loop, seed):
    assert first_difference(optimizer, clip, loop, seed) is None


@pytest.mark.parametrize("loop, seed", IMPOSSIBLE)
def test_a_cell_that_cannot_exist_says_why(loop, seed):
    assert IMPOSSIBLE[loop, seed] == TOO_LATE
    number, different = first_difference("sgd momentum", "no clip", loop, seed)
    assert number == BREAKS_AT
    assert {"scale", "first.weight"} <= set(different)


# --- a matrix that cannot turn red proves nothing ---


@pytest.mark.parametrize("clip", CLIPS[1:])
@pytest.mark.parametrize("optimizer", ["sgd momentum", "adamw fused"])
@pytest.mark.parametrize("loop", ["plain", "grad scaler"])
def test_a_foreign_clip_over_everything_couples_host_and_seed(optimizer, clip, loop, monkeypatch):
    without_seed(optimizer, clip, loop, False)
    monkeypatch.setattr(
        GrowthController,
        "clip_grad_norm_",
        lambda growth, limit: nn.utils.clip_grad_norm_(growth.model.parameters(), limit),
    )
    assert "first.weight" in first_difference(optimizer, clip, loop, "healthy")[1]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_check_for_users_says_the_same(optimizer, loop):
    script = Script("healthy", optimizer, None, loop, False)
    assert_isolated(script.step, script.growth, script.scaler, steps=3)
