"""GrowthCallback and GrowthTrainerMixin in the real Trainer, with tiny models of random weights."""

import dataclasses
import math
import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import pytest
import torch
from clients.truth import LOOSE
from safetensors.torch import load_file
from same import same
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from seedtriton import (
    AlphaSchedule,
    ConfigurationError,
    Gate,
    GateThresholds,
    GrowthController,
    SeedSlot,
    Stage,
    WiringError,
)
from seedtriton.growth.clients import give_group
from seedtriton.integrations.saved import FILE, saved_in
from seedtriton.integrations.transformers import GrowthCallback, GrowthTrainerMixin, load_seeds

pytestmark = pytest.mark.filterwarnings("default")  # the client's own are its business

VOCABULARY, LENGTH, WIDTH = 32, 8, 16
SLOT = "transformer.h.0.mlp.1"
LATE = dataclasses.replace(LOOSE, min_training_epochs=2)
NEVER = GateThresholds(min_training_epochs=10**6)
FAST = {"thresholds": LOOSE, "auto_advance": [Gate.G1, Gate.G2, Gate.G3, Gate.G5], "mode": "permissive"}


class Tokens(torch.utils.data.Dataset):
    """Each token from the one before it, with some noise."""

    def __init__(self, count=32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randint(VOCABULARY, (count, 1), generator=generator)]
        for _ in range(LENGTH - 1):
            noise = torch.randint(VOCABULARY, (count, 1), generator=generator)
            rows.append(torch.where(torch.rand(count, 1, generator=generator) < 0.1, noise, (5 * rows[-1] + 3) % 32))
        self.rows = torch.cat(rows, 1)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Net(GPT2LMHeadModel):
    def __init__(self, config):
        super().__init__(config)
        block = self.transformer.h[0]
        block.mlp = nn.Sequential(block.mlp, SeedSlot())


class Seed(nn.Module):
    def __init__(self, drop=0.1):
        super().__init__()
        self.norm, self.first, self.drop = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(drop)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.second(self.drop(torch.relu(self.first(self.norm(x)))))


def net(kind=Net, seed=0):
    set_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=WIDTH, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1,
    )  # fmt: skip
    return kind(config)


class Capturing(Trainer):
    """Keeps the sums of squares of the gradients of every optimizer step, in float64, before they are clipped."""

    sums = weights = None

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.sums is not None and self.accelerator.sync_gradients:
            found = {"seed": 0.0, "host": 0.0}
            for name, parameter in self.model.named_parameters():
                if parameter.grad is not None:
                    found["seed" if ".seed." in name else "host"] += float(parameter.grad.double().square().sum())
            self.sums.append(found)
        return loss


class Growing(GrowthTrainerMixin, Capturing):
    pass


def arguments(folder, **more):
    known = {
        "num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "weight_decay": 0.1,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "epoch",
    }  # fmt: skip
    return TrainingArguments(str(folder), **(known | more))


def grown(folder, callback=None, model=None, kind=Growing, resume=None, run=True, **more):
    callback = callback or GrowthCallback(seeds={SLOT: Seed}, thresholds=NEVER, sinks=[])
    trainer = kind(
        model or net(), arguments(folder, **more), train_dataset=Tokens(), eval_dataset=Tokens(8, 1),
        callbacks=[callback],
    )  # fmt: skip
    trainer.sums = []
    if run:
        trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


def plain(folder, **more):
    data = {"train_dataset": Tokens(), "eval_dataset": Tokens(8, 1)}
    trainer = Trainer(net(GPT2LMHeadModel), arguments(folder, **more), **data)
    trainer.train()
    return trainer


def host_of(model):
    """Weights of the host by the names that they have without a slot."""
    state = model.state_dict().items()
    return {key.replace("mlp.0.", "mlp."): value.clone() for key, value in state if f"{SLOT}." not in key}


CHECKPOINTED = [
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    for reentrant in (True, False)
]
LOOPS = {
    "accumulation 1": {},
    "accumulation 4": {"gradient_accumulation_steps": 4},
    "accumulation 3, a rest": {"gradient_accumulation_steps": 3},
    "bf16": {"bf16": True},
    "reentrant": CHECKPOINTED[0],
    "not reentrant": CHECKPOINTED[1],
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "hard clipping": {"max_grad_norm": 0.05},
    "no clipping": {"max_grad_norm": 0.0},
    "cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 3},
    "constant": {"lr_scheduler_type": "constant"},
    "plain AdamW": {"optim": "adamw_torch"},
    "SGD": {"optim": "sgd", "learning_rate": 0.05},
}


@pytest.mark.parametrize("loop", LOOPS)
def test_the_ratio_is_that_of_the_gradients_and_the_host_is_the_one_without_a_seed(loop, tmp_path, monkeypatch):
    # In a compiled graph a seed that draws shares the host's generator (README).
    seed = (lambda: Seed(0.0)) if loop == "compiled" else Seed
    callback = GrowthCallback(seeds={SLOT: seed}, thresholds=NEVER, sinks=[])
    measured = []
    measure = GrowthController.measure
    monkeypatch.setattr(GrowthController, "measure", lambda *a, **k: (measured.append(1), measure(*a, **k)))
    trainer, callback = grown(tmp_path / "a", callback, **LOOPS[loop])
    evidence = callback.growth.evidence()[SLOT]
    steps = trainer.state.global_step
    assert callback.growth.slots[SLOT].stage is Stage.TRAINING
    assert evidence.samples == len(trainer.sums) == steps == len(measured)
    assert evidence.dropped == 0
    seed, host = (math.sqrt(math.fsum(s[who] for s in trainer.sums) / steps) for who in ("seed", "host"))
    assert seed > 0.0
    assert evidence.ratio == pytest.approx(seed / (host + 1e-8), rel=1e-6)
    assert evidence.displacement > 1e-4
    assert same(host_of(trainer.model), host_of(plain(tmp_path / "b", **LOOPS[loop]).model))


@pytest.mark.parametrize("loop", ["accumulation 1", "accumulation 4", "hard clipping", "no clipping"])
def test_logged_losses_and_norms_are_the_hosts(loop, tmp_path):
    told = [
        [{k: entry[k] for k in ("loss", "grad_norm", "learning_rate")} for entry in log if "loss" in entry]
        for log in (
            grown(tmp_path / "a", **LOOPS[loop])[0].state.log_history,
            plain(tmp_path / "b", **LOOPS[loop]).state.log_history,
        )
    ]
    assert len(told[0]) == 2
    assert told[0] == told[1]


def test_the_seed_is_clipped_by_its_own_norm(tmp_path):
    norms = []

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seed = [p.grad.flatten() for n, p in model.named_parameters() if f"{SLOT}.seed" in n]
            host = [p.grad.flatten() for n, p in model.named_parameters() if f"{SLOT}.seed" not in n]
            norms.extend(float(torch.cat(part).norm()) for part in (seed, host))

    trainer, _ = grown(tmp_path, run=False, max_grad_norm=0.05)
    trainer.add_callback(Norms())
    trainer.train()
    assert norms == pytest.approx([0.05] * 32, rel=1e-4)


def test_the_numbers_are_in_the_clients_log(tmp_path):
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer, _callback = grown(tmp_path, run=False)
    trainer.add_callback(Reporter())
    trainer.train()
    names = {f"growth/{SLOT}/{name}" for name in ("ratio", "alpha", "samples", "blend_gain", "displacement")}
    for log in (seen, trainer.state.log_history):
        found = [entry for entry in log if names <= set(entry)]
        assert [entry["epoch"] for entry in found] == [1.0, 2.0]
        assert [entry[f"growth/{SLOT}/samples"] for entry in found] == [8, 16]
        assert len([entry for entry in log if "loss" in entry]) == 2  # the client's own lines are all there


def test_what_a_subclass_sums_up_between_two_lines_of_its_log_is_whole(tmp_path):
    class Summing(Growing):  # as trl's
        steps = 0

        def training_step(self, *args, **kwargs):
            self.steps += 1
            return super().training_step(*args, **kwargs)

        def log(self, logs, *args, **kwargs):
            super().log(logs | {"steps": self.steps}, *args, **kwargs)
            self.steps = 0

    trainer, _ = grown(tmp_path, kind=Summing, logging_strategy="steps", logging_steps=6)
    lines = trainer.state.log_history
    assert [line["steps"] for line in lines if "loss" in line] == [6, 6]
    assert [line["epoch"] for line in lines if f"growth/{SLOT}/ratio" in line] == [1.0, 2.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_a_schedule_reaches_the_seed(schedule, tmp_path):
    rates = []

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            rates.append([group["lr"] for group in optimizer.param_groups])

    at = 5 if schedule == "cosine" else 0
    callback = GrowthCallback(seeds={SLOT: Seed}, thresholds=NEVER, germinate_at=at, sinks=[])
    trainer, _ = grown(tmp_path, callback, run=False, lr_scheduler_type=schedule, warmup_steps=2)
    trainer.add_callback(Rates())
    trainer.train()
    assert [len(set(step)) for step in rates] == [1] * 16
    assert [len(step) for step in rates] == [2] * at + [4] * (16 - at)
    assert (rates[0] != rates[-1]) == (schedule != "constant")


def test_a_rate_of_its_own_is_scheduled_too(tmp_path):
    callback = GrowthCallback(seeds={SLOT: Seed}, thresholds=NEVER, how={"lr": 6e-3}, sinks=[])
    trainer, callback = grown(tmp_path, callback, run=False)
    rates = []

    class Rates(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            rates.append([group["lr"] for group in optimizer.param_groups])

    trainer.add_callback(Rates())
    trainer.train()
    assert rates[3][0] > 0
    assert rates[3] == pytest.approx([rates[3][0]] * 2 + [2 * rates[3][0]] * 2)


@pytest.mark.parametrize("decay", [0.1, 0.0])
def test_biases_and_norms_of_a_seed_decay_as_the_hosts_do(decay, tmp_path):
    _trainer, callback = grown(tmp_path, weight_decay=decay)
    named = {id(p): name for name, p in callback.growth.slots[SLOT].named_parameters()}
    groups = {
        frozenset(named[id(p)].removeprefix("seed.") for p in group["params"]): group["weight_decay"]
        for group in callback.growth.optimizer.param_groups
        if id(group["params"][0]) in named
    }
    both = frozenset({"first.weight", "second.weight"})
    rest = frozenset({"norm.weight", "norm.bias", "first.bias", "second.bias"})
    assert groups == ({both: 0.1, rest: 0.0} if decay else {both | rest: 0.0})


def test_a_slot_below_a_norm_decays_too(tmp_path):
    model = llama()
    callback = GrowthCallback(seeds={"model.norm.0": Seed}, thresholds=NEVER, sinks=[])
    trainer = Growing(model, arguments(tmp_path), train_dataset=Tokens(), callbacks=[callback])
    trainer.train()
    decayed = {id(p) for g in callback.growth.optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    seed = callback.growth.slots["model.norm.0"].seed
    assert [id(p) in decayed for p in (seed.first.weight, seed.first.bias, seed.norm.weight)] == [True, False, False]


# --- epochs ---


class Epochs:
    def __init__(self):
        self.told = []

    def __call__(self, event):
        if event["event"] == "epoch" and event["seed"] is None:
            self.told.append((event["step"], event["accuracy"], event["loss"]))


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]).mean())}


@pytest.mark.parametrize(
    "more, steps, told",
    [
        ({}, [8, 16], "nothing"),
        ({"eval_strategy": "epoch"}, [8, 16], "accuracy"),
        ({"eval_strategy": "epoch", "eval_on_start": True}, [8, 16], "accuracy"),
        ({"eval_strategy": "epoch", "eval_delay": 2}, [8, 16], "late"),
        ({"eval_strategy": "steps", "eval_steps": 3}, [3, 6, 9, 12, 15, 16], "accuracy"),
        ({"eval_strategy": "epoch", "metric": False}, [8, 16], "loss"),
        ({"eval_strategy": "epoch", "names": ("eval_x", "eval_y")}, [8, 16], "nothing"),
        ({"eval_strategy": "epoch", "gradient_accumulation_steps": 4}, [2, 4], "accuracy"),
    ],
)
def test_an_evaluation_ends_an_epoch_and_where_there_is_none_the_data(more, steps, told, tmp_path, caplog):
    metric, names = more.pop("metric", True), more.pop("names", ("eval_accuracy", "eval_loss"))
    epochs = Epochs()
    callback = GrowthCallback(
        seeds={SLOT: Seed}, thresholds=NEVER, sinks=[epochs], accuracy_metric=names[0], loss_metric=names[1]
    )
    trainer = Growing(
        net(), arguments(tmp_path, **more), train_dataset=Tokens(), eval_dataset=Tokens(8, 1), callbacks=[callback],
        compute_metrics=accuracy if metric else None,
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()  # behind the training it ends no epoch
    assert [step for step, _, _ in epochs.told] == steps
    given = [(a is not None, loss is not None) for _, a, loss in epochs.told]
    wanted = {"nothing": (False, False), "accuracy": (True, True), "loss": (False, True)}
    assert given == ([(False, False), (True, True)] if told == "late" else [wanted[told]] * len(steps))
    assert ("has neither 'eval_x' nor 'eval_y'" in caplog.text) == (names[0] == "eval_x")


def test_of_several_data_sets_the_one_that_was_named_counts(tmp_path):
    epochs = Epochs()
    callback = GrowthCallback(seeds={SLOT: Seed}, thresholds=NEVER, sinks=[epochs], loss_metric="eval_second_loss")
    trainer = Growing(
        net(), arguments(tmp_path, eval_strategy="epoch"), train_dataset=Tokens(), callbacks=[callback],
        eval_dataset={"first": Tokens(8, 1), "second": Tokens(8, 2)},
    )  # fmt: skip
    trainer.train()
    losses = [entry["eval_second_loss"] for entry in trainer.state.log_history if "eval_second_loss" in entry]
    assert [loss for _, _, loss in epochs.told] == losses
    assert len(losses) == 2


def test_a_training_in_which_no_epoch_ends_says_so(tmp_path, caplog):
    trainer, callback = grown(tmp_path, eval_strategy="steps", eval_steps=4, eval_delay=1000)
    assert "no gate was asked" in caplog.text
    trainer.evaluate()
    assert callback.growth.epoch == 0


def test_a_seed_germinates_when_it_is_due(tmp_path):
    for at in (5, lambda state: state.epoch is not None and state.global_step >= 5):
        callback = GrowthCallback(seeds={SLOT: Seed}, thresholds=NEVER, germinate_at=at, sinks=[])
        _trainer, callback = grown(tmp_path, callback)
        assert callback.growth.evidence()[SLOT].samples == 11
        assert callback.growth.step == 16


# --- stop and resume ---


def lively(steps=100, **more):
    return GrowthCallback(
        seeds={SLOT: Seed}, schedule=AlphaSchedule(steps=steps), sinks=[], **(FAST | more)
    )  # fmt: skip


def all_of(trainer, callback):
    return {
        "model": trainer.model.state_dict(),
        "optimizer": callback.growth.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "growth": callback.growth.state_dict(),
        "verdicts": list(map(str, callback.verdicts)),
        "random": torch.random.get_rng_state(),
        "alpha": callback.growth.slots[SLOT].alpha_value,
        "progress": callback.growth.progress,
    }


@pytest.mark.parametrize(
    "step, stage, more",
    [
        (5, Stage.TRAINING, {}),
        (8, Stage.TRAINING, {}),  # saved before the epoch ends
        (8, Stage.BLENDING, {"save_strategy": "epoch"}),
        (13, Stage.BLENDING, {}),
        (3, Stage.TRAINING, {"gradient_accumulation_steps": 2, "num_train_epochs": 4}),
        (13, Stage.BLENDING, {"eval_strategy": "epoch"}),
        (16, Stage.BLENDING, {"eval_strategy": "steps", "eval_steps": 4, "num_train_epochs": 3}),
        (5, Stage.TRAINING, {"max_grad_norm": 0.0, "optim": "sgd"}),
        (10, Stage.BLENDING, {"eval_strategy": "steps", "eval_steps": 5, "unknown": True}),
        (13, Stage.BLENDING, {"bf16": True}),
        (13, Stage.BLENDING, {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
    ],
)
def test_a_run_that_is_resumed_goes_on_bit_for_bit(step, stage, more, tmp_path):
    late = {"thresholds": LATE} if step == 16 else {}
    late |= {"accuracy_metric": "x", "loss_metric": "y"} if more.get("unknown") else {}
    more = {"save_strategy": "steps", "save_steps": step} | {key: more[key] for key in more if key != "unknown"}
    whole, callback = grown(tmp_path / "run", lively(**late), **more)
    folder = str(tmp_path / "run" / f"checkpoint-{step}")
    saved = saved_in(folder)
    assert saved["growth"]["slots"][SLOT]["slot"]["lifecycle"]["stage"] == stage.name
    torch.manual_seed(99)
    resumed, again = grown(tmp_path / "again", lively(**late), model=net(seed=7), resume=folder, **more)
    assert resumed.state.global_step == whole.state.global_step > step
    for part, value in all_of(whole, callback).items():
        assert same(all_of(resumed, again)[part], value), part
    assert callback.growth.epoch >= 2


def test_a_trainer_that_makes_its_own_scheduler_is_resumed(tmp_path):
    class OwnScheduler(Growing):
        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer, 0.5, num_training_steps)
            return self.lr_scheduler

    more = {"kind": OwnScheduler, "save_strategy": "steps", "save_steps": 5}
    whole, callback = grown(tmp_path / "run", lively(), **more)
    resumed, again = grown(tmp_path / "again", lively(), resume=str(tmp_path / "run" / "checkpoint-5"), **more)
    assert again.growth.progress == 1.0
    for part, value in all_of(whole, callback).items():
        assert same(all_of(resumed, again)[part], value), part


def test_a_checkpoint_from_before_the_seed_is_resumed(tmp_path):
    more = {"save_strategy": "steps", "save_steps": 4}
    whole, callback = grown(tmp_path / "run", lively(germinate_at=6), **more)
    resumed, again = grown(
        tmp_path / "again", lively(germinate_at=6), resume=str(tmp_path / "run" / "checkpoint-4"), **more
    )
    for part, value in all_of(whole, callback).items():
        assert same(all_of(resumed, again)[part], value), part


def test_a_seed_that_was_pruned_stays_out(tmp_path):
    class Prune(TrainerCallback):
        def __init__(self, callback):
            self.callback = callback

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                self.callback.growth.prune(SLOT)

    callback = lively()
    trainer, _ = grown(tmp_path, callback, run=False, save_strategy="steps", save_steps=5)
    trainer.add_callback(Prune(callback))
    trainer.train()
    assert trainer.growth.slots[SLOT].seed is None
    resumed, again = grown(tmp_path / "again", lively(), resume=str(tmp_path / "checkpoint-5"))
    assert again.growth.slots[SLOT].seed is None
    for part, value in all_of(trainer, callback).items():
        assert same(all_of(resumed, again)[part], value), part


def test_an_ordinary_checkpoint_is_resumed_and_the_seed_germinates(tmp_path):
    class Plain(Trainer):
        pass

    ordinary = Plain(net(), arguments(tmp_path, save_strategy="steps", save_steps=8), train_dataset=Tokens())
    ordinary.train()
    _trainer, callback = grown(tmp_path / "again", resume=str(tmp_path / "checkpoint-8"))
    assert callback.growth.evidence()[SLOT].samples == 8


def test_a_resume_without_the_mixin_is_refused_by_name(tmp_path):
    grown(tmp_path, lively(), save_strategy="steps", save_steps=8)
    with pytest.raises(RuntimeError, match=r"slot 'transformer.h.0.mlp.1' is empty and the state has a seed for it"):
        grown(tmp_path, lively(), kind=Trainer, max_grad_norm=0.0, resume=str(tmp_path / "checkpoint-8"))


def test_the_same_trainer_goes_back_and_trains_on(tmp_path):
    trainer, callback = grown(tmp_path, lively(steps=4), save_strategy="steps", save_steps=5)
    assert callback.growth.slots[SLOT].stage is not Stage.TRAINING
    done = all_of(trainer, callback)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    for part in ("model", "optimizer", "alpha", "verdicts"):
        assert same(all_of(trainer, callback)[part], done[part]), part
    trainer.train()
    assert callback.growth.step == 32
    known = list(callback.growth._wiring.groups._schedulers)
    assert any(item is trainer.lr_scheduler for item in known)  # the second train() has made another
    assert len({len(group["params"]) for group in trainer.optimizer.param_groups}) > 1


# --- the best model ---


@pytest.mark.parametrize(
    "best, pruned, stage",
    [
        (8, False, Stage.TRAINING),
        (16, False, Stage.BLENDING),
        (24, False, Stage.HOLDING),
        (32, False, Stage.FOSSILIZED),
        (8, True, Stage.TRAINING),
        (16, True, Stage.BLENDING),
        (4, False, Stage.DORMANT),
    ],
)
def test_the_best_model_has_the_seeds_that_it_had(best, pruned, stage, tmp_path):
    probe = torch.arange(LENGTH).remainder(VOCABULARY).view(1, -1)
    seen = {}

    class Best(Growing):
        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs)
            with torch.no_grad():
                seen[self.state.global_step] = self.model.eval()(probe).logits.clone()
            return metrics | {"eval_score": 1.0 if self.state.global_step == best else 0.0}

    class Prune(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if pruned and state.global_step == 18:
                callback.growth.prune(SLOT)

    def evaluated(state):
        return state.global_step >= 5

    callback = lively(steps=4, germinate_at=evaluated if best == 4 else 0, thresholds=LATE)
    trainer = Best(
        net(), arguments(
            tmp_path, num_train_epochs=6, eval_strategy="steps", eval_steps=4 if best == 4 else 8, save_strategy="best",
            metric_for_best_model="score", greater_is_better=True, load_best_model_at_end=True,
        ),
        train_dataset=Tokens(), eval_dataset=Tokens(8, 1), callbacks=[callback, Prune()],
    )  # fmt: skip
    trainer.train()
    place = trainer.growth.slots[SLOT]
    saved = saved_in(tmp_path / f"checkpoint-{best}")["growth"]["slots"][SLOT]["slot"]
    assert place.stage is stage
    assert place.stage.name == saved["lifecycle"]["stage"]
    assert place.alpha_value == saved["alpha"]
    assert callback.growth.evidence().keys() == ({SLOT} if stage not in (Stage.DORMANT, Stage.FOSSILIZED) else set())
    with torch.no_grad():
        now = trainer.model.eval()(probe).logits
    assert torch.equal(now, seen[best])
    weights = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    assert same({k: v for k, v in trainer.model.state_dict().items() if k in weights}, weights)


@pytest.mark.parametrize(
    "file, words", [(FILE, f"saved without {FILE}"), ("model.safetensors", "not those that were saved")]
)
def test_a_best_model_of_which_not_all_is_there_is_refused(file, words, tmp_path):
    class Lost(Growing):
        def _load_best_model(self):
            os.remove(os.path.join(self.state.best_model_checkpoint, file))
            super()._load_best_model()

    with pytest.raises(WiringError, match=words):
        grown(
            tmp_path, lively(), kind=Lost, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
            metric_for_best_model="loss",
        )  # fmt: skip


# --- from_pretrained ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_comes_back_with_its_seeds(dtype, tmp_path):
    trainer, _callback = grown(tmp_path / "run", lively(steps=4), num_train_epochs=5)
    assert trainer.growth.slots[SLOT].stage is Stage.FOSSILIZED
    trainer.save_model(str(tmp_path / "final"))
    model = Net.from_pretrained(tmp_path / "final", dtype=dtype)
    probe = torch.arange(LENGTH).view(1, -1)
    with torch.no_grad():
        wanted, host = trainer.model.eval().to(dtype)(probe).logits, model.eval()(probe).logits
        assert not torch.equal(host, wanted)  # what from_pretrained makes is the host alone
        load_seeds(model, tmp_path / "final", {SLOT: Seed})
        assert torch.equal(model(probe).logits, wanted)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_training_on_a_model_whose_seeds_were_dropped_is_refused(tmp_path):
    trainer, callback = grown(tmp_path / "run", lively(), num_train_epochs=2)
    trainer.save_model(str(tmp_path / "final"))
    model = Net.from_pretrained(tmp_path / "final")
    with pytest.raises(WiringError, match="from_pretrained has dropped them"):
        grown(tmp_path / "again", lively(), model=model)
    load_seeds(model, tmp_path / "final", {SLOT: Seed})
    stage, epoch = trainer.growth.slots[SLOT].stage, trainer.growth.epoch
    assert stage is Stage.BLENDING
    again, callback = grown(tmp_path / "again", lively(), model=model)
    assert callback.growth.epoch == epoch + 2
    with pytest.raises(WiringError, match="not those that were saved"):
        grown(tmp_path / "again", lively(), model=again.model)
    with pytest.raises(WiringError, match="nothing is known of their seeds' lives"):
        grown(tmp_path / "again", lively(), model=trainer.model)


def test_seeds_without_their_weights_are_named(tmp_path):
    trainer, _callback = grown(tmp_path / "run", lively())
    trainer.save_model(str(tmp_path / "final"))
    with pytest.raises(WiringError, match=f"has no {FILE}"):
        load_seeds(net(), tmp_path, {SLOT: Seed})
    os.remove(tmp_path / "final" / "model.safetensors")
    with pytest.raises(WiringError, match="not those that were saved"):
        load_seeds(net(), tmp_path / "final", {SLOT: Seed})


# --- alone, and what is refused ---


def test_a_callback_alone_measures_what_nobody_clips(tmp_path):
    trainer, callback = grown(tmp_path / "a", lively(), kind=Capturing, max_grad_norm=0.0, save_strategy="epoch")
    sums = trainer.sums[:8]
    entry = next(e for e in trainer.state.log_history if f"growth/{SLOT}/ratio" in e)
    ratio = math.sqrt(math.fsum(s["seed"] for s in sums)) / math.sqrt(math.fsum(s["host"] for s in sums))
    assert entry[f"growth/{SLOT}/ratio"] == pytest.approx(ratio, rel=1e-6)
    assert saved_in(tmp_path / "a" / "checkpoint-8")["germinated"] == [SLOT]
    resumed, again = grown(
        tmp_path / "b", lively(), resume=str(tmp_path / "a" / "checkpoint-8"), max_grad_norm=0.0, save_strategy="epoch"
    )
    for part, value in all_of(trainer, callback).items():
        assert same(all_of(resumed, again)[part], value), part


@pytest.mark.parametrize(
    "more, words",
    [
        ({}, "max_grad_norm=1.0"),
        ({"max_grad_norm": 0.0, "load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
         "load_best_model_at_end=True"),
    ],
)  # fmt: skip
def test_a_callback_alone_refuses_what_it_cannot_see_to(more, words, tmp_path):
    with pytest.raises(WiringError, match=words):
        grown(tmp_path, kind=Capturing, **more)


def test_no_limit_at_all_is_the_clients_affair(tmp_path):
    with pytest.raises(TypeError) as without:
        plain(tmp_path / "a", max_grad_norm=None)
    with pytest.raises(TypeError) as grows:
        grown(tmp_path / "b", max_grad_norm=None)
    assert str(grows.value) == str(without.value)


def test_an_unknown_slot_is_named_before_it_is_due(tmp_path):
    with pytest.raises(ConfigurationError, match=r"no slots \['nowhere'\]"):
        grown(tmp_path, GrowthCallback(seeds={"nowhere": Seed}, germinate_at=10**6))


def test_the_mixin_without_a_callback_changes_nothing(tmp_path):
    trainer = Growing(net(), arguments(tmp_path / "a"), train_dataset=Tokens())
    trainer.train()
    assert same(host_of(trainer.model), host_of(plain(tmp_path / "b").model))


def test_two_callbacks_are_refused(tmp_path):
    trainer, _callback = grown(tmp_path, run=False)
    trainer.add_callback(GrowthCallback(seeds={}))
    with pytest.raises(WiringError, match="there are several"):
        trainer.train()


def test_it_is_a_callback_of_the_client():
    class Mine(GrowthCallback):
        pass

    for kind in (GrowthCallback, Mine):
        assert isinstance(kind(seeds={}), TrainerCallback)
        assert isinstance(kind(seeds={}), kind)
        assert type(kind(seeds={})) is type(kind(seeds={}))


def test_a_nan_of_the_seed_costs_the_host_nothing(tmp_path):
    class Broken(Seed):
        def forward(self, x):
            return super().forward(x) * float("nan")

    callback = GrowthCallback(seeds={SLOT: Broken}, thresholds=NEVER, sinks=[])
    trainer, callback = grown(tmp_path / "a", callback)
    assert same(host_of(trainer.model), host_of(plain(tmp_path / "b").model))
    assert callback.growth.evidence()[SLOT].seed_not_finite == 16


def test_groups_are_split_by_name_or_not_at_all(tmp_path):
    _trainer, callback = grown(tmp_path)
    before = [list(map(id, group["params"])) for group in callback.growth.optimizer.param_groups]
    for names, more in ((["seed.nothing"], {"weight_decay": 0.5}), (["seed.first.bias"], {"decay": 0.5})):
        with pytest.raises(ConfigurationError, match="no parameters of the seed"):
            give_group(callback.growth, SLOT, names, **more)
    assert [list(map(id, group["params"])) for group in callback.growth.optimizer.param_groups] == before


# --- the shortest use ---


def llama():
    set_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.model.norm = nn.Sequential(SeedSlot(), model.model.norm)
    return model


def test_the_shortest_use_is_three_lines(tmp_path):
    import seedtriton.integrations.transformers as module

    code = [line.removeprefix("    ") for line in module.__doc__.splitlines() if line.startswith("    ")]
    assert len(code) == 3
    names = {"Trainer": Trainer, "model": llama(), "args": arguments(tmp_path), "make_seed": Seed, "data": Tokens()}
    exec("\n".join(code).replace("args, ...,", "args, train_dataset=data,"), names)
    names["trainer"].train()
    growth = names["trainer"].growth
    assert growth.slots["model.norm.0"].stage is Stage.TRAINING
    assert growth.evidence()["model.norm.0"].samples == 16
