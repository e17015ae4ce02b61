"""A slot behind a module whose code stays as it is does what one that is written into the model does."""

import collections
import copy
import dataclasses
import io
import pickle

import pytest
import torch
from networks import Residual
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from seedtriton import (
    AlphaSchedule,
    ConfigurationError,
    GateThresholds,
    GrowthController,
    SeedSlot,
    Stage,
    StraightThrough,
    WiringError,
    insert_slot,
    remove_slot,
)
from seedtriton.growth.wiring import slots_of
from seedtriton.testing import assert_isolated

# Nothing is to be learned here: a seed that is measured moves on.
EASY = GateThresholds(
    min_training_epochs=1, min_samples=4, min_blend_gain_t=None, max_loss_rise=None, min_contribution=None
)
NAMED = ("seed", "reason", "tensors", "run")  # fields of events in which paths are, or the name of the run
WIDTH = 6
SLOT = "growth_slot"


class Answer(collections.OrderedDict):
    """Like Hugging Face's ModelOutput: a dict and a dataclass at once, without what is None."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                super().__setitem__(field.name, getattr(self, field.name))

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __getitem__(self, key):
        return dict(self.items())[key] if isinstance(key, str) else tuple(self.values())[key]


@dataclasses.dataclass
class Output(Answer):
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    attentions: tuple | None = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    states: torch.Tensor
    more: int = 1


Pair = collections.namedtuple("Pair", "states more")
# How a module may return its features x, and what tells the slot where they are.
FORMS = {
    "tensor": (lambda x: x, None), "tensor, told": (lambda x: x, 0), "tuple": (lambda x: (x, None, 1), None),
    "second of a tuple": (lambda x: (3, x), 1), "list": (lambda x: [x, 2], None),
    "namedtuple": (lambda x: Pair(x, 1), None), "its other name": (lambda x: Pair(1, x), "more"),
    "dataclass": (Frozen, None), "its field": (Frozen, "states"),
    "ModelOutput": (lambda x: Output(None, x, (1,)), None), "its name": (lambda x: Output(x.mean(), x), "logits"),
    "its position": (lambda x: Output(x.mean(), x), 1), "dict": (lambda x: {"a": 1, "b": x}, "b"),
}  # fmt: skip


def taken(output, features):
    """The features, as the model takes them from what its block returned."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(features, str):
        return output[features] if isinstance(output, dict) else getattr(output, features)
    return output.states if isinstance(output, Frozen) else output[features or 0]


class Block(nn.Module):
    def __init__(self, form="tensor"):
        super().__init__()
        self.layer, self.form = nn.Linear(WIDTH, WIDTH), form

    def forward(self, x, scale=1.0):
        return FORMS[self.form][0](torch.relu(self.layer(x)) * scale)


class Net(nn.Module):
    """Blocks in a list, the first of them followed by a slot that is written here, or by none."""

    def __init__(self, written, form="tensor", again=False, recompute=None):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList([Block(form), Block()])
        self.last = nn.Linear(WIDTH, 4)
        if written:
            self.slot = SeedSlot()
        self.written, self.again, self.recompute = written, again, recompute

    def block(self, x):
        found = taken(self.layers[0](x, scale=0.9), FORMS[self.layers[0].form][1])
        return self.slot(found) if self.written else found

    def forward(self, x):
        x = self.first(x)
        for _ in range(2 if self.again else 1):
            x = self.block(x) if self.recompute is None else checkpoint(self.block, x, use_reentrant=self.recompute)
        return self.last(self.layers[1](x))


class Life:
    """Germination, training, blending; what the gates said, every number of it, and the weights."""

    def __init__(self, model, slot, run=None):
        self.events, self.model, self.run = [], model, run or model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        self.growth = GrowthController(
            model, self.optimizer, thresholds=EASY, sinks=[self.events.append], schedule=AlphaSchedule(steps=8)
        )
        torch.manual_seed(1)
        self.growth.germinate(slot, Residual(WIDTH, 16), probe=torch.randn(2, WIDTH))
        teacher = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
        self.x = torch.randn(64, 8)
        self.y = teacher(self.x).argmax(dim=1).detach()

    def step(self, batch):
        nn.functional.cross_entropy(self.run(self.x[batch]), self.y[batch]).backward()
        self.growth.measure()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def epochs(self, count):
        for _ in range(count):
            for batch in torch.arange(64).split(16):
                self.step(batch)
            self.growth.end_epoch(accuracy=0.5)
        return self

    def told(self):
        plain = [{key: value for key, value in event.items() if key not in NAMED} for event in self.events]
        return repr(plain), {event["stage"] for event in self.events}

    def weights(self):
        return [p.detach().clone() for p in self.model.parameters()]


def assert_same_life(inserted, written, epochs=5):
    one, other = inserted.epochs(epochs), written.epochs(epochs)
    assert one.told() == other.told()
    assert "BLENDING" in one.told()[1]
    # The seed's parameters lie elsewhere in the order.
    assert sorted(map(str, one.weights())) == sorted(map(str, other.weights()))


# --- the same as one that is written ---


@pytest.mark.parametrize("form", FORMS)
def test_a_life_is_that_of_a_slot_that_is_written_into_the_model(form):
    model = Net(written=False, form=form)
    slot = insert_slot(model, "layers.0", features=FORMS[form][1])
    assert slot.name == f"layers.0.{SLOT}"
    assert_same_life(Life(model, slot.name), Life(Net(written=True, form=form), "slot"))


@pytest.mark.parametrize("options", [{"recompute": True}, {"recompute": False}, {"again": True}], ids=str)
def test_under_checkpoints_and_in_a_module_that_is_called_twice_too(options):
    model = Net(written=False, **options)
    slot = insert_slot(model, "layers.0")
    assert_same_life(Life(model, slot.name), Life(Net(written=True, **options), "slot"))


def test_a_sequential_runs_it_as_its_last_module_and_once():
    torch.manual_seed(0)
    layers = [nn.Linear(8, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4)]
    written = nn.Sequential(nn.Sequential(*copy.deepcopy(layers[:2]), SeedSlot()), copy.deepcopy(layers[2]))
    model = nn.Sequential(nn.Sequential(*layers[:2]), layers[2])
    slot = insert_slot(model, "0")
    assert not model[0]._forward_hooks
    assert_same_life(Life(model, slot.name), Life(written, "0.2"))
    one, other = (checkpoint_sequential(each[0], 1, torch.ones(2, 8), use_reentrant=False) for each in (model, written))
    assert torch.equal(one, other)


class Iterating(nn.Module):
    """Goes over its own children."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


def counted(slot, calls):
    """A seed that counts its calls and doubles."""
    slot.germinate(Doubling(calls))
    slot.move(Stage.TRAINING)
    slot.move(Stage.BLENDING)
    slot.set_alpha(1.0)


class Doubling(nn.Module):
    def __init__(self, calls):
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.ones(())), calls

    def forward(self, x):
        self.calls.append(1)
        return 2 * self.weight * x


class OfItsOwn(nn.Sequential):
    def forward(self, x):
        return self[0](x) + 1


@pytest.mark.parametrize(
    "inner", [Iterating(), nn.Sequential(nn.Linear(8, 4)), OfItsOwn(nn.Linear(8, 4)), nn.Linear(8, 4)], ids=repr
)
def test_the_seed_runs_once_whatever_goes_over_the_children(inner):
    model, calls = nn.ModuleDict({"inner": copy.deepcopy(inner)}), []
    x = torch.randn(3, 8)
    before = model["inner"](x)
    counted(insert_slot(model, "inner"), calls)
    assert torch.equal(model["inner"](x), 2 * before)
    assert len(calls) == 1


def test_a_module_that_is_found_under_two_paths_has_one_slot():
    shared, calls = nn.Linear(8, 8), []
    model = nn.Sequential(shared, nn.ReLU(), shared)
    slot = insert_slot(model, "2")
    assert slot.name == f"0.{SLOT}"
    assert slots_of(model) == {f"0.{SLOT}": slot}
    with pytest.raises(WiringError, match="followed by a slot already"):
        insert_slot(model, "0")
    counted(slot, calls)
    model(torch.randn(2, 8))
    assert len(calls) == 2


# --- while it is empty ---


@pytest.mark.parametrize("path", ["layers.0", "layers.0.layer", "last", "first"])
def test_an_empty_one_changes_nothing(path):
    model = Net(written=False, form="tuple")
    x, state = torch.randn(4, 8), copy.deepcopy(model.state_dict())
    before, returned = model(x), model.layers[0](torch.ones(1, WIDTH))
    slot = insert_slot(model, path)
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state, strict=True)
    assert torch.equal(model(x), before)
    assert type(model.layers[0](torch.ones(1, WIDTH))) is type(returned)
    assert slots_of(model) == {f"{path}.{SLOT}": slot}
    assert slot.training is model.training


def test_an_empty_one_hands_on_what_no_seed_could_take():
    model = nn.ModuleDict({"strange": nn.Identity()})
    insert_slot(model, "strange")
    things = object()
    assert model["strange"](things) is things


def test_one_that_waits_hands_on_the_very_object_and_one_behind_the_host_the_numbers():
    model = Net(written=False, form="list")
    slot = insert_slot(model, "layers.0")
    given = [torch.ones(2, WIDTH), 2]
    slot.germinate(Residual(WIDTH))
    assert slot(given, by_hook=True) is given
    slot.move(Stage.TRAINING)
    with torch.no_grad():
        assert slot(given, by_hook=True) is given
    found = slot(given, by_hook=True)
    assert found is not given
    assert torch.equal(found[0], given[0])
    assert torch.equal(given[0], torch.ones(2, WIDTH))
    assert slot(given) is given


def test_a_module_in_eval_mode_gets_a_slot_in_eval_mode():
    assert not insert_slot(Net(written=False).eval(), "layers.0").training


# --- copies and files ---


def copies():
    def through(save, load):
        def copied(model):
            buffer = io.BytesIO()
            save(model, buffer)
            buffer.seek(0)
            return load(buffer)

        return copied

    return {
        "deepcopy": copy.deepcopy,
        "pickle": through(pickle.dump, pickle.load),
        "torch.save": through(torch.save, lambda buffer: torch.load(buffer, weights_only=False)),
    }


@pytest.mark.parametrize("how", copies())
def test_a_copy_runs_its_own_slot_and_can_be_taken_back(how):
    model = Net(written=False)
    insert_slot(model, "layers.0")
    copied = copies()[how](model)
    own, theirs = slots_of(model), slots_of(copied)
    assert own.keys() == theirs.keys()
    x = torch.randn(3, 8)
    before = model(x)
    counted(theirs[f"layers.0.{SLOT}"], [])
    assert torch.equal(model(x), before)
    assert not torch.equal(copied(x), before)
    twice = copies()["deepcopy"](copied)
    with torch.no_grad():
        twice.layers[0].growth_slot.seed.weight.fill_(3.0)
    assert not torch.equal(twice(x), copied(x))
    remove_slot(model, "layers.0")
    assert not torch.equal(copied(x), before)
    third = copies()[how](model)
    assert torch.equal(third(x), before)


def test_a_module_that_is_copied_alone_has_a_slot_of_its_own():
    model = Net(written=False)
    slot = insert_slot(model, "layers.0")
    model.layers.append(copy.deepcopy(model.layers[0]))
    assert list(slots_of(model)) == [f"layers.0.{SLOT}", f"layers.2.{SLOT}"]
    counted(slot, [])
    x = torch.rand(2, WIDTH)
    assert torch.equal(model.layers[0](x), 2 * model.layers[2](x))


def test_the_probe_tries_it_on_a_twin():
    model = Net(written=False, form="tuple")
    slot = insert_slot(model, "layers.0")
    life = Life(model, slot.name).epochs(1)
    x, y = life.x, life.y

    def losses(model):
        return nn.functional.cross_entropy(model(x), y, reduction="none")

    with torch.no_grad():
        before = losses(model.eval())
        blended = losses(twin_at(model, slot.name, 1.0))
    probe = life.growth.probe(slot.name, losses)
    assert probe.loss == pytest.approx(float(before.double().mean()))
    assert probe.changes[-1] == pytest.approx(float((blended - before).double().mean()), abs=1e-9)
    assert probe.changes[-1] != 0.0
    assert torch.equal(losses(model), before)


def twin_at(model, name, alpha):
    twin = copy.deepcopy(model)
    twin.get_submodule(name).blend_at(alpha)
    return twin


def test_a_run_with_it_stops_and_resumes():
    model = Net(written=False)
    life = Life(model, insert_slot(model, "layers.0").name).epochs(4)
    saved = life.growth.state_dict(), model.state_dict(), life.optimizer.state_dict()
    saved = copy.deepcopy(saved)
    other = Net(written=False)
    insert_slot(other, "layers.0")
    resumed = Life.__new__(Life)
    resumed.events, resumed.model, resumed.run, resumed.x, resumed.y = [], other, other, life.x, life.y
    resumed.optimizer = torch.optim.AdamW(other.parameters(), lr=5e-3)
    resumed.growth = GrowthController(
        other, resumed.optimizer, thresholds=EASY, sinks=[], schedule=AlphaSchedule(steps=8)
    )
    resumed.growth.load_state_dict(saved[0], seeds={f"layers.0.{SLOT}": Residual(WIDTH, 16)})
    other.load_state_dict(saved[1])
    resumed.optimizer.load_state_dict(saved[2])
    life.epochs(2)
    resumed.epochs(2)
    assert all(map(torch.equal, life.weights(), resumed.weights()))


def test_a_loop_with_it_is_isolated():
    model = Net(written=False, form="tuple")
    life = Life(model, insert_slot(model, "layers.0").name)
    assert_isolated(lambda i: life.step(torch.arange(16) + i), life.growth, steps=4)


# --- torch.compile ---


@pytest.mark.parametrize(
    "first, form",
    [("insert", form) for form in ("tensor", "namedtuple", "dict", "dataclass", "list")]
    + [("compile", "tensor"), ("run", "tuple")],
)
def test_a_compiled_model_runs_it_in_one_graph_whichever_came_first(first, form):
    torch.compiler.reset()
    model, x = Net(written=False, form=form), torch.randn(4, 8)
    compiled = torch.compile(model, fullgraph=True, backend="eager") if first != "insert" else None
    if first == "run":
        before = compiled(x)
    slot = insert_slot(model if first == "insert" else compiled, "layers.0", features=FORMS[form][1])
    if compiled is None:
        compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert slot.name == f"layers.0.{SLOT}"
    slot.germinate(Residual(WIDTH), isolation=StraightThrough())
    slot.move(Stage.TRAINING)
    assert torch.equal(compiled(x), model(x))
    compiled(x).sum().backward()
    assert slot.alpha.grad is not None
    assert all(p.grad is not None for p in slot.seed.parameters())
    slot.move(Stage.BLENDING)
    slot.set_alpha(0.5)
    blended = compiled(x)
    assert torch.equal(blended, model(x))
    slot.move(Stage.PRUNED)
    assert not torch.equal(blended, compiled(x))
    for stage in (Stage.EMBARGOED, Stage.RESETTING, Stage.DORMANT):
        slot.move(stage)
    remove_slot(compiled, "layers.0")
    assert torch.equal(compiled(x), model(x))
    if first == "run":
        assert torch.equal(compiled(x), before)


# Dynamo looks for .grad of whatever comes in, hides torch's warning, and stumbles where it is an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("in_place", [False, True])
def test_a_module_that_is_compiled_by_itself_is_followed_inside(in_place):
    model = Net(written=False)
    if in_place:
        model.layers[0].compile(fullgraph=True, backend="eager")
    else:
        model.layers[0] = torch.compile(model.layers[0], fullgraph=True, backend="eager")
    slot = insert_slot(model, "layers.0")
    assert slots_of(model) == {slot.name: slot}
    assert model.get_submodule(slot.name) is slot
    x = torch.randn(2, 8)
    before = model.layers[0](x[:, :WIDTH])
    counted(slot, [])
    assert torch.equal(model.layers[0](x[:, :WIDTH]), 2 * before)
    slot.vacate()
    remove_slot(model, "layers.0")
    assert torch.equal(model.layers[0](x[:, :WIDTH]), before)


def test_behind_a_checkpoints_wrapper_states_go_on_to_load():
    model = Net(written=False)
    model.layers[0] = checkpoint_wrapper(model.layers[0])
    keys = list(model.state_dict())
    slot = insert_slot(model, "layers.0")
    assert slots_of(model) == {slot.name: slot}
    assert list(model.state_dict()) == keys
    counted(slot, [])
    state = model.state_dict()
    assert f"layers.0.{SLOT}.seed.weight" in state
    model.load_state_dict(state, strict=True)
    hidden = torch.rand(2, WIDTH)
    assert torch.equal(model.layers[0](hidden), 2 * torch.relu(model.layers[0].layer(hidden)))
    slot.vacate()
    remove_slot(model, "layers.0")
    assert list(model.state_dict()) == keys


# --- hooks of others ---


def test_hooks_that_are_there_or_come_later_see_what_passed_through_the_slot():
    model, seen = Net(written=False), []
    model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
    slot = insert_slot(model, "layers.0")
    model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
    counted(slot, [])
    x = torch.rand(2, WIDTH)
    model.layers[0](x)
    assert torch.equal(seen[0], 2 * torch.relu(model.layers[0].layer(x)))
    assert seen[0] is seen[1]


# --- what is refused ---


class Named(nn.Module):
    growth_slot = None

    def forward(self, x):
        return x


@pytest.mark.parametrize(
    "path, match",
    [
        ("layers.7", r"no module 'layers\.7'; 'layers' has '0', '1'"),
        ("layer", r"no module 'layer'; it has 'first', 'layers', 'last'"),
        ("layers.0.layer.weight", r"no module 'layers\.0\.layer\.weight'; 'layers\.0\.layer' has none"),
        ("", "no module ''"),
        ("layers", r"'layers' is a ModuleList, which is not called .*: put the slot behind .*'layers\.0', 'layers\.1'"),
        ("written", "'written' is a slot itself"),
        ("written.seed.expand", "'written.seed.expand' is in a slot, 'written'"),
    ],
)
def test_a_path_that_no_slot_can_follow_is_an_error_that_says_what_there_is(path, match):
    model = Net(written=False)
    model.written = SeedSlot()
    model.written.germinate(Residual(WIDTH))
    with pytest.raises(ConfigurationError, match=match):
        insert_slot(model, path)
    assert list(slots_of(model)) == ["written"]


class Rows(nn.ModuleDict):
    """Goes over all of its own children, as the dense blocks of torchvision do."""

    def forward(self, x):
        return [child(x) for child in self.values()]


class Group(nn.Module):
    """Has modules, and no forward."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)


@pytest.mark.parametrize("group", [Rows({"inner": nn.Linear(2, 2)}), Group()], ids=["Rows", "Group"])
def test_what_is_no_place_for_one_more_child_or_is_never_called_is_refused(group):
    with pytest.raises(ConfigurationError, match=r"put the slot behind one of its modules, 'group\.inner'"):
        insert_slot(nn.ModuleDict({"group": group}), "group")
    assert list(group._modules) == ["inner"]


def test_a_second_slot_behind_the_same_module_is_refused():
    model = Net(written=False)
    insert_slot(model, "layers.0")
    with pytest.raises(WiringError, match=r"'layers\.0' is followed by a slot already: layers\.0\.growth_slot"):
        insert_slot(model, "layers.0")
    with pytest.raises(ConfigurationError, match="is a slot itself"):
        insert_slot(model, "layers.0.growth_slot")
    assert len(model.layers[0]._forward_hooks) == 1
    model.layers[1] = Named()
    with pytest.raises(WiringError, match="already"):
        insert_slot(model, "layers.1")


@pytest.mark.parametrize("features", [-1, True, 1.0, ["a"]])
def test_features_that_are_no_place_are_refused(features):
    with pytest.raises(ConfigurationError, match="features must be a position from 0 on, a name or None"):
        insert_slot(Net(written=False), "layers.0", features=features)


@pytest.mark.parametrize(
    "returned, features, match",
    [
        ({"a": 1}, None, r"given dict \(it has \['a'\]\) and looks for features None: insert_slot"),
        ({"a": 1}, "a", "'a' in it is int"),
        ((), None, "given tuple"),
        ((torch.ones(1), 2), 2, r"it has \[0, 1\]\) and looks for features 2"),
        (Pair(torch.ones(1), 2), "other", r"\['states', 'more'\]"),
        (Output(None, None), None, "given Output"),
        (torch.ones(2), 1, r"given Tensor \(it is no tensor|given Tensor"),
        (None, None, r"given NoneType \(it is no tensor\)"),
        (torch.ones(2, dtype=torch.int64), None, "takes real floating features"),
        ((torch.ones(2, dtype=torch.int64),), None, "takes real floating features"),
    ],
)
def test_what_has_no_features_is_an_error_that_names_the_slot_once_a_seed_is_there(returned, features, match):
    model = nn.ModuleDict({"strange": nn.Identity()})
    slot = insert_slot(model, "strange", features=features)
    assert model["strange"](returned) is returned
    slot.germinate(Residual(2))
    assert model["strange"](returned) is returned
    slot.move(Stage.TRAINING)
    with pytest.raises(WiringError, match=match) as caught:
        model["strange"](returned)
    assert "slot 'strange.growth_slot'" in str(caught.value)


# --- a real client ---


@pytest.mark.filterwarnings("ignore")  # of its own
@pytest.mark.parametrize("path", ["transformer.h.0", "transformer.h.1.mlp", "transformer"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_of_transformers_takes_it_behind_its_blocks(path, recompute):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_embd=8, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
    model = transformers.GPT2LMHeadModel(config)
    if recompute:
        model.gradient_checkpointing_enable()
    ids, keys = torch.randint(0, 50, (2, 7)), list(model.state_dict())
    slot = insert_slot(model, path)
    assert list(model.state_dict()) == keys
    growth = GrowthController(model, torch.optim.SGD(model.parameters(), 0.1), sinks=[])
    growth.germinate(slot.name, Residual(8))
    torch.manual_seed(1)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    assert slot.alpha.grad is not None
    assert all(p.grad is not None for p in slot.seed.parameters())
    slot.move(Stage.BLENDING)
    slot.set_alpha(1.0)
    torch.manual_seed(1)
    assert model(input_ids=ids, labels=ids, use_cache=False).loss != loss


# --- and back ---


def test_what_is_removed_leaves_no_trace():
    model = Net(written=False)
    hooked = model.layers[1]
    hooked.register_forward_hook(lambda *_: None)
    before = [(name, sorted(vars(module)), list(module._forward_hooks.values()), list(module._modules))
              for name, module in model.named_modules()]  # fmt: skip
    for path in ("layers.0", "layers.1", "last"):
        insert_slot(model, path)
    for path in ("layers.0", "layers.1", "last"):
        remove_slot(model, path)
    after = [(name, sorted(vars(module)), list(module._forward_hooks.values()), list(module._modules))
             for name, module in model.named_modules()]  # fmt: skip
    assert before == after
    with pytest.raises(WiringError, match="no SeedSlot"):
        slots_of(model)
    assert insert_slot(model, "layers.0").stage is Stage.DORMANT


def test_a_slot_with_a_seed_or_at_rest_stays():
    model = Net(written=False)
    slot = insert_slot(model, "layers.0")
    life = Life(model, slot.name)
    with pytest.raises(WiringError, match=r"'layers\.0\.growth_slot' is occupied or resting \(stage TRAINING\)"):
        remove_slot(model, "layers.0")
    life.growth.prune(slot.name)
    with pytest.raises(WiringError, match="stage PRUNED"):
        remove_slot(model, "layers.0")
    life.epochs(3)
    assert model.layers[0].growth_slot is slot
    remove_slot(model, "layers.0")
    with pytest.raises(ConfigurationError, match=r"no slot 'layers\.0\.growth_slot'"):
        life.growth.germinate(slot.name, Residual(WIDTH))
    with pytest.raises(WiringError, match="was removed from its model"):
        slot.germinate(Residual(WIDTH))
    assert slot.stage is Stage.DORMANT
    assert slot.seed is None


@pytest.mark.parametrize("path", ["layers.1", "last"])
def test_there_is_nothing_to_remove_where_nothing_was_inserted(path):
    model = Net(written=False)
    insert_slot(model, "layers.0")
    with pytest.raises(ConfigurationError, match="no slot was inserted behind"):
        remove_slot(model, path)
