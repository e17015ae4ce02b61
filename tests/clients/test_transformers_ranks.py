"""GrowthCallback and GrowthTrainerMixin on two ranks with Trainer's DDP, over gloo."""

import math
import os
import warnings

import pytest
from parallel.harness import values
from same import same

from seedtriton import Stage

TWO = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False}


def start(rank, world):
    """As torchrun would have started this process."""
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


def lived(here, folder):
    """The evidence, the sums that it is of, the weights, and whether the host's are those of a plain Trainer."""
    settings = {**TWO, "max_grad_norm": 0.05, "gradient_accumulation_steps": 2}
    trainer, callback = here.grown(f"{folder}/lived", **settings)
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    assert callback.growth.slots[here.SLOT].stage is Stage.TRAINING
    alone = here.plain(f"{folder}/alone", **settings)
    weights = {name: value.tolist() for name, value in trainer.model.state_dict().items()}
    host = same(here.host_of(trainer.model), here.host_of(alone.model))
    return callback.growth.evidence()[here.SLOT].state_dict(), trainer.sums, weights, host


def resumed(here, rank, folder):
    """By the stage in which it was stopped, which parts of a run that went on there are not those of the whole run."""
    more = {**TWO, "save_strategy": "steps", "save_steps": 3, "num_train_epochs": 4}
    whole, callback = here.grown(f"{folder}/whole", here.lively(), **more)
    wanted, apart = here.all_of(whole, callback), {}
    for step in (3, 6):
        path = f"{folder}/whole/checkpoint-{step}"
        stage = here.saved_in(path)["growth"]["slots"][here.SLOT]["slot"]["lifecycle"]["stage"]
        back, again = here.grown(f"{folder}/again", here.lively(), model=here.net(seed=7 + rank), resume=path, **more)
        found = here.all_of(back, again)
        apart[stage] = [part for part in wanted if not same(found[part], wanted[part])]
    return apart


def both(rank, world, folder):
    start(rank, world)
    from clients import test_transformers as here

    return lived(here, folder), resumed(here, rank, folder)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return values(both, 2, limit=200, folder=str(tmp_path_factory.mktemp("ranks")))


def test_two_ranks_measure_the_same_and_leave_the_host_alone(found):
    (first, _), (second, _) = found
    assert first == second
    evidence, sums, _, host = first
    seed, base = (math.sqrt(math.fsum(s[who] for s in sums) / len(sums)) for who in ("seed", "host"))
    assert evidence["samples"] == len(sums) == 4
    assert evidence["ratio"] == pytest.approx(seed / (base + 1e-8), rel=1e-6)
    assert host


def test_two_ranks_go_on_bit_for_bit(found):
    assert [apart for _, apart in found] == [{Stage.TRAINING.name: [], Stage.BLENDING.name: []}] * 2
