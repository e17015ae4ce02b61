"""prepare_growth on two ranks with DDP under accelerate, over gloo."""

import os
import warnings

import pytest
import torch
from clients.truth import differences
from parallel.harness import values

from seedtriton import Stage


def start(rank, world):
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # not used: the group is there


def lived(rank, world, clip, accumulated):
    from clients.test_accelerate import Adapter, Run

    start(rank, world)
    grown = Run(Adapter, "SGD", clip, accumulated=accumulated, thresholds=None)
    assert grown.accelerator.num_processes == world
    assert type(grown.model).__name__ == "DistributedDataParallel"
    grown.train()
    evidence = grown.growth.evidence()["slot"]
    grown.truth.check(evidence, len(grown.truth.samples))
    alone = Run(None, "SGD", clip, accumulated=accumulated).train()
    weights = {name: value.tolist() for name, value in grown.net.state_dict().items()}
    return evidence.state_dict(), weights, differences(alone.hosts, grown.hosts)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_two_ranks_measure_the_same_and_leave_the_host_alone(accumulated):
    first, second = values(lived, 2, limit=120, clip="theirs", accumulated=accumulated)
    assert differences(list(first), list(second)) == []
    assert first[2] == []
    assert first[0]["samples"] == (10 if accumulated == 1 else 6)


def resumed(rank, world, folder, at):
    from clients.test_accelerate import Run

    start(rank, world)
    full = Run(clip="theirs").train(8, save=(folder, at))
    again = Run(clip="theirs")
    again.accelerator.load_state(folder)
    stage = again.growth.slots["slot"].stage
    again.train(8, begin=at)
    hosts = differences(full.hosts[-len(again.hosts) :], again.hosts)
    return str(stage), hosts, differences(full.whole(), again.whole())


@pytest.mark.parametrize("at, stage", [(3, Stage.TRAINING), (18, Stage.BLENDING)])
def test_two_ranks_go_on_bit_for_bit(tmp_path, at, stage):
    torch.manual_seed(0)
    for found in values(resumed, 2, limit=120, folder=tmp_path, at=at):
        assert found == (str(stage), [], [])
