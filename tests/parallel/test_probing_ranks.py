"""The probe on several ranks: in place where nothing can be copied, and one set of losses from those of all."""

import pytest
import torch
import torch.distributed as dist
from parallel.harness import Block, Host, batches, host, spawn, values
from parallel.sharded import F64, distance, full, germinate, mesh_of, one_step, prepared, seed_of
from torch import nn

from seedtriton import SeedSlot, Stage
from seedtriton.growth.probing import probe, probe_pair, trial_of
from seedtriton.parallel.losses import gather_losses
from seedtriton.parallel.sharding import settle

# --- probe in place ---


class Counting(nn.Module):
    """Counts what it sees, in a buffer and in an attribute, and draws."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(2))
        self.calls = 0

    def forward(self, x):
        self.seen += 1
        self.calls += 1
        return x + 0 * torch.rand(1, dtype=x.dtype)


class Counted(Host):
    def __init__(self):
        super().__init__()
        self.last = nn.Sequential(Counting(), self.last, nn.BatchNorm1d(self.outputs))


def bits_of(model):
    tensors = [full(t.detach()).clone() for t in (*model.parameters(), *model.buffers())]
    tensors += [full(p.grad).clone() for p in model.parameters() if p.grad is not None]
    tensors += [torch.get_rng_state(), model.slot.alpha.grad.clone()]
    slot = model.slot
    plain = [
        [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()],
        slot.alpha_value, slot._mode, slot.stage, slot.isolation_violations, slot._checks_due, model.last[0].calls,
        vars(slot.random).copy(), sorted(vars(model.last[0])),
    ]  # fmt: skip
    return tensors, plain, [id(p) for p in model.parameters()] + [id(slot.alpha), slot.alpha._version]


def same_bits(before, after):
    tensors = len(before[0]) == len(after[0]) and all(map(torch.equal, before[0], after[0]))
    return tensors and before[1:] == after[1:]


def careless(model, x, fails=None):
    """Its losses; leaves training mode, another alpha, hooks' traces and learning parameters behind."""
    losses = model(x).flatten(1).square().mean(1)
    torch.rand(3)
    if fails == "outside":
        raise ValueError("no such file")
    model.train()
    with torch.enable_grad():
        model(x)
    if fails == "inside":
        hook = model.after.register_forward_pre_hook(lambda *_: 1 / 0)
        try:
            model(x)
        finally:
            hook.remove()
    model.slot.blend_at(0.7)
    model.last[0].cache = x
    model.last[0].seen = torch.full((2,), 9.0)
    model.slot.random.tick += 1  # as a slot does that is behind the host
    settle(model)
    model.first.requires_grad_(False)
    return losses


def probes(rank, world, when, blocks=False, options=None):
    model = prepared(rank, world, when, blocks, make=Counted, options=options)
    model.slot.move(Stage.TRAINING)
    x = batches(4, dtype=F64)[3][0]
    truth = host(F64, Counted)
    germinate(truth, seed_of(truth))
    truth.slot.move(Stage.TRAINING)
    one_step(model, (rank, world)), one_step(truth, (rank, world))
    truth.load_state_dict({name: full(t) for name, t in model.state_dict().items()})
    settle(model)
    before, report = bits_of(model), []
    for fails in (None, "outside", "inside"):
        model.unshard()  # as a validation pass leaves it
        try:
            found = probe(model, "slot", lambda m, fails=fails: careless(m, x, fails), (0.5, 1.0))
        except (ValueError, ZeroDivisionError) as error:
            found = type(error).__name__
        report.append((found, same_bits(before, bits_of(model))))
    wanted = probe(truth, "slot", lambda m: careless(m, x), (0.5, 1.0))
    truth.requires_grad_(True)  # a twin shares its parameters, and their flags
    apart = distance(one_step(model, (rank, world)), one_step_of_all(truth, world))
    return report, wanted, apart


def one_step_of_all(truth, world):
    """The mean of what the ranks compute; batch norm looks at each rank's batch alone."""
    saved = {name: tensor.clone() for name, tensor in truth.state_dict().items()}
    sums = []
    for part in range(world):
        truth.load_state_dict(saved)
        sums.append(one_step(truth, (part, world)))
    return {name: torch.stack([each[name] for each in sums]).mean(0) for name in sums[0]}


@pytest.mark.parametrize(
    "layout",
    [
        {"when": "late"}, {"when": "whole"},
        {"when": "late", "blocks": True, "options": {"reshard_after_forward": False}},
    ],
    ids=str,
)
def test_a_probe_in_place_finds_what_a_twin_does_and_leaves_nothing_behind(layout):
    for report, wanted, apart in values(probes, **layout):
        (found, kept), *failed = report
        assert kept
        assert (found.loss, *found.changes) == pytest.approx((wanted.loss, *wanted.changes), rel=1e-12)
        assert found.errors == pytest.approx(wanted.errors, rel=1e-12)
        assert found.changes[0] != found.changes[1]
        assert failed == [("ValueError", True), ("ZeroDivisionError", True)]
        assert apart < 1e-12


def in_inference_mode(rank, world):
    """A seed whose first forward pass is the probe's."""
    model = prepared(rank, world, "early")
    x = batches(1, dtype=F64)[0][0]
    probe(model, "slot", torch.inference_mode()(lambda m: m(x).square().mean()))
    model.slot.move(Stage.TRAINING)
    return all(grad is not None for grad in one_step(model, (rank, world)).values())


def test_a_model_that_ran_first_in_inference_mode_can_learn():
    assert values(in_inference_mode) == [True, True]


def tensor_parallel(rank, world):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, truth = host(F64), host(F64)
    for each in (model, truth):
        germinate(each, seed_of(each))
        each.slot.move(Stage.TRAINING)
    plan = {"before.expand": ColwiseParallel(), "before.contract": RowwiseParallel()}
    model.mesh = mesh_of(world)
    parallelize_module(model, model.mesh, plan)
    x = batches(1, dtype=F64)[0][0]
    found, wanted = [probe(each, "slot", lambda m: m(x).square().mean(1), (0.5,)) for each in (model, truth)]
    with trial_of(model) as twin:
        return found.changes[0] / wanted.changes[0] - 1, twin is not model


def test_a_model_of_dtensors_has_a_twin():
    for apart, copied in values(tensor_parallel):
        assert abs(apart) < 1e-12
        assert copied


# --- losses of several ranks ---


def gather(found):
    def of_all(own):
        said = [None] * dist.get_world_size()
        dist.all_gather_object(said, own)
        return said

    return gather_losses(found, of_all)


def gathers(rank, world):
    model = host(F64)
    germinate(model, seed_of(model))
    model.slot.move(Stage.TRAINING)
    x = batches(2, 20, F64)[1][0]
    own = x[: 9] if rank == 0 else x[9:]
    cut = [5, 4] if rank == 0 else [6, 5]
    rounded = F64 if rank == 0 else torch.float16

    def losses(m, data):
        return m(data).flatten(1).square().mean(1)

    def means(m, data, sizes):
        return [part.mean().item() for part in losses(m, data).split(sizes)], sizes

    def look(evaluate, gather=gather):
        return probe(model, "slot", evaluate, (0.5, 1.0), gather)

    pair = host(F64)
    pair.after = nn.Sequential(pair.after, SeedSlot())
    germinate(pair, seed_of(pair))
    pair.after[1].germinate(Block(pair.width).double())
    names = ("slot", "after.1")
    return {
        "shares": (look(lambda m: losses(m, own)), look(lambda m: losses(m, x), None)),
        "all": (look(lambda m: losses(m, x)), look(lambda m: losses(m, x), None)),
        "all, rounded": (look(lambda m: losses(m, x).to(rounded)), look(lambda m: losses(m, x), None)),
        "batches": (look(lambda m: means(m, own, cut)), look(lambda m: means(m, x, [5, 4, 6, 5]), None)),
        "means": (
            look(lambda m: losses(m, own).mean()),
            [look(lambda m, d=d: losses(m, d).mean().item(), None) for d in (x[:9], x[9:])],
        ),
        "pair": (
            probe_pair(pair, names, lambda m: losses(m, own), (0.5, 1.0), gather),
            probe_pair(pair, names, lambda m: losses(m, x), (0.5, 1.0)),
        ),
    }  # fmt: skip


def numbers(found):
    errors = [getattr(found, name) for name in dir(found) if "error" in name]
    flat = [e for error in errors for e in (error if isinstance(error, tuple) else (error,))]
    rest = (found.loss, *getattr(found, "changes", ()), getattr(found, "together", 0), getattr(found, "degrees", 0))
    return [*rest, *flat]


def test_losses_of_all_ranks_are_those_of_one():
    first, second = values(gathers)
    for name, (found, wanted) in first.items():
        assert found == second[name][0], "the same bits on every rank"
        if name == "means":
            assert found.errors is found.spread is found.degrees is None
            assert found.loss == pytest.approx(sum(each.loss for each in wanted) / 2)
            assert found.changes[1] == pytest.approx(sum(each.changes[1] for each in wanted) / 2)
        elif name.startswith("all"):
            assert found == wanted, "the whole set on every rank counts once"
        else:
            assert numbers(found) == pytest.approx(numbers(wanted), rel=1e-12)


def found_on(*rows, counts=None):
    rows = [torch.as_tensor(row, dtype=F64) for row in rows]
    return [(row, torch.ones_like(row) if counts is None else torch.as_tensor(counts, dtype=F64)) for row in rows]


SAMPLES = [0.31, 0.72, 0.11, 0.95]
# name: what each of four ranks has found, and how many losses there are together.
SHARED = {
    "two pairs that share a model": (
        [found_on(SAMPLES, SAMPLES)] * 2 + [found_on([0.5, 0.6, 0.8, 0.2], SAMPLES)] * 2, 8
    ),
    "zeros before the blend, and harm on one rank after it": (
        [found_on([0.0] * 4, [0.0] * 4)] * 3 + [found_on([0.0] * 4, [0.0, 1.0, 1.0, 0.0])], 16
    ),
    "errors that agree by chance": ([found_on([0, 0, 1, 0])] * 2 + [found_on([0, 1, 1, 0])] * 2, 16),
    "one sample each": ([found_on([x]) for x in SAMPLES], 4),
    "one sample, and the same": ([found_on([0.5])] * 4, 1),
    "of batches of another size": ([found_on(SAMPLES)] * 3 + [found_on(SAMPLES, counts=[2, 2, 2, 2])], 8),
    "other numbers": ([found_on(SAMPLES), found_on(SAMPLES[:3]), found_on(SAMPLES[:2]), found_on(SAMPLES[:1])], 10),
}  # fmt: skip


def share(rank, world):
    counts = {}
    for name, (found, _) in SHARED.items():
        together = gather(found[rank])
        counts[name] = {len(losses) for losses, _ in together} | {len(counts) for _, counts in together}
    return counts


def test_ranks_that_look_at_the_same_samples_count_once():
    expected = {name: {count} for name, (_, count) in SHARED.items()}
    assert values(share, 4) == [expected] * 4


def disagrees(rank, world, how):
    if how == "kinds":
        return gather(found_on(0.5) if rank == 1 else found_on(SAMPLES))
    if how == "alphas":
        return gather(found_on(*[SAMPLES] * (2 + rank)))
    model = prepared(rank, world, "late", blocks=True)
    if how == "inside" and rank == 1:
        model.after.register_forward_pre_hook(lambda *_: 1 / 0)

    def evaluate(m):
        losses = m(batches(1, dtype=F64)[0][0]).square().mean(1)
        if how == "outside" and rank == 1:
            raise FileNotFoundError("validation.bin")
        return losses

    return probe(model, "slot", evaluate, (0.5,), gather)


def test_ranks_that_disagree_are_all_refused():
    for how, said in [
        ("kinds", "1 times losses on rank 0, 1 times a mean alone on rank 1"),
        ("alphas", "2 times losses on rank 0, 3 times losses on rank 1"),
    ]:
        for result in spawn(disagrees, how=how):
            assert result.error.startswith(f"WiringError: evaluate(model) returned {said}")


def test_an_error_on_one_rank_ends_the_probe_on_all():
    first, second = spawn(disagrees, how="outside", limit=20)
    assert second.error == "FileNotFoundError: validation.bin"
    assert first.error.startswith("WiringError: evaluate(model) failed on rank 1")
    assert "FileNotFoundError: validation.bin" in first.error


def test_an_error_inside_a_forward_pass_leaves_the_others_to_the_limit_of_their_group():
    first, second = spawn(disagrees, how="inside", limit=20, timeout=2)
    assert second.error == "ZeroDivisionError: division by zero"
    assert first.error.startswith("RuntimeError")  # in FSDP2's all_gather: nobody could tell it in words
