"""Adapters as seeds, and slots in a model that PEFT has wrapped, with tiny models of random weights on a CPU."""

import copy
import math
import os
import subprocess
import sys

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import pytest
import torch
from clients.truth import LOOSE, documented
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from same import same
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from seedtriton import (
    AlphaSchedule,
    ConfigurationError,
    Gate,
    GateThresholds,
    GrowthController,
    SeedSlot,
    Stage,
    StateDictError,
    WiringError,
    merge_fossils,
    restore_slots,
)
from seedtriton.evidence import NO_GRADIENT
from seedtriton.gates import QualityGates, SeedStatus
from seedtriton.integrations.peft import load_seeds, monitor_adapters, save_seeds
from seedtriton.integrations.transformers import GrowthCallback, GrowthTrainerMixin

pytestmark = pytest.mark.filterwarnings("default")  # the client's own are its business

VOCABULARY, LENGTH, WIDTH = 32, 8, 16
SLOT = "transformer.h.0.mlp.1"
FAST = {
    "thresholds": LOOSE, "auto_advance": [Gate.G1, Gate.G2, Gate.G3, Gate.G5], "mode": "permissive", "sinks": [],
    "schedule": AlphaSchedule(steps=6),
}  # fmt: skip
LORA = {"r": 4, "fan_in_fan_out": True}


def tokens(count=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(VOCABULARY, (count, 1), generator=generator)]
    for _ in range(LENGTH - 1):
        noise = torch.randint(VOCABULARY, (count, 1), generator=generator)
        rows.append(torch.where(torch.rand(count, 1, generator=generator) < 0.1, noise, (5 * rows[-1] + 3) % 32))
    return torch.cat(rows, 1)


ROWS = tokens()


def gpt2(slot=False):
    set_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=2 * LENGTH, n_embd=WIDTH, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.1, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    if slot:
        model.transformer.h[0].mlp = nn.Sequential(model.transformer.h[0].mlp, SeedSlot())
    return model


class Seed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.inner, self.drop = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)

    def forward(self, x):
        return x + self.drop(torch.relu(self.inner(self.norm(x))))


def adapted(slot=False, unfrozen=False, **more):
    model = get_peft_model(gpt2(slot), LoraConfig(target_modules=["c_attn"], **(LORA | more)))
    if unfrozen:
        model.requires_grad_(True)
    return model


def adam(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)


def squares(parameters):
    return math.fsum(float(p.grad.double().square().sum()) for p in parameters if p.grad is not None)


def of_adapter(model, name):
    """By PEFT's own naming, ``lora_A.<adapter>.weight``."""
    return [p for path, p in model.named_parameters() if name in path.split(".")]


def train(model, optimizer, monitor=None, steps=6, begin=0, names=(), clip=None):
    """Steps of a loop, and of each the sums of squares of the base and of each adapter, in float64."""
    sums = []
    for number in range(begin, begin + steps):
        set_seed(number)
        batch = ROWS[4 * number % 32 :][:4]
        model(input_ids=batch, labels=batch).loss.backward()
        own = {name: squares(of_adapter(model, name)) for name in names}
        sums.append({"base": squares(model.parameters()) - math.fsum(own.values()), **own})
        if monitor is not None:
            monitor.measure()
        if clip is not None:
            clip()
        optimizer.step()
        optimizer.zero_grad()
    return sums


def check(evidence, sums, name="default"):
    base, own = (math.sqrt(math.fsum(s[who] for s in sums) / len(sums)) for who in ("base", name))
    assert own > 0.0
    assert base > 0.0
    assert evidence.samples == len(sums)
    assert evidence.ratio == pytest.approx(own / (base + 1e-8), rel=1e-6)
    assert (evidence.seed_norm, evidence.host_norm) == (pytest.approx(own, rel=1e-6), pytest.approx(base, rel=1e-6))


# --- the shortest use ---


def test_the_lines_of_the_docs_are_enough():
    model = adapted(unfrozen=True)
    optimizer, steps = adam(model), iter(range(3))

    def loss_of(model, batch):
        next(steps)
        return model(input_ids=batch, labels=batch).loss

    names = {"model": model, "optimizer": optimizer, "loss_of": loss_of, "loader": [ROWS[:4]] * 3}
    lines = documented("PEFT")[0]
    assert len([line for line in lines.splitlines() if "monitor" in line]) == 4  # with the import
    exec(lines, names)
    assert names["monitor"].read()["default"].samples == 3


def test_nothing_of_peft_is_imported():
    code = "import sys, seedtriton.integrations.peft; assert not {'peft', 'transformers'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- what is measured ---


KINDS = {
    "lora": LoraConfig(target_modules=["c_attn", "c_fc"], **LORA),
    "dora": LoraConfig(target_modules=["c_attn"], use_dora=True, **LORA),
    "embedding": LoraConfig(target_modules=["wte"], r=2),
    "a module as a whole": LoraConfig(target_modules=["c_attn"], modules_to_save=["lm_head"], **LORA),
    "tokens": LoraConfig(target_modules=["c_attn"], trainable_token_indices=[1, 2], **LORA),
    "adalora": AdaLoraConfig(init_r=6, target_r=2, tinit=2, tfinal=2, deltaT=1, total_step=20, target_modules=["c_fc"]),
    "ia3": IA3Config(target_modules=["c_attn"], feedforward_modules=[]),
    "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_ratio_is_that_of_the_gradients_and_training_is_the_one_without_a_monitor(kind):
    def run(watched):
        model = get_peft_model(gpt2(), copy.deepcopy(KINDS[kind]))
        model.requires_grad_(True)
        optimizer = adam(model)
        monitor = monitor_adapters(model, optimizer) if watched else None
        sums = []
        for number in range(6):
            set_seed(number)
            model(input_ids=ROWS[:4], labels=ROWS[:4]).loss.backward()
            own = squares(of_adapter(model, "default"))
            sums.append({"base": squares(model.parameters()) - own, "default": own})
            if watched:
                monitor.measure()
            optimizer.step()
            if kind == "adalora":
                model.base_model.update_and_allocate(number)
            optimizer.zero_grad()
        return model, monitor, sums, optimizer

    model, monitor, sums, _optimizer = run(True)
    known = monitor.read()["default"]
    check(known, sums)
    assert (known.in_optimizer, known.optimizer_steps, known.frozen) == (True, 6, False)
    assert known.displacement > 0.0
    assert same(model.state_dict(), run(False)[0].state_dict())


def test_two_adapters_at_a_time_are_two_seeds():
    model = adapted()
    model.add_adapter("second", LoraConfig(target_modules=["c_fc"], **LORA))
    model.base_model.set_adapter(["default", "second"])
    model.requires_grad_(True)
    optimizer = adam(model)
    monitor, first = monitor_adapters(model, optimizer), monitor_adapters(model, optimizer, ["default"])
    sums = train(model, optimizer, monitor, names=("default", "second"))
    known = monitor.read()
    check(known["default"], sums)
    check(known["second"], sums, "second")
    train(model, optimizer, first, begin=6)
    assert first.read().keys() == {"default"}
    again = train(model, optimizer, first, begin=12, names=("default", "second"))
    first.reset()
    again = train(model, optimizer, first, begin=18, names=("default", "second"))
    check(first.read()["default"], again)  # the other one belongs to nobody


def test_of_a_frozen_base_the_ratio_is_undefined_and_the_rest_is_known():
    model = adapted()
    optimizer = adam(model)
    monitor = monitor_adapters(model, optimizer)
    sums = train(model, optimizer, monitor, names=("default",))
    known = monitor.read()["default"]
    assert (known.status, known.ratio, known.samples) == ("host_undefined", None, 6)
    assert "a frozen host?" in known.reason
    assert known.seed_norm == pytest.approx(math.sqrt(math.fsum(s["default"] for s in sums) / 6), rel=1e-6)
    assert known.displacement > 0.0
    assert known.live_share > 0.5


def test_what_is_not_there_is_named():
    model = adapted()
    with pytest.raises(ConfigurationError, match=r"no adapters \['other'\]; its adapters are \['default'\]"):
        monitor_adapters(model, adam(model), ["default", "other"])
    with pytest.raises(WiringError, match="get_peft_model"):
        monitor_adapters(gpt2(), adam(gpt2()))


# --- adapters come and go ---


def test_an_adapter_that_is_added_is_watched(caplog):
    model = adapted()
    optimizer = adam(model)
    monitor = monitor_adapters(model, optimizer)
    train(model, optimizer, monitor, 2)
    model.add_adapter("late", LoraConfig(target_modules=["c_fc"], **LORA))
    train(model, optimizer, monitor, 2, begin=2)
    assert monitor.seeds == ("default", "late")  # noticed by the measurement
    assert "adapter 'late' was added" in caplog.text
    late = monitor.read()["late"]
    assert "the adapter 'late', which is inactive, and active is ['default']" in late.reason
    model.base_model.set_adapter(["default", "late"])
    model.requires_grad_(True)
    monitor.read()
    sums = train(model, optimizer, monitor, 3, begin=4, names=("default", "late"))
    known = monitor.read()
    check(known["late"], sums, "late")
    check(known["default"], sums)
    assert (known["late"].in_optimizer, known["default"].in_optimizer) == (False, True)
    optimizer.add_param_group({"params": of_adapter(model, "late")})
    assert monitor.read()["late"].in_optimizer


def test_an_adapter_that_was_added_before_a_read_is_in_it():
    model = adapted()
    monitor = monitor_adapters(model, adam(model))
    model.add_adapter("late", LoraConfig(target_modules=["c_fc"], **LORA))
    assert monitor.read().keys() == {"default", "late"}


def test_adapters_that_are_deleted_are_watched_no_more(caplog):
    model = adapted()
    for name in ("second", "third"):
        model.add_adapter(name, LoraConfig(target_modules=["c_fc"], **LORA))
    optimizer = adam(model)
    monitor = monitor_adapters(model, optimizer, ["third", "default", "second"])
    train(model, optimizer, monitor, 3, names=("default",))
    for name in ("second", "third"):
        model.delete_adapter(name)
    known = monitor.read()
    assert known.keys() == {"default"}
    assert known["default"].samples == 3
    assert "adapters ['second', 'third'] were deleted" in caplog.text
    model.add_adapter("second", LoraConfig(target_modules=["c_fc"], **LORA))
    model.add_adapter("fourth", LoraConfig(target_modules=["c_fc"], **LORA))
    assert monitor.read().keys() == {"default", "second"}  # those that were asked for


def test_a_seed_that_was_removed_by_hand_does_not_come_back():
    model = adapted()
    model.add_adapter("second", LoraConfig(target_modules=["c_fc"], **LORA))
    monitor = monitor_adapters(model, adam(model))
    monitor.remove_seed("second")
    assert monitor.read().keys() == {"default"}
    model.add_adapter("third", LoraConfig(target_modules=["c_fc"], **LORA))
    assert monitor.read().keys() == {"default", "third"}, "others that are added later are followed all the same"
    with pytest.raises(ConfigurationError, match="no seed is called"):
        monitor.remove_seed("default", "nobody")
    assert "default" in monitor.read()
    model.delete_adapter("second")
    assert monitor.read().keys() == {"default", "third"}
    model.add_adapter("second", LoraConfig(target_modules=["c_fc"], **LORA))
    assert monitor.read().keys() == {"default", "third", "second"}, "another adapter of that name"


def gate(known):
    checks = QualityGates().judge(Stage.BLENDING, SeedStatus(seed="s", stage=Stage.TRAINING, evidence=known)).checks
    return {check.question: check for check in checks}


@pytest.mark.parametrize("frozen", [True, False])
def test_an_adapter_that_is_not_active_is_called_so(frozen, caplog):
    model = adapted()
    model.add_adapter("second", LoraConfig(target_modules=["c_fc"], **LORA))
    optimizer = adam(model)
    monitor = monitor_adapters(model, optimizer)
    train(model, optimizer, monitor, 3)
    model.set_adapter("second")
    if not frozen:
        model.requires_grad_(True)
    optimizer.add_param_group({"params": of_adapter(model, "second")})
    sums = train(model, optimizer, monitor, 3, begin=3, names=("default", "second"))
    monitor.read()
    train(model, optimizer, monitor, 3, begin=6)
    known = monitor.read()
    assert "the adapter 'default', which is inactive, and active is ['second']: set_adapter('default')" in (
        known["default"].reason
    )
    assert known["default"].frozen
    assert known["default"].status == NO_GRADIENT
    assert gate(known["default"])["optimizer"].name == "seed_frozen"
    assert sums[0]["default"] == 0.0 < sums[0]["second"]
    assert known["second"].in_optimizer
    assert not known["second"].frozen
    assert "which is inactive" in caplog.text
    model.set_adapter("default")
    train(model, optimizer, monitor, 1, begin=9)
    assert "inactive" not in monitor.read()["default"].reason


def test_one_that_has_samples_from_when_it_was_active_is_called_inactive_too():
    model = adapted()
    optimizer = adam(model)
    monitor = monitor_adapters(model, optimizer)
    train(model, optimizer, monitor, 3)
    model.base_model.disable_adapter_layers()
    for parameter in of_adapter(model, "default"):
        parameter.requires_grad_(True)
    known = monitor.read()["default"]
    assert known.samples == 3
    assert "adapters are disabled" in known.reason
    model.base_model.enable_adapter_layers()
    model.merge_adapter()
    assert "is merged into the base: unmerge_adapter()" in monitor.read()["default"].reason
    model.unmerge_adapter()
    assert "adapter" not in monitor.read()["default"].reason


def test_merged_and_unloaded_there_is_nothing_to_watch(caplog):
    model = adapted()
    optimizer = adam(model)
    monitor = monitor_adapters(model, optimizer)
    train(model, optimizer, monitor, 3)
    model.eval()
    with torch.no_grad():
        before = model(ROWS[:4]).logits
        merged = model.merge_and_unload()
        assert torch.allclose(merged(ROWS[:4]).logits, before, atol=1e-5)
    assert monitor.read() == {}
    assert "merged and unloaded" in caplog.text


def test_a_monitor_goes_on_bit_for_bit():
    def begun():
        model = adapted(unfrozen=True)
        optimizer = adam(model)
        return model, optimizer, monitor_adapters(model, optimizer)

    whole = begun()
    train(*whole, 3)
    saved = copy.deepcopy([part.state_dict() for part in whole])
    train(*whole, 5, begin=3)
    again = begun()
    for part, state in zip(again, saved):
        part.load_state_dict(state)
    train(*again, 5, begin=3)
    assert str(again[2].read()) == str(whole[2].read())
    assert all(same(one.state_dict(), other.state_dict()) for one, other in zip(whole, again))
    assert again[2].read()["default"].samples == 8


# --- slots under PEFT ---


def grown(model, **more):
    optimizer = adam(model)
    return optimizer, GrowthController(model, optimizer, **(FAST | more))


def host_of(model):
    return {k: v.clone() for k, v in model.state_dict().items() if f"{SLOT}." not in k}


def test_slots_have_the_names_that_they_have_without_peft():
    model = adapted(slot=True)
    optimizer, growth = grown(model)
    assert list(growth.slots) == [SLOT]
    assert growth.germinate(SLOT, Seed()).passed
    train(model, optimizer, growth, 3)
    assert growth.evidence()[SLOT].samples == 3
    state = growth.state_dict()
    plain = gpt2(slot=True)
    restore_slots(plain, state, {SLOT: Seed})
    assert plain.transformer.h[0].mlp[1].stage is Stage.TRAINING


def test_a_slot_is_looked_for_in_a_model_that_peft_leaves_outside():
    model = get_peft_model(gpt2(slot=True), copy.deepcopy(KINDS["prompt"]))
    optimizer, growth = grown(model)
    (name,) = growth.slots
    growth.germinate(name, Seed())
    train(model, optimizer, growth, 3)
    prompt = float(next(p for n, p in model.named_parameters() if "prompt_encoder" in n).numel())
    assert growth.monitor._watched.segment_by_id[id(next(model.prompt_encoder.parameters()))] == 0
    assert prompt > 0
    assert growth.evidence()[name].ratio is not None  # the prompt is the host that learns


def test_the_host_and_its_adapters_are_bit_for_bit_those_without_a_seed():
    def run(seed):
        model = adapted(slot=True, lora_dropout=0.1)
        optimizer, growth = grown(model, thresholds=GateThresholds(min_training_epochs=10**6))
        if seed:
            growth.germinate(SLOT, Seed())
        sums, own = [], lambda: growth.slots[SLOT].parameters() if seed else ()

        def clip():
            if seed:
                total, mine = squares(model.parameters()), squares(own())
                sums.append({"base": total - mine, "default": mine})
            growth.clip_grad_norm_(0.5)

        model.train()
        train(model, optimizer, growth, 12, clip=clip)
        return model, growth, sums

    (model, growth, sums), (alone, _, _) = run(True), run(False)
    assert growth.slots[SLOT].stage is Stage.TRAINING
    check(growth.evidence()[SLOT], sums)
    assert same(host_of(model), host_of(alone))


def whole_of(model, optimizer, growth):
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "growth": growth.state_dict()}


def lived(model, optimizer, growth, epochs, begin=0):
    for epoch in range(begin, epochs):
        train(model, optimizer, growth, 4, begin=4 * epoch)
        growth.end_epoch()


@pytest.mark.parametrize("epochs, stage", [(1, Stage.BLENDING), (3, Stage.HOLDING), (5, Stage.FOSSILIZED)])
def test_beside_an_adapter_the_seeds_are_saved_and_go_on_bit_for_bit(epochs, stage, tmp_path):
    model = adapted(slot=True)
    optimizer, growth = grown(model)
    growth.germinate(SLOT, Seed())
    lived(model, optimizer, growth, epochs)
    assert growth.slots[SLOT].stage is stage
    moments = copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():
        wanted = model.eval()(ROWS).logits
    model.train()
    names = {
        "model": model, "growth": growth, "folder": tmp_path, "base": gpt2(slot=True), "PeftModel": PeftModel,
        "make_optimizer": adam, "make_seed": Seed, "GrowthController": lambda *given: GrowthController(*given, **FAST),
    }  # fmt: skip
    exec(documented("PEFT")[1], names)
    again, later, resumed = names["model"], names["optimizer"], names["growth"]
    lived(model, optimizer, growth, epochs + 2, begin=epochs)

    with torch.no_grad():
        assert torch.equal(again.eval()(ROWS).logits, wanted)
    again.train()
    later.load_state_dict(moments)
    lived(again, later, resumed, epochs + 2, begin=epochs)
    assert same(whole_of(again, later, resumed), whole_of(model, optimizer, growth))


def test_a_seed_that_the_adapters_file_has_no_place_for_is_named(tmp_path):
    model = adapted(slot=True)
    optimizer, growth = grown(model)
    growth.germinate(SLOT, Seed())
    lived(model, optimizer, growth, 2)
    model.save_pretrained(tmp_path)
    state = growth.state_dict()
    again = PeftModel.from_pretrained(gpt2(slot=True), tmp_path, is_trainable=True)
    later = adam(again)
    resumed = GrowthController(again, later, **FAST)
    resumed.load_state_dict(state, seeds={SLOT: Seed})
    with pytest.raises(WiringError, match=rf"such as \['{SLOT}\.seed\.norm\.weight'.*save_seeds\(growth, folder\)"):
        train(again, later, resumed, 1)
    with pytest.raises(WiringError, match=r"has no growth.pt: .*save_seeds\(growth, folder\)"):
        load_seeds(gpt2(slot=True), tmp_path, {SLOT: Seed})


def test_damaged_weights_of_seeds_are_refused(tmp_path):
    model = adapted(slot=True)
    _, growth = grown(model)
    growth.germinate(SLOT, Seed())
    save_seeds(growth, tmp_path)
    saved = torch.load(tmp_path / "growth.pt", weights_only=True)
    for weights in ({SLOT: {"seed.inner.weight": 3.0}}, {SLOT: 1}, []):
        torch.save({**saved, "weights": weights}, tmp_path / "growth.pt")
        with pytest.raises(StateDictError, match="no growth state"):
            load_seeds(gpt2(slot=True), tmp_path, {SLOT: Seed})
    torch.save({**saved, "weights": {"elsewhere": saved["weights"][SLOT]}}, tmp_path / "growth.pt")
    with pytest.raises(StateDictError, match=r"weights of slots \['elsewhere'\]"):
        load_seeds(gpt2(slot=True), tmp_path, {SLOT: Seed})


def test_an_adapter_that_is_added_is_another_host_and_the_seed_learns_on():
    model = adapted(slot=True)
    optimizer, growth = grown(model)
    growth.germinate(SLOT, Seed())
    train(model, optimizer, growth, 3)
    model.add_adapter("second", LoraConfig(target_modules=["c_fc"], **LORA))
    train(model, optimizer, growth, 4, begin=3)
    known = growth.evidence()[SLOT]
    assert (known.frozen, known.in_optimizer, known.samples) == (False, True, 4)
    assert "its window began anew when parameters changed (the host: parameter" in known.reason


def test_a_seed_that_was_there_before_peft_is_frozen_with_the_base_and_its_evidence_says_so():
    inner = gpt2(slot=True)
    place = inner.transformer.h[0].mlp[1]
    place.germinate(Seed())
    state = place.lifecycle_state()
    model = get_peft_model(inner, LoraConfig(target_modules=["c_attn"], **LORA))
    assert (place.lifecycle_state(), place.stage) == (state, Stage.GERMINATED)
    monitor = monitor_adapters(model, adam(model))
    assert not any(p.requires_grad for p in place.parameters())
    assert monitor.read().keys() == {"default"}


def test_merging_the_adapters_leaves_the_seed_where_it_is():
    model = adapted(slot=True)
    optimizer, growth = grown(model)
    growth.germinate(SLOT, Seed())
    lived(model, optimizer, growth, 5)
    assert growth.slots[SLOT].stage is Stage.FOSSILIZED
    with torch.no_grad():
        wanted = model.eval()(ROWS[:4]).logits
        merged = model.merge_and_unload()
        assert torch.allclose(merged(ROWS[:4]).logits, wanted, atol=1e-5)
        assert merge_fossils(merged) == [SLOT]
        assert torch.allclose(merged(ROWS[:4]).logits, wanted, atol=1e-5)
    assert not any("lora" in key or ".seed." in key for key in merged.state_dict())


# --- in Trainer ---


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        return {"input_ids": ROWS[index], "labels": ROWS[index]}


class Growing(GrowthTrainerMixin, Trainer):
    pass


def trained(folder, resume=None):
    known = {
        "num_train_epochs": 3, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "save_strategy": "steps", "save_steps": 6, "logging_strategy": "epoch",
    }  # fmt: skip
    callback = GrowthCallback(seeds={SLOT: Seed}, **FAST)
    args = TrainingArguments(str(folder), **known)
    trainer = Growing(adapted(slot=True), args, train_dataset=Rows(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_trainer_resumes_an_adapted_model_with_its_seeds_bit_for_bit(tmp_path):
    whole = trained(tmp_path / "a")
    assert whole.growth.slots[SLOT].stage is not Stage.TRAINING
    files = os.listdir(tmp_path / "a" / "checkpoint-6")
    assert {"adapter_model.safetensors", "growth.pt"} <= set(files)
    assert "model.safetensors" not in files
    again = trained(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-6"))
    for part in ("model", "optimizer", "growth"):
        assert same(getattr(again, part).state_dict(), getattr(whole, part).state_dict()), part


def test_the_best_adapted_model_has_the_seeds_that_it_had(tmp_path):
    seen = {}

    class Best(Growing):
        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs)
            with torch.no_grad():
                seen[self.state.global_step] = self.model.eval()(ROWS).logits.clone()
            return metrics | {"eval_score": float(self.state.global_step == 8)}

    callback = GrowthCallback(seeds={SLOT: Seed}, **FAST)
    args = TrainingArguments(
        str(tmp_path), num_train_epochs=4, per_device_train_batch_size=8, learning_rate=3e-3, report_to="none",
        use_cpu=True, disable_tqdm=True, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    trainer = Best(adapted(slot=True), args, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[callback])
    trainer.train()
    with torch.no_grad():
        assert torch.equal(trainer.model.eval()(ROWS).logits, seen[8])
    assert not torch.equal(seen[8], seen[16])
