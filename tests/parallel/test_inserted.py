"""A slot that was inserted, before or after the model was wrapped, is on many ranks what one is that is written."""

import pytest
import torch
from parallel.harness import Host, block, host, values, wrapped
from parallel.test_agreement import EASY
from parallel.test_lives import PER_EPOCH
from parallel.test_ranks import learn

from seedtriton import AlphaSchedule, GrowthController, StraightThrough, insert_slot


class Bare(Host):
    """The same host, and no slot in it."""

    def __init__(self):
        super().__init__()
        del self.slot

    def forward(self, x):
        return self.last(self.after(self.before(torch.relu(self.first(x)))))


def life(rank, world, kind, when):
    """From germination into the blend; ``when`` the slot is inserted, None: it is written into the model."""
    inner = host(make=Host if when is None else Bare)
    if kind == "blocks":
        from torch.distributed.fsdp import fully_shard

        fully_shard(inner.before)  # the module that the slot follows is one of FSDP's own
    if when == "before":
        insert_slot(inner, "before")
    model = wrapped(inner, "fsdp" if kind == "blocks" else kind)
    if when == "after":
        insert_slot(model, "before")
    optimizer = torch.optim.SGD(inner.parameters(), 0.05)
    events = []
    growth = GrowthController(
        model, optimizer, thresholds=EASY, sinks=[events.append], schedule=AlphaSchedule(steps=2 * PER_EPOCH)
    )
    [name] = growth.slots
    growth.germinate(name, block(rank=rank), isolation=StraightThrough(), probe=torch.zeros(2, Host.width))
    for epoch in range(4):
        learn(model, growth, optimizer, (rank, world), steps=PER_EPOCH, skip=epoch)
        growth.end_epoch(loss=1.0)
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in inner.parameters()]
    told = [(e["event"], e["stage"], e.get("ratio"), e.get("blend_gain"), e.get("alpha")) for e in events]
    return name, told, sorted(float(weight.detach().double().sum()) for weight in weights)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "blocks"])
def test_a_life_on_two_ranks_is_that_of_a_slot_that_is_written_into_the_model(kind):
    written = values(life, kind=kind, when=None)
    assert "BLENDING" in {stage for _, stage, *_ in written[0][1]}
    for when in ("before", "after"):
        found = values(life, kind=kind, when=when)
        assert [name for name, *_ in found] == ["before.growth_slot"] * 2
        assert found[0][1] == written[0][1]
        assert [weights for *_, weights in found] == [weights for *_, weights in written]
