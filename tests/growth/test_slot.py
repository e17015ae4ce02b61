"""SeedSlot: the identity when empty, what the stage says when not."""

import copy
import io
import pickle

import pytest
import torch
from networks import Cnn, Mlp, Residual
from torch import nn

from seedtriton import ConfigurationError, SeedSlot, Stage, StateDictError, TransitionError, WiringError
from seedtriton.growth.slot import ISOLATION_CHECKS

LIFE = [Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED]


def slot_in(stage, seed=None, alpha=0.0, probe=None):
    slot = SeedSlot()
    slot.germinate(seed or Residual(4), probe=probe)
    for step in LIFE[: LIFE.index(stage) + 1]:
        slot.move(step)
    slot.set_alpha(alpha)
    return slot


def test_an_empty_slot_is_the_identity_and_leaves_no_trace():
    slot, x = SeedSlot(), torch.randn(3, 4)
    assert slot(x) is x
    assert list(slot.state_dict()) == []
    assert list(slot.parameters()) == []


def test_a_checkpoint_without_slots_loads_strictly_into_a_model_with_empty_ones():
    plain = nn.Sequential(nn.Linear(4, 4))
    grown = nn.Sequential(nn.Linear(4, 4), SeedSlot())
    grown.load_state_dict(plain.state_dict(), strict=True)


def test_germinated_is_not_yet_part_of_the_forward_pass():
    slot, x = SeedSlot(), torch.randn(3, 4)
    slot.germinate(Residual(4))
    assert slot.stage is Stage.GERMINATED
    assert slot(x) is x


def test_validation_in_training_does_not_run_the_seed():
    class Counting(Residual):
        calls = 0

        def forward(self, x):
            Counting.calls += 1
            return super().forward(x)

    slot = slot_in(Stage.TRAINING, Counting(4))
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert slot(x) is x
    assert Counting.calls == 0
    slot(x)
    assert Counting.calls == 1


@pytest.mark.parametrize("stage", [Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_the_blend_is_the_interpolation_exact_at_both_ends(stage, alpha):
    slot, x = slot_in(stage, alpha=alpha), torch.randn(3, 4)
    seeded = slot.seed(x)
    if alpha in (0.0, 1.0):
        assert torch.equal(slot(x), seeded if alpha else x)
    else:
        torch.testing.assert_close(slot(x), x + alpha * (seeded - x))


def test_at_alpha_zero_not_even_a_nan_reaches_the_output():
    slot, x = slot_in(Stage.BLENDING), torch.randn(3, 4, requires_grad=True)
    with torch.no_grad():
        slot.seed.contract.bias.fill_(float("nan"))
    output = slot(x)
    assert torch.equal(output, x)


def test_while_blending_both_sides_and_alpha_get_their_gradients():
    slot, x = slot_in(Stage.BLENDING, alpha=0.25), torch.randn(3, 4, requires_grad=True)
    slot(x).sum().backward()
    assert slot.seed.contract.bias.grad.sum() == pytest.approx(0.25 * 12)
    torch.testing.assert_close(slot.alpha.grad, (slot.seed(x) - x).sum().detach())
    assert x.grad is not None


def test_alpha_is_no_parameter_and_stays_a_leaf_that_learns_after_to():
    model = Mlp()
    model.slot.germinate(Residual(7))
    model.slot.move(Stage.TRAINING)
    for convert in (lambda m: m.double(), lambda m: m.half(), lambda m: m.to(torch.float32)):
        convert(model)
        alpha = model.slot.alpha
        assert alpha.is_leaf
        assert alpha.requires_grad
        assert alpha.dtype == torch.float32
    assert not any("alpha" in name for name, _ in model.named_parameters())
    model(torch.randn(Mlp.shape)).sum().backward()
    assert model.slot.alpha.grad is not None


def test_alpha_keeps_its_exact_value_through_half_precision():
    slot = slot_in(Stage.BLENDING, alpha=0.123456)
    before = slot.alpha.detach().clone()
    slot.half().float()
    assert torch.equal(slot.alpha.detach(), before)


def test_to_without_a_change_keeps_the_same_alpha_tensor():
    slot = slot_in(Stage.BLENDING)
    alpha = slot.alpha
    slot.to(torch.float32)
    assert slot.alpha is alpha


@pytest.mark.parametrize("assign", [False, True])
def test_alpha_travels_with_the_state_dict_and_still_learns(assign):
    source, target = slot_in(Stage.BLENDING, alpha=0.7), slot_in(Stage.BLENDING, alpha=0.1)
    target.load_state_dict(source.state_dict(), assign=assign)
    assert target.alpha_value == pytest.approx(0.7)
    assert target.alpha.is_leaf
    target(torch.randn(2, 4)).sum().backward()
    assert target.alpha.grad is not None


def test_a_blended_state_in_a_slot_that_does_not_blend_is_refused():
    """All keys match, and the output would be the host's: a deployed model would be without its seed."""
    source, target = slot_in(Stage.FOSSILIZED, alpha=1.0), SeedSlot()
    target.germinate(copy.deepcopy(source.seed))
    with pytest.raises(RuntimeError, match="is in GERMINATED and the state has its seed at alpha 1: they are of"):
        target.load_state_dict(source.state_dict())
    target.load_lifecycle_state(source.lifecycle_state())
    target.load_state_dict(source.state_dict())
    features = torch.randn(2, 4)
    assert torch.equal(target(features), source(features))


def test_a_fossil_keeps_its_alpha_and_no_longer_measures_it():
    slot = slot_in(Stage.FOSSILIZED, alpha=0.5)
    slot(torch.randn(2, 4)).sum().backward()
    assert slot.alpha.grad is None
    slot.double()
    assert not slot.alpha.requires_grad


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf")])
def test_alpha_outside_the_interval_is_refused(value):
    slot = slot_in(Stage.BLENDING, alpha=0.5)
    with pytest.raises(ConfigurationError, match="alpha"):
        slot.set_alpha(value)
    assert slot.alpha_value == 0.5


def test_setting_alpha_never_replaces_the_tensor():
    slot = slot_in(Stage.BLENDING)
    address = slot.alpha.data_ptr()
    slot.set_alpha(0.5)
    assert slot.alpha.data_ptr() == address
    assert slot.alpha == 0.5


def test_an_occupied_slot_refuses_and_keeps_its_seed():
    slot = slot_in(Stage.BLENDING, alpha=0.5)
    seed = slot.seed
    with pytest.raises(WiringError, match="BLENDING"):
        slot.germinate(Residual(4))
    assert slot.seed is seed
    assert slot.stage is Stage.BLENDING
    assert slot.alpha_value == 0.5


@pytest.mark.parametrize(
    "seed, words",
    [
        (nn.Linear(4, 5), r"\(3, 5\)"),
        (nn.Sequential(nn.Linear(4, 4), nn.Flatten(0)), r"\(12,\)"),
        (nn.ReLU(), "no trainable parameter"),
        (nn.Linear(4, 4).requires_grad_(False), "no trainable parameter"),
        (nn.LSTM(4, 4), "tuple"),
    ],
)
def test_an_unfit_seed_is_refused_and_the_slot_stays_usable(seed, words):
    slot = SeedSlot()
    with pytest.raises(WiringError, match=words):
        slot.germinate(seed, probe=torch.randn(3, 4))
    assert slot.stage is Stage.DORMANT
    assert slot.seed is None
    slot.germinate(Residual(4), probe=torch.randn(3, 4))


def test_without_a_probe_the_first_forward_pass_checks_the_shape():
    slot = slot_in(Stage.TRAINING, nn.Linear(4, 5))
    with pytest.raises(WiringError, match="keep shape and dtype"):
        slot(torch.randn(3, 4))
    slot.move(Stage.PRUNED)


@pytest.mark.parametrize("nonsense", [3, "seed", lambda: 3])
def test_something_that_is_no_seed_is_refused(nonsense):
    with pytest.raises(ConfigurationError, match="module or a factory"):
        SeedSlot().germinate(nonsense)


def test_a_factory_is_called_once():
    made = []
    slot = SeedSlot()
    slot.germinate(lambda: made.append(Residual(4)) or made[-1])
    assert slot.seed is made[0]
    assert len(made) == 1


def test_the_seed_moves_to_the_probes_dtype():
    slot = SeedSlot()
    slot.germinate(Residual(4), probe=torch.randn(3, 4, dtype=torch.float64))
    assert slot.seed.expand.weight.dtype == torch.float64


def test_the_probe_changes_neither_random_state_nor_batch_norm_nor_training_flags():
    seed = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5))
    seed[1].eval()
    state = torch.random.get_rng_state()
    running = seed[1].running_mean.clone()
    flags = []
    hook = seed[2].register_forward_hook(lambda module, *_: flags.append(module.training))
    slot = SeedSlot()
    slot.germinate(seed, probe=torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)))
    hook.remove()
    assert flags == [False]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(seed[1].running_mean, running)
    assert seed[2].training


def test_only_a_seed_that_writes_into_its_input_pays_for_a_copy():
    writing, clean = SeedSlot(), SeedSlot()
    writing.germinate(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)), probe=torch.randn(3, 4))
    clean.germinate(Residual(4), probe=torch.randn(3, 4))
    seen = []
    for slot in (writing, clean):
        slot.move(Stage.TRAINING)
        slot.seed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].data_ptr()))
        x = torch.randn(3, 4)
        slot(x)
        seen.append(x.data_ptr())
    assert seen[0] != seen[1]
    assert seen[2] == seen[3]


def test_a_seed_that_writes_into_its_input_leaves_the_probe_alone():
    probe = torch.randn(3, 4)
    before = probe.clone()
    SeedSlot().germinate(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)), probe=probe)
    assert torch.equal(probe, before)


def addresses_of_input(slot, passes):
    """For every forward pass, whether the seed got the very memory of the features."""
    shared, x = [], torch.randn(3, 4)
    hook = slot.seed.register_forward_pre_hook(lambda _, inputs: shared.append(inputs[0].data_ptr() == x.data_ptr()))
    for _ in range(passes):
        slot(x)
    hook.remove()
    return shared


def test_a_seed_without_a_probe_pays_for_one_copy_only():
    assert addresses_of_input(slot_in(Stage.TRAINING), 3) == [False, True, True]
    writing = slot_in(Stage.TRAINING, nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)))
    assert addresses_of_input(writing, 3) == [False, False, False]


def test_a_seed_that_writes_only_in_training_mode_gets_a_copy_although_the_probe_saw_nothing():
    seed = nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(4, 4))
    slot = slot_in(Stage.TRAINING, seed, probe=torch.randn(3, 4))
    x = torch.randn(3, 4)
    before = x.clone()
    assert torch.equal(slot(x), before)
    assert torch.equal(x, before)


def test_a_seed_that_writes_in_secret_is_a_violation_and_gets_a_copy_from_then_on():
    class Secret(Residual):
        def forward(self, x):
            return super().forward(x.mul_(2) if self.training else x)

    slot = slot_in(Stage.TRAINING, Secret(4), probe=torch.randn(3, 4))
    slot(torch.randn(3, 4))
    assert slot.isolation_violations == 1
    x = torch.randn(3, 4)
    before = x.clone()
    assert torch.equal(slot(x), before)
    assert torch.equal(x, before)
    assert slot.isolation_violations == 1


def test_pruning_empties_the_slot():
    slot = slot_in(Stage.BLENDING, alpha=0.5)
    slot.move(Stage.PRUNED)
    x = torch.randn(3, 4)
    assert slot(x) is x
    assert list(slot.state_dict()) == []
    assert slot.alpha is None
    with pytest.raises(WiringError, match="empty slot"):
        slot.set_alpha(0.1)


def test_a_refused_move_changes_nothing():
    slot, x = slot_in(Stage.TRAINING), torch.randn(3, 4)
    with pytest.raises(TransitionError):
        slot.move(Stage.FOSSILIZED)
    assert slot.stage is Stage.TRAINING
    assert torch.equal(slot(x), x)


def test_copies_and_pickles_of_a_model_keep_the_life():
    model = Cnn()
    model.slot.germinate(model.seed())
    model.slot.move(Stage.TRAINING)
    model.slot.move(Stage.BLENDING)
    model.slot.set_alpha(0.5)
    x = torch.randn(Cnn.shape)
    model.eval()
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(x), model(x))
        assert clone.slot.stage is Stage.BLENDING
        assert clone.slot.alpha.is_leaf


def test_life_cycle_state_round_trips_through_a_weights_only_file():
    source = slot_in(Stage.HOLDING, alpha=0.5)
    source.isolation_violations = 2
    file = io.BytesIO()
    torch.save({"module": source.state_dict(), "life": source.lifecycle_state()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    target = SeedSlot()
    target.germinate(Residual(4))
    target.load_lifecycle_state(saved["life"])
    target.load_state_dict(saved["module"])
    x = torch.randn(3, 4)
    assert torch.equal(target(x), source(x))
    assert target.lifecycle_state() == source.lifecycle_state()


def test_a_restored_slot_looks_for_leaks_as_often_as_was_left():
    class Leaky(Residual):
        def forward(self, x):
            return super().forward(x) + host.sum()

    host = nn.Parameter(torch.zeros(3))
    source = slot_in(Stage.TRAINING, Leaky(4))
    x = torch.randn(3, 4)
    for _ in range(3):
        source(x)
    restored = SeedSlot()
    restored.load_lifecycle_state(source.lifecycle_state(), Leaky(4))
    for slot in (source, restored):
        for _ in range(10):
            slot(x)
        assert slot.isolation_violations == ISOLATION_CHECKS


def test_a_restored_seed_that_writes_into_its_input_still_gets_a_copy():
    writing = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))
    source = slot_in(Stage.TRAINING, writing, probe=torch.randn(3, 4))
    restored, x = SeedSlot(), torch.randn(3, 4)
    restored.load_lifecycle_state(source.lifecycle_state(), copy.deepcopy(writing))
    before = x.clone()
    restored(x)
    assert torch.equal(x, before)


def test_a_slot_is_restored_with_a_given_seed_its_gate_and_its_frozen_parameters():
    source = SeedSlot()
    source.germinate(Residual(4).double(), probe=torch.randn(3, 4).double(), blend="gate")
    source.move(Stage.TRAINING)
    source.move(Stage.BLENDING)
    source.set_alpha(0.5)
    source.freeze()
    target = SeedSlot().eval()
    target.load_lifecycle_state(source.lifecycle_state(), Residual(4))
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 4).double()
    assert torch.equal(target(x), source(x))
    assert not any(p.requires_grad for p in target.parameters())
    assert not target.gate.training
    target.thaw()
    assert all(p.requires_grad for p in target.parameters())
    with pytest.raises(StateDictError, match="occupied"):
        target.load_lifecycle_state(source.lifecycle_state(), Residual(4))


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"alpha": 2.0},
        {"alpha": float("nan")},
        {"unknown": 1},
        {"lifecycle": None},
        {"isolation_violations": "x"},
        {"isolation_violations": -1},
        {"checks_due": -1},
        {"preserves_shape": 1},
        {"preserves_shape": False},
        {"copy_input": None},
        {"rho": -1.0},
        {"rho": "x"},
        {"rule": "length"},
        {"handed_on": 1},
        {"checks_due": None},
        {"blend": "gate"},
        {"blend": "multiply"},
        {"channels": 4},
        {"frozen": ["seed.other"]},
        {"frozen": "seed"},
        {"random": None},
        {"random": {"key": 1}},
        {"random": {"key": 1, "tick": 0, "spent": None, "draws": 2}},
        {"isolate_blending": 1},
        {"gate_dims": [1]},
        {"channel_dim": 1},
    ],
)
def test_a_bad_life_cycle_state_is_refused_and_changes_nothing(change):
    slot = slot_in(Stage.BLENDING, alpha=0.5)
    before = slot.lifecycle_state()
    with pytest.raises(StateDictError):
        slot.load_lifecycle_state({**slot_in(Stage.HOLDING).lifecycle_state(), **change})
    assert slot.lifecycle_state() == before


def test_a_state_with_a_seed_needs_a_slot_with_a_seed():
    with pytest.raises(StateDictError, match="germinate"):
        SeedSlot().load_lifecycle_state(slot_in(Stage.BLENDING).lifecycle_state())
    occupied = slot_in(Stage.BLENDING)
    with pytest.raises(StateDictError, match="fresh model"):
        occupied.load_lifecycle_state(SeedSlot().lifecycle_state())


def test_whole_alpha_ramp_costs_no_recompilation_and_a_stage_at_most_one():
    compiles = []

    def count(graph, _):
        compiles.append(graph)
        return graph

    torch._dynamo.reset()
    model = Mlp()
    model.slot.germinate(Residual(7), probe=torch.randn(2, 7))
    compiled = torch.compile(model, backend=count, fullgraph=True)
    x = torch.randn(Mlp.shape)
    counts = []
    for stage in (Stage.TRAINING, Stage.BLENDING):
        model.slot.move(stage)
        compiled(x).sum().backward()
        counts.append(len(compiles))
    for step in range(20):
        model.slot.set_alpha(step / 20)
        assert torch.equal(compiled(x), model(x))
    assert counts == [1, 2]
    assert len(compiles) == 2
