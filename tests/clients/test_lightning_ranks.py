"""GrowthCallback on two ranks with Lightning's DDP, over gloo."""

import os
import warnings

import pytest
from clients.truth import data, differences
from parallel.harness import values

from seedtriton import Stage

SETTINGS = {"strategy": "ddp", "devices": 2}


def start(rank, world):
    """As torchrun would have started this process."""
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # not used: the group is there


def lived(rank, world, settings):
    from clients.test_lightning import Lit, Watcher, fit, grower

    start(rank, world)
    watcher, growth, alone = Watcher(), grower(thresholds=None), Watcher()
    made = fit(Lit("SGD"), growth, watcher, **SETTINGS, **settings)
    assert made.world_size == world
    evidence = growth.growth.evidence()["net.slot"]
    watcher.truth.check(evidence, len(watcher.truth.samples))
    weights = {name: value.tolist() for name, value in made.lightning_module.state_dict().items()}
    fit(Lit("SGD"), alone, **SETTINGS, **settings)
    numbers = {name: float(value) for name, value in made.callback_metrics.items() if name.startswith("growth/")}
    return evidence.state_dict(), weights, numbers, differences(alone.hosts, watcher.hosts)


@pytest.mark.parametrize("settings", [{"gradient_clip_val": 0.05}, {"accumulate_grad_batches": 2}], ids=str)
def test_two_ranks_measure_the_same_and_leave_the_host_alone(settings):
    first, second = values(lived, 2, limit=150, settings=settings)
    assert differences(list(first), list(second)) == []
    assert first[3] == []
    steps = 6 if "accumulate_grad_batches" in settings else 10
    assert first[0]["samples"] == first[2]["growth/net.slot/samples"] == steps


def resumed(rank, world, folder, at):
    from clients.test_lightning import Lit, Stopping, fit, grower, loaders, trainer, whole

    start(rank, world)

    class Steady(Lit):
        def training_step(self, batch, index):
            begin = 8 * (2 * index + self.global_rank) % 72
            return self.loss(data()[begin : begin + 8])

    settings = {**SETTINGS, "epochs": 5, "gradient_clip_val": 0.05}
    path, watcher, growth = f"{folder}/at.ckpt", Stopping(f"{folder}/at.ckpt", at), grower()
    wanted = whole(fit(Steady(), growth, watcher, **settings), growth)
    again, back = Stopping(), grower()
    made = trainer(again, back, **settings)
    made.fit(Steady(), *loaders(), ckpt_path=path)
    return str(again.stages[0]), differences(wanted, whole(made, back))


@pytest.mark.parametrize("at, stage", [(3, Stage.TRAINING), (17, Stage.BLENDING)])
def test_two_ranks_go_on_bit_for_bit(tmp_path, at, stage):
    for found in values(resumed, 2, limit=150, folder=tmp_path, at=at):
        assert found == (str(stage), [])
