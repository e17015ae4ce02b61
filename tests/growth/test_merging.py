"""A model that has grown, without growth: rebuilt from its weights, and with its fossils as plain modules."""

import copy

import pytest
import torch
from torch import nn

from seedtriton import (
    ConfigurationError,
    GrowthController,
    SeedSlot,
    Stage,
    WiringError,
    insert_slot,
    load_grown,
    merge_fossils,
)

WAY = (Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED)


class Seed(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.inner, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x):
        return x + torch.tanh(self.inner(self.norm(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.early, self.last = nn.Linear(4, 6), SeedSlot(), nn.Linear(6, 3)
        self.deep = nn.Sequential(nn.Linear(6, 6), SeedSlot())

    def forward(self, x):
        return self.last(self.deep(self.early(torch.relu(self.first(x)))))


def grown(blend="add", alpha=1.0, until=Stage.FOSSILIZED):
    torch.manual_seed(0)
    model = Net()
    growth = GrowthController(model, torch.optim.AdamW(model.parameters()), sinks=[])
    probe = torch.randn(3, 6)
    growth.germinate("early", Seed(), blend=blend, probe=probe)
    slot = model.early
    with torch.no_grad():
        for parameter in slot.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for stage in WAY[1 : WAY.index(until) + 1]:
        growth._mover.move(growth._lives["early"], stage, "forced", "script")
        if stage is Stage.BLENDING:
            slot.set_alpha(alpha)
    return model.eval(), growth


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("blend", ["add", "multiply", "gate"])
def test_a_merged_model_computes_the_same_and_has_no_slot(blend):
    model, _ = grown(blend)
    want = model(X)
    assert merge_fossils(model) == ["early"]
    assert not any(isinstance(module, SeedSlot) for module in model.modules())
    torch.testing.assert_close(model(X), want, rtol=1e-6, atol=1e-6)
    assert isinstance(model.deep[1], nn.Identity)
    if blend == "add":
        assert type(model.early) is Seed
        assert "early.inner.weight" in model.state_dict()
        assert not any("alpha" in key for key in model.state_dict())
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(torch.jit.trace(model, X)(X), model(X))
    exported = torch.export.export(model, (X,)).module()
    torch.testing.assert_close(exported(X), model(X))


@pytest.mark.filterwarnings("ignore")  # of its own libraries
@pytest.mark.parametrize("blend", ["add", "multiply", "gate"])
def test_a_merged_model_goes_through_onnx(blend, tmp_path):
    for package in ("onnx", "onnxscript"):  # torch's exporter wants both
        pytest.importorskip(package, reason=f"{package} is not installed: pip install onnx onnxscript")
    from onnx.reference import ReferenceEvaluator

    model, _ = grown(blend)
    want = model(X).detach()
    merge_fossils(model)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (X,), path, dynamo=True, verbose=False)
    session = ReferenceEvaluator(path)
    [found] = session.run(None, {session.input_names[0]: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), want, rtol=1e-5, atol=1e-5)


class Pair(nn.Module):
    """Returns its features in a tuple, behind what they were; and goes over its children, as some modules do."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        before = x
        for module in self.children():
            x = module(x)
        return before, x


class Unslotted(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.empty, self.pair = nn.Linear(4, 6), nn.Linear(6, 6), Pair()
        self.run = nn.Sequential(nn.Linear(6, 6), nn.ReLU())

    def forward(self, x):
        before, x = self.pair(self.empty(self.first(x)))
        return before + self.run(x)


@pytest.mark.parametrize("blend", ["add", "gate"])
def test_inserted_slots_are_merged_where_they_stand(blend):
    torch.manual_seed(0)
    model = Unslotted()
    before = set(model.state_dict())
    for path in ("empty", "run"):
        insert_slot(model, path)
    names = [insert_slot(model, "pair", features=1).name, "run.growth_slot"]
    growth = GrowthController(model, torch.optim.AdamW(model.parameters()), sinks=[])
    for name in names:
        growth.germinate(name, Seed(), blend=blend, probe=torch.randn(3, 6))
        for stage in WAY[1:]:
            growth._mover.move(growth._lives[name], stage, "forced", "script")
            if stage is Stage.BLENDING:
                growth.slots[name].set_alpha(1.0)
    want, unfelt = model.eval()(X), copy.deepcopy(model)
    for name in names:
        unfelt.get_submodule(name).set_alpha(0.0)
    assert not torch.allclose(unfelt(X), want, atol=1e-3)
    assert merge_fossils(model) == names
    assert not any(isinstance(module, SeedSlot) for module in model.modules())
    torch.testing.assert_close(model(X), want, rtol=1e-6, atol=1e-6)
    assert not hasattr(model.empty, "growth_slot")
    assert not model.empty._forward_hooks
    assert before < set(model.state_dict())
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(X), model(X))
    assert torch.equal(torch.jit.trace(model, X)(X), model(X))
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), model(X))


def test_what_is_not_permanent_or_not_whole_is_not_merged():
    for model, _ in (grown(until=Stage.HOLDING), grown(until=Stage.TRAINING)):
        with pytest.raises(WiringError, match="the seed in 'early' lives"):
            merge_fossils(model)
        assert isinstance(model.deep[1], SeedSlot)
    model, _ = grown(alpha=0.5)
    with pytest.raises(WiringError, match=r"has alpha 0\.5"):
        merge_fossils(model)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_a_grown_model_is_rebuilt_from_its_weights(alpha):
    model, growth = grown(alpha=alpha)
    state = copy.deepcopy(model.state_dict())
    for options in ({}, {"growth": growth.state_dict()}):
        twin = load_grown(Net(), state, {"early": Seed}, **options).eval()
        assert torch.equal(twin(X), model(X))
        assert twin.early.stage is Stage.FOSSILIZED


@pytest.mark.parametrize("until", [Stage.TRAINING, Stage.HOLDING])
def test_a_seed_that_still_lived_is_as_the_host_felt_it(until):
    model, growth = grown(alpha=0.7, until=until)
    for options in ({}, {"growth": growth.state_dict()}):
        twin = load_grown(Net(), model.state_dict(), {"early": Seed()}, **options).eval()
        assert torch.equal(twin(X), model(X))


def test_a_gate_network_needs_the_growth_state():
    model, growth = grown("gate")
    with pytest.raises(ConfigurationError, match="only the growth state knows how they gate"):
        load_grown(Net(), model.state_dict(), {"early": Seed})
    twin = load_grown(Net(), model.state_dict(), {"early": Seed}, growth.state_dict()).eval()
    assert torch.equal(twin(X), model(X))


def test_seeds_and_state_have_to_fit():
    model, _ = grown()
    for seeds in ({}, {"early": Seed, "deep.1": Seed}):
        with pytest.raises(ConfigurationError, match=r"seeds in slots \['early'\], and seeds= names"):
            load_grown(Net(), model.state_dict(), seeds)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_grown(Net(), model.state_dict(), {"early": lambda: Seed(5)})


# --- weights of another time in a seed's life ---


def test_a_blended_seed_does_not_go_behind_a_host_nor_the_other_way():
    fossil, training = grown()[0], grown(until=Stage.TRAINING)[0]
    with pytest.raises(RuntimeError, match=r"'early' is in TRAINING and the state has its seed at alpha 1: they"):
        training.load_state_dict(fossil.state_dict())
    with pytest.raises(RuntimeError, match=r"'early' is in FOSSILIZED and the state has its seed at alpha 0"):
        fossil.load_state_dict(grown(until=Stage.TRAINING)[0].state_dict())


def test_the_best_weights_come_back_in_the_middle_of_a_ramp():
    model, _ = grown(alpha=0.3, until=Stage.BLENDING)
    best = copy.deepcopy(model.state_dict())
    want = model(X)
    model.early.set_alpha(0.8)
    with torch.no_grad():
        model.first.weight.add_(1.0)
    model.load_state_dict(best)
    assert model.early.alpha_value == pytest.approx(0.3)
    assert torch.equal(model(X), want)


def test_the_best_weights_after_a_prune_are_refused_with_a_way_out():
    model, growth = grown(until=Stage.HOLDING)
    best = copy.deepcopy(model.state_dict())
    growth.prune("early")
    with pytest.raises(RuntimeError, match=r"'early' is empty .* load_grown\(model, state, seeds\)"):
        model.load_state_dict(best)
