"""Gradients of seeds that germinated after the wrap, against DistributedDataParallel, one process, and plain means."""

import copy
import io
import pickle
import time
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from parallel import harness
from parallel.harness import batches, block, distance, gradients_of, loss_of, mine, plant, train, truth, values
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

from seedtriton import ConfigurationError, WiringError
from seedtriton.parallel.averaging import SeedAveraging, broadcast_modules

SINGLE = 1e-7  # of a gradient's norm, in float32: another order of summation
DOUBLE = 1e-13


def averaging_of(ddp, seeds, bucket_bytes=25 * 2**20, timeout=None):
    group = dist.new_group(timeout=timeout)  # half an hour unless told, whatever the first group has
    averaging = SeedAveraging(group, lambda: ddp.require_backward_grad_sync, bucket_bytes)
    for name, seed in seeds.items():
        averaging.add(name, [seed])
    return averaging


def wrapped_late(wrap, seed, bucket_bytes=25 * 2**20, size=16, dtype=torch.float32, timeout=None):
    """The host is wrapped and has trained before the seed comes; the averaging has to be kept alive."""
    model = harness.host(dtype)
    ddp = DDP(model, **wrap)
    part = dist.get_rank(), dist.get_world_size()
    loss_of(ddp, mine(batches(1, size, dtype)[0], *part)).backward()
    ddp.zero_grad()
    plant(model, seed)
    return ddp, averaging_of(ddp, {"slot": seed}, bucket_bytes, timeout)


def wrapped_early(wrap, seed, dtype=torch.float32):
    """The same network with the seed in it when it is wrapped."""
    model = harness.host(dtype)
    plant(model, seed)
    return DDP(model, **wrap)


def same_bits(found, wanted):
    return found.keys() == wanted.keys() and all(
        (found[name] is None and wanted[name] is None) or torch.equal(found[name], wanted[name]) for name in wanted
    )


def on_all_ranks(value):
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def same_on_all_ranks(gradients):
    return all(same_bits(other, gradients) for other in on_all_ranks(gradients))


def means(gradients):
    """The mean over the ranks of what each has, zero where it has none; None where nobody has."""
    ranks, found = on_all_ranks(gradients), {}
    for name in gradients:
        parts = [rank[name] for rank in ranks if rank[name] is not None]
        found[name] = sum((part / len(ranks) for part in parts[1:]), parts[0] / len(ranks)) if parts else None
    return found


class Recorded:
    """The number of elements of every collective of a kind, in the order of their start."""

    def __init__(self, kind="all_reduce"):
        self.sizes, self._kind, self._collective = [], kind, getattr(dist, kind)

    def __call__(self, tensor, *args, **kwargs):
        self.sizes.append(tensor.numel())
        return self._collective(tensor, *args, **kwargs)

    def __enter__(self):
        setattr(dist, self._kind, self)
        return self

    def __exit__(self, *error):
        setattr(dist, self._kind, self._collective)


# --- under DistributedDataParallel ---


def late_and_early(rank, world, wrap=None, dtype=torch.float32, bucket_bytes=25 * 2**20, size=16):
    data = batches(3, size, dtype)
    ddp, kept = wrapped_late(wrap or {}, block(dtype), bucket_bytes, size, dtype)
    late = train(ddp, data, (rank, world))
    early = train(wrapped_early(wrap or {}, block(dtype), dtype), data, (rank, world))
    assert kept.unaveraged == ()
    assert same_on_all_ranks(late)
    assert any("slot.seed" in name and gradient.abs().sum() > 0 for name, gradient in late.items())
    return late, distance(late, early), same_bits(late, early)


WRAPS = [{}, {"static_graph": True}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}]


@pytest.mark.parametrize("wrap", WRAPS, ids=lambda wrap: next(iter(wrap), "plain"))
def test_a_late_seed_gets_the_bits_of_one_that_was_wrapped_with_its_host(wrap):
    assert [bits for _, _, bits in values(late_and_early, wrap=wrap)] == [True, True]


def test_the_same_on_four_ranks_up_to_the_order_of_the_sum():
    found = values(late_and_early, world=4, size=32)
    assert max(far for _, far, _ in found) <= SINGLE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gets_the_same_bits(dtype):
    assert [bits for _, _, bits in values(late_and_early, dtype=dtype)] == [True, True]


@pytest.mark.parametrize("bucket_bytes", [1, 600])
def test_many_buckets_get_the_same_bits(bucket_bytes):
    assert [bits for _, _, bits in values(late_and_early, bucket_bytes=bucket_bytes)] == [True, True]


@pytest.mark.parametrize("world", [2, 4])
def test_one_process_computes_the_same_from_the_global_batch(world):
    wanted = truth(3)
    for late, _, _ in values(late_and_early, world=world, dtype=torch.float64, bucket_bytes=600):
        assert distance(late, wanted) <= DOUBLE


def accumulated(rank, world, synchronizing, set_to_none):
    """Three steps of two micro-batches each, late and early; whether they end in the same bits."""

    def run(ddp):
        optimizer = torch.optim.SGD(ddp.parameters(), 0.05)
        for batch in batches(3):
            optimizer.zero_grad(set_to_none=set_to_none)
            for micro in range(2):
                with nullcontext() if micro or synchronizing else ddp.no_sync():
                    (loss_of(ddp, mine(mine(batch, rank, world), micro, 2)) / 2).backward()
                assert kept.unaveraged == () or not (micro or synchronizing)
            optimizer.step()
        return gradients_of(ddp)

    ddp, kept = wrapped_late({}, block())
    late = run(ddp)
    assert same_on_all_ranks(late)
    assert distance(late, truth(3)) < 1e-6
    return same_bits(late, run(wrapped_early({}, block())))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("synchronizing", [False, True], ids=["no_sync", "every micro-batch"])
def test_micro_batches_add_up_as_with_ddp(synchronizing, set_to_none):
    assert values(accumulated, synchronizing=synchronizing, set_to_none=set_to_none) == [True, True]


def zeros(state, bucket):
    future = torch.futures.Future()
    future.set_result(bucket.buffer().zero_())
    return future


def beside_a_hook(rank, world):
    ddp, kept = wrapped_late({}, block())
    plain = train(ddp, batches(1), (rank, world))
    hooked = DDP(harness.host())
    hooked.register_comm_hook(None, zeros)
    loss_of(hooked, mine(batches(1)[0], rank, world)).backward()
    hooked.zero_grad()
    seed = plant(hooked.module, block())
    kept = averaging_of(hooked, {"slot": seed})
    found = train(hooked, batches(1), (rank, world))
    assert kept.unaveraged == ()
    of_seed = {name: gradient for name, gradient in plain.items() if "slot.seed" in name}
    assert same_bits({name: found[name] for name in of_seed}, of_seed)
    return sum(float(gradient.abs().sum()) for name, gradient in found.items() if name not in of_seed)


def test_a_communication_hook_of_ddp_does_not_touch_the_seed():
    assert values(beside_a_hook) == [0.0, 0.0]


def compiled(rank, world):
    ddp, kept = wrapped_late({}, block())
    late = train(torch.compile(ddp, backend="aot_eager"), batches(2), (rank, world))
    early = train(wrapped_early({}, block()), batches(2), (rank, world))
    assert kept.unaveraged == ()
    assert same_on_all_ranks(late)
    return distance({name.removeprefix("_orig_mod.module."): g for name, g in late.items()}, early)


def test_a_compiled_model_gets_the_same():
    assert max(values(compiled)) <= SINGLE


FROZEN = ("expand", "", "contract", "expand contract", "")


def frozen_and_thawed(rank, world):
    """It comes with one half frozen; then all of it trains, the other half, nothing, and all again."""

    def freeze(seed, names):
        for name, child in seed.named_children():
            child.requires_grad_(name not in names)

    def run(model, slot, part):
        optimizer, found = torch.optim.SGD(model.parameters(), 0.05), []
        for names, batch in zip(FROZEN, batches(len(FROZEN), dtype=torch.float64)):
            freeze(slot.seed, names)
            optimizer.zero_grad()
            loss_of(model, mine(batch, *part)).backward()
            optimizer.step()
            found.append(gradients_of(model))
        return found

    seeds = [block(torch.float64), block(torch.float64)]
    for seed in seeds:
        freeze(seed, FROZEN[0])
    ddp, kept = wrapped_late({}, seeds[0], dtype=torch.float64)
    assert not any(p.requires_grad for p in seeds[0].expand.parameters())
    alone = harness.host(torch.float64)
    plant(alone, seeds[1])
    with Recorded() as sent:
        found = run(ddp, ddp.module.slot, (rank, world))
    wanted = run(alone, alone.slot, (0, 1))
    assert kept.unaveraged == ()
    return max(distance(*pair) for pair in zip(found, wanted)), sent.sizes


def test_frozen_parameters_are_left_out_and_come_back():
    expand, contract = 16 * 32 + 32 + 2, 32 * 16 + 16 + 2
    for far, sizes in values(frozen_and_thawed):
        assert far <= DOUBLE
        assert sizes == [contract, expand + contract, expand, expand + contract]


def fails_once(rank, world):
    """Rank 0 runs out of something in a micro-batch, halfway through its seed, and drops the batch; rank 1 does too."""
    ddp, kept = wrapped_late({}, block(torch.float64), bucket_bytes=1, dtype=torch.float64)
    seed, bad = ddp.module.slot.seed, rank == 0

    def fail(_):
        if bad:
            raise MemoryError("none left")

    handle = seed.contract.weight.register_post_accumulate_grad_hook(fail)
    with ddp.no_sync(), pytest.raises(MemoryError) if bad else nullcontext():
        loss_of(ddp, mine(batches(1, dtype=torch.float64)[0], rank, world)).backward()
    handle.remove()
    assert kept.unaveraged == ("slot",)
    ddp.zero_grad()
    assert kept.unaveraged == ()  # nothing left to average
    return train(ddp, batches(3, dtype=torch.float64), (rank, world))


def test_a_rank_that_failed_in_no_sync_goes_on_with_the_others():
    wanted = truth(3)
    assert max(distance(found, wanted) for found in values(fails_once)) <= DOUBLE


def leaves_the_seed_out(rank, world):
    """Rank 1 uses the host alone."""
    ddp, kept = wrapped_late({}, block(), timeout=timedelta(seconds=1.5))
    batch = mine(batches(1)[0], rank, world)
    if rank == 1:
        ddp.module.slot.vacate()
    try:
        loss_of(ddp, batch).backward()
    except WiringError as error:
        return str(error)
    time.sleep(3)  # still there, so that the other waits for nothing else
    return kept.unaveraged


def test_a_seed_that_one_rank_does_not_use_ends_in_the_timeout_and_says_so():
    said, other = values(leaves_the_seed_out)
    assert "the gradients of seed 'slot' could not be averaged over the ranks. Is it used on every rank" in said
    assert "imed out" in said
    assert other == ()


# --- modules alone ---


def averaging_alone(modules, bucket_bytes=25 * 2**20, synchronizes=lambda: True):
    averaging = SeedAveraging(dist.new_group(), synchronizes, bucket_bytes)
    for name, module in modules.items():
        averaging.add(name, module if isinstance(module, list) else [module])
    return averaging


def inputs(rank, width=harness.Host.width):
    return torch.randn(4, width, generator=torch.Generator().manual_seed(10 + rank))


def local(module, compute):
    """What this rank alone would have in ``p.grad``: a copied module has none of the hooks."""
    twin = copy.deepcopy(module)
    compute(twin)
    return gradients_of(twin)


def sends_early(rank, world, bucket_bytes):
    """How many buckets are under way when the last gradient is made, and what was sent in which order."""
    module, begun = block(), []
    module.expand.weight.register_post_accumulate_grad_hook(lambda _: begun.append(len(sent.sizes)))
    kept = averaging_alone({"seed": module}, bucket_bytes)
    with Recorded() as sent:
        module(inputs(rank)).sum().backward()
    assert kept.unaveraged == ()
    assert all(bucket.newest is None for bucket in kept._buckets)  # no buffer outlives its pass
    return begun, sent.sizes


def test_sums_travel_while_backward_runs_from_the_last_parameter_to_the_first():
    expand, contract, bias, last = 16 * 32, 32 * 16, 32, 16
    single = [3], [last + 1, contract + 1, bias + 1, expand + 1]
    assert values(sends_early, bucket_bytes=1) == [single] * 2
    pairs = [1], [last + contract + 2, bias + expand + 2]
    assert values(sends_early, bucket_bytes=4 * (last + contract)) == [pairs] * 2


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.spare = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x, names):
        return sum(getattr(self, name)(x) for name in names)


def branches(rank, world, names, bucket_bytes):
    torch.manual_seed(0)
    module = Branches()

    def compute(module):
        module(inputs(rank), names[rank]).square().sum().backward()

    kept = averaging_alone({"seed": module}, bucket_bytes)
    wanted = means(local(module, compute))
    compute(module)
    found = gradients_of(module)
    assert kept.unaveraged == ()
    assert same_on_all_ranks(found)
    return same_bits(found, wanted), [name for name, gradient in found.items() if gradient is None]


@pytest.mark.parametrize("bucket_bytes", [1, 2000, 2**20])
def test_ranks_may_make_their_gradients_in_different_orders(bucket_bytes):
    names = [["left", "right", "spare"], ["spare", "right", "left"]]
    assert values(branches, names=names, bucket_bytes=bucket_bytes) == [(True, [])] * 2


@pytest.mark.parametrize("bucket_bytes", [1, 2**20])
def test_ranks_may_leave_out_different_parts_of_a_seed(bucket_bytes):
    unused = ["spare.weight", "spare.bias"]
    found = values(branches, names=[["left"], ["right", "left"]], bucket_bytes=bucket_bytes)
    assert found == [(True, unused)] * 2
    assert values(branches, names=[["left"], ["right"]], bucket_bytes=bucket_bytes) == [(True, unused)] * 2


def not_in_the_last_micro_batch(rank, world):
    """Rank 1 uses a branch in the first micro-batch alone, rank 0 never; and then the seed is not used at all."""
    torch.manual_seed(0)
    module, synchronizing = Branches(), [False]
    kept = averaging_alone({"seed": module}, synchronizes=lambda: synchronizing[0])

    def compute(module, synchronize=True):
        synchronizing[0] = False
        module(inputs(rank), ["left", "right"][: rank + 1]).square().sum().backward()
        synchronizing[0] = synchronize
        module(inputs(rank), ["left"]).sum().backward()

    wanted = means(local(module, compute))
    compute(module)
    assert same_bits(gradients_of(module), wanted)
    assert gradients_of(module)["spare.weight"] is None
    module.zero_grad()
    compute(module, synchronize=False)
    synchronizing[0] = True
    (torch.ones(2, requires_grad=True) * 2).sum().backward()  # a pass that should have averaged
    return kept.unaveraged


def test_what_was_used_in_an_earlier_micro_batch_is_averaged_or_known_not_to_be():
    assert values(not_in_the_last_micro_batch) == [("seed",), ("seed",)]


def two_seeds(rank, world):
    """Of two seeds one is not used; nothing of it travels, and the other does not wait for it."""
    modules, synchronizing = {"idle": block(), "busy": block(rank=1)}, [True]
    modules["idle"].codes = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    with torch.inference_mode():
        modules["idle"].constant = nn.Parameter(torch.ones(2), requires_grad=False)
    kept = averaging_alone(modules, synchronizes=lambda: synchronizing[0])
    wanted = means(local(modules["busy"], lambda m: m(inputs(rank)).square().sum().backward()))
    with Recorded() as sent:
        modules["busy"](inputs(rank)).square().sum().backward()
    assert same_bits(gradients_of(modules["busy"]), wanted)
    assert all(gradient is None for gradient in gradients_of(modules["idle"]).values())
    assert len(sent.sizes) == 1
    synchronizing[0] = False
    modules["busy"](inputs(rank)).square().sum().backward()
    assert kept.unaveraged == ("busy",)
    synchronizing[0] = True
    kept.remove("busy")
    assert kept.unaveraged == ()
    with Recorded() as sent:
        modules["busy"](inputs(rank)).square().sum().backward()
    assert not sent.sizes
    assert not modules["busy"].expand.weight._post_accumulate_grad_hooks
    assert not modules["busy"].expand._load_state_dict_post_hooks
    for wrong, error in [
        (lambda: kept.remove("busy"), "no seed 'busy' is averaged; there are \\['idle'\\]"),
        (lambda: kept.add("idle", [block()]), "'idle' is averaged already"),
        (lambda: kept.add("other", [modules["idle"].expand]), "'idle' and 'other' share a parameter"),
        (lambda: averaging_alone({}, bucket_bytes=0), "at least 1, got 0"),
    ]:
        with pytest.raises((ConfigurationError, WiringError), match=error):
            wrong()
    alone = dist.new_group([0])
    if rank == 1:
        with pytest.raises(ConfigurationError, match="this rank is not in the group"):
            SeedAveraging(alone, lambda: True)
    return True


def test_seeds_come_and_go_one_by_one():
    assert values(two_seeds) == [True, True]


class Tied(nn.Module):
    """A weight used behind a part that reentrant checkpointing computes again, and inside it."""

    def __init__(self):
        super().__init__()
        self.first, self.outer = nn.Linear(16, 16), nn.Linear(16, 16)
        self.again = self.outer
        self.mixed = nn.Parameter(torch.ones(16, dtype=torch.bfloat16))

    def part(self, x):
        return torch.relu(nn.functional.linear(x, self.outer.weight))

    def forward(self, x, reentrant=False):
        x = self.first(x) * self.mixed
        for _ in range(2):
            x = checkpoint(self.part, x, use_reentrant=True) if reentrant else self.part(x)
        return self.outer(x)


def backward_in_backward(rank, world, bucket_bytes):
    torch.manual_seed(0)
    module = Tied().double()
    kept = averaging_alone({"seed": module}, bucket_bytes)

    def compute(module):
        for _ in range(2):
            module(inputs(rank).double(), reentrant=True).square().sum().backward()

    def plainly(module):
        for _ in range(2):
            module(inputs(rank).double()).square().sum().backward()

    wanted = means(local(module, plainly))
    compute(module)
    assert kept.unaveraged == ()
    assert not kept._passes
    return distance(gradients_of(module), wanted)


@pytest.mark.parametrize("bucket_bytes", [1, 2**20])
def test_a_pass_within_a_pass_loses_and_doubles_nothing(bucket_bytes):
    assert max(values(backward_in_backward, bucket_bytes=bucket_bytes)) <= DOUBLE


def unusual_passes(rank, world):
    """Two forwards, retained graphs, second derivatives, infinities; tied modules, two dtypes, complex numbers."""
    torch.manual_seed(0)

    def two_forwards(module):
        (module(inputs(rank)).square().sum() + module(inputs(rank + 5)).sum()).backward()

    def retained(module):
        loss = module(inputs(rank)).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()

    def infinite(module):
        (module(inputs(rank)) * (float("inf") if rank else 1.0)).sum().backward()

    def frozen_in_between(module):
        loss = module(inputs(rank)).square().sum()
        module.outer.bias.requires_grad_(False)
        loss.backward()

    for compute in (two_forwards, retained, frozen_in_between, infinite):
        module = Tied()
        kept = averaging_alone({"seed": [module, module.outer]})
        wanted = means(local(module, compute))
        with Recorded() as sent:
            compute(module)
        found = gradients_of(module)
        assert kept.unaveraged == ()
        assert len(sent.sizes) == (4 if compute is retained else 2)  # one per dtype
        assert (found["outer.bias"] is None) == (compute is frozen_in_between)
        if compute is retained:  # the second pass adds to what the first has averaged
            assert distance(found, wanted) <= torch.finfo(torch.bfloat16).eps
            found["mixed"] = wanted["mixed"]
            assert distance(found, wanted) <= SINGLE
        else:
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
        if compute is infinite:
            assert not found["outer.weight"].isfinite().any()
    module = block()
    kept = averaging_alone({"seed": module})
    module(inputs(rank)).square().sum().backward(create_graph=True)
    once = gradients_of(module)
    assert same_on_all_ranks(once)
    module.contract.bias.grad.square().sum().backward()
    assert same_on_all_ranks(gradients_of(module))
    assert not torch.equal(module.contract.weight.grad, once["contract.weight"])  # the means still know their graph
    module = nn.Linear(16, 2, dtype=torch.complex64)
    kept = averaging_alone({"seed": module})

    def turned(module):
        module(inputs(rank).to(torch.complex64)).abs().square().sum().backward()

    wanted = means(local(module, turned))
    turned(module)
    assert kept.unaveraged == ()
    return same_bits(gradients_of(module), wanted)


def test_unusual_passes_end_in_means_too():
    assert values(unusual_passes) == [True, True]


def failed_everywhere(rank, world, where):
    """Both ranks fail halfway; nothing of that pass is left, and the next is right."""
    module, failing = block(), [True]

    def fail(_):
        if failing[0]:
            raise MemoryError("none left")

    kept = averaging_alone({"seed": module}, bucket_bytes=1)
    getattr(module, where).weight.register_post_accumulate_grad_hook(fail)
    with pytest.raises(MemoryError):
        module(inputs(rank)).sum().backward()
    assert not kept._passes
    failing[0] = False
    module.zero_grad()

    def compute(module):
        module(inputs(rank)).square().sum().backward()

    wanted = means(local(module, compute))
    compute(module)
    return same_bits(gradients_of(module), wanted)


@pytest.mark.parametrize("where", ["expand", "contract"])
def test_a_pass_that_failed_on_all_ranks_leaves_nothing(where):
    assert values(failed_everywhere, where=where) == [True, True]


def refused(rank, world):
    said = []

    def attempt(module, compute, bucket_bytes=2**20):
        kept = averaging_alone({"seed": module}, bucket_bytes)
        with pytest.raises(WiringError) as error:
            compute(module)
        said.append(str(error.value))
        assert kept is not None

    attempt(nn.Embedding(4, 2, sparse=True), lambda m: m(torch.tensor([1])).sum().backward())

    def free(parameter):
        parameter.grad = None

    def freed(module):
        module.expand.bias.register_post_accumulate_grad_hook(free)
        module(inputs(rank)).sum().backward()

    attempt(block(), freed)
    attempt(block(), freed, bucket_bytes=1)
    module = block()
    module.expand.bias.register_post_accumulate_grad_hook(free)
    attempt(module, lambda m: m(inputs(rank)).sum().backward())
    return said


def test_what_cannot_be_averaged_is_refused_with_the_way_out():
    for said in values(refused):
        assert "seed 'seed' has a sparse_coo gradient (parameter of shape (4, 2))" in said[0]
        assert "sparse=False" in said[0]
        assert all("shape (32,), was freed inside backward" in text for text in said[1:])
        assert len(said) == 4


def copied(rank, world):
    """Copies train alone, on rank 0 here: averaging them would wait for rank 1. The original goes on."""
    ddp, kept = wrapped_late({}, block())
    if rank == 0:
        model, saved = ddp.module, io.BytesIO()
        torch.save(model, saved)
        saved.seek(0)
        loaded = torch.load(saved, weights_only=False)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
            train(twin, batches(1))
    found = train(ddp, batches(3), (rank, world))
    assert kept.unaveraged == ()
    return same_bits(found, train(wrapped_early({}, block()), batches(3), (rank, world)))


def test_copies_of_a_model_are_on_their_own():
    assert values(copied) == [True, True]


def replaced(rank, world):
    """Parameters that a load puts in place of others, or get another dtype; and an averaging that is gone."""
    torch.manual_seed(0)
    module = Branches()
    kept = averaging_alone({"seed": module})

    def compute(module):
        module.zero_grad()
        (module.left(inputs(rank)) * module.right(inputs(rank).to(module.right.weight.dtype))).sum().backward()

    def right():
        wanted = means(local(module, compute))
        compute(module)
        return same_bits(gradients_of(module), wanted)

    assert right()
    module.load_state_dict({name: tensor + 1 for name, tensor in module.state_dict().items()}, assign=True)
    assert right()
    module.right.double()
    assert right()
    assert kept.unaveraged == ()
    alone = local(module, compute)
    del kept
    compute(module)
    return same_bits(gradients_of(module), alone)


def test_replaced_parameters_are_found_again():
    assert values(replaced) == [True, True]


# --- buffers and first weights ---


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.line = nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.tied = self.line.weight
        self.register_buffer("odd", torch.zeros(3, dtype=torch.int8))
        self.register_buffer("flags", torch.zeros(2, 2, dtype=torch.bool))
        self.register_buffer("brief", torch.zeros((), dtype=torch.bfloat16), persistent=False)
        self.register_buffer("rotation", torch.zeros(2, dtype=torch.complex64))
        self.register_buffer("across", torch.zeros(2, 3, dtype=torch.float64).T)
        self.register_buffer("empty", torch.zeros(0))


def tensors_of(module):
    return {name: t.detach().clone() for name, t in (*module.named_parameters(), *module.named_buffers())}


def different(rank):
    torch.manual_seed(rank)
    module = Normed()
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_((torch.randn(tensor.shape) * 9 - rank).to(tensor.dtype))
        module.norm(torch.randn(4 + rank, 3))
        for _ in range(rank):
            module.norm(torch.randn(4, 3))
    return module


def spread(rank, world, buffers):
    """Ranks 1 and 2 are a group, and rank 1 tells; how many tensors are its, and how many each rank's own."""
    module = different(rank)
    before = tensors_of(module)
    told, group = on_all_ranks(before)[1], dist.new_group([1, 2])
    if rank == 0:
        return None
    unique = list(module.buffers()) if buffers else [*module.parameters(), *module.buffers()]
    names = {name for name, _ in module.named_buffers()} if buffers else set(told)
    with Recorded("broadcast") as sent:
        if buffers:
            averaging = SeedAveraging(group, lambda: True)
            averaging.sync_buffers()
            assert not sent.sizes
            averaging.add("seed", [module, module.norm])
            averaging.sync_buffers()
        else:
            broadcast_modules([module, module.norm], group)
    assert sent.sizes == [sum(t.numel() * t.element_size() for t in unique)]
    found = tensors_of(module)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (told if name in names else before)[name], rtol=0, atol=0)
    assert rank == 1 or any(not torch.equal(before[name], told[name]) for name in names)
    return len(names), len(found) - len(names)


def test_buffers_of_every_kind_are_those_of_the_first_rank():
    assert values(spread, world=3, buffers=True) == [None, (9, 4), (9, 4)]


def test_a_new_seed_begins_with_the_weights_and_buffers_of_the_first_rank():
    assert values(spread, world=3, buffers=False) == [None, (13, 0), (13, 0)]


class Normal(harness.Block):
    def __init__(self, width):
        super().__init__(width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x):
        return super().forward(self.norm(x))


def batch_norm(rank, world):
    """A late seed with batch norm: gradients and, at the end, statistics of DistributedDataParallel."""
    seed = block(make=Normal, rank=rank)
    broadcast_modules([seed], dist.group.WORLD)
    ddp, kept = wrapped_late({}, seed)
    early = wrapped_early({}, block(make=Normal))
    found, wanted = (train(model, batches(3), (rank, world)) for model in (ddp, early))
    assert same_bits(found, wanted)
    kept.sync_buffers()
    here = dict(seed.named_buffers())
    assert all(same_bits(other, here) for other in on_all_ranks(here))
    # DistributedDataParallel sends them before each forward pass: those of rank 0 after the last.
    return same_bits(here, on_all_ranks(dict(early.module.slot.seed.named_buffers()))[0])


def test_batch_norm_ends_with_the_statistics_that_ddp_ends_with():
    assert values(batch_norm) == [True, True]
