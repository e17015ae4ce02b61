"""Behind the host a seed's random numbers are its own: the host's masks are those without it, in every kind of step."""

import copy
import itertools

import pytest
import torch
from networks import Residual
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import seedtriton.growth.randomness as randomness
from seedtriton import GrowthController, SeedSlot, Stage, StraightThrough, WiringError
from seedtriton.growth.randomness import SeedRandom
from seedtriton.growth.slot import ISOLATION_CHECKS


class Dropping(Residual):
    """Draws by a module, by a function, or by neither; keeps every mask it drew."""

    def __init__(self, width=6, how="module"):
        super().__init__(width)
        self.how, self.drop, self.masks = how, nn.Dropout(0.5 if how == "module" else 0.0), []

    def forward(self, x):
        hidden = torch.relu(self.expand(x))
        ones = self.drop(torch.ones_like(hidden))
        if self.how == "function":
            ones = nn.functional.dropout(ones, 0.5, self.training)
        elif self.how == "own":
            ones = torch.bernoulli(torch.full_like(hidden, 0.5))
        self.masks.append(ones.detach())
        return x + self.contract(hidden * ones)


class Host(nn.Module):
    """Draws before and behind its slot; all of it, or the slot alone, may be recomputed by a checkpoint."""

    def __init__(self, drop=0.3, around=None, slot=True, width=6):
        super().__init__()
        self.first, self.last, self.around = nn.Linear(4, width), nn.Linear(width, 3), around
        self.slot = SeedSlot() if slot else nn.Identity()
        self.before, self.behind = nn.Dropout(drop), nn.Dropout(drop)

    def body(self, x):
        return self.behind(self.last(self.slot(self.before(torch.tanh(self.first(x))))))

    def forward(self, x):
        if self.around in (True, False):
            return checkpoint(self.body, x, use_reentrant=self.around)
        if self.around == "slot":
            hidden = self.before(torch.tanh(self.first(x)))
            return self.behind(self.last(checkpoint(self.slot, hidden, use_reentrant=False)))
        return self.body(x)


def behind(slot, seed, probe=None, **arguments):
    slot.germinate(seed, probe=probe, isolation=StraightThrough(), **arguments)
    slot.move(Stage.TRAINING)
    return slot


def pair(how="module", **host):
    """The same host twice, with a seed behind it and without."""
    torch.manual_seed(5)
    grown, plain = Host(**host), Host(**host, slot=False)
    plain.load_state_dict(grown.state_dict())
    behind(grown.slot, Dropping(how=how))
    return grown, plain


def run(model, steps, inputs, each=1):
    """Losses and gradients of the host over some steps; ``each`` forward passes before their backward passes."""
    torch.manual_seed(11)
    found = []
    for _ in range(steps):
        losses = [model(inputs).square().sum() for _ in range(each)]
        for loss in losses:
            loss.backward()
        found += [loss.detach() for loss in losses]
        found += [p.grad.clone() for name, p in model.named_parameters() if not name.startswith("slot.")]
        model.zero_grad()
    return [*found, torch.rand(3)]


@pytest.mark.parametrize("around", [None, True, False, "slot"])
@pytest.mark.parametrize("how", ["module", "function", "own"])
def test_a_seed_that_draws_leaves_the_hosts_masks_alone(how, around):
    grown, plain = pair(how, around=around)
    inputs = torch.randn(8, 4, requires_grad=True)
    for found, expected in zip(run(grown, ISOLATION_CHECKS + 4, inputs), run(plain, ISOLATION_CHECKS + 4, inputs)):
        assert torch.equal(found, expected)
    assert all(p.grad is None for p in grown.slot.parameters())  # zero_grad was last
    assert len(grown.slot.seed.masks) == (ISOLATION_CHECKS + 4) * (2 if around in (False, "slot") else 1)


def test_a_seed_that_begins_to_draw_after_nobody_looks_any_more_still_leaves_them_alone():
    grown, plain = pair("none")
    inputs = torch.randn(8, 4)
    run(grown, ISOLATION_CHECKS, inputs)
    assert grown.slot.random.draws is False
    grown.slot.seed.how = "function"
    for found, expected in zip(run(grown, 3, inputs), run(plain, 3, inputs)):
        assert torch.equal(found, expected)


def test_an_exception_in_the_seed_puts_the_numbers_back():
    class Failing(Residual):
        def forward(self, x):
            torch.rand(3)
            raise KeyError("seed")

    slot, before = behind(SeedSlot(), Failing(6)), torch.random.get_rng_state()
    with pytest.raises(WiringError, match="KeyError"):
        slot(torch.zeros(2, 6))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_blended_a_seed_draws_from_the_generator_that_everybody_has():
    slot = behind(SeedSlot(), Dropping())
    slot.move(Stage.BLENDING)
    before = torch.random.get_rng_state()
    slot(torch.zeros(2, 6))
    assert not torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize("around", [None, True, False, "slot"])
def test_every_step_has_masks_of_its_own(drop, around):
    grown, _ = pair(drop=drop, around=around)
    inputs = torch.randn(8, 4, requires_grad=True)
    run(grown, 6, inputs)
    masks = grown.slot.seed.masks
    firsts = masks[:: len(masks) // 6]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(firsts, 2))


def test_so_has_every_forward_pass_without_a_backward_pass():
    slot = behind(SeedSlot(), Dropping())
    for _ in range(4):
        slot(torch.zeros(2, 6))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(slot.seed.masks, 2))


def test_they_are_neither_the_hosts_numbers_nor_those_of_another_slot():
    model = nn.ModuleDict({name: SeedSlot() for name in ("a", "b")})
    model["host"] = nn.Linear(1, 1)
    growth = GrowthController(model, torch.optim.SGD(model.parameters(), lr=0.1), sinks=[])
    seeds = [Dropping(), Dropping()]
    for name, seed in zip("ab", seeds):
        growth.germinate(name, seed)
    x = torch.zeros(4, 6)
    for name in "ab":
        model[name](x)
    drawn = [seeds[0].masks[0], seeds[1].masks[0], nn.functional.dropout(torch.ones(4, 8), 0.5)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize("order", ["in turn", "forward first", "last first"])
@pytest.mark.parametrize("around", [False, "slot"])
def test_a_checkpoints_second_run_draws_the_masks_of_the_first(around, order, drop):
    grown, _ = pair(drop=drop, around=around)
    inputs = torch.randn(8, 4, requires_grad=True)
    for _ in range(4):
        masks = grown.slot.seed.masks
        masks.clear()
        losses = [grown(inputs).square().sum() for _ in range(1 if order == "in turn" else 3)]
        firsts = list(masks)
        if order == "last first":
            losses.reverse()
            firsts.reverse()
        for loss in losses:
            loss.backward()
        seconds = masks[len(firsts) :]
        assert len(seconds) == len(firsts)
        assert all(torch.equal(a, b) for a, b in zip(firsts, seconds))


def test_under_a_checkpoint_passes_of_a_host_that_draws_are_told_apart_in_any_order():
    """The schedule of a pipeline: a second forward pass before the first backward pass, and so on."""
    grown, _ = pair(around=False)
    inputs, masks, waiting = torch.randn(8, 4, requires_grad=True), grown.slot.seed.masks, []
    firsts, seconds = [], []
    for _ in range(4):
        waiting.append(grown(inputs).square().sum())
        firsts.append(masks[-1])
        if len(waiting) == 2:
            waiting.pop(0).backward()
            seconds.append(masks[-1])
    assert all(torch.equal(a, b) for a, b in zip(firsts, seconds))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(firsts, 2))


def test_with_some_results_kept_and_some_recomputed_the_seeds_gradient_is_right():
    """A selective checkpoint mixes tensors of both runs: with other masks in the second the gradient would be wrong."""

    def keep(ctx, op, *args, **kwargs):
        kept = op in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    grown, _ = pair()
    other = copy.deepcopy(grown)
    inputs = torch.randn(8, 4)
    found = []
    for model, context in ((grown, lambda: create_selective_checkpoint_contexts(keep)), (other, None)):
        torch.manual_seed(3)
        for _ in range(2):
            hidden = torch.tanh(model.first(inputs))
            more = {} if context is None else {"context_fn": context}
            out = checkpoint(model.slot, model.before(hidden), use_reentrant=False, **more)
            out.square().sum().backward()
        found.append([p.grad for p in model.slot.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_a_region_inside_the_seed_is_recomputed_with_its_own_numbers():
    class Inside(Dropping):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    slot = behind(SeedSlot(), Inside())
    slot(torch.randn(8, 6)).sum().backward()
    assert torch.equal(*slot.seed.masks)


def test_nothing_is_seeded_for_a_seed_that_draws_nothing(monkeypatch):
    seeded = []
    monkeypatch.setattr(SeedRandom, "_reseed", lambda *given: seeded.append(given))
    slot = behind(SeedSlot(), Dropping(how="none"))
    for _ in range(4):
        slot(torch.zeros(2, 6))
    assert len(seeded) == 1


def test_a_look_in_eval_mode_does_not_take_a_seed_for_one_that_draws_nothing():
    slot = behind(SeedSlot(), Dropping())
    slot.eval()
    for _ in range(ISOLATION_CHECKS):
        slot(torch.zeros(2, 6))
    slot.train()
    state = torch.random.get_rng_state()
    slot(torch.zeros(2, 6))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(slot.seed.masks[-1], nn.functional.dropout(torch.ones(2, 8), 0.5))


def test_germinating_takes_nothing_from_the_generator():
    before = torch.random.get_rng_state()
    slot, seed = SeedSlot(), Dropping()
    torch.random.set_rng_state(before)
    slot.germinate(seed)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_same_script_draws_the_same_masks_again():
    def masks():
        grown, _ = pair()
        run(grown, 3, torch.ones(8, 4))
        return grown.slot.seed.masks

    assert all(torch.equal(a, b) for a, b in zip(masks(), masks()))


def test_a_saved_slot_goes_on_with_the_masks_it_would_have_had():
    for step in range(3):
        slot = behind(SeedSlot(), Dropping())
        x = torch.zeros(2, 6)
        for _ in range(step):
            slot(x)
        restored = SeedSlot()
        restored.load_lifecycle_state(slot.lifecycle_state(), Dropping())
        for each in (slot, restored):
            each(x)
        assert torch.equal(slot.seed.masks[-1], restored.seed.masks[-1])
        assert restored.lifecycle_state() == slot.lifecycle_state()


def test_a_state_without_random_numbers_gets_some_when_they_are_needed():
    source = behind(SeedSlot(), Dropping()).lifecycle_state()
    del source["random"]
    slot = SeedSlot()
    slot.load_lifecycle_state(source, Dropping())
    assert "random" not in slot.lifecycle_state()
    slot(torch.zeros(2, 6))
    assert slot.lifecycle_state()["random"].keys() == {"key", "tick", "spent", "draws"}


class FakeGenerator:
    """A device's: its state is a pair of numbers, as CUDA's is."""

    def __init__(self):
        self.seed, self.offset = 1, 0

    def get_state(self):
        return torch.tensor([self.seed, self.offset]).view(torch.uint8)

    def set_state(self, state):
        self.seed, self.offset = state.view(torch.int64).tolist()

    def manual_seed(self, seed):
        self.seed, self.offset = seed, 0


class FakeDevice:
    type, index = "cuda", 1


@pytest.mark.parametrize("capturing", [False, True])
def test_a_devices_generator_is_put_back_too_unless_a_graph_is_captured(monkeypatch, capturing):
    generators = (FakeGenerator(), FakeGenerator())
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    own = generators[1]

    class Features:
        device, is_cpu = FakeDevice(), False

    seen = []

    class Draws(nn.Module):
        def forward(self, features):
            seen.append((own.seed, own.offset))
            own.offset += 4
            return torch.rand(2)

    random, before = SeedRandom(), torch.random.get_rng_state()
    random.begin("slot")
    for _ in range(2):
        random.run(Draws(), Features(), look=True)
    assert random.draws
    assert (own.seed, own.offset) == ((1, 8) if capturing else (1, 0))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (generators[0].seed, generators[0].offset) == (1, 0)
    assert capturing or (seen[0][0] != seen[1][0] and 1 not in (seen[0][0], seen[1][0]))


@pytest.mark.parametrize("draw", [torch.rand, torch.randn, torch.randperm])
def test_every_draw_of_the_host_changes_the_mark_of_its_state(draw):
    marks = set()
    for _ in range(2000):
        marks.add(randomness._mark([torch.default_generator.get_state()]))
        draw(3)
    assert len(marks) == 2000


def test_a_device_without_generators_has_the_cpus():
    assert randomness._generators(torch.device("meta")) == (torch.default_generator,)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_the_seed_draws_from_the_hosts_generator(backend):
    """What the documentation says of torch.compile: no protection there, in one graph, and right gradients."""
    torch._dynamo.reset()
    grown, plain = pair()
    inputs = torch.randn(8, 4)
    compiled = torch.compile(grown, backend=backend, fullgraph=True)
    torch.manual_seed(11)
    compiled(inputs).square().sum().backward()
    assert all(p.grad is not None for p in grown.parameters())
    after = torch.random.get_rng_state()
    torch.manual_seed(11)
    torch.compile(plain, backend=backend, fullgraph=True)(inputs)
    assert not torch.equal(torch.random.get_rng_state(), after)
