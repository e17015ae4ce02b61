"""Random damage to a saved controller: refused by name with nothing changed, or harmless; never a bare error."""

import copy
import random

import pytest
import torch
from resuming import SEEDS_BY_SLOT, STEPS, Run
from same import same

from seedtriton import SeedtritonError

MOMENTS = (5, 25, 40)
VALUES = (
    torch.ones(3), torch.zeros(()), torch.tensor([float("nan")]), "text", "", b"x", None, True, -1, 0, 10**9, 1.5, -0.5,
    float("nan"), float("inf"), [], {}, (1,), [1, 2, 3], {"a": 1},
)  # fmt: skip
DAMAGES = 120


@pytest.fixture(scope="module")
def saved():
    run, found = Run(), {}
    while run.step <= max(MOMENTS):
        if run.step in MOMENTS:
            found[run.step] = copy.deepcopy(run.state())
        run.one()
    return found


def places(value, path=()):
    """Every leaf and every container inside, by the keys that lead there."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def damaged(state, draw):
    """Something else somewhere, or nothing where there was something."""
    path = draw.choice(list(places(state)))
    holder = state
    for key in path[:-1]:
        holder = holder[key]
    if draw.random() < 0.15:
        del holder[path[-1]]
    else:
        holder[path[-1]] = copy.deepcopy(draw.choice(VALUES))
    return path


@pytest.mark.parametrize("part", range(4))
def test_damage_is_refused_by_name_or_does_no_harm(saved, part):
    refused = 0
    for number in range(part, DAMAGES, 4):
        draw = random.Random(number)
        state = copy.deepcopy(saved[draw.choice(MOMENTS)])
        path = damaged(state["growth"], draw)
        run = Run()
        before = copy.deepcopy(run.state())
        try:
            run.growth.load_state_dict(state["growth"], seeds=SEEDS_BY_SLOT)
        except SeedtritonError:
            refused += 1
            now = run.state()
            assert all(same(now[name], before[name]) for name in before if name != "random"), (number, path)
            continue
        run.model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.scheduler.load_state_dict(state["scheduler"])
        run.step = state["step"]
        said = "not those that were saved"
        try:
            while run.step < min(STEPS, state["step"] + 5):
                run.one()
        except SeedtritonError as error:  # a digest is held against weights in the first step
            said = str(error)
        assert "not those that were saved" in said, (number, path)
    assert refused > DAMAGES / 4 / 2
