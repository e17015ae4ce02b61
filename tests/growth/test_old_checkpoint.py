"""States that 0.1 saved, before the library had wings, are taken over by this release bit for bit.

``data/controller-0.1.pt.xz`` was written at commit 36784c3 by the run in tests/resuming.py with a window of 8: before
step 10 (one seed blending by a gate network, one in TRAINING) and before step 24 (a fossil, and a seed fading out).
"""

import io
import lzma
import pathlib

import pytest
import torch
from resuming import Run
from same import same

from seedtriton import StraightThrough, TrustRegion
from seedtriton.core.harm import Watch
from seedtriton.growth.life import Life

DATA = pathlib.Path(__file__).parent / "data" / "controller-0.1.pt.xz"


@pytest.fixture(scope="module")
def saved():
    return torch.load(io.BytesIO(lzma.decompress(DATA.read_bytes())), weights_only=True)


@pytest.mark.parametrize(
    "step, stages", [(10, ("BLENDING", "TRAINING")), (24, ("FOSSILIZED", "BLENDING"))], ids=["10", "24"]
)
def test_a_state_of_the_first_release_is_taken_over_bit_for_bit(saved, step, stages):
    run, old = Run(window=8), saved[step]
    run.load({**old, "random": torch.random.get_rng_state()})
    assert (str(run.model.early.stage), str(run.model.late.stage)) == stages
    assert (run.model.late.frozen is not None) == (step == 24)
    now = run.state()
    # The rule of the seeds is the one that they were trained by.
    assert all(entry.pop("digest") for entry in now["growth"]["slots"].values())
    assert run.model.early.isolation == TrustRegion(0.3, "norm")
    assert run.model.late.isolation == StraightThrough()
    # What 0.1 did not save: how long the optimizer has not stepped, told losses, and what a watch and a probe found.
    assert now["growth"]["monitor"]["_extra_state"].pop("waited") == [0]
    told = [now["growth"].pop(name) for name in ("loss", "losses", "epoch_began", "epoch_steps")]
    assert told == [None, [], 0, 0]
    for life in now["growth"]["lives"]:
        assert [life.pop(name) for name in Life.LATER] == [None, None, Watch().state_dict(), 0, 0]
        # And that a sigmoid may have another steepness than the one of 0.1.
        assert [life["schedule"].pop("steepness"), life["alpha"]["path"].pop("steepness")] == [12.0, 12.0]
    for part in ("growth", "model", "optimizer", "scheduler", "step"):
        assert same(now[part], old[part]), part
    # And it goes on from there.
    run.one()
    assert run.growth.step == old["growth"]["step"] + 1
    assert run.growth.evidence().keys() == ({"early", "late"} if step == 10 else {"late"})


def test_that_comparison_can_fail(saved):
    run = Run(window=8)
    run.load({**saved[10], "random": torch.random.get_rng_state()})
    run.growth.monitor.ring[0, 0, 0] += 1e-16
    assert not same(run.state()["growth"]["monitor"], saved[10]["growth"]["monitor"])
